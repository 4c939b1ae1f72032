"""The files of a checkpoint of torch.distributed.checkpoint (DCP), read without running code and checked for damage.

DCP pickles its index, ``.metadata``, and unpickles whatever it finds there. Our index lists tensors only, so unpickling
is limited to the few classes named here. DCP itself reads the tensors with ``weights_only``.

Damage: the marker ``complete`` holds a checksum of itself and of every other file. A large file, ``*.distcp``, is a
series of zip files, one for each tensor; its checksum covers their CRC-32s, and the content of each tensor is compared
with its own CRC-32 when it is read.
"""

import dataclasses
import enum
import hashlib
import io
import json
import pickle
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    _StorageInfo,  # part of every .metadata
    _StoragePrefix,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from avlm.config.values import shown
from avlm.storage.checkpoint_plan import Part, Place

MARKER = "complete"
DAMAGED = "it is not what was written: remove this checkpoint folder to continue from an earlier one"
METADATA = "torch.distributed.checkpoint.metadata"
CLASSES = dict.fromkeys(("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata"), METADATA)
CLASSES |= dict.fromkeys(("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"), METADATA)
CLASSES |= {"_StorageInfo": "torch.distributed.checkpoint.filesystem", "_get_layout": "torch.serialization"}
PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")  # .metadata notes its folder


class Reader(dcp.FileSystemReader):
    """DCP's reader of a folder. ValueError if its index lists anything but tensors in files of the folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        content = read_checked(path)
        try:
            metadata = _Unpickler(io.BytesIO(content)).load()
            _check(metadata)
        except Exception as error:  # a damaged pickle may raise any error
            raise ValueError(f"{path} is not the index of a checkpoint: {cause_of(error)}") from None
        metadata.storage_meta = None
        self.written = written_digests(path.parent)
        self.places = defaultdict(list)
        for place in metadata.storage_data.values():
            self.places[place.relative_path].append(place)
        return metadata

    def _slice_file(self, file: IO[bytes], place: _StorageInfo) -> IO[bytes]:
        """The zip file of one tensor, compared with its CRC-32, which torch.load does not do. (This overrides a private
        method of DCP in torch 2.11. If it goes away, tests/training/test_checkpoint.py no longer finds damage.)"""
        self._check_file(place.relative_path)
        content = io.BytesIO(super()._slice_file(file, place).read())  # DCP's view seeks wrongly from its end
        try:
            damaged = zipfile.ZipFile(content).testzip()
        except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
            damaged = cause_of(error)
        if damaged:
            raise ValueError(f"{Path(self.path) / place.relative_path} is damaged ({damaged}): {DAMAGED}")
        content.seek(0)
        return content

    def _check_file(self, name: str) -> None:
        """ValueError unless the file belongs to this checkpoint: that of another step has the same layout."""
        written = self.written.get(name)
        if written is not None and written != fingerprint(Path(self.path) / name, self.places[name]):
            raise ValueError(f"{Path(self.path) / name} belongs to another checkpoint: {DAMAGED}")
        self.written.pop(name, None)  # checked once


class Writer(dcp.FileSystemWriter):
    """DCP's writer of the files of one rank. They are on the disk when ``write`` returns."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, per_thread_copy_ahead=0)  # its copying ahead would wait for all the GPU has to do

    def write(self, prefix: str, parts: Iterable[Part]) -> tuple[str, list[Place]]:
        """Write tensors into the file ``<prefix>0.distcp``. Returns its name and their places."""
        plan = SavePlan([part.item for part in parts], storage_data=_StoragePrefix(prefix))
        written = self.write_data(plan, _Given(parts)).value()
        sizes = {part.item.index: part.tensor.size() for part in parts}
        places = []
        for result in written:
            index, info = result.index, result.storage_data
            offsets = tuple(index.offset or ())
            places.append(Place(index.fqn, offsets, tuple(sizes[index]), info.relative_path, info.offset, info.length))
        return f"{prefix}0.distcp", places


class _Given(DefaultSavePlanner):
    """Hands DCP's writer the tensors of parts."""

    def __init__(self, parts: Iterable[Part]) -> None:
        super().__init__()
        self.tensors = {part.item.index: part.tensor for part in parts}

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.tensors[write_item.index]


class _Part(io.RawIOBase):
    """Some bytes of an open file, as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        super().__init__()
        self.file = file
        self.start = start
        self.length = length
        self.place = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.length}[whence]
        self.place = max(0, origin + offset)
        return self.place

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.place)
        found = self.file.read(max(0, min(len(buffer), self.length - self.place)))
        buffer[: len(found)] = found
        self.place += len(found)
        return len(found)


def fingerprint(file: Path, places: Iterable[_StorageInfo | Place]) -> str:
    """A checksum of the CRC-32s in a file with tensors at these ``places``: it covers their contents without reading
    them."""
    entries = []
    try:
        with file.open("rb") as content:
            for place in sorted(places, key=lambda place: place.offset):
                part = _Part(content, place.offset, place.length)
                entries += [(place.offset, info.filename, info.CRC) for info in zipfile.ZipFile(part).infolist()]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise ValueError(f"{file} is damaged ({cause_of(error)}): {DAMAGED}") from None
    return digest(repr(entries).encode())


def pickled(metadata: Metadata) -> bytes:
    """The content of .metadata, as DCP writes it."""
    return pickle.dumps(dataclasses.replace(metadata, version=CURRENT_DCP_VERSION))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def read_marker(path: Path) -> dict[str, Any]:
    """The marker of the checkpoint ``path``. ValueError if it is damaged, or names files that are missing."""
    marker = path / MARKER
    try:
        found = json.loads(marker.read_bytes())
    except OSError as error:
        raise ValueError(f"{marker} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{marker} is not valid JSON: {cause_of(error)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{marker} must hold an object of keys, not {shown(str(found))}")
    checksum = found.pop("checksum", None)
    if (checksum is not None or "files" in found) and checksum != digest(json.dumps(found).encode()):
        raise ValueError(f"{marker} is damaged: {DAMAGED}")
    for name in found.get("files", {}):
        if not (path / name).is_file():
            raise ValueError(f"{path} lacks {name}, which its marker names: {DAMAGED}")
    return found


def marker_text(progress: dict[str, Any], files: dict[str, str]) -> str:
    content = {**progress, "files": files}
    return json.dumps({**content, "checksum": digest(json.dumps(content).encode())})


def written_digests(path: Path) -> dict[str, str]:
    """File name -> checksum, as the marker of a checkpoint has them."""
    return read_marker(path).get("files", {}) if (path / MARKER).is_file() else {}


def read_checked(file: Path) -> bytes:
    """A small file of a checkpoint. ValueError if it differs from the checksum in the marker; checkpoints of earlier
    versions have none."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    written = written_digests(file.parent).get(file.name)
    if written is not None and written != digest(content):
        raise ValueError(f"{file} is damaged: {DAMAGED}")
    return content


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if module in ("pathlib", "pathlib._local") and name in PATHS:
            return lambda *parts: "/".join(map(str, parts))
        if CLASSES.get(name) == module:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):  # by which Python 3.11.2 (Debian 12) pickles members of an Enum
            return _member
        raise pickle.UnpicklingError(f"it names {shown(f'{module}.{name}')}, which does not belong in a checkpoint")


def _check(metadata: Any) -> None:
    """Raise ValueError for what ``_Unpickler`` accepts but would make DCP fail, or read outside of the folder."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise ValueError("it holds no Metadata")
    for name, value in metadata.state_dict_metadata.items():  # DCP would unpickle anything that is no tensor
        if not isinstance(value, TensorStorageMetadata) or not isinstance(value.properties.dtype, torch.dtype):
            raise ValueError(f"{shown(str(name))} is not a tensor")
        sizes = [value.size]
        for chunk in value.chunks:
            sizes += [chunk.offsets, chunk.sizes]
        if not all(isinstance(size, torch.Size) for size in sizes):
            raise ValueError(f"{shown(str(name))} has no shape")
    if not isinstance(metadata.storage_data, dict):
        raise ValueError("it names no files")
    for index, place in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(place, _StorageInfo):
            raise ValueError("its files are not listed by tensor")
        if Path(place.relative_path).name != place.relative_path or getattr(place, "transform_descriptors", None):
            raise ValueError(f"it names {shown(str(place.relative_path))}, which is not a plain file of the folder")


def cause_of(error: BaseException) -> str:
    """The message of an error on one line. DCP's exception holds those of the ranks, with tracebacks."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else ""
    if first and not isinstance(error, LookupError):
        return shown(first, 400)
    return f"{type(error).__name__} {shown(first)}".strip()


def _member(owner: Any, name: str) -> Any:
    if not isinstance(owner, enum.EnumMeta) or name not in owner.__members__:
        raise pickle.UnpicklingError(
            f"it takes {shown(name)} of {shown(repr(owner))}, which is not a member of an Enum"
        )
    return owner[name]

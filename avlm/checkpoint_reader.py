"""Reads checkpoints of torch.distributed.checkpoint (DCP) without running code that they hold.

DCP pickles its index, ``.metadata``, and unpickles whatever it finds there. Ours are indexes of tensors: a few classes,
listed here, and nothing else is built. The tensors themselves DCP reads with ``weights_only``.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo  # it stands in every .metadata
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from avlm.model_config import shown

METADATA = "torch.distributed.checkpoint.metadata"
CLASSES = dict.fromkeys(("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata"), METADATA)
CLASSES |= dict.fromkeys(("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"), METADATA)
CLASSES |= {"_StorageInfo": "torch.distributed.checkpoint.filesystem", "_get_layout": "torch.serialization"}
PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")  # the folder that was written, as a note


class Reader(dcp.FileSystemReader):
    """DCP's reader of a folder. ValueError where its index is more than one of tensors in files of the folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
            _check(metadata)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        except Exception as error:  # a pickle that is damaged fails with any of Python's own
            raise ValueError(f"{path} is no index of a checkpoint: {cause_of(error)}") from None
        metadata.storage_meta = None
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if module in ("pathlib", "pathlib._local") and name in PATHS:
            return lambda *parts: "/".join(map(str, parts))
        if CLASSES.get(name) == module:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {shown(f'{module}.{name}')}, which is not built from a checkpoint")


def _check(metadata: Any) -> None:
    """Raise ValueError for what ``_Unpickler`` lets pass and DCP would stumble over, or read outside the folder."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise ValueError("it holds no Metadata")
    for name, value in metadata.state_dict_metadata.items():  # what is no tensor DCP would unpickle as it is
        if not isinstance(value, TensorStorageMetadata) or not isinstance(value.properties.dtype, torch.dtype):
            raise ValueError(f"{shown(str(name))} is no tensor")
        cuts = [(chunk.offsets, chunk.sizes) for chunk in value.chunks]
        if not all(isinstance(size, torch.Size) for size in (value.size, *(size for cut in cuts for size in cut))):
            raise ValueError(f"{shown(str(name))} has no shape")
    if not isinstance(metadata.storage_data, dict):
        raise ValueError("it names no files")
    for index, place in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(place, _StorageInfo):
            raise ValueError("its files are not listed by tensor")
        if Path(place.relative_path).name != place.relative_path or getattr(place, "transform_descriptors", None):
            raise ValueError(f"it names {shown(str(place.relative_path))}, which is no plain file of the folder")


def cause_of(error: BaseException) -> str:
    """What went wrong, on one line. DCP's own exception holds those of the ranks, with tracebacks."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (
        shown(line) if line and not isinstance(error, LookupError) else f"{type(error).__name__} {shown(line)}".strip()
    )

"""Where weights come from. Every kind of source becomes names and lazy tensors, which read only what is indexed.

Hugging Face folder or Hub name   safetensors or pickles, one file or shards; config.json
exported AVLM                     the same under our names, or GGUF files
run, or checkpoint of a run       DCP files of any layout of ranks; the run's config.yaml
.ckpt, .pt, .pth file             {"state_dict": {...}} or the bare dict, under our names or Hugging Face's
"""

import math
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index  # what DCP itself cuts chunks with
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

# What DCP itself uses to place shards; the public API has no equivalent that knows strided shards (FSDP over TP).
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from avlm.config.model import ModelConfig
from avlm.config.values import shown
from avlm.families.door import RESHAPED, AnyConfig, elsewhere, family_of, find, is_channel_major, is_transposed
from avlm.storage.checkpoint_files import Reader, cause_of
from avlm.storage.hub import resolve
from avlm.storage.model_folder import read_json
from avlm.storage.run_folder import is_run, read_run
from avlm.storage.weight_files import WeightFiles, choose, local
from avlm.weights import served
from avlm.weights.folder import is_own, read_config
from avlm.weights.gguf_files import read_gguf
from avlm.weights.served import Places

FILES = (".ckpt", ".pt", ".pth")
# Names by which we recognise our own files, and prefixes that wrappers (Lightning, DDP) may have added.
OWN_ANCHORS = (
    "decoder.embedding.weight",
    "vision.patch.weight",
    "audio.conv1.bias",
    "vision_projector.up.weight",
    "vision_projector.linear.weight",
    "audio_projector.up.weight",
    "audio_projector.linear.weight",
)
WRAPPERS = ("", "model.", "module.")


class Whole:
    """A tensor in memory, or mapped from a file, with the two calls of a safetensors slice."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, index) -> Tensor:
        return self.tensor[index]


class Rows:
    """The rows of another tensor from ``first`` on, or what they are in its dim ``dim``, with the two calls of a
    safetensors slice: only they are read."""

    def __init__(self, whole: Any, first: int, number: int, dim: int = 0):
        self.whole = whole
        self.first = first
        self.number = number
        self.dim = dim

    def get_shape(self) -> list[int]:
        shape = list(self.whole.get_shape())
        return [*shape[: self.dim], self.number, *shape[self.dim + 1 :]]

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        cuts = _cuts(index, len(self.get_shape()))
        start, stop, _ = cuts[self.dim].indices(self.number)
        cuts[self.dim] = slice(self.first + start, self.first + stop)
        return self.whole[tuple(cuts)]


class Stacked:
    """Tensors of one shape, as one with a dim more. Of those that are indexed, only what is indexed is read."""

    def __init__(self, parts: list[Any]):
        self.parts = parts

    def get_shape(self) -> list[int]:
        return [len(self.parts), *self.parts[0].get_shape()]

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        first, *others = _cuts(index, len(self.get_shape()))
        read = [part[tuple(others)] for part in self.parts[first]]
        return torch.stack(read) if read else self.parts[0][tuple(others)][None][:0]


def _cuts(index: slice | tuple[slice, ...], dims: int) -> list[slice]:
    """A slice for each dim."""
    given = index if isinstance(index, tuple) else (index,)
    return [*given, *[slice(None)] * (dims - len(given))]


class ChannelMajor:
    """The matrix of a linear whose input is several rows side by side. Its columns stand channel by channel in a file,
    with one for every row, and row by row here. Of its lines only those that are indexed are read."""

    def __init__(self, whole: Any):
        self.whole = whole

    def get_shape(self) -> list[int]:
        return list(self.whole.get_shape())

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        rows, *columns = index if isinstance(index, tuple) else (index,)
        return regrouped(self.whole[rows], self.get_shape()[0])[:, *columns]


def regrouped(matrix_OI: Tensor, first: int) -> Tensor:
    """Columns of ``first`` groups, whose first ones then stand together, then their second ones, and so on."""
    return matrix_OI.unflatten(1, (first, -1)).transpose(1, 2).flatten(1)


class Turned:
    """A tensor whose last two dims change places, with the two calls of a safetensors slice. Only what is indexed is
    read."""

    def __init__(self, whole: Any):
        self.whole = whole

    def get_shape(self) -> list[int]:
        *others, lines, columns = self.whole.get_shape()
        return [*others, columns, lines]

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        *others, lines, columns = _cuts(index, len(self.get_shape()))
        return self.whole[(*others, columns, lines)].transpose(-1, -2)


def in_our_order(tensor: Any, family: ModuleType, name: str) -> Any:
    """A tensor of a family's file as the parameter ``name`` has its numbers."""
    if is_channel_major(family, name):
        return ChannelMajor(tensor)
    return Turned(tensor) if is_transposed(family, name) else tensor


class Stored:
    """A tensor of a DCP folder. Indexed by slices, it reads the chunks that overlap them, one chunk at a time."""

    def __init__(self, reader: Reader, name: str, metadata: TensorStorageMetadata):
        self.reader = reader
        self.name = name
        self.metadata = metadata
        self.shape = metadata.size
        self.dtype = metadata.properties.dtype

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        index = index if isinstance(index, tuple) else (index,)
        offsets, sizes = [0] * len(self.shape), list(self.shape)
        for dim, cut in enumerate(index):
            offsets[dim], stop, _ = cut.indices(self.shape[dim])
            sizes[dim] = stop - offsets[dim]
        region = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        value = torch.empty(region.sizes, dtype=self.dtype)
        items = create_read_items_for_chunk_list(self.name, self.metadata, [region])
        try:
            self.reader.read_data(LoadPlan(items), _Into(value)).wait()
        except Exception as error:  # a file that is missing, cut short or no zip: each has its own
            raise ValueError(f"{self.reader.path}: {self.name} cannot be read: {cause_of(error)}") from None
        return value


class _Into(DefaultLoadPlanner):
    """Puts each chunk that a reader reads at its place in one tensor."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return narrow_tensor_by_index(self.value, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


@dataclass(frozen=True)
class Source:
    """The weights that an entry of ``init_from`` names."""

    path: Path
    tensors: dict[str, Any]  # name -> Whole, Stored or a slice of safetensors
    config: AnyConfig | None  # None: a single file says nothing about its architecture
    own_names: bool  # ours, not Hugging Face's
    files: WeightFiles | None = None  # of a model folder
    family: ModuleType | None = None  # of a model folder with Hugging Face's names
    elsewhere: dict[str, str] = field(default_factory=dict)  # module that a folder leaves to another -> that one
    places: Places = field(default_factory=dict)  # where modules lie, in an export whose classes are several families'


def open_source(given: str | Path) -> Source:
    """Raises ValueError or FileNotFoundError for a path that is none of the four kinds, incomplete or unreadable."""
    path = local(given)
    if path.is_file():
        if path.suffix not in FILES:
            raise ValueError(f"{path} is a file that does not end in {', '.join(FILES)}: give its folder")
        tensors, own_names = _unwrapped(read_pickle(path))
        return Source(path, tensors, None, own_names)
    if is_run(path):
        config, path = read_run(path)
        return Source(path, open_checkpoint(path), config.model, True)
    path = resolve(given)
    config, files = read_config(path), choose(path)
    keys = read_json(path / "config.json")
    if files.read[0].endswith(".gguf"):
        if not is_own(keys) or not isinstance(config, ModelConfig):
            raise ValueError(f"{path} holds only GGUF files that we did not write: give the folder of safetensors")
        return Source(path, dict(read_gguf(path, files.read, config)), config, True, files)
    tensors = read_files(path, files)
    if is_own(keys):
        places = served.places(keys, config)
        return Source(path, tensors, config, not places, files, places=places)
    family = family_of(keys)
    others = elsewhere(family, keys)
    for module, (key, name) in others.items():
        tensors = {**_of_part(family, module, f"{path / 'config.json'}: {key}", name), **tensors}
    named = {module: name for module, (_, name) in others.items()}
    return Source(path, tensors, config, False, files, family, named)


def _of_part(family: ModuleType, module: str, origin: str, name: str) -> dict[str, Any]:
    """The tensors of a module that lies in a folder of its own, under the names that ``family`` has for them."""
    other = open_source(name)
    found = find(module, other.tensors, other.family) if other.family else None
    if found is None:
        raise ValueError(f"{origin} is {name}, which holds no {module} of Hugging Face's")
    their, prefix = found
    tensors = {}
    for key, tensor in other.tensors.items():
        if module == "decoder" and key == their.HEAD:
            tensors[family.HEAD] = tensor
        elif key.startswith(prefix):
            tensors[family.PREFIXES[module][0] + key.removeprefix(prefix)] = tensor
    return tensors


def open_checkpoint(path: Path) -> dict[str, Stored]:
    """Our name -> tensor of a checkpoint folder, without the optimizer's."""
    reader = Reader(path)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    tensors = {}
    for name, value in metadata.state_dict_metadata.items():
        if name.startswith("model."):
            tensors[name.removeprefix("model.")] = Stored(reader, name, value)
    return tensors


def read_files(folder: Path, files: WeightFiles) -> dict[str, Any]:
    """Name -> lazy tensor. If several files hold a tensor, the last one counts, as in transformers; ValueError if the
    index names a different one."""
    tensors: dict[str, Any] = {}
    found: dict[str, str] = {}
    several: set[str] = set()
    for name in files.read:
        path = folder / name
        held = read_safetensors(path) if name.endswith(".safetensors") else read_pickle(path)
        several |= tensors.keys() & held.keys()
        tensors |= held
        found |= dict.fromkeys(held, name)
    for tensor, name in files.places.items():
        if tensor in several and found[tensor] != name:
            raise ValueError(f"{folder}: {shown(tensor)} is in {found[tensor]}, but the index names {shown(name)}")
    if not tensors:
        raise ValueError(f"{folder}: {files} holds no tensor")
    return tensors


def read_safetensors(path: Path) -> dict[str, Any]:
    try:
        file = safe_open(path, framework="pt")
        return {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {cause_of(error)}") from None


def read_pickle(path: Path) -> dict[str, Whole]:
    """The tensors of a pickle, read without running code. They are memory-mapped: unused ones stay on disk."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} cannot be read: it holds more than tensors and plain values, and code in weight files is not run; "
            "save its state_dict alone"
        ) from None
    except Exception as error:  # files that are damaged or cut short raise many types
        raise ValueError(f"{path} cannot be read: {cause_of(error)}") from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no state_dict and is not one: it is a {type(content).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} holds no state_dict and is not one: {shown(repr(key))} is not a tensor")
    if not state:
        raise ValueError(f"{path} holds no tensor")
    return {key: Whole(value) for key, value in state.items()}


def _unwrapped(tensors: dict[str, Whole]) -> tuple[dict[str, Whole], bool]:
    """The tensors without the prefix of a wrapper around our model, and whether the names are ours."""
    for wrapper in WRAPPERS:
        if any(wrapper + anchor in tensors for anchor in OWN_ANCHORS):
            return {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}, True
    return tensors, False


def check_shape(name: str, shape: tuple[int, ...], source: Any, origin: str) -> None:
    for stored in _stored_in(source):
        if isinstance(stored, Whole):
            dtype = stored.tensor.dtype
            is_float = dtype.is_floating_point
        elif isinstance(stored, Stored):
            dtype = stored.dtype
            is_float = dtype.is_floating_point
        else:
            dtype = stored.get_dtype()
            is_float = dtype.startswith(("F16", "F32", "F64", "BF16"))
        if not is_float:
            raise ValueError(f"{origin} has dtype {dtype}: quantised weights are not supported")
    there = tuple(source.get_shape())
    is_reshaped = name in RESHAPED and len(there) != len(shape) and math.prod(there) == math.prod(shape)
    if there != tuple(shape) and not is_reshaped:
        raise ValueError(f"{origin} has shape {there}, and {name} has {tuple(shape)}")


def _stored_in(source: Any) -> list[Any]:
    """The tensors of a file that a source is a view of."""
    if isinstance(source, Stacked):
        return source.parts
    return _stored_in(source.whole) if isinstance(source, Rows | ChannelMajor | Turned) else [source]


@torch.no_grad()
def copy_slice(parameter: Tensor, source: Any) -> None:
    """Copy the slice of ``parameter`` that this rank holds; the copy converts the dtype."""
    shape, there = tuple(parameter.shape), tuple(source.get_shape())
    shard, offset, size = parameter, (0,) * len(shape), shape
    if isinstance(parameter, DTensor):
        shard = parameter.to_local()  # without grad: the storage itself
        size, offset = compute_local_shape_and_global_offset(shape, parameter.device_mesh, parameter.placements)
    if not shard.numel():
        return
    region = tuple(slice(start, start + length) for start, length in zip(offset, size))
    if there == shape:
        value = source[region]
    elif there[0] == shape[0]:  # (D, 3, [2,] P, P) -> (D, 3 * [2 *] P * P)
        value = source[region[0]].flatten(1)[:, region[1]]
    else:  # (D,) -> (1, D), or (1, R, D) -> (R, D)
        value = source[:].view(shape)[region]
    shard.copy_(value)

"""A model folder on disk. It appears complete or not at all, and is never in memory as a whole."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from avlm.config.values import shown
from avlm.parallel.mesh import World

SHARD_BYTES = 5 * 10**9
MAX_JSON_BYTES = 2**26  # of a config or an index; those of 400 billion parameters have 2**17
CONFIGS = ("config.json", "adapter_config.json")  # every model folder has one of them


@dataclass(frozen=True)
class Lazy:
    """A tensor to be written. It is read, and computed, only when its file is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @staticmethod
    def of(tensor: Any) -> "Lazy":
        """Of a tensor, or of anything with a shape and a dtype that is read by indexing."""
        return Lazy(tuple(tensor.shape), tensor.dtype, lambda: tensor[:])

    @staticmethod
    def joined(parts: list["Lazy"], dim: int = 0) -> "Lazy":
        """The rows of all parts, or what they are in a dim, one after the other."""
        first = parts[0]
        if len(parts) == 1:
            return first
        shape = (*first.shape[:dim], sum(part.shape[dim] for part in parts), *first.shape[dim + 1 :])
        return Lazy(shape, first.dtype, lambda: torch.cat([part.read() for part in parts], dim))

    def changed(
        self,
        change: Callable[[Tensor], Tensor],
        shape: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Lazy":
        """The result of ``change``, with a different ``shape`` or ``dtype`` if one is given."""
        return Lazy(shape or self.shape, dtype or self.dtype, lambda: change(self.read()))

    def to(self, dtype: torch.dtype) -> "Lazy":
        return self.changed(lambda tensor: tensor.to(dtype), dtype=dtype)

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise ValueError if a model folder may not be written: over a file, or over files that are not a model's."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{folder} is not empty: choose another folder, or give --overwrite to replace a model there")
    if not any((folder / name).is_file() for name in CONFIGS):
        raise ValueError(f"{folder} is not empty and holds no model ({' or '.join(CONFIGS)}): it is not overwritten")


def publish(folder: Path, write: Callable[[Path], None], overwrite: bool, world: World | None) -> None:
    """Let all ranks ``write`` into a partial folder, which replaces ``folder`` when all of them are done.

    If a rank fails, the earlier folder stays and the new one is removed: ValueError, or OSError with the cause.
    """
    is_first = world is None or world.is_first
    partial = folder.with_name(f"{folder.name}.partial")
    old = folder.with_name(f"{folder.name}.old")
    check_target(folder, overwrite)
    for left in (partial, old):
        if left.exists():
            raise ValueError(f"{left} is left over from an interrupted export: move it away")
    if world is not None:
        world.barrier()  # until all ranks have looked
    failure = None
    try:
        partial.mkdir(parents=True, exist_ok=True)
        write(partial)
    except Exception as error:
        failure = error
    reason = str(failure) if failure else None
    reasons = [reason] if world is None else world.gather(reason)
    if any(reasons):
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
        if failure is not None:
            raise failure
        raise OSError(f"{folder} was not written: {next(filter(None, reasons))}")
    if is_first:
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    if world is not None:
        world.barrier()


def write_tensors(tensors: dict[str, Lazy], folder: Path, world: World | None = None, name: str = "model") -> None:
    """One ``name``.safetensors, or shards of at most SHARD_BYTES with their index; ranks take turns at the shards, so a
    rank holds the tensors of one at a time."""
    rank = 0 if world is None else world.rank
    size = 1 if world is None else world.size
    shards = _shards(tensors)
    files = [f"{name}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [f"{name}.safetensors"]
    for i in range(rank, len(shards), size):
        whole = {each: tensors[each].read().contiguous() for each in shards[i]}
        save_file(whole, folder / files[i], {"format": "pt"})
        (folder / files[i]).chmod(0o644)  # it is written for its owner alone, and may be served by another
        del whole  # before the next is read
        with open(folder / files[i], "rb") as file:
            os.fsync(file.fileno())
    if len(shards) > 1 and rank == 0:
        weight_map = {}
        for shard, file in zip(shards, files):
            weight_map |= dict.fromkeys(shard, file)
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{name}.safetensors.index.json", index)


def _shards(tensors: dict[str, Lazy]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The keys of a JSON file of ``limit`` bytes or fewer. ValueError with one line for anything else."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise ValueError(f"it has {size:,} bytes, and more than {limit:,} are not read")
        keys = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:  # also of a wrong encoding, or of a number that is too long
        raise ValueError(f"{path} is not valid JSON: {shown(str(error))}") from None
    if not isinstance(keys, dict):
        raise ValueError(f"{path} must hold an object of keys, not {shown(keys, 80)}")
    return keys


def write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n")

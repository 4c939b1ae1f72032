"""Checkpoints: everything that an exact resume needs, written whole or not at all.

    <run>/checkpoints/step_00000100/
        *.distcp, .metadata       weights and optimizer state (torch.distributed.checkpoint: any layout can load them)
                                  frozen_*.distcp: what the stage does not train, hard links to an earlier checkpoint's
        rank_00000.safetensors    torch's random state of that rank (CPU, and the GPU if there is one)
        rank_00000.json           Python's and numpy's random state
        loader_00000.json         where the loader of that data rank stands
        complete                  marker, written last: where the run stands, and checksums of all files (JSON)
    <run>/checkpoints/latest      name of the newest complete one
    <run>/checkpoints/best        name of the best one by checkpoint.best

``avlm.training.saving`` writes them. Reading one runs no code and detects damage (``avlm.storage.checkpoint_files``).
To share a model, export it (``python -m avlm.weights export``).
"""

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from avlm.config.values import shown
from avlm.data.redistribute import redistribute
from avlm.models.avlm import AVLM
from avlm.parallel.mesh import World
from avlm.storage.checkpoint_files import Reader, cause_of, read_checked, read_marker


def load_model(path: Path, model: AVLM) -> None:
    """Read the weights of a checkpoint, in place. ValueError unless it holds the parameters of this very model."""
    tensors = model_tensors(model)
    with _named_errors(path):
        stored = {name for name in Reader(path).read_metadata().state_dict_metadata if name.startswith("model.")}
        different = stored ^ {f"model.{name}" for name in tensors}
        if different:
            raise ValueError(f"it and the model differ in {', '.join(sorted(different)[:5])}")
        dcp.load({"model": tensors}, storage_reader=Reader(path))


def load_optimizer(path: Path, model: AVLM, optimizer: torch.optim.Optimizer) -> None:
    """Read the optimizer's state of a checkpoint, in place."""
    with _named_errors(path):
        dcp.load({"optimizer": optimizer_tensors(model, optimizer)}, storage_reader=Reader(path))


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (Exception, CheckpointException) as error:
        raise ValueError(f"{path} cannot be loaded: {cause_of(error)}") from error


def load_random_state(path: Path, world: World) -> None:
    """Restore the random state of this rank, which only the dropout of adapters uses. With a different number of
    ranks than before, the state that the seed gave is kept."""
    if len(_files(path, "rank_*.json")) != world.size:
        return
    file = path / f"rank_{world.rank:05d}.safetensors"
    try:
        tensors = safetensors.torch.load(read_checked(file))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {cause_of(error)}") from None
    torch.set_rng_state(tensors["cpu"])
    if world.device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], world.device)
    state = _read_state(path / f"rank_{world.rank:05d}.json")
    try:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        where = path / f"rank_{world.rank:05d}.json"
        raise ValueError(f"{where} holds no random state ({cause_of(error)}): remove this checkpoint folder") from None


def read_loader_state(path: Path, world: World, workers: int) -> dict[str, Any]:
    """The loader state of this rank's data rank. With another number of data ranks, or ``workers`` of each, it is
    redistributed."""
    files = _files(path, "loader_*.json")
    if len(files) == world.data_size:
        state = _read_state(files[world.data_rank])
        if state.get("workers") == workers:
            return state
    try:
        return redistribute([_read_state(file) for file in files], world.data_rank, world.data_size, workers)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no states of loaders ({cause_of(error)}): remove this folder") from None


def _files(path: Path, pattern: str) -> list[Path]:
    """The small files of a kind in order, only those that the marker names if it names any."""
    found = sorted(path.glob(pattern))
    named = read_marker(path).get("files")
    if not named:
        return found
    return [file for file in found if file.name in named]


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(read_checked(path))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {cause_of(error)}") from None
    if not isinstance(state, dict):  # null would start the data from the beginning
        raise ValueError(f"{path} holds {shown(str(state))}, not a state: remove this checkpoint folder")
    return state


def model_tensors(model: AVLM) -> dict[str, Tensor]:
    """Parameters by name: the live tensors, which a load writes into. Tied parameters appear once."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {name: parameter.detach() for parameter, name in names.items()}


def optimizer_tensors(model: AVLM, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state by the name of its parameter: the live tensors."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: state for parameter, state in optimizer.state.items()}

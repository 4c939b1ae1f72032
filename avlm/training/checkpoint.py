"""Checkpoints: everything that an exact resume needs, written whole or not at all.

    <run>/checkpoints/step_00000100/
        *.distcp, .metadata       weights and optimizer state (torch.distributed.checkpoint: any layout can load them)
        rank_00000.safetensors    torch's random state of that rank (CPU, and the GPU if there is one)
        rank_00000.json           Python's and numpy's random state
        loader_00000.json         where the loader of that data rank stands
        complete                  marker, written last: where the run stands, and checksums of all files (JSON)
    <run>/checkpoints/latest      name of the newest complete one
    <run>/checkpoints/best        name of the best one by checkpoint.best

Reading one runs no code and detects damage (``avlm.storage.checkpoint_files``). To share a model, export it
(``python -m avlm.weights export``).
"""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils._pytree import tree_leaves

from avlm.config.run import CheckpointConfig
from avlm.config.values import shown
from avlm.data.redistribute import redistribute
from avlm.models.avlm import AVLM
from avlm.parallel.mesh import World
from avlm.storage.checkpoint_files import (
    MARKER,
    Reader,
    Writer,
    cause_of,
    digest,
    fingerprint,
    marker_text,
    read_checked,
    read_marker,
)
from avlm.storage.run_folder import Progress, complete_checkpoints, folder_of, write_durably
from avlm.training.log import Log


class Saver:
    """Writes the checkpoints of a run."""

    def __init__(self, run: Path, config: CheckpointConfig, world: World):
        self.run = run
        self.config = config
        self.world = world
        self.has_failed = False  # the last attempt

    def is_due(self, step: int) -> bool:
        """Whether this step is saved: every ``config.every`` steps, and after a failed attempt."""
        return self.has_failed or step % self.config.every == 0

    def save_or_warn(
        self,
        progress: Progress,
        model: AVLM,
        optimizer: torch.optim.Optimizer,
        loader_state: dict,
        log: Log,
        is_final: bool,
    ) -> bool:
        """Save; where that fails, warn once and let the run continue. OSError if there is no later attempt."""
        self.world.watch.enter("save", progress.step)
        had_failed = self.has_failed
        failure = self.save(progress, model, optimizer, loader_state)
        if failure and is_final:
            raise OSError(failure)
        if failure and not had_failed:
            log.message(f"warning: {failure}; the run continues and tries again after the next step")
        return not failure

    def save(self, progress: Progress, model: AVLM, optimizer: torch.optim.Optimizer, loader_state: dict) -> str:
        """Write a checkpoint. Returns "", or why it could not be written, the same on every rank. After a failure
        earlier checkpoints are untouched, and nothing is left of this one."""
        failure = self._save(progress, model, optimizer, loader_state)
        self.has_failed = bool(failure)
        return failure

    def _save(self, progress: Progress, model: AVLM, optimizer: torch.optim.Optimizer, loader_state: dict) -> str:
        path = folder_of(self.run, progress.step)
        tensors = {"model": model_tensors(model), "optimizer": optimizer_tensors(model, optimizer)}
        need = sum(tensor.nbytes for tensor in tree_leaves(tensors))
        attempt = functools.partial(self._attempt, path, need)
        files: dict[str, str] = {}
        failure = (
            attempt(lambda: self._make_folder(path, need))
            or attempt(lambda: files.update(_write_rank_state(path, self.world, loader_state)))
            or attempt(lambda: files.update(self._write_tensors(path, tensors)))
        )
        if failure:
            return failure
        for of_rank in self.world.gather(files):
            files |= of_rank
        failure = attempt(lambda: self._complete(path, progress, files))
        if self.world.is_first and not failure:
            with contextlib.suppress(OSError):  # the checkpoint is written; leftovers go after the next one
                self._tidy(path, progress)
        self.world.barrier()
        return failure

    def _make_folder(self, path: Path, need: int) -> None:
        if not self.world.is_first:
            return
        shutil.rmtree(path, ignore_errors=True)  # remains of an interrupted run
        path.parent.mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(path.parent)
        if disk.total and disk.free < need:  # each attempt would fill the disk to the brim
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path.mkdir()

    def _write_tensors(self, path: Path, tensors: dict[str, Any]) -> dict[str, str]:
        """All ranks together; file name -> checksum of this rank's files."""
        writer = Writer(path)
        dcp.save(tensors, storage_writer=writer)
        places = defaultdict(list)
        for place in writer.places:
            places[place.relative_path].append(place)
        return {name: fingerprint(path / name, of_file) for name, of_file in places.items()}

    def _complete(self, path: Path, progress: Progress, files: dict[str, str]) -> None:
        """The marker makes a checkpoint complete."""
        if self.world.is_first:
            index = digest((path / ".metadata").read_bytes())
            write_durably(path / MARKER, marker_text(dataclasses.asdict(progress), {**files, ".metadata": index}))

    def _tidy(self, path: Path, progress: Progress) -> None:
        """Point ``latest`` and ``best`` to their checkpoints, and remove old ones."""
        write_durably(path.parent / "latest", path.name)
        done = complete_checkpoints(self.run)
        best = folder_of(self.run, progress.best_step)
        if best in done:
            write_durably(path.parent / "best", best.name)
        for old in set(done[: -self.config.keep]) - {best}:
            (old / MARKER).unlink()  # first, so that a half-removed checkpoint does not count as complete
            shutil.rmtree(old, ignore_errors=True)

    def _attempt(self, path: Path, need: int, write: Callable[[], Any]) -> str:
        """Call ``write``. Returns "" if it worked on every rank, else why not (most often a full disk), on all ranks.

        Only errors that leave all ranks at the same point are caught: file errors, and DCP's own, which it raises on
        all ranks. Any other may come from the middle of a collective, such as the death of a data worker: it ends this
        rank, and with it the others, which wait in that collective.
        """
        reason = ""
        try:
            write()
        except (OSError, CheckpointException) as error:
            reason = _reason(error, path, need)
        reasons = [each for each in self.world.gather(reason) if each]
        if not reasons:
            return ""
        if self.world.is_first:
            (path / MARKER).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
        done = complete_checkpoints(self.run)
        kept = f"the newest complete checkpoint is {done[-1]}" if done else "there is no earlier checkpoint"
        return f"could not write checkpoint {path}: {reasons[0]}; {kept}"


def _reason(error: BaseException, path: Path, need: int) -> str:
    """Why a checkpoint of ``need`` bytes could not be written. PyTorch's zip writer hides that a disk is full."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
    free = shutil.disk_usage(path.parent).free
    if free < need:
        return f"no space left on device ({free / 2**20:.1f} MiB are free, {need / 2**20:.1f} are needed)"
    return cause_of(error)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes. DCP's exception holds the error of each rank that failed."""
    while error is not None:
        yield error
        if isinstance(error, CheckpointException):
            for failed, _ in error.failures.values():
                yield from _causes(failed)
        error = error.__cause__ or error.__context__


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


def read_loader_state(path: Path, world: World) -> dict[str, Any]:
    """The loader state of this rank's data rank. With another number of data ranks the streams are redistributed."""
    files = _files(path, "loader_*.json")
    if len(files) == world.data_size:
        return _read_state(files[world.data_rank])
    try:
        return redistribute([_read_state(file) for file in files], world.data_rank, world.data_size)
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


def _write_rank_state(path: Path, world: World, loader_state: dict) -> dict[str, str]:
    """Write the small files of this rank. Returns file name -> checksum."""
    tensors = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(world.device)
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}
    files = {
        f"rank_{world.rank:05d}.safetensors": safetensors.torch.save(tensors),
        f"rank_{world.rank:05d}.json": json.dumps(state).encode(),
    }
    if world.leads_row:
        files[f"loader_{world.data_rank:05d}.json"] = json.dumps(loader_state).encode()
    for name, content in files.items():
        write_durably(path / name, content)
    return {name: digest(content) for name, content in files.items()}

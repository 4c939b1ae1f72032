"""Writes the checkpoints of a run (``avlm.training.checkpoint`` says what is in one).

The training loop waits while a rank copies what it has to write into host memory. A thread writes the copy, and agrees
with those of the other ranks over a process group of its own, so its messages never mix with those of training. Unless
``checkpoint.async_save`` is set, the loop waits for the thread too, and nothing is copied.

Parameters that a stage does not train are written into files of their own, ``frozen_*``, by the first save of the
stage. Later checkpoints hold hard links to them, so each folder is whole and may be removed without a look at others.
"""

import contextlib
import dataclasses
import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from avlm.config.run import CheckpointConfig
from avlm.models.avlm import AVLM
from avlm.parallel.mesh import World
from avlm.storage.checkpoint_files import MARKER, Writer, cause_of, digest, fingerprint, marker_text, pickled
from avlm.storage.checkpoint_plan import Part, Place, flat, index_of, own_parts
from avlm.storage.run_folder import Progress, complete_checkpoints, folder_of, write_durably
from avlm.training.checkpoint import model_tensors, optimizer_tensors
from avlm.training.log import Log


@dataclasses.dataclass
class Layout:
    """What stays the same from one checkpoint to the next, as long as the same parameters train."""

    signature: list[tuple[MetadataIndex, torch.Size, torch.dtype]]  # of this rank's parts
    buffers: dict[MetadataIndex, Tensor] = dataclasses.field(default_factory=dict)  # in host memory, written next
    places: list[Place] = dataclasses.field(default_factory=list)  # of this rank's parts
    index: bytes = b""  # DCP's .metadata; on the first rank
    frozen: Path | None = None  # the newest checkpoint that holds the frozen parameters as this layout writes them
    frozen_places: list[Place] = dataclasses.field(default_factory=list)
    frozen_files: dict[str, str] = dataclasses.field(default_factory=dict)  # name -> checksum, of this rank


@dataclasses.dataclass(frozen=True)
class Content:
    """One checkpoint on its way to the disk."""

    path: Path
    progress: Progress
    need: int  # bytes that all ranks together write
    tensors: dict[str, Tensor]  # all of the model, for their names and shapes: their values go on changing
    paths: dict[str, tuple]
    trained: list[Part]
    frozen: list[Part] | None  # None: linked
    small: dict[str, bytes]  # file name -> content


class Saver:
    """Writes the checkpoints of a run. All ranks make theirs together, and call its methods together."""

    def __init__(self, run: Path, config: CheckpointConfig, world: World):
        self.run = run
        self.config = config
        self.world = world
        self.group = dist.new_group(backend="gloo")
        self.thread = world.thread("save")
        self.cleaner = ThreadPoolExecutor(1, "prune")
        self.pruning: Future[None] = self.cleaner.submit(_remove, [])
        self.writing: Future[str] | None = None
        self.attempt = Progress(), Progress()  # the progress that is being saved, and the one before its validation
        self.failure = ""  # of the last attempt that has ended
        self.is_told = False
        self.layout: Layout | None = None

    def is_due(self, step: int) -> bool:
        return step % self.config.every == 0

    def is_unsaved(self) -> bool:
        """Whether the last attempt failed, as far as this rank knows: its thread may end before those of others. Raises
        what the thread raised, other than not being able to write."""
        if self.writing is not None:
            return self.writing.done() and bool(self.writing.result())
        return bool(self.failure)

    def save_or_warn(
        self,
        progress: Progress,
        before: Progress,
        model: AVLM,
        optimizer: torch.optim.Optimizer,
        loader_state: dict,
        log: Log,
        is_final: bool,
    ) -> Progress:
        """Save; where that fails, warn once and let the run continue. OSError if there is no later attempt.

        ``before`` is the progress before this step's validation. Returns the progress without a best step that turned
        out not to be saved, so that a later step may be the best.
        """
        self.world.watch.enter("save", progress.step)
        progress, before = self._settled(progress, before)
        self.attempt = progress, before
        self.save(progress, model, optimizer, loader_state, wait=is_final or not self.config.async_save)
        if self.writing is None:
            [progress] = self._settled(progress)
        if is_final:
            self.world.watch.result(self.pruning, "prune")
            if self.failure:
                raise OSError(self.failure)
        if self.failure and not self.is_told:
            log.message(f"warning: {self.failure}; the run continues and tries again after the next step")
        self.is_told = bool(self.failure)
        return progress

    def _settled(self, *records: Progress) -> list[Progress]:
        """Records of progress, without a best step that the attempt before could not save."""
        self.finish()
        attempted, before = self.attempt
        lost = self.failure and attempted.best_step == attempted.step
        return [r.with_best_of(before) if lost and r.best_step == attempted.step else r for r in records]

    def save(
        self,
        progress: Progress,
        model: AVLM,
        optimizer: torch.optim.Optimizer,
        loader_state: dict,
        wait: bool = True,
    ) -> str:
        """Write a checkpoint. Returns "", or why it could not be written, the same on every rank. After a failure
        earlier checkpoints are untouched, and nothing is left of this one. Without ``wait`` it is being written when
        this returns, and ``finish`` has the failure."""
        self.finish()
        content = self._prepare(progress, model, optimizer, loader_state, stage=not wait)
        if content is not None:
            self.writing = self.thread.submit(self._write, content)
        return self.finish() if wait else ""

    def finish(self) -> str:
        """Wait for the checkpoint that is being written. Returns why the last one could not be, or ""."""
        if self.writing is not None:
            self.failure = self.world.watch.result(self.writing, "save")
            self.writing = None
        return self.failure

    # 1. While the training loop waits.

    def _prepare(
        self, progress: Progress, model: AVLM, optimizer: torch.optim.Optimizer, loader_state: dict, stage: bool
    ) -> Content | None:
        path = folder_of(self.run, progress.step)
        state = {"model": model_tensors(model), "optimizer": optimizer_tensors(model, optimizer)}
        frozen_names = {f"model.{name}" for name in state["model"].keys() - state["optimizer"].keys()}
        tensors, paths = flat(state)
        parts = own_parts(tensors, self.world)
        signature = [(part.item.index, part.tensor.size(), part.tensor.dtype) for part in parts]
        signature += [(MetadataIndex(name), torch.Size(), torch.uint8) for name in sorted(frozen_names)]
        if self.layout is None or self.layout.signature != signature:
            self.layout = Layout(signature)
        trained = [part for part in parts if part.item.index.fqn not in frozen_names]
        frozen = [part for part in parts if part.item.index.fqn in frozen_names]
        skipped = frozen_names if self.layout.frozen else set()
        need = sum(tensor.nbytes for name, tensor in tensors.items() if name not in skipped)
        small = _rank_state(self.world, loader_state)
        failure = self._attempt(path, need, partial(self._make_folder, path, need))
        if failure:
            self.failure = failure
            return None
        if self._link_frozen(path):
            frozen = None
        if stage:
            trained = self._staged(trained)
            frozen = frozen and self._staged(frozen)
        return Content(path, progress, need, tensors, paths, trained, frozen, small)

    def _make_folder(self, path: Path, need: int) -> None:
        if not self.world.is_first:
            return
        self.world.watch.result(self.pruning, "prune")  # the room that they free counts
        shutil.rmtree(path, ignore_errors=True)  # remains of an interrupted run
        path.parent.mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(path.parent)
        if disk.total and disk.free < need:  # each attempt would fill the disk to the brim
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path.mkdir()

    def _link_frozen(self, path: Path) -> bool:
        """Give the new checkpoint the files with this rank's frozen parameters. False if there are none yet, they are
        gone, or the file system has no hard links: they are then written again."""
        if self.layout.frozen is None:
            return False
        try:
            for name in self.layout.frozen_files:
                os.link(self.layout.frozen / name, path / name)
        except OSError:
            for name in self.layout.frozen_files:  # not to be written through a link
                (path / name).unlink(missing_ok=True)
            return False
        return True

    def _staged(self, parts: list[Part]) -> list[Part]:
        """The parts with copies in host memory, into buffers that are used again: pinned where the tensors are on a
        GPU."""
        is_cuda = self.world.device.type == "cuda"
        staged = []
        for item, tensor in parts:
            buffer = self.layout.buffers.get(item.index)
            if buffer is None:
                buffer = torch.empty(tensor.size(), dtype=tensor.dtype, pin_memory=is_cuda)
                self.layout.buffers[item.index] = buffer
            staged.append(Part(item, buffer.copy_(tensor, non_blocking=True)))
        if is_cuda:
            torch.cuda.current_stream().synchronize()
        return staged

    # 2. In the thread.

    def _write(self, content: Content) -> str:
        path, layout, places = content.path, self.layout, []
        files: dict[str, str] = {}
        attempt = partial(self._attempt, path, content.need)
        failure = attempt(lambda: self._write_files(content, files, places))
        if failure:
            return failure
        if any(self._gather(places != layout.places)):
            of_ranks = [None] * self.world.size if self.world.is_first else None
            dist.gather_object(places, of_ranks, group=self.group)
            if of_ranks:
                layout.index = pickled(index_of(content.tensors, content.paths, of_ranks))
            layout.places = places
        for of_rank in self._gather(files):
            files |= of_rank
        failure = attempt(lambda: self._complete(content, files))
        if failure:
            return failure
        layout.frozen = path
        if self.world.is_first:
            with contextlib.suppress(OSError):  # the checkpoint is written; leftovers go after the next one
                self._tidy(path, content.progress)
        self._gather(None)
        return ""

    def _write_files(self, content: Content, files: dict[str, str], places: list[Place]) -> None:
        """Write what is this rank's, and note the checksums of its files and the places of its tensors."""
        layout, rank = self.layout, self.world.rank
        for name, small in content.small.items():
            write_durably(content.path / name, small)
            files[name] = digest(small)
        trained = _write_parts(content.path, f"__{rank}_", content.trained)
        if content.frozen is not None:
            layout.frozen_files, layout.frozen_places = _write_parts(content.path, f"frozen_{rank}_", content.frozen)
            for part in content.frozen:
                layout.buffers.pop(part.item.index, None)  # not needed again
        files |= trained[0] | layout.frozen_files
        places += trained[1] + layout.frozen_places

    def _complete(self, content: Content, files: dict[str, str]) -> None:
        """The marker makes a checkpoint complete."""
        if self.world.is_first:
            path, index = content.path, self.layout.index
            write_durably(path / ".metadata", index)
            progress = dataclasses.asdict(content.progress)
            write_durably(path / MARKER, marker_text(progress, {**files, ".metadata": digest(index)}))

    def _tidy(self, path: Path, progress: Progress) -> None:
        """Point ``latest`` and ``best`` to their checkpoints, and remove old ones, those that an interrupted run left
        half-written or half-removed too."""
        write_durably(path.parent / "latest", path.name)
        done = complete_checkpoints(self.run)
        best = folder_of(self.run, progress.best_step)
        if best in done:
            write_durably(path.parent / "best", best.name)
        kept = {path, *done[-self.config.keep :], *({best} & set(done))}
        older = [folder for folder in path.parent.glob("step_*") if folder.name < path.name and folder not in kept]
        for old in older:
            (old / MARKER).unlink(missing_ok=True)  # first: a half-removed checkpoint does not count as complete
        self.pruning = self.cleaner.submit(_remove, older)

    def _gather(self, value: Any) -> list[Any]:
        return self.world.gather(value, self.group)

    def _attempt(self, path: Path, need: int, write: Callable[[], Any]) -> str:
        """Call ``write``. Returns "" if it worked on every rank, else why not (most often a full disk), on all ranks.

        ``write`` waits for no other rank, so all ranks are at the same point after a file error, or after that of
        PyTorch's zip writer. Any other error ends this rank, and with it the others.
        """
        reason = ""
        try:
            write()
        except (OSError, RuntimeError) as error:
            reason = _reason(error, path, need)
        reasons = [each for each in self._gather(reason) if each]
        if not reasons:
            return ""
        if self.world.is_first:
            (path / MARKER).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
        done = complete_checkpoints(self.run)
        kept = f"the newest complete checkpoint is {done[-1]}" if done else "there is no earlier checkpoint"
        return f"could not write checkpoint {path}: {reasons[0]}; {kept}"


def _write_parts(path: Path, prefix: str, parts: list[Part]) -> tuple[dict[str, str], list[Place]]:
    """(checksum by file name, places)."""
    if not parts:
        return {}, []
    name, places = Writer(path).write(prefix, parts)
    return {name: fingerprint(path / name, places)}, places


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _rank_state(world: World, loader_state: dict) -> dict[str, bytes]:
    """The small files of this rank, by name."""
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
    return files


def _reason(error: BaseException, path: Path, need: int) -> str:
    """Why a checkpoint of ``need`` bytes could not be written. PyTorch's zip writer hides that a disk is full."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
        cause = cause.__cause__ or cause.__context__
    free = shutil.disk_usage(path.parent).free
    if free < need:
        return f"no space left on device ({free / 2**20:.1f} MiB are free, {need / 2**20:.1f} are needed)"
    return cause_of(error)

"""A watch over all ranks: a run without progress ends in time, and one line says which rank it waited for.

A rank that stops, dies or waits for a file leaves the others in a collective. torch bounds each collective, by default
to 10 or 30 minutes, and then names a rank that waited. So every rank has two threads here, which work alike for gloo
and NCCL. One writes a beat into the store of the launcher every few seconds: what the main thread is doing. The other
counts the time since the main thread last began something (``enter``). When that is more than ``parallel.timeouts``
allow on some rank, it compares the beats and prints the line, and all ranks end with code 2.

    <run>/hang/step_00000012/     from each rank that still answers
        stacks_00003.txt          where its threads were
        gloo_3.json               its last collectives on the host
        nccl_3                    and on GPUs, for ``torchfrtrace``
"""

import faulthandler
import json
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from avlm.config.parallel import TimeoutsConfig
from avlm.process.exit import leave
from avlm.process.launch import local_ranks, store_host

ROOT = Path(__file__).parents[2]
Result = TypeVar("Result")
Phase = Literal["start", "step", "validate", "save"]  # as parallel.timeouts call them
MOST_SECONDS = 5.0  # between two beats
LATER = 120.0  # seconds: torch's own bound, for a rank whose main thread lets no other thread run, comes after ours
SHOWN = 8  # ranks that the line names


class Beat(NamedTuple):
    """What a rank last said: how often it has spoken, on which machine it is, and what its main thread is doing."""

    number: int
    host: str
    doing: str


class Watch:
    """That of one rank. Until ``begin`` it watches nothing: a single process has nobody to wait for."""

    def __init__(self) -> None:
        self.phase: Phase = "start"
        self.step = 0
        self.entered = 0  # how often something began
        self.timeouts: TimeoutsConfig | None = None
        self.main_thread = threading.get_ident()
        self.awaited: str | None = None  # name of the thread that the main thread waits for
        self.ended = threading.Event()
        self.late = threading.Event()  # the time of this rank is up
        self.called = threading.Event()  # that of some rank is
        self.written = threading.Event()  # the files in ``folder``

    def begin(self, rank: int, size: int, store: dist.Store, timeouts: TimeoutsConfig, run: Path) -> None:
        """Start the threads, in the phase "start". ``store`` is shared by the ranks of this start and no others."""
        self.rank = rank
        self.size = size
        self.timeouts = timeouts
        self.run = run
        self.seconds = min(MOST_SECONDS, min(vars(timeouts).values()) / 5)
        store = store.clone()  # a connection of its own: the main thread may wait on the other
        self.enter("start", 1)
        for target, name in ((self._beat, "beat"), (self._count, "watch")):
            threading.Thread(target=target, args=(store,), name=name, daemon=True).start()

    def enter(self, phase: Phase, step: int) -> None:
        """The main thread of every rank begins something whose time ``parallel.timeouts`` bound."""
        if self.timeouts is not None and (phase != self.phase or phase == "start"):  # in which groups are made
            self._bound_collectives()
        self.phase = phase
        self.step = step
        self.entered += 1

    def result(self, future: Future[Result], executor: str) -> Result:
        """Wait for what the only thread of an executor does, by the name of the executor. Until then a beat says where
        that thread is."""
        self.awaited = f"{executor}_0"
        try:
            return future.result()
        finally:
            self.awaited = None

    def end(self) -> None:
        self.ended.set()

    def _bound_collectives(self) -> None:
        """Of every group: those of a mesh do not take the bound of the process group."""
        bound = timedelta(seconds=max(vars(self.timeouts).values()) + LATER)
        for group in list(_world.pg_map):
            _set_pg_timeout(bound, group)

    def _beat(self, store: dist.Store) -> None:
        """Speak until some rank calls, then tell whom it waits for, and end. All that uses the store, which may not
        answer, is done here."""
        number = 0
        try:
            while not self.ended.wait(self.seconds):
                number += 1
                self._speak(store, number)
                if self.late.is_set():
                    store.compare_set("hang", "", f"{self.rank} {self.phase}_{self.step:08d}")
                if store.check(["hang"]):
                    break
            else:
                return
            caller, title = store.get("hang").decode().split()
            self.folder = self.run / "hang" / title
            self.called.set()
            before = self._heard(store)
            for _ in range(3):
                time.sleep(self.seconds)
                number += 1
                self._speak(store, number)
            if int(caller) == self.rank:
                self._tell(missing(before, self._heard(store)))
                store.set("told", "")
            store.wait(["told"], timedelta(seconds=5 * self.seconds))
        except RuntimeError:  # the store has ended, with the first rank or the launcher; or the caller has
            if not self.called.is_set():
                return
        self.written.wait(2 * self.seconds)  # and no longer: it may be the disk that does not answer
        leave(2, at_once=True)

    def _count(self, store: dist.Store) -> None:
        """Count the time in which nothing began. A process that is stopped and continued does not count that time: the
        others may have been stopped as well."""
        waited, entered = 0.0, self.entered
        while not self.called.wait(self.seconds):
            if self.ended.is_set():
                return
            waited = waited + self.seconds if self.entered == entered else 0.0
            entered = self.entered
            if waited >= getattr(self.timeouts, self.phase):
                break
        self.late.set()
        if not self.called.wait(4 * self.seconds):
            self.folder = self.run / "hang" / f"{self.phase}_{self.step:08d}"
        self._write()
        self.written.set()
        time.sleep(12 * self.seconds)  # by then the other thread has ended the process, if the store answers
        if local_ranks()[0] <= 1:  # of each machine: one of the two may be the one that has stopped
            self._tell(f"rank 0 or the launcher on {store_host()} does not answer")
        leave(2, at_once=True)

    def _speak(self, store: dist.Store, number: int) -> None:
        beat = Beat(number, socket.gethostname(), f"in {self._what()} at {self._place()}")
        store.set(f"beat/{self.rank}", json.dumps(beat))

    def _heard(self, store: dist.Store) -> list[Beat | None]:
        """The last beat of every rank; None of those that have not spoken."""
        names = [f"beat/{rank}" for rank in range(self.size)]
        return [Beat(*json.loads(store.get(name))) if store.check([name]) else None for name in names]

    def _what(self) -> str:
        before = {"start": "the start before ", "step": "", "validate": "validation after ", "save": "saving after "}
        return f"{before[self.phase]}step {self.step}"

    def _place(self) -> str:
        """Where the main thread, or the one that it waits for, is in our own code."""
        threads = {thread.name: thread.ident for thread in threading.enumerate()}
        frame = sys._current_frames().get(threads.get(self.awaited, self.main_thread))
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and ".venv" not in path.parts:
                return f"{frame.f_code.co_name} ({path.relative_to(ROOT)}:{frame.f_lineno})"
            frame = frame.f_back
        return "its end"

    def _write(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / f"stacks_{self.rank:05d}.txt", "w") as file:
                faulthandler.dump_traceback(file)
            (self.folder / f"gloo_{self.rank}.json").write_bytes(c10d._dump_fr_trace_json())
            if "nccl" in dist.get_backend_config():
                (self.folder / f"nccl_{self.rank}").write_bytes(c10d._dump_nccl_trace())
        except OSError as error:
            print(f"warning: rank {self.rank}: {self.folder}: {error}", file=sys.stderr, flush=True)

    def _tell(self, whom: str) -> None:
        seconds = getattr(self.timeouts, self.phase)
        print(
            f"error: no progress in {self._what()} for {seconds:g} s (parallel.timeouts.{self.phase}): "
            f"{whom}; stacks and last collectives: {self.folder}",
            file=sys.stderr,
            flush=True,
        )


def missing(before: list[Beat | None], after: list[Beat | None]) -> str:
    """Whom the others wait for, by the beats of all ranks before and after a pause: those that have become silent, else
    those that do something else than most, or all if no most do the same."""
    silent = [rank for rank, beat in enumerate(after) if beat is None or beat == before[rank]]
    if silent:
        return _listed([f"{_words(rank, after[rank], 'was last')}, and does not answer" for rank in silent])
    counts = Counter(beat.doing for beat in after)
    usual, count = counts.most_common(1)[0]
    if count == len(after):
        return f"all {count} ranks are {usual}: the network between them, or a kernel, does not end"
    if count * 2 <= len(after):  # of two, either may wait for the other
        ranks = sorted(range(len(after)), key=lambda rank: counts[after[rank].doing])
        return f"ranks are at different places: {_listed([_words(rank, after[rank], 'is') for rank in ranks])}"
    odd = [rank for rank, beat in enumerate(after) if beat.doing != usual]
    return f"{_listed([_words(rank, after[rank], 'is') for rank in odd])}; the others are {usual}"


def _words(rank: int, beat: Beat | None, verb: str) -> str:
    return f"rank {rank} has not begun" if beat is None else f"rank {rank} on {beat.host} {verb} {beat.doing}"


def _listed(texts: list[str]) -> str:
    more = [f"and {len(texts) - SHOWN} more ranks"] if len(texts) > SHOWN else []
    return ", ".join(texts[:SHOWN] + more)

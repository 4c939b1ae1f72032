"""Worker processes of the loaders."""

import atexit
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from typing import Any

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # what asks a run to end, and often its whole process tree


def start(number: int, then: Callable[[int], None] | None = None) -> None:
    """Called in worker process ``number`` before its first sample. A run that is asked to end needs its workers for the
    step that it is in, and ends them itself: see ``end``."""
    for stop in STOPS:
        signal.signal(stop, signal.SIG_IGN)
    if then is not None:
        then(number)


def end(rows: Iterator[Any] | None) -> None:
    """End the processes of a DataLoader's iterator. torch asks them to, waits, and sends a signal that they ignore."""
    if hasattr(rows, "_shutdown_workers"):  # without processes there is nothing to end
        rows._shutdown_workers()
        for process in rows._workers:
            process.kill()


@atexit.register  # before multiprocessing's own, which waits for them to end
def _kill() -> None:
    """A process that is done does not wait for the row that a worker is reading."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it an error
    for process in multiprocessing.active_children():
        if process.daemon:  # as data workers are; multiprocessing would end it too, by the signal that they ignore
            process.kill()

"""Worker processes of the loaders."""

import atexit
import gc
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures.thread import _threads_queues
from typing import Any

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # they ask a run to end, and often reach its whole process tree
THRESHOLDS = gc.get_threshold()  # Python's own, which a training loop changes


def start(number: int, then: Callable[[int], None] | None = None) -> None:
    """Called in worker process ``number`` before its first sample. Workers ignore signals: a run that is asked to end
    still needs them for its current step, and ends them itself by ``end``. They collect garbage when they need to."""
    gc.set_threshold(*THRESHOLDS)
    _threads_queues.clear()  # of the process before the fork: the thread that forked would wait for itself at the end
    for stop in STOPS:
        signal.signal(stop, signal.SIG_IGN)
    if then is not None:
        then(number)


def end(rows: Iterator[Any] | None) -> None:
    """End the processes of a DataLoader's iterator. torch would ask them, wait, and send a signal that they ignore."""
    if hasattr(rows, "_shutdown_workers"):  # an iterator without processes has no such method
        rows._shutdown_workers()
        for process in rows._workers:
            process.kill()


@atexit.register  # runs before multiprocessing's own handler, which waits for them
def _kill() -> None:
    """Kill the workers, so that a finished process does not wait for the row that one of them is reading."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report an error
    for process in multiprocessing.active_children():
        if process.daemon:  # data workers are; multiprocessing would send them a signal that they ignore
            process.kill()

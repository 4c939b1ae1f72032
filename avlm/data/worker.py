"""Worker processes of the loaders."""

import signal
from collections.abc import Callable

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # what asks a run to end, and often its whole process tree


def start(number: int, then: Callable[[int], None] | None = None) -> None:
    """Called in worker process ``number`` before its first sample. A run that is asked to end needs its workers for the
    step that it is in, and ends them itself."""
    for stop in STOPS:
        signal.signal(stop, signal.SIG_IGN)
    if then is not None:
        then(number)

"""How a process ends, and with which exit code.

0        done
1        an error of the code, with its traceback
2        a user's mistake, or a lost rank, disk or data worker: one line
128 + n  asked to end by signal n (SIGTERM 143, SIGINT 130, SIGHUP 129), after saving if there was something to save
141      nobody reads the output any more (``| head``)
"""

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import TextIO

from avlm.process.launch import ranks, started_by_torchrun
from avlm.process.worker import STOPS

# How gloo, the rendezvous store and NCCL report a rank that is gone.
LOST_RANK = ("closed by peer", "reset by peer", "Broken pipe", "Connection was likely closed", "remote process exited")


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient norm became NaN or infinite."""


def listen() -> list[int]:
    """Collect the signals that ask this process to end, instead of ending at once. Returns the list to which their
    numbers are added as they arrive; the training loop looks at it after each step.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored. A second Ctrl-C ends the process at once, but not
    under a launcher, which forwards a signal that the ranks receive anyway.
    """
    arrived: list[int] = []

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in arrived and not started_by_torchrun():
            raise KeyboardInterrupt
        arrived.append(number)

    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, note)
    return arrived


def run_command(main: Callable[[], None]) -> None:
    """Run a command to its end, and **end the process** with one of the codes above.

    A user's mistake is one line and code 2. A rank that only lost a peer reports that in one line, because the peer's
    own error is the one to read. Any other error keeps its traceback. After success a command of one process returns,
    while the ranks of a larger run exit at once: threads of gloo that outlive the interpreter would abort it. After an
    error they exit at once because their peers may be waiting for them in a collective.
    """
    try:
        main()
        if sys.stdout is not None:  # None if the process was started without one
            sys.stdout.flush()
    except SystemExit as end:
        if ranks()[1] == 1:
            raise
        leave(end.code if isinstance(end.code, int) else int(bool(end.code)), at_once=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        leave(128 + signal.SIGINT, at_once=_has_started())
    except BrokenPipeError as error:
        if sys.stdout is None or not _is_unread(sys.stdout):
            _explain(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        leave(128 + signal.SIGPIPE, at_once=_has_started())
    except Exception as error:
        _explain(error)
    if ranks()[1] > 1:
        leave(0, at_once=True)


def _has_started() -> bool:
    """Whether there is a process group. What never imported torch, which takes seconds, has none."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


def _is_unread(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _explain(error: Exception) -> None:
    """Print what went wrong, and end the process."""
    started = _has_started()
    rank, size = ranks()
    lost = _lost(error)
    if not lost and not isinstance(error, ValueError | OSError | NonFiniteLoss):
        if not started:
            raise error
        sys.excepthook(type(error), error, error.__traceback__)  # torch's hook, which puts the rank before every line
        leave(1, at_once=True)
    if not started and rank > 0:
        time.sleep(2)  # most often the first rank prints the same, and the launcher ends this one meanwhile
    where = f" (rank {rank})" if size > 1 and (started or rank > 0) else ""
    print(f"error{where}: {lost or ' '.join(str(error).split())}", file=sys.stderr, flush=True)
    leave(2, at_once=started)


def leave(code: int, at_once: bool) -> None:
    """End the process with an exit code. ``at_once`` waits for no other thread, and can be called by any."""
    if not at_once:
        sys.exit(code)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _lost(error: Exception) -> str:
    """A message if the error only means that another process is gone, else ""."""
    of_cause = _loss(error.__cause__) if error.__cause__ else ""  # an error while reading a checkpoint has a cause
    return of_cause or _loss(error)


def _loss(error: BaseException) -> str:
    if not isinstance(error, RuntimeError):
        return ""
    text = str(error).partition("\n")[0]
    if text.startswith("DataLoader worker"):
        return f"a data worker ended ({text.strip()}): if memory ran out, lower data.num_workers or data.packing_buffer"
    if any(phrase in text for phrase in LOST_RANK):
        return f"another rank ended; look for its own error ({text.partition('] ')[2] or text})"
    return ""

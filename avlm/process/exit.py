"""How a process ends: by its last step, by a signal, by an error that is one line.

0        done
1        an error of the code, with its traceback
2        what a user got wrong, or a rank, disk or data worker that was lost: one line
128 + n  asked to end by signal n (SIGTERM 143, SIGINT 130, SIGHUP 129): saved first, where there was something to save
141      nobody reads the output any more (``| head``)
"""

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import TextIO

import torch

from avlm.process.launch import ranks
from avlm.process.worker import STOPS

# What gloo, the rendezvous store and NCCL say of a rank that is gone.
LOST_RANK = ("closed by peer", "reset by peer", "Broken pipe", "Connection was likely closed", "remote process exited")


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient norm became NaN or infinite."""


def listen() -> list[int]:
    """The numbers of signals that ask this process to end, as they arrive: for a loop to look at after each step.

    What is ignored, as SIGHUP is under nohup, stays ignored. A second Ctrl-C ends the process at once, but not under a
    launcher, which passes on the one that ranks get anyway.
    """
    arrived: list[int] = []
    launched = "TORCHELASTIC_RUN_ID" in os.environ

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in arrived and not launched:
            raise KeyboardInterrupt
        arrived.append(number)

    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, note)
    return arrived


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Print what a user got wrong as one line, without a traceback, and exit with 2. What is neither that nor a loss of
    something keeps its traceback.

    **Ends the process** of a run of several ranks, also where all went well: threads of gloo that outlive the
    interpreter abort it, and after an error the others may wait for this rank in a collective. A rank that only lost
    another says so, as the other's own error is the one to read.
    """
    try:
        yield
        if sys.stdout is not None:  # closed from the start
            sys.stdout.flush()
    except SystemExit as end:
        if ranks()[1] == 1:
            raise
        _leave(end.code if isinstance(end.code, int) else int(bool(end.code)), at_once=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _leave(128 + signal.SIGINT, at_once=torch.distributed.is_initialized())
    except BrokenPipeError as error:
        if sys.stdout is None or not _is_unread(sys.stdout):
            _explain(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
        _leave(128 + signal.SIGPIPE, at_once=torch.distributed.is_initialized())
    except Exception as error:
        _explain(error)
    if ranks()[1] > 1:
        _leave(0, at_once=True)


def _is_unread(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _explain(error: Exception) -> None:
    """Say what went wrong, and leave."""
    started, (rank, size) = torch.distributed.is_initialized(), ranks()
    lost = _lost(error)
    if not lost and not isinstance(error, ValueError | OSError | NonFiniteLoss):
        if not started:
            raise error
        sys.excepthook(type(error), error, error.__traceback__)  # torch's, which puts the rank before every line
        _leave(1, at_once=True)
    if not started and rank > 0:
        time.sleep(2)  # most often the first rank says the same, and the launcher ends this one before it wakes up
    where = f" (rank {rank})" if size > 1 and (started or rank > 0) else ""
    print(f"error{where}: {lost or ' '.join(str(error).split())}", file=sys.stderr, flush=True)
    _leave(2, at_once=started)


def _leave(code: int, at_once: bool) -> None:
    if not at_once:
        sys.exit(code)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _lost(error: Exception) -> str:
    """What to say of an error that is no more than another process being gone; nothing of any other."""
    for cause in filter(None, (error.__cause__, error)):  # reading a checkpoint names the checkpoint
        if said := _loss(cause):
            return said
    return ""


def _loss(cause: BaseException) -> str:
    text = str(cause).partition("\n")[0]
    if not isinstance(cause, RuntimeError):
        return ""
    if text.startswith("DataLoader worker"):
        return (
            f"a data worker ended ({text.strip()}): where memory ran out, lower data.num_workers or data.packing_buffer"
        )
    if any(phrase in text for phrase in LOST_RANK):
        return f"another rank ended, look for its own error ({text.partition('] ')[2] or text})"
    return ""

"""Locks on files, for file systems with and without them."""

import errno
import fcntl
import sys
from typing import IO

ABSENT = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # Lustre mounted with noflock, NFS without lockd


def lock(file: IO[str], wait: bool) -> bool:
    """Take the lock of an open file until it is closed. Returns False if another process has it and we do not ``wait``.

    On a file system without locks a warning is printed, and the lock counts as taken.
    """
    try:
        # flock would live on in forked loader workers.
        fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno not in ABSENT:
            raise
        advice = "start nothing else that writes to its folder"
        print(f"{file.name} cannot be locked here ({error.strerror}): {advice}", file=sys.stderr)
    return True

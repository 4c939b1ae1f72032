"""The rank of this process, from the launcher's environment variables; and how many files it may open."""

import os
import resource


def ranks() -> tuple[int, int]:
    """(rank, world size); (0, 1) without a launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def local_ranks() -> tuple[int, int]:
    """(rank, number of ranks) on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def own_launch() -> str:
    """A name that the ranks of this machine share, and no other start has; "" for a rank without others here."""
    if local_ranks()[1] == 1:
        return ""
    start = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return " ".join([os.uname().nodename, str(os.getppid()), *start])


def started_by_torchrun() -> bool:
    """torchrun ends all ranks when one of them fails; other launchers may let them wait for it."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def store_host() -> str:
    """The machine of rank 0 or of the launcher that keeps the store through which ranks meet."""
    return os.environ["MASTER_ADDR"]


def raise_file_limit() -> None:
    """As many open files as the system allows this process. Each rank has a connection to every other one, and 1,024,
    the usual limit, is too few for 1,000 ranks."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

"""The rank of this process, from the launcher's environment variables."""

import os


def ranks() -> tuple[int, int]:
    """(rank, world size); (0, 1) without a launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def local_ranks() -> tuple[int, int]:
    """(rank, number of ranks) on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def started_by_torchrun() -> bool:
    """torchrun ends all ranks when one of them fails; other launchers may let them wait for it."""
    return "TORCHELASTIC_RUN_ID" in os.environ

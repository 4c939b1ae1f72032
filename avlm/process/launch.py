"""What the launcher says of this process."""

import os


def ranks() -> tuple[int, int]:
    """(rank, world size) that the launcher gave this process; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

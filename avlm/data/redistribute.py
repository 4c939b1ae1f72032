"""Loader states for another number of data ranks.

Every worker of every data rank reads a stream of its own, and its state says where that stands. The same streams are
dealt out in the same order to other ranks: no sample is lost or read twice, while rows are handed out in another order.
What ``energon checkpoint redist`` does with Energon's own files, for ours.
"""

from typing import Any


def redistribute(states: list[dict[str, Any]], rank: int, world: int) -> dict[str, Any]:
    """The state for data rank ``rank`` of ``world``, of the states of all data ranks that wrote the checkpoint, in
    order. It asks for as many workers of a rank as keep their whole number. ValueError if that cannot be."""
    count = len(states) * max(1, states[0]["workers"])
    if count % world:
        raise ValueError(
            f"the checkpoint holds {count} streams of data ({len(states)} data ranks x data.num_workers="
            f"{states[0]['workers']}), which cannot be dealt out evenly to {world} data ranks: take a number of data "
            f"ranks (parallel.replicate x parallel.shard) that divides {count}, or its weights alone with init_from"
        )
    own = slice(rank * (count // world), (rank + 1) * (count // world))
    state = {**states[0], "rank": rank, "world": world, "workers": count // world}
    if "slots" in state:
        return {**state, "slots": [slot for given in states for slot in given["slots"]][own], "turn": 0}
    if "energon" in state and states[0]["workers"]:
        from avlm.data.energon.state import from_json, to_json  # slow to import

        merged = [from_json(given["energon"]) for given in states]
        merged[0].worker_states = [worker for given in merged for worker in given.worker_states][own]
        merged[0].next_worker_id = 0
        return {**state, "energon": to_json(merged[0])}
    what = "Energon's streams of data.num_workers=0" if "energon" in state else "synthetic rows"
    raise ValueError(
        f"{what} belong to their rank: go on with {len(states)} data ranks (parallel.replicate x parallel.shard), or "
        "take the weights alone with init_from"
    )

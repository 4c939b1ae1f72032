"""Loader states for another number of data ranks.

Every worker of every data rank reads a stream of its own, and its state says how far it has read. The same streams are
dealt out in the same order to a different number of ranks: no sample is lost or read twice, but rows come in another
order. ``energon checkpoint redist`` does the same with Energon's own files.
"""

from typing import Any


def redistribute(states: list[dict[str, Any]], rank: int, world: int) -> dict[str, Any]:
    """The state for data rank ``rank`` of ``world``. ``states``: those of all data ranks that wrote the checkpoint, in
    order. The total number of workers stays the same; ValueError if ``world`` does not divide it."""
    count = len(states) * max(1, states[0]["workers"])
    if count % world:
        raise ValueError(
            f"the checkpoint holds {count} streams of data ({len(states)} data ranks x data.num_workers="
            f"{states[0]['workers']}), which cannot be dealt out evenly to {world} data ranks: take a number of data "
            f"ranks (parallel.replicate x parallel.shard) that divides {count}, or its weights alone with init_from"
        )
    workers = count // world
    own = slice(rank * workers, (rank + 1) * workers)
    state = {**states[0], "rank": rank, "world": world, "workers": workers}
    if "slots" in state:
        slots = [slot for given in states for slot in given["slots"]]
        return {**state, "slots": slots[own], "turn": 0}
    if "energon" in state and states[0]["workers"]:
        from avlm.data.energon.state import from_json, to_json  # slow to import

        loaders = [from_json(given["energon"]) for given in states]
        streams = [worker for loader in loaders for worker in loader.worker_states]
        merged = loaders[0]
        merged.worker_states = streams[own]
        merged.next_worker_id = 0
        return {**state, "energon": to_json(merged)}
    what = "Energon's streams of data.num_workers=0" if "energon" in state else "synthetic rows"
    raise ValueError(
        f"{what} belong to their rank: continue with {len(states)} data ranks (parallel.replicate x parallel.shard), "
        "or take the weights alone with init_from"
    )

"""Loader states for another number of data ranks, or of workers.

The samples of a run are dealt out to slots, and the state of each says how far it has read. The slots of a checkpoint
are dealt out in the same order to the ranks that continue it, unevenly if it has to be: no sample is lost or read
twice, but rows come in another order. Where there are fewer slots than workers, and samples are found by number, each
is divided into several. Energon's own workers read a slot each: their number follows from the ranks, which have to
divide the slots, as they do for ``energon checkpoint redist``.
"""

from typing import Any

from avlm.data.numbered import divided

State = dict[str, Any]


def redistribute(states: list[State], rank: int, world: int, workers: int) -> State:
    """The state for data rank ``rank`` of ``world``, with ``workers`` each (0: no processes). ``states``: those of all
    data ranks that wrote the checkpoint, in order. ValueError if the ranks cannot share its slots."""
    own = {**states[rank % len(states)], "rank": rank, "world": world, "workers": workers}
    if "slots" in own:
        return own | _slots_of(states, rank, world, max(workers, 1))
    if len(states) == world:
        return own if "row" in own else states[rank]
    if "energon" in own and states[0]["workers"]:
        return own | _energon_of(states, rank, world)
    what = "Energon's streams of data.num_workers=0" if "energon" in own else "synthetic rows"
    raise ValueError(
        f"{what} belong to their rank: continue with {len(states)} data ranks (parallel.replicate x parallel.shard), "
        "or take the weights alone with init_from"
    )


def _slots_of(states: list[State], rank: int, world: int, workers: int) -> State:
    slots = [slot for state in states for slot in state["slots"]]
    if len(slots) < world * workers and all(state.get("divisible") for state in states):
        slots = _divided(slots, -(-world * workers // len(slots)))
    count = len(slots)
    if count < world:
        raise ValueError(
            f"the checkpoint holds {count} slots of data that cannot be divided, and {world} data ranks would read "
            f"them: take at most {count} (parallel.replicate x parallel.shard), or its weights alone with init_from"
        )
    first, end = rank * count // world, (rank + 1) * count // world
    return {"slots": slots[first:end], "dealt": [first, end, count], "turn": 0}


def _divided(slots: list[State], parts: int) -> list[State]:
    """``parts`` times as many slots. Rows that were planned stay with the first part."""
    found: list[list[State]] = [[] for _ in range(parts)]
    for number, slot in enumerate(slots):
        sources = [divided(source, number, len(slots), parts) for source in slot["sources"]]
        for part, of_part in enumerate(zip(*sources)):
            found[part].append({"sources": list(of_part), "rows": [] if part else slot["rows"]})
    return [slot for part in found for slot in part]


def _energon_of(states: list[State], rank: int, world: int) -> State:
    from avlm.data.energon.state import from_json, to_json  # slow to import

    loaders = [from_json(state["energon"]) for state in states]
    streams = [worker for loader in loaders for worker in loader.worker_states]
    count = len(streams)
    if count % world:
        fits = [str(ranks) for ranks in range(1, count + 1) if count % ranks == 0]
        raise ValueError(
            f"the checkpoint holds {count} streams of Energon's ({len(states)} data ranks x data.num_workers="
            f"{states[0]['workers']}), which {world} data ranks cannot share evenly: take {', '.join(fits[:-1])} or "
            f"{fits[-1]} (parallel.replicate x parallel.shard), or its weights alone with init_from"
        )
    workers = count // world
    merged = loaders[0]
    merged.worker_states = streams[rank * workers : (rank + 1) * workers]
    merged.next_worker_id = 0
    return {"energon": to_json(merged), "workers": workers}

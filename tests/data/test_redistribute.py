"""A checkpoint of some data ranks, read on by others: the same streams, each sample once."""

import functools
import json
import zlib
from collections import Counter
from itertools import islice

import pytest
import torch

from avlm.data.redistribute import redistribute
from tests.data.energon.test_loader import content, root  # noqa: F401 (a fixture)
from tests.data.energon.test_loader import loader as energon_loader
from tests.data.test_jsonl import folder  # noqa: F401 (a fixture)
from tests.data.test_jsonl import loader as jsonl_loader

both = pytest.mark.parametrize("loader", ["energon", "jsonl"], indirect=True)
energon, jsonl = energon_loader, jsonl_loader


@pytest.fixture
def loader(request):
    return request.getfixturevalue(request.param)


def read(make, world, workers, states=None, rows=4):
    """(rows of all ranks, the loaders after them)."""
    found, loaders = [], []
    for rank in range(world):
        state = json.loads(json.dumps(states[rank])) if states else None
        loaders.append(make(rank=rank, world=world, num_workers=workers, state=state))
        found += [content(batch) for batch in islice(loaders[-1], rows)]
    return found, [each.state() for each in loaders]


@both
@pytest.mark.parametrize("world, workers", [(1, 4), (4, 1)])
def test_other_ranks_continue_the_same_streams(loader, world, workers):
    _, states = read(loader, world=2, workers=2)
    expected, _ = read(loader, world=2, workers=2, states=states)
    dealt = [redistribute(states, rank, world, workers) for rank in range(world)]
    found, _ = read(loader, world, workers, states=dealt, rows=2 * 4 // world)
    assert sorted(found, key=repr) == sorted(expected, key=repr)


@pytest.mark.parametrize("worlds", [(1, 4), (4, 3, 2), (7, 2, 5)])
def test_any_ranks_with_the_default_workers_read_every_sample_once_an_epoch(jsonl, worlds):
    make = functools.partial(jsonl, "good.jsonl", packing_buffer=3)
    states = None
    counts = Counter()
    for world in worlds:
        if states:
            states = [redistribute(states, rank, world, workers=2) for rank in range(world)]
        rows, states = read(make, world, workers=2, states=states, rows=3)
        counts.update(key for keys, *_ in rows for key in keys)
    assert counts and counts + left(states, epochs=20) == {f"good.jsonl:{i + 1}": 20 for i in range(21)}


def left(states, epochs):
    """How often each sample is still to be read in the first epochs: in planned rows, and at positions to come."""
    orders = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(zlib.crc32(f"1 {epoch}".encode()))
        orders += torch.randperm(21, generator=generator).tolist()
    numbers = []
    for state in states:
        for slot in state["slots"]:
            [source] = slot["sources"]
            numbers += [place for row in slot["rows"] for _, place in row]
            numbers += orders[source["next"] :: state["dealt"][2]]
    return Counter(f"good.jsonl:{number + 1}" for number in numbers)


def test_workers_that_read_several_slots_resume_with_the_very_same_rows(jsonl):
    make = functools.partial(jsonl, packing_buffer=6)
    _, states = read(make, world=4, workers=2)
    dealt = [redistribute(states, rank, 3, workers=2) for rank in range(3)]
    assert [len(state["slots"]) for state in dealt] == [2, 3, 3]
    expected, _ = read(make, 3, 2, dealt, rows=11)
    begun, states = read(make, 3, 2, dealt, rows=5)
    continued, _ = read(make, 3, 2, states, rows=6)
    of_rank = [begun[5 * rank : 5 * rank + 5] + continued[6 * rank : 6 * rank + 6] for rank in range(3)]
    assert [row for rows in of_rank for row in rows] == expected


def test_256_slots_of_64_ranks_are_dealt_to_56():
    slot = {"sources": [{"drawn": 3, "next": 7}], "rows": []}
    states = [{"workers": 4, "records": [9], "divisible": True, "slots": [slot] * 4} for _ in range(64)]
    dealt = [redistribute(states, rank, 56, 4) for rank in range(56)]
    assert {len(state["slots"]) for state in dealt} == {4, 5}
    assert [slot for state in dealt for slot in range(*state["dealt"][:2])] == list(range(256))


def test_the_workers_of_energon_follow_from_its_streams(energon, capsys):
    _, states = read(energon, world=2, workers=2)
    expected, _ = read(energon, world=2, workers=2, states=states)
    capsys.readouterr()
    dealt = [redistribute(states, 0, 1, workers=2)]
    found, _ = read(energon, world=1, workers=2, states=dealt, rows=8)
    assert sorted(found, key=repr) == sorted(expected, key=repr)
    assert capsys.readouterr().err == "data.num_workers=4, not 2: Energon's streams have a worker each\n"
    with pytest.raises(ValueError, match=r"4 streams .*, which 3 data ranks cannot share evenly: take 1, 2 or 4 "):
        redistribute(states, 0, 3, workers=2)


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(
        ValueError, match=r"2 slots of data that cannot be divided, and 4 data ranks .*: take at most 2"
    ):
        redistribute([{"workers": 2, "divisible": False, "slots": [{}, {}]}], 0, 4, 2)
    with pytest.raises(ValueError, match="synthetic rows belong to their rank: continue with 2 data ranks"):
        redistribute([{"workers": 2, "row": 3}] * 2, 0, 1, 2)
    assert redistribute([{"workers": 2, "row": 3}], 0, 1, 4) == {"rank": 0, "world": 1, "workers": 4, "row": 3}
    with pytest.raises(
        ValueError, match=r"Energon's streams of data\.num_workers=0 belong to their rank: continue with 2"
    ):
        redistribute([{"workers": 0, "energon": {}}] * 2, 0, 1, 2)

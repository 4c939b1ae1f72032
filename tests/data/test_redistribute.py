"""A checkpoint of some data ranks, read on by others: the same streams, each sample once."""

import json
from itertools import islice

import pytest

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
    dealt = [redistribute(states, rank, world) for rank in range(world)]
    found, _ = read(loader, world, workers, states=dealt, rows=2 * 4 // world)
    assert sorted(found, key=repr) == sorted(expected, key=repr)


def test_streams_that_do_not_divide_are_refused(jsonl):
    _, states = read(jsonl, world=2, workers=2)
    with pytest.raises(ValueError, match=r"4 streams of data \(2 data ranks x data.num_workers=2\).* to 3 data ranks"):
        redistribute(states, 0, 3)
    with pytest.raises(ValueError, match=r"set data\.num_workers=4"):
        jsonl(rank=0, world=1, num_workers=2, state=redistribute(states, 0, 1))
    with pytest.raises(ValueError, match="synthetic rows belong to their rank: continue with 2 data ranks"):
        redistribute([{"workers": 2, "row": 3}] * 2, 0, 1)
    with pytest.raises(
        ValueError, match=r"Energon's streams of data\.num_workers=0 belong to their rank: continue with 2"
    ):
        redistribute([{"workers": 0, "energon": {}}] * 2, 0, 1)

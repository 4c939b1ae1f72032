"""What a rank sends is what the formulas of docs/parallelism.md say."""

import functools

import pytest

from tests.parallel.equivalence import LAYOUTS
from tests.parallel.spawn import run_ranks
from tests.parallel.wire import CHOSEN, count_all


@functools.cache
def measured():
    return run_ranks(count_all, 4, {name: LAYOUTS[4][name] for name in CHOSEN})


@pytest.mark.parametrize("layout", CHOSEN)
def test_every_rank_sends_as_many_bytes_as_the_formula_says(layout):
    """Exactly: the padding of shards is part of the formula. A collective without a formula fails too."""
    for rank, found in enumerate(measured()):
        counted, expected = found[layout]
        assert +counted == +expected, f"rank {rank}"


@pytest.mark.parametrize(
    ("layout", "axis", "kinds"),
    [
        ("HSDP", "replicate", {"all-reduce"}),
        ("TP", "tensor", {"all-gather", "reduce-scatter", "all-reduce"}),
        ("ring", "context", {"send"}),
        ("all-gather", "context", {"all-gather", "reduce-scatter"}),
        ("Ulysses", "context", {"all-to-all"}),
        ("Ulysses", "row", {"all-to-all"}),
        ("FSDP x ring, media balanced", "world", {"all-to-all", "all-reduce", "objects"}),
    ],
)
def test_an_axis_is_seen_with_its_collectives(layout, axis, kinds):
    for found in measured():
        assert {kind for name, kind in found[layout][0] if name == axis} == kinds


def test_a_ring_sends_the_same_whoever_is_asked():
    sent = [found["ring"][0]["context", "send"] for found in measured()]
    assert len(set(sent)) == 1

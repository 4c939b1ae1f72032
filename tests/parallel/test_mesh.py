"""Every rank knows its place, and few communicators are made."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from avlm.parallel.mesh import lay_out, rows_that_share
from tests.parallel.spawn import run_ranks

# mesh (replicate, shard, context, tensor), balance_media -> communicators of a rank: of all ranks; the weights' axes,
# of which those of one rank are one; of the row on the host; of media on the device, and on the host if balanced
COUNTS = {
    ((1, 4, 1, 1), False): 1 + 2,
    ((1, 4, 1, 1), True): 1 + 2 + 2,
    ((2, 2, 1, 1), False): 1 + 3,
    ((1, 1, 4, 1), False): 1 + 2 + 2,
    ((1, 1, 1, 4), False): 1 + 2 + 2,
    ((1, 2, 1, 2), False): 1 + 4 + 2,
    ((1, 2, 2, 1), True): 1 + 2 + 1 + 2,
}


def places_and_counts():
    dist.init_process_group("gloo")
    found = {}
    for shape, balance in COUNTS:
        before = len(_world.pg_map)
        world = lay_out(shape, torch.device("cpu"), balance)
        axes = {name: world.axis(name)[0] for name in world.shape}
        place = (world.data_rank, world.data_size, world.leads_row, world.counts_losses)
        found[shape, balance] = axes, place, 1 + len(_world.pg_map) - before
    dist.destroy_process_group()
    return found


@functools.cache
def measured():
    return run_ranks(places_and_counts, 4)


@pytest.mark.parametrize(("layout", "expected"), COUNTS.items(), ids=str)
def test_communicators_of_the_same_use_and_ranks_are_one(layout, expected):
    assert {found[layout][2] for found in measured()} == {expected}


@pytest.mark.parametrize("layout", COUNTS, ids=str)
def test_ranks_lie_in_row_major_order(layout):
    shape, _ = layout
    indices = torch.cartesian_prod(*(torch.arange(length) for length in shape)).tolist()
    row_size = shape[2] * shape[3]
    for rank, found in enumerate(measured()):
        axes, place, _ = found[layout]
        assert list(axes.values()) == indices[rank]
        assert place == (rank // row_size, 4 // row_size, rank % row_size == 0, axes["tensor"] == 0)


@pytest.mark.parametrize(("layout", "expected"), [((8, 1), 8), ((64, 2), 32), ((6, 24), 2), ((3, 64), 1), ((97, 1), 1)])
def test_balanced_media_are_shared_among_at_most_64_ranks(layout, expected):
    assert rows_that_share(*layout) == expected


def test_a_thread_uses_the_device_of_its_rank(monkeypatch):
    """Not the first GPU, on which every rank would then hold memory."""
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for kind, expected in (("cpu", []), ("cuda", [torch.device("cuda", 3)])):
            world = lay_out((1, 1, 1, 1), torch.device("cpu"))
            world = replace(world, device=torch.device(kind, 3 if kind == "cuda" else None))
            assert world.thread("rows").submit(lambda: len(used)).result() == len(expected)
            assert used == expected
    finally:
        dist.destroy_process_group()

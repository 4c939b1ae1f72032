"""A rank sends as many bytes as the formulas of docs/parallelism.md say."""

import functools

import pytest

from tests.measurements.wire import CHOSEN, OF_OTHERS, OTHER_MODELS, WITH_EXPERTS, count_all, count_options
from tests.parallel.small import TREE
from tests.parallel.spawn import run_ranks


@functools.cache
def measured():
    return run_ranks(count_all, 4, OF_OTHERS)


OTHERS = [f"{name}, {model}" for name in OF_OTHERS for model in OTHER_MODELS]


@pytest.mark.parametrize("layout", [*CHOSEN, *OTHERS, *WITH_EXPERTS])
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
        ("experts gathered", "expert", {"all-gather", "reduce-scatter"}),
        ("FSDP x TP, experts", "expert", {"all-to-all"}),
        ("FSDP x TP, experts", "row", {"all-to-all", "all-reduce"}),
    ],
)
def test_an_axis_is_seen_with_its_collectives(layout, axis, kinds):
    for found in measured():
        assert {kind for name, kind in found[layout][0] if name == axis} == kinds


def test_accumulation_reshard_and_blocks_of_towers_change_the_bytes_as_documented():
    """Two ranks, three micro-batches."""
    options = [
        {},
        {"train": {"accumulate_mode": "local"}},
        {"parallel": {"reshard": False}},
        {"parallel": {"tower_sharding": "block"}},
        {"parallel": {"replicate": 2}},
    ]
    plain, local, kept, blocks, copies = run_ranks(count_options, 2, options, 3)[0]
    gathers = "shard_context = shard_context_tensor", "all-gather"
    scatters = "shard_context = shard_context_tensor", "reduce-scatter"
    gathered = plain[0][gathers]
    scattered = plain[0][scatters]
    assert gathered
    assert local[0][gathers] == gathered
    assert local[0][scatters] * 3 == scattered
    assert kept[0][gathers] < gathered
    assert kept[0][scatters] == scattered
    assert blocks[1] > plain[1]
    assert 0 < copies[0]["replicate", "all-reduce"] <= 2 * scattered / 3, "between copies once a step"
    assert all(prefetches for *_, prefetches in (plain, local, kept))


def test_a_frozen_tower_is_gathered_for_its_forward_alone():
    """In float32 a gradient has the bytes of its weight, so a tower that does not train saves as much of either."""
    modules = ["decoder", "vision_projector", "audio_projector"]
    frozen = {"stages": [{**TREE["stages"][0], "train": modules}]}
    options = [{"train": {"precision": "fp32"}}, {"train": {"precision": "fp32"}, **frozen}]
    (all_train, *_), (some_train, *_) = run_ranks(count_options, 2, options, 1)[0]
    axis = "shard_context = shard_context_tensor"
    saved = {kind: all_train[axis, kind] - some_train[axis, kind] for kind in ("all-gather", "reduce-scatter")}
    assert saved["all-gather"] == saved["reduce-scatter"] > 0


def test_selective_recomputation_sends_no_keys_of_a_ring_again_and_sums_nothing_again():
    """Full recomputation does."""
    options = []
    for layout in ({"context": 2, "context_mode": "ring"}, {"tensor": 2}):
        for mode in ("none", "selective", "full"):
            options.append({"parallel": layout, "train": {"recompute": {"decoder": mode}}})
    found = [counted for counted, *_ in run_ranks(count_options, 2, options, 1)[0]]
    none, selective, full = [counted["context", "send"] for counted in found[:3]]
    assert 0 < none == selective < full
    none, selective, full = [counted["tensor", "reduce-scatter"] for counted in found[3:]]
    assert 0 < none == selective < full

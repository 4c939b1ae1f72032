"""The time of a step on paper: what must follow from its parts, whatever the rates are."""

import functools
from dataclasses import replace

import pytest

from avlm.config.load import resolve_config
from avlm.models import costs
from avlm.preflight import rates
from avlm.preflight.described_step import Row, counts_of, equal_documents, typical_row
from avlm.preflight.rates import GPUS
from avlm.preflight.report import report
from avlm.preflight.step_time import estimate
from tests.measurements import elementwise_bytes
from tests.measurements.equivalence import LAYOUTS
from tests.parallel.small import MODELS, TREE, make_config, make_rows

LARGE = {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_layers": 4, "num_heads": 32}
TOKENS = 65_536


@functools.cache
def config_of(**parallel):
    tree = {**TREE, "device": "cuda", "parallel": parallel, "train": {"recompute": {"decoder": "selective"}}}
    tree["model"] = {**TREE["model"], "decoder": {**LARGE, "num_kv_heads": 8, "max_position": TOKENS}}
    tree["data"] = {"train": "synthetic", "seq_length": TOKENS}
    return resolve_config(tree, "test")


def time_of(world_size, documents=16, gpu=GPUS["h100"], tokens=TOKENS, **parallel):
    cfg = config_of(**parallel)
    row = Row(equal_documents(tokens, documents), {"image": 16, "audio": 16}, tokens // 8)
    return estimate(cfg, cfg.stages[0], world_size, gpu, row)


def test_the_counts_of_a_described_row_are_those_of_a_packed_row():
    """Of square images. The audio of small rows fills no window, so it is left out."""
    cfg = make_config()
    [batch] = make_rows(cfg, ["image"])
    documents = tuple(length for _, length in batch.segments.spans)
    row = Row(
        documents,
        {"image": len(batch.image.sizes), "audio": 0},
        len(batch.target_R),
    )
    found = counts_of(row, cfg.model, cfg.stages[0].data)
    expected = costs.counts(batch)
    assert {name: found[name] for name in expected} == expected


def test_ranks_that_share_a_row_divide_what_is_computed():
    alone, shared = time_of(1), time_of(8, context=8)
    for part in ("products", "attention", "elementwise"):
        assert shared.parts[part] == pytest.approx(alone.parts[part] / 8, rel=0.02), part
    over_tensor = time_of(8, tensor=8)
    assert over_tensor.parts["products"] == pytest.approx(alone.parts["products"] / 8, rel=0.02)
    assert over_tensor.parts["tensor exchange"] > 0 == alone.parts["tensor exchange"]


def test_a_row_of_short_documents_over_many_ranks_takes_hardly_longer_than_plain_rows():
    """At most 1.3 times as long, and a row of one document far longer, as its attention has far more pairs."""
    cfg = config_of()
    short = replace(cfg.stages[0].data, seq_length=TOKENS // 16)
    plain_row = Row(equal_documents(TOKENS // 16, 4), {"image": 1, "audio": 1}, TOKENS // 128)
    plain = estimate(cfg, replace(cfg.stages[0], data=short), 16, GPUS["h100"], plain_row)
    of_many = time_of(16, documents=64, context=16)
    assert of_many.device < 1.3 * plain.device
    assert time_of(16, documents=1, context=16).parts["attention"] > 10 * of_many.parts["attention"]


@pytest.mark.parametrize("layout", LAYOUTS[4].values(), ids=LAYOUTS[4])
def test_every_layout_has_a_time_and_counts_what_its_axes_send(layout):
    found = time_of(4, documents=1, **layout)
    assert 0 < found.mfu < rates.PRODUCT and all(seconds >= 0 for seconds in found.parts.values())
    assert (found.sent["tensor"] > 0) == (layout.get("tensor", 1) > 1)
    assert (found.sent["context"] > 0) == (layout.get("context", 1) > 1)
    assert found.sent["weights"] > 0


def test_a_slower_link_only_adds_to_what_is_waited_for():
    fast = time_of(64, context=16)
    slow = time_of(64, gpu=replace(GPUS["h100"], nic=GPUS["h100"].nic / 100), context=16)
    for part, seconds in fast.parts.items():
        if part == "exposed communication":
            assert slow.parts[part] > 10 * seconds
        else:
            assert slow.parts[part] == seconds, part
    assert slow.wall.startswith("exposed communication") and slow.sent == fast.sent


def test_a_gpu_without_room_is_the_first_wall():
    assert time_of(1, gpu=replace(GPUS["h100"], memory=1e9)).wall.startswith("memory")


def test_elementwise_kernels_move_as_many_bytes_as_are_counted():
    sizes = elementwise_bytes.LLAMA_8B
    tokens, D, F = 256, sizes["hidden_size"], sizes["intermediate_size"]
    QK = (sizes["num_heads"] + sizes["num_kv_heads"]) * D // sizes["num_heads"]
    counted = {name: moved for name, (moved, _) in elementwise_bytes.eager_block(sizes, tokens).items()}
    assert 2 * sum(rates.NORM) * tokens * D == pytest.approx(counted["RMSNorm"], rel=0.03)
    assert sum(rates.ROTATED) * tokens * QK == pytest.approx(counted["rotate"], rel=0.03)
    assert sum(rates.SWIGLU) * tokens * F == pytest.approx(counted["SwiGLU"], rel=0.03)


@pytest.mark.parametrize("model", MODELS)
def test_preflight_says_what_bounds_a_step_and_that_it_is_an_assumption(model):
    cfg = make_config(model=MODELS[model], device="cuda")
    text = report(cfg, world_size=2)
    assert "s a step on H100s" in text and "rates that are assumptions" in text
    assert typical_row(cfg.stages[0].data, cfg.model).tokens == 64


def test_preflight_gives_no_time_for_a_run_on_a_cpu():
    assert "H100" not in report(make_config(device="cpu"), world_size=2)

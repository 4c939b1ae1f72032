"""The time of a step on paper: what must follow from its parts, whatever the rates are."""

import functools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from avlm.config.load import resolve_config
from avlm.models import costs
from avlm.models.batch import IMAGE, seen_segments
from avlm.models.encoder import OffsetRMSNorm
from avlm.models.shapes import parameter_shapes
from avlm.preflight import communication, rates
from avlm.preflight.described_step import Both, Row, Step, counts_of, equal_documents, typical_row
from avlm.preflight.layout import layout_of
from avlm.preflight.memory import Case
from avlm.preflight.rates import GPUS
from avlm.preflight.report import report
from avlm.preflight.step_time import estimate
from avlm.training.bf16_moments import BF16MomentsAdamW
from kernels.segments import Segments
from tests.measurements import elementwise_bytes
from tests.measurements.layouts import LAYOUTS
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
    expected = costs.counts(batch) | {"real_tokens": len(batch.token_T)}  # nothing fills up a described row
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("bidirectional", ["images", "prefix"])
def test_tokens_that_look_ahead_are_counted_as_in_a_packed_row(bidirectional):
    cfg = make_config(model=MODELS["gemma"])
    model = replace(cfg.model, decoder=replace(cfg.model.decoder, bidirectional=bidirectional))
    document = [1, *[IMAGE] * 4, 1, *[IMAGE] * 4, 1, 1, 1]
    token_T = torch.tensor(2 * document)
    rows_R = torch.tensor([start + i for start in (0, len(document)) for i in (10, 11)])
    seen = seen_segments(Segments.of(2 * [len(document)]), token_T, rows_R, model.decoder)
    found = counts_of(Row(2 * (len(document),), {"image": 4}, 4), model, cfg.stages[0].data)
    assert found["token_pairs"] == costs.pairs(seen["segments"])
    assert found["window_pairs"] == costs.pairs(seen["windowed"])


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


@pytest.mark.parametrize("sharding", ["unit", "block"])
def test_a_computation_hides_no_more_communication_than_it_lasts(sharding):
    cfg = config_of(tower_sharding=sharding)
    case = Case(cfg, cfg.stages[0], layout_of(cfg, 64), parameter_shapes(cfg.model))
    step = Step(case, replace(GPUS["h100"], nic=1e6), Row((TOKENS,), {"image": 0, "audio": 0}, 0))
    _, alone, _ = communication.weights(step, {"products": {}}, Both())
    _, hidden, _ = communication.weights(step, {"products": {"vision": Both(forward=0.001)}}, Both())
    assert alone - hidden == pytest.approx(0.001)


def test_heads_are_exchanged_by_as_many_ranks_as_exchange_them_in_a_run():
    cfg = config_of(tensor=4, context=8)
    decoder = replace(cfg.model.decoder, num_kv_heads=32)
    cfg = replace(cfg, model=replace(cfg.model, decoder=decoder))
    case = Case(cfg, cfg.stages[0], layout_of(cfg, 32), parameter_shapes(cfg.model))
    assert case.layout.context_mode == "ulysses_ring"
    assert Step(case, GPUS["h100"], Row((TOKENS,), {}, 0)).num_together == 2  # a machine of 8 has 2 x 4 of the ranks


@pytest.mark.parametrize("is_async", [False, True])
def test_a_save_waits_for_what_trains_alone_and_copies_of_the_model_share_it(is_async):
    cfg = config_of()
    whole = replace(cfg, checkpoint=replace(cfg.checkpoint, async_save=is_async))
    stage = replace(cfg.stages[0], train=["vision_projector"])
    row = Row((TOKENS,), {"image": 0, "audio": 0}, 0)
    all_train = estimate(whole, cfg.stages[0], 8, GPUS["h100"], row).save
    assert estimate(whole, stage, 8, GPUS["h100"], row).save - rates.SAVE_PLAN * (not is_async) < 0.05 * all_train
    copies = replace(whole, parallel=replace(whole.parallel, replicate=8))
    assert estimate(copies, cfg.stages[0], 8, GPUS["h100"], row).save == pytest.approx(all_train, rel=0.01)


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
    with FakeTensorMode():
        norm = OffsetRMSNorm(D, 1e-6)
        norm.weight = torch.nn.Parameter(torch.empty(D, dtype=torch.bfloat16, device="cuda:0"))
        assert elementwise_bytes.eager(norm, [(tokens, D)]) == pytest.approx(
            [size * tokens * D for size in rates.OFFSET_NORM], rel=0.03
        )
    assert sum(rates.ROTATED) * tokens * QK == pytest.approx(counted["rotate"], rel=0.03)
    assert sum(rates.SWIGLU) * tokens * F == pytest.approx(counted["SwiGLU"], rel=0.03)


def test_moments_in_bf16_cost_the_bytes_that_their_operators_move():
    weight = nn.Parameter(torch.zeros(1024, 64))
    weight.grad = torch.ones_like(weight)
    adam = BF16MomentsAdamW([{"params": [weight], "keys": [1]}])
    moments = {name: torch.zeros_like(weight, dtype=torch.bfloat16) for name in ("exp_avg", "exp_avg_sq")}
    adam.state[weight] = {"step": torch.zeros(()), **moments}
    with elementwise_bytes.Bytes() as counted:
        adam.step()
    clipping = rates.ADAMW["fp32"] - 28
    assert rates.ADAMW["bf16"] - clipping == pytest.approx(counted.total / weight.numel(), rel=0.03)


@pytest.mark.parametrize("model", MODELS)
def test_preflight_says_what_bounds_a_step_and_that_it_is_an_assumption(model):
    cfg = make_config(model=MODELS[model], device="cuda")
    text = report(cfg, world_size=2)
    assert "s a step on H100s" in text and "rates that are assumptions" in text
    assert typical_row(cfg.stages[0].data, cfg.model).tokens == 64


def test_preflight_gives_no_time_for_a_run_on_a_cpu():
    assert "H100" not in report(make_config(device="cpu"), world_size=2)

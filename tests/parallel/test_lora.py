"""Adapters on several ranks: every layout gives the gradients of one process."""

import functools
from dataclasses import replace

import pytest
import torch

from avlm.config.load import resolve_config
from avlm.config.model import MODULES
from avlm.models import freezing
from avlm.models.avlm import AVLM, init
from avlm.models.lora import LowRankLinear, is_adapter, row_lengths
from avlm.parallel import mesh
from avlm.parallel.apply import own_part
from avlm.parallel.fsdp import reshard
from avlm.training import optimizer
from avlm.weights.sources import Whole, copy_slice
from tests.measurements.equivalence import TOLERANCE, distance, relative
from tests.parallel.small import TREE, build, make_rows, whole
from tests.parallel.spawn import run_ranks
from train import train_step

MIXES = ["both", "text", "image", "audio"]
EVERY_KIND = ["decoder.*", "vision.*.q", "vision.*.down", "audio.*.up"]
FULL = {"recompute": {"decoder": "full", "vision": "selective", "audio": "full"}}
SELECTIVE = {"recompute": {"decoder": "selective"}}
# ranks -> name -> (parallel, train, lora, what a stage says)
CASES = {
    2: {
        "FSDP, DoRA": ({"tower_sharding": "block"}, FULL, {"dora": True}, {"train": ["lora", "vision_projector"]}),
        "FSDP, all": ({}, {"accumulate_mode": "local"}, {"rslora": True}, {"train": list(MODULES)}),
        "TP": ({"tensor": 2}, FULL, {}, {"train": ["lora"]}),
        "TP, all": ({"tensor": 2}, SELECTIVE, {}, {"train": list(MODULES)}),
        "ring": ({"context": 2, "context_mode": "ring"}, SELECTIVE, {}, {"freeze_language_model": True}),
        "FSDP, compiled": ({}, {"compile": True, **FULL}, {"targets": ["decoder.*"]}, {"train": ["lora"]}),
    },
    4: {
        "FSDP x TP": ({"tensor": 2}, FULL, {}, {"train": ["lora", "audio_projector"]}),
        "HSDP x TP": ({"tensor": 2, "replicate": 2}, {}, {"rslora": True}, {"train": ["lora"]}),
        "TP x ring": ({"tensor": 2, "context": 2, "context_mode": "ring"}, {}, {}, {"train": ["lora"]}),
        "TP x Ulysses": ({"tensor": 2, "context": 2, "context_mode": "ulysses"}, SELECTIVE, {}, {"train": ["decoder"]}),
    },
}


def make(layout, train, lora, stage):
    decoder = {**TREE["model"]["decoder"], "num_heads": 8, "num_kv_heads": 4, "qkv_bias": True}
    model = {**TREE["model"], "decoder": decoder, "lora": {"rank": 3, "targets": EVERY_KIND, **lora}}
    stages = [{"name": "one", "steps": 4, **stage}]
    return resolve_config({**TREE, "model": model, "parallel": layout, "train": train, "stages": stages}, "test")


def start(cfg, worlds):
    """A laid-out model with weights in which no adapter is zero, and the same one whole."""
    world, model = build(cfg, worlds)
    alone = AVLM(cfg.model)
    init(alone)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in alone.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    for name, parameter in model.named_parameters():
        copy_slice(parameter, Whole(alone.get_parameter(name).detach()))
    return world, model, alone


def step(cfg, world, model):
    """(loss, whole gradients) of one step, of a row for each data rank."""
    rows = make_rows(cfg, MIXES[: world.data_size])
    num_targets = sum(len(row.target_R) for row in rows)
    part = own_part(rows[world.data_rank], cfg.model, world, balance=False)
    found = {}

    class Observed:
        step = staticmethod(
            lambda: found.update({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        )
        zero_grad = staticmethod(lambda: None)

    values = train_step(model, [part], num_targets, Observed, 1e9, world, cfg.train.accumulate_mode)
    return values[:-2].sum().item() / num_targets, values[-2].item(), {name: whole(g) for name, g in found.items()}


@functools.cache
def on_ranks(world_size):
    return run_ranks(everything, world_size, world_size)[0]


def everything(world_size):
    """Errors of each case, and with two ranks what a base in bf16 does."""
    worlds = {}
    found = {name: errors_of(make(*case), worlds) for name, case in CASES[world_size].items()}
    in_bf16 = train_in_bf16(worlds) if world_size == 2 else None
    mesh.stop()
    return found, in_bf16


def errors_of(cfg, worlds):
    world, model, alone = start(cfg, worlds)
    loss, norm, gradients = step(cfg, world, model)
    freezing.freeze(alone, cfg.stages[0])
    rows = make_rows(cfg, MIXES[: world.data_size])
    total = sum(alone(row)[0] for row in rows) / sum(len(row.target_R) for row in rows)
    total.backward()
    expected = {key: p.grad for key, p in alone.named_parameters() if p.requires_grad}
    length = torch.stack([g.norm() for g in expected.values()]).norm()
    loss_off, norm_off = relative(abs(loss - total.item()), total.item()), relative(abs(norm - length), length)
    return [loss_off, norm_off, distance(gradients, expected)]


@pytest.mark.parametrize("world_size", CASES)
def test_gradients_of_adapters_and_of_what_trains_beside_them_are_those_of_one_process(world_size):
    for name, errors in on_ranks(world_size)[0].items():
        assert max(errors) <= TOLERANCE, (name, errors)


def train_in_bf16(worlds):
    """A run of two stages over a base without float32 weights; and how DoRA starts on shards."""
    lora = {"base": "bf16", "targets": ["decoder.*", "vision.*.up"]}
    cfg = make({}, {"precision": "bf16"}, lora, {"train": ["audio_projector"]})
    second = replace(cfg.stages[0], name="two", train=["lora", "vision_projector", "audio"])
    world, model = build(cfg, worlds)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    before = {name: whole(parameter) for name, parameter in model.named_parameters()}
    losses = []
    for stage in (cfg.stages[0], second):
        freezing.freeze(model, stage)
        adam = optimizer.build(model, stage.optimizer)
        for i in range(6):
            optimizer.schedule(adam, stage.optimizer, i, 6)
            [row] = make_rows(cfg, ["both"])
            part = own_part(row, cfg.model, world, balance=False)
            values = train_step(model, [part], 2.0 * len(row.target_R), adam, 1.0, world)
            losses.append(values[:-2].sum().item())
    moved = {name for name, parameter in model.named_parameters() if not whole(parameter).equal(before[name])}
    reshard(model)
    _, dora = build(make({}, {}, {"dora": True}, {"train": ["lora"]}), worlds)
    magnitudes = [
        (whole(linear.lora_magnitude), row_lengths(whole(linear.weight)))
        for linear in dora.modules()
        if isinstance(linear, LowRankLinear)
    ]
    return dtypes, moved, losses, max((a - b).abs().max().item() for a, b in magnitudes)


def test_a_base_in_bf16_stays_as_it_is_beside_float32_adapters_that_learn():
    dtypes, moved, losses, magnitudes_off = on_ranks(2)[1]
    for name, dtype in dtypes.items():
        is_base = name.startswith(("decoder.", "vision.")) and not is_adapter(name)
        assert dtype == (torch.bfloat16 if is_base else torch.float32), name
        assert (name in moved) <= (not is_base), name
    assert {"decoder.blocks.1.ffn.down.lora_up.weight", "vision.blocks.0.up.lora_down.weight"} <= moved
    assert losses[-1] < losses[6] and magnitudes_off < 1e-6

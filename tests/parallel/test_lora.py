"""Adapters on several ranks: every layout gives the gradients of one process."""

import functools
from dataclasses import replace

import pytest
import torch

from avlm.config.load import resolve_config
from avlm.models import freezing
from avlm.models.avlm import AVLM
from avlm.models.batch import KINDS
from avlm.models.initial import init
from avlm.models.lora import LowRankLinear, is_adapter, row_lengths
from avlm.parallel import mesh
from avlm.parallel.apply import own_part
from avlm.parallel.fsdp import reshard
from avlm.training import optimizer
from avlm.weights.sources import Whole, copy_slice
from tests.measurements.equivalence import TOLERANCE, distance, relative
from tests.parallel.small import EVERYTHING, MODELS, TREE, Observer, build, make_rows, whole
from tests.parallel.spawn import run_ranks
from tests.parallel.test_compile import count_graphs
from train import train_step

MIXES = ["both", "text", "image", "audio"]
EVERY_KIND = ["decoder.*", "vision.*.q", "vision.*.down", "audio.*.up"]
FULL = {"recompute": {"decoder": "full", "vision": "selective", "audio": "full"}}
SELECTIVE = {"recompute": {"decoder": "selective"}}
ALL = {"train": EVERYTHING}
ADAPTERS = {"train": ["lora"]}
OF_SHARED = {"targets": ["decoder.*.q", "decoder.*.o", "decoder.*.shared.*"]}  # of experts
# ranks -> name -> (parallel, train, lora, keys of the stage, and of small.MODELS)
CASES = {
    2: {
        "FSDP, DoRA": ({"tower_sharding": "block"}, FULL, {"dora": True}, {"train": ["lora", "vision_projector"]}),
        "FSDP, all": ({}, {"accumulate_mode": "local"}, {"rslora": True}, ALL),
        "TP": ({"tensor": 2}, FULL, {}, ADAPTERS),
        "TP, all": ({"tensor": 2}, SELECTIVE, {}, ALL),
        "ring": ({"context": 2, "context_mode": "ring"}, SELECTIVE, {}, {"freeze_language_model": True}),
        "FSDP, windows": ({}, FULL, {"targets": ["decoder.*.q", "vision.*.gate"]}, ADAPTERS, "windows"),
        "TP, DeepStack": ({"tensor": 2}, {}, {"rslora": True}, {"train": ["lora", "vision_projector"]}, "deep"),
        "TP, experts": ({"tensor": 2, "expert": 2}, SELECTIVE, OF_SHARED, ADAPTERS, "experts"),
        "FSDP, experts": ({"expert": 2}, FULL, {"dora": True, **OF_SHARED}, ALL, "experts"),
        "FSDP, Conformers": ({"tower_sharding": "block"}, FULL, {}, ALL, "conformer"),
        "ring, Conformers": ({"context": 2, "context_mode": "ring"}, {}, {}, ADAPTERS, "conformer"),
        "FSDP, compiled": ({}, {"compile": True, **FULL}, {"targets": ["decoder.*"]}, ADAPTERS),
    },
    4: {
        "FSDP x TP": ({"tensor": 2}, FULL, {}, {"train": ["lora", "audio_projector"]}),
        "HSDP x TP": ({"tensor": 2, "replicate": 2}, {}, {"rslora": True}, ADAPTERS),
        "TP x ring": ({"tensor": 2, "context": 2, "context_mode": "ring"}, {}, {}, ADAPTERS),
        "TP x Ulysses": ({"tensor": 2, "context": 2, "context_mode": "ulysses"}, SELECTIVE, {}, {"train": ["decoder"]}),
    },
}


def make(layout, train, lora, stage, kind="square"):
    decoder = {**MODELS[kind]["decoder"], "num_heads": 8, "num_kv_heads": 4, "qkv_bias": True}
    model = {**MODELS[kind], "decoder": decoder, "lora": {"rank": 3, "targets": EVERY_KIND, **lora}}
    stages = [{"name": "one", "steps": 4, **stage}]
    return resolve_config({**TREE, "model": model, "parallel": layout, "train": train, "stages": stages}, "test")


def start(cfg, worlds):
    """A sharded model whose adapters are not zero, and the same model whole."""
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


def rows_of(cfg, world):
    """A row for each data rank, and the targets of all."""
    rows = make_rows(cfg, MIXES[: world.data_size])
    return rows, sum(len(row.target_R) for row in rows)


def step(cfg, world, model):
    """(loss, gradient norm, whole gradients) of one step, of a row for each data rank."""
    rows, num_targets = rows_of(cfg, world)
    part = own_part(rows[world.data_rank], cfg.model, world)
    observer = Observer(model)
    values = train_step(model, [part], num_targets, observer, 1e9, world, cfg.train.accumulate_mode)
    *losses, norm, _ = values[: len(KINDS) + 2].tolist()
    return sum(losses) / num_targets, norm, observer.gradients


@functools.cache
def on_ranks(world_size):
    return run_ranks(everything, world_size, world_size)[0]


def everything(world_size):
    """Errors of each case, and with two ranks the results of a base in bf16."""
    worlds = {}
    with count_graphs():
        found = {name: errors_of(make(*case), worlds) for name, case in CASES[world_size].items()}
    in_bf16 = None
    if world_size == 2:
        in_bf16 = *train_in_bf16(worlds), dora_error(worlds)
    mesh.stop()
    return found, in_bf16


def errors_of(cfg, worlds):
    """Of the loss, the gradient norm and the worst gradient."""
    world, model, alone = start(cfg, worlds)
    loss, norm, gradients = step(cfg, world, model)
    freezing.freeze(alone, cfg.stages[0])
    rows, num_targets = rows_of(cfg, world)
    expected_loss = sum(alone(row)[0] for row in rows) / num_targets
    expected_loss.backward()
    expected = {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}
    expected_norm = torch.stack([g.norm() for g in expected.values()]).norm()
    return [
        relative(abs(loss - expected_loss.item()), expected_loss.item()),
        relative(abs(norm - expected_norm), expected_norm),
        distance(gradients, expected),
    ]


@pytest.mark.parametrize("world_size", CASES)
def test_gradients_of_adapters_and_of_all_that_trains_with_them_are_those_of_one_process(world_size):
    for name, errors in on_ranks(world_size)[0].items():
        assert max(errors) <= TOLERANCE, (name, errors)


def train_in_bf16(worlds):
    """(dtypes, names of the parameters that moved, losses) of two stages over a base without float32 weights."""
    lora = {"base": "bf16", "targets": ["decoder.*", "vision.*.up"]}
    cfg = make({}, {"precision": "bf16"}, lora, {"train": ["audio_projector"]})
    first = cfg.stages[0]
    second = replace(first, name="two", train=["lora", "vision_projector", "audio"])
    world, model = build(cfg, worlds)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    before = {name: whole(parameter) for name, parameter in model.named_parameters()}
    [row] = make_rows(cfg, ["both"])
    part = own_part(row, cfg.model, world)
    losses = []
    for stage in (first, second):
        freezing.freeze(model, stage)
        adam = optimizer.build(model, stage.optimizer)
        for i in range(6):
            optimizer.schedule(adam, stage.optimizer, i, 6)
            values = train_step(model, [part], 2.0 * len(row.target_R), adam, 1.0, world)
            losses.append(values[:-2].sum().item())
    moved = {name for name, parameter in model.named_parameters() if not whole(parameter).equal(before[name])}
    reshard(model)
    return dtypes, moved, losses


def dora_error(worlds):
    """How far sharded DoRA magnitudes are at first from the lengths of the weight's rows."""
    _, model = build(make({}, {}, {"dora": True}, ADAPTERS), worlds)
    error = 0.0
    for linear in model.modules():
        if isinstance(linear, LowRankLinear):
            off = whole(linear.lora_magnitude) - row_lengths(whole(linear.weight))
            error = max(error, off.abs().max().item())
    return error


def test_a_base_in_bf16_stays_as_it_is_while_float32_adapters_learn():
    dtypes, moved, losses, _ = on_ranks(2)[1]
    for name, dtype in dtypes.items():
        if name.startswith(("decoder.", "vision.")) and not is_adapter(name):
            assert dtype == torch.bfloat16, name
            assert name not in moved
        else:
            assert dtype == torch.float32, name
    assert {"decoder.blocks.1.ffn.down.lora_up.weight", "vision.blocks.0.up.lora_down.weight"} <= moved
    assert losses[-1] < losses[6]


def test_dora_magnitudes_on_shards_begin_as_the_lengths_of_whole_rows():
    *_, error = on_ranks(2)[1]
    assert error < 1e-6

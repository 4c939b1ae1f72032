"""Sharded training over many steps and stages, and worlds that do not fit."""

from dataclasses import replace

import pytest

from avlm.config.load import load_config
from avlm.models import freezing
from avlm.parallel import mesh
from avlm.training import optimizer
from tests.parallel.small import build, make_config, make_rows, whole
from tests.parallel.spawn import run_ranks
from train import train_step

MIXES = ["text", "image", "audio", "both"]  # ranks never agree on their media


def twenty_steps(cfg, steps=20):
    """Losses and gradient norms over a fixed list of rows, row i to rank i mod n; and whether the head is tied."""
    world, model = build(cfg)
    adam = optimizer.build(model, cfg.stages[0].optimizer)
    rows = make_rows(cfg, MIXES), make_rows(cfg, MIXES[::-1], seed=1)
    history = []
    for step in range(steps):
        of_step = rows[step % 2]
        num_targets = sum(len(row.target_R) for row in of_step)
        optimizer.schedule(adam, cfg.stages[0].optimizer, step, steps)
        values = train_step(model, of_step[world.rank :: world.size], num_targets, adam, 1.0, world)
        loss = values[:-2].sum().item() / num_targets
        history.append((loss, values[-2].item()))
    tied = is_tied(model)
    mesh.stop()
    return history, tied


def is_tied(model):
    return model.decoder.head.weight is model.decoder.embedding.weight


@pytest.mark.parametrize("world_size", [2, 4])
def test_more_ranks_take_the_same_twenty_steps(world_size):
    [(alone, _)] = run_ranks(twenty_steps, 1, make_config())
    for history, tied in run_ranks(twenty_steps, world_size, make_config()):
        assert tied, "the tied head lost its embedding"
        for (loss, norm), (loss_alone, norm_alone) in zip(history, alone):
            assert loss == pytest.approx(loss_alone, rel=1e-5)
            assert norm == pytest.approx(norm_alone, rel=1e-4)
    first_loss, _ = alone[0]
    last_loss, _ = alone[-1]
    assert last_loss < first_loss


def stages_in_bf16(layouts):
    """For each layout: modules that moved in each stage, dtypes of the weights, and whether the head is tied."""
    worlds = {}
    found = []
    for cfg in layouts:
        world, model = build(cfg, worlds)
        moved = []
        for stage in cfg.stages:
            freezing.freeze(model, stage)
            adam = optimizer.build(model, stage.optimizer)
            before = {name: whole(parameter) for name, parameter in model.named_parameters()}
            for row in make_rows(cfg, MIXES)[world.rank :: world.size]:
                optimizer.schedule(adam, stage.optimizer, 5, 10)
                train_step(model, [row], 50.0, adam, 1.0, world)
            modules = set()
            for name, parameter in model.named_parameters():
                if not whole(parameter).equal(before[name]):
                    modules.add(name.split(".")[0])
            moved.append(modules)
        dtypes = {str(parameter.dtype) for parameter in model.parameters()}
        found.append((moved, dtypes, is_tied(model)))
    mesh.stop()
    return found


def test_a_module_may_be_frozen_then_trained_then_frozen_in_bf16_however_it_is_sharded():
    stages = [
        {"name": "a", "steps": 2, "train": ["decoder"]},
        {"name": "b", "steps": 2, "train": ["vision", "vision_projector", "audio"]},
        {"name": "c", "steps": 2, "train": ["audio_projector"]},
        {"name": "d", "steps": 2, "train": ["decoder", "vision_projector"]},
    ]
    layouts = [{}, {"tower_sharding": "block", "reshard": False}, {"cpu_offload": True}]
    configs = [make_config(stages=stages, train={"precision": "bf16"}, parallel=layout) for layout in layouts]
    for ranks in run_ranks(stages_in_bf16, 2, configs):
        for moved, dtypes, tied in ranks:
            assert moved == [set(stage["train"]) for stage in stages]
            assert dtypes == {"torch.float32"}, "weights stay float32"
            assert tied, "the tied head lost its embedding"


@pytest.mark.parametrize(
    ("layout", "world_size", "message"),
    [
        ({"replicate": 2, "shard": 2}, 3, r"replicate=2 x shard=2 x context=1 x tensor=1 does not make 3 ranks"),
        ({"context": 4, "tensor": 2}, 4, r"replicate=1 x context=4 x tensor=2 does not divide 4 ranks"),
    ],
)
def test_a_world_that_the_mesh_does_not_fit_is_refused(layout, world_size, message):
    with pytest.raises(ValueError, match=message):
        mesh.sizes(replace(make_config().parallel, **layout), world_size)


def test_an_unknown_axis_is_named_with_the_nearest_known_one():
    with pytest.raises(ValueError, match=r"unknown key parallel\.tensors \(did you mean tensor\?\)"):
        load_config("configs/demo.yaml", ["parallel.tensors=2"])

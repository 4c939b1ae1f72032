"""Sharding changes no number: one, two and four ranks take the same steps, whatever media each rank happens to have."""

from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor

from avlm import config, optimizer, parallel, weights
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample
from avlm.models.avlm import AVLM
from avlm.parallel import mesh
from tests.parallel.spawn import run_ranks
from train import train_step

WIDTH = 32
TREE = {
    "output_dir": "unused",
    "model": {
        "decoder": {
            **{"vocab_size": 96, "hidden_size": WIDTH, "intermediate_size": 64, "num_layers": 2},
            **{"num_heads": 4, "num_kv_heads": 2, "tie_embedding": True},
        },
        "vision": {
            **{"hidden_size": 24, "intermediate_size": 48, "num_layers": 2, "num_heads": 2},
            **{"image_size": 16, "patch_size": 8, "feature_layer": -1},
        },
        "audio": {
            **{"hidden_size": 24, "intermediate_size": 48, "num_layers": 1, "num_heads": 2},
            **{"num_mels": 16, "max_positions": 50},
        },
        "vision_projector": {},
        "audio_projector": {"downsample": 2},
    },
    "data": {"train": "synthetic", "seq_length": 64},
    "optimizer": {"lr": 3e-3, "warmup_steps": 2},
    "stages": [{"name": "all", "steps": 20, "train": list(config.MODULES)}],
}


def make_config(**overrides):
    tree = {**TREE, **overrides}
    return config.resolve(tree, "test")


def make_rows(cfg, count, seed=0):
    """Rows of very different content: none, images only, clips only, both; so that ranks never agree on their media."""
    generator = torch.Generator().manual_seed(seed)
    integers = lambda *shape: torch.randint(0, cfg.model.decoder.vocab_size, shape, generator=generator)
    rows = []
    for i in range(count):
        samples = []
        for j in range(3):
            images, clips = [(0, 0), (2, 0), (0, 1), (1, 1)][(i + (j == 1)) % 4]
            mels = [torch.randn(16, 2 * (5 + j), generator=generator) for _ in range(clips)]
            text = integers(6 + j)
            media = [-200] * (4 * images) + [-300] * sum(-(-mel.shape[1] // 4) for mel in mels)
            token_T = torch.cat([torch.tensor(media, dtype=torch.long), text])
            target_T = torch.full_like(token_T, -100)
            target_T[len(media) : -1] = token_T[len(media) + 1 :]
            pixels = torch.randint(0, 255, (images, 3, 16, 16), generator=generator, dtype=torch.uint8)
            kind = ["text", "image", "audio", "mixed"][(images > 0) + 2 * (clips > 0)]
            samples.append(EncodedSample(f"{i}.{j}", kind, token_T, target_T, pixels, mels))
        rows.append(pack(samples, cfg.stages[0].data.seq_length, cfg.model))
    return rows


def build(cfg):
    world = mesh.start(cfg, torch.device("cpu"))
    with torch.device("meta"):
        model = AVLM(cfg.model)
    parallel.apply(model, world, cfg)
    weights.start(model, cfg.init_from, cfg.seed)
    parallel.warm_up(model, cfg, world)
    optimizer.freeze(model, cfg.stages[0])
    return world, model, optimizer.build(model, cfg.stages[0].optimizer)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def twenty_steps(cfg, rows_of_step=4, steps=20):
    """Losses and gradient norms over a fixed list of rows, row i to rank i mod n; and whether the head is tied."""
    world, model, adam = build(cfg)
    rows = make_rows(cfg, 2 * rows_of_step)
    history = []
    for step in range(steps):
        of_step = rows[step % 2 * rows_of_step :][:rows_of_step]
        num_targets = sum(len(row.target_R) for row in of_step)
        optimizer.schedule(adam, cfg.stages[0].optimizer, step, steps)
        values = train_step(model, of_step[world.rank :: world.size], num_targets, adam, 1.0, world)
        history.append((values[:-2].sum().item() / num_targets, values[-2].item()))
    tied = model.decoder.head.weight is model.decoder.embedding.weight
    mesh.stop()
    return history, tied


def gradients(cfg):
    """Gradients of one step, whole, by name."""
    world, model, _ = build(cfg)
    rows = make_rows(cfg, 4)
    num_targets = sum(len(row.target_R) for row in rows)
    for row in rows[world.rank :: world.size]:
        (model(row)[0] / num_targets).backward()
    found = {name: whole(p.grad).numpy() for name, p in model.named_parameters()}
    mesh.stop()
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_more_ranks_take_the_same_twenty_steps(world_size):
    [(alone, _)] = run_ranks(twenty_steps, 1, make_config())
    for history, tied in run_ranks(twenty_steps, world_size, make_config()):
        assert tied, "the tied head lost its embedding"
        for (loss, norm), (loss_alone, norm_alone) in zip(history, alone):
            assert abs(loss - loss_alone) <= 1e-5 * loss_alone
            assert abs(norm - norm_alone) <= 1e-4 * norm_alone
    assert alone[-1][0] < alone[0][0]


def test_replicas_of_shards_have_the_gradients_of_one_process():
    """HSDP 2 x 2, by the comparison rule of docs/architecture.md."""
    [alone] = run_ranks(gradients, 1, make_config())
    [sharded, *_] = run_ranks(gradients, 4, make_config(parallel={"replicate": 2, "shard": 2}))
    norm = sum((g**2).sum() for g in alone.values()) ** 0.5
    assert alone.keys() == sharded.keys()
    for name, expected in alone.items():
        scale = max(abs(expected).max(), 1e-3 * norm)
        assert abs(sharded[name] - expected).max() <= 1e-4 * scale, name


def stages_in_bf16(cfg):
    """Vision frozen, then trained, then frozen: weights that moved in each stage."""
    world, model, _ = build(cfg)
    moved = []
    for stage in cfg.stages:
        optimizer.freeze(model, stage)
        adam = optimizer.build(model, stage.optimizer)
        before = {name: whole(p) for name, p in model.named_parameters()}
        for row in make_rows(cfg, 4)[world.rank :: world.size]:
            optimizer.schedule(adam, stage.optimizer, 5, 10)
            train_step(model, [row], 50.0, adam, 1.0, world)
        moved.append(
            {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(whole(p), before[name])}
        )
    dtypes = {p.dtype for p in model.parameters()}
    mesh.stop()
    return moved, dtypes


def test_a_tower_may_be_frozen_then_trained_then_frozen_in_bf16():
    stages = [
        {"name": "a", "steps": 2, "train": ["decoder"]},
        {"name": "b", "steps": 2, "train": ["vision", "vision_projector", "audio"]},
        {"name": "c", "steps": 2, "train": ["audio_projector"]},
    ]
    cfg = make_config(stages=stages, train={"precision": "bf16"})
    for moved, dtypes in run_ranks(stages_in_bf16, 2, cfg):
        assert moved == [{"decoder"}, {"vision", "vision_projector", "audio"}, {"audio_projector"}]
        assert dtypes == {torch.float32}, "weights stay float32"


def test_a_world_that_the_mesh_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"parallel\.replicate=2 x parallel\.shard=2 does not make 3 ranks"):
        mesh.sizes(replace(make_config().parallel, replicate=2, shard=2), 3)

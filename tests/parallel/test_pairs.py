"""Contrastive stages over ranks and micro-batches: the steps of one process."""

import pytest
import torch

from avlm.data.captions import EncodedPair, pack_pairs
from avlm.models.batch import empty_pairs
from avlm.parallel import mesh
from avlm.parallel.check import check_layout
from avlm.parallel.rows import of_a_step
from avlm.training import optimizer
from tests.parallel.small import TREE, build, make_config
from tests.parallel.spawn import run_ranks
from train import train_step

TEXT = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 2,
    "max_position": 8,
}
STAGE = {"name": "pairs", "steps": 6, "objective": "contrastive", "train": ["vision", "audio", "text", "contrastive"]}
LOSSES = {"softmax": {"size": 16}, "sigmoid": {"size": 16, "loss": "sigmoid", "vision": {"pool": "attention"}}}


def config_of(loss: str, **changes):
    model = {**TREE["model"], "text": TEXT, "contrastive": LOSSES[loss]}
    return make_config(**{"model": model, "stages": [STAGE], "optimizer": {"lr": 1e-2, "warmup_steps": 1}, **changes})


def rows_of(model, seed: int) -> list:
    """Four rows of different numbers of images and clips with their captions; the last has none."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for num_images, num_clips in ((2, 1), (0, 2), (3, 0)):
        samples = []
        for kind in ["image"] * num_images + ["audio"] * num_clips:
            token_T = torch.randint(0, 96, (3 + len(samples),), generator=generator)
            if kind == "image":
                items = [torch.randint(0, 255, (2, 2, 192), generator=generator, dtype=torch.uint8)]
            else:
                items = [torch.randn(16, 20, generator=generator)]
            samples.append(EncodedPair("", kind, token_T, token_T, {kind: items}))
        rows.append(pack_pairs(samples, model))
    return [*rows, empty_pairs(model)]


def steps(layouts):
    """(loss, gradient norm) of each step of each layout: row i is of rank i mod n."""
    worlds, found = {}, []
    for cfg in layouts:
        world, model = build(cfg, worlds)
        adam = optimizer.build(model, cfg.stages[0].optimizer)
        history = []
        for step in range(cfg.stages[0].steps):
            rows = rows_of(cfg.model, step % 3)
            num_pairs = sum(len(row.target_R) for row in rows)
            parts = of_a_step(rows[world.rank :: world.size], cfg.model, world)
            optimizer.schedule(adam, cfg.stages[0].optimizer, step, 6)
            values = train_step(model, parts, num_pairs, adam, 1.0, world)
            history.append((values[:-2].sum().item() / num_pairs, values[-2].item()))
        found.append(history)
    mesh.stop()
    return found


def test_ranks_and_micro_batches_take_the_steps_of_one_process():
    [alone] = run_ranks(steps, 1, [config_of(loss) for loss in LOSSES])
    for losses in alone:
        assert losses[-1][0] < losses[0][0], "it learns"
    copies = {"replicate": 2, "tower_sharding": "block"}
    layouts = [config_of("softmax"), config_of("sigmoid", parallel=copies)]
    for found in run_ranks(steps, 2, layouts):
        for history, of_one in zip(found, alone, strict=True):
            for (loss, norm), (loss_alone, norm_alone) in zip(history, of_one, strict=True):
                assert loss == pytest.approx(loss_alone, rel=1e-5)
                assert norm == pytest.approx(norm_alone, rel=1e-4)


@pytest.mark.parametrize("key, value", [("context", 2), ("tensor", 2), ("balance_media", True)])
def test_layouts_that_share_rows_are_refused(key, value):
    cfg = config_of("softmax", parallel={key: value})
    with pytest.raises(ValueError, match=f"stage pairs: objective=contrastive .* set parallel.{key}="):
        check_layout(cfg, 2)

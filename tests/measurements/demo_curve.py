"""Twenty steps of configs/demo.yaml's last stage, on its own data, in several layouts: the losses of one process."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

from avlm.config.load import load_config
from avlm.config.parallel import ParallelConfig
from avlm.config.run import Config
from avlm.data.loader import open_loader
from avlm.data.stream import Stream
from avlm.demo.build import ensure
from avlm.parallel import mesh
from avlm.parallel.apply import own_part
from avlm.training import optimizer
from tests.parallel.small import build
from tests.parallel.spawn import run_ranks
from train import train_step

STEPS, ROWS_OF_STEP = 20, 4
LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("one process", 1, {}),
    ("FSDP", 4, {}),
    ("HSDP x TP", 4, {"replicate": 2, "tensor": 2}),
    ("TP x ring", 4, {"tensor": 2, "context": 2, "context_mode": "ring"}),
    ("FSDP x Ulysses, media balanced", 4, {"context": 2, "context_mode": "ulysses", "balance_media": True}),
]


def curve(cfg: Config) -> list[float]:
    """Loss per target of every step, on every rank alike. Each rank reads the rows itself: sent to it, every tensor
    would be an open file."""
    data = cfg.stages[0].data
    loader = open_loader(Stream(data.train, data, cfg.model, rank=0, world=1, seed=1, train=True))
    rows = list(itertools.islice(loader, STEPS * ROWS_OF_STEP))
    world, model = build(cfg)
    stage = cfg.stages[0]
    adam = optimizer.build(model, stage.optimizer)
    losses = []
    for step in range(STEPS):
        of_step = rows[step * ROWS_OF_STEP :][:ROWS_OF_STEP]
        num_targets = sum(len(row.target_R) for row in of_step)
        optimizer.schedule(adam, stage.optimizer, 50 + step, stage.steps)
        parts = [own_part(row, cfg.model, world) for row in of_step[world.data_rank :: world.data_size]]
        values = train_step(model, parts, num_targets, adam, stage.optimizer.clip_norm, world)
        losses.append(values[:-2].sum().item() / num_targets)
    mesh.stop()
    return losses


def run() -> list[str]:
    cfg = load_config(Path(__file__).parents[2] / "configs" / "demo.yaml", ["device=cpu"])
    ensure(cfg)
    stage = cfg.stages[-1]  # without processes of its own: a rank of a test may have none
    cfg = replace(cfg, stages=[replace(stage, data=replace(stage.data, num_workers=0))])
    failed, expected = [], []
    for name, world_size, layout in LAYOUTS:
        sharded = replace(cfg, parallel=ParallelConfig(**layout))
        losses = run_ranks(curve, world_size, sharded, timeout=900)[0]
        expected = expected or losses
        worst = max(abs(a - b) / b for a, b in zip(losses, expected))
        line = f"{world_size}  demo.yaml, {STEPS} steps  {name:<32}  "
        line += f"{losses[0]:.4f} -> {losses[-1]:.4f}  worst {worst:.1e}"
        print(line, flush=True)
        if not worst <= 1e-5:
            failed.append(line)
    return failed


if __name__ == "__main__":
    assert not run()

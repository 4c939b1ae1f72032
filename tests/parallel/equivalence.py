"""Every layout gives the numbers of one process: python -m tests.parallel.equivalence [--quick] [--world-sizes 1 2 4]

A case is a layout, what media the rows hold, how many rows a rank accumulates, what is recomputed and what trains; any
two settings of two of these factors meet in some case (pairwise covering). It is compared with the plain model in one
process: loss, gradient norm and every gradient, by the rule of docs/architecture.md. Prints a line a case, and exits
with 1 when one fails.
"""

import argparse
import functools
import itertools
import random
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from avlm import config, optimizer, parallel, weights
from avlm.config import Config
from avlm.models.avlm import AVLM, init
from avlm.parallel import mesh
from tests.parallel.small import MEDIA, TREE, make_rows
from tests.parallel.spawn import run_ranks
from train import train_step

TOLERANCE = 1e-5
MIXES = ("text", "image", "audio", "both", "different")  # different: no two neighbouring ranks have the same
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one process": {}},
    2: {
        "FSDP": {},
        "FSDP, towers by block": {"tower_sharding": "block"},
        "FSDP, media balanced": {"balance_media": True},
        "HSDP": {"replicate": 2},
        "TP": {"tensor": 2},
        "ring": {"context": 2, "context_mode": "ring"},
        "all-gather": {"context": 2, "context_mode": "allgather"},
        "Ulysses": {"context": 2, "context_mode": "ulysses"},
    },
    4: {
        "FSDP": {},
        "HSDP": {"replicate": 2},
        "TP": {"tensor": 4},
        "ring": {"context": 4, "context_mode": "ring"},
        "all-gather": {"context": 4, "context_mode": "allgather"},
        "Ulysses": {"context": 4, "context_mode": "ulysses"},
        "FSDP x TP": {"tensor": 2},
        "FSDP x ring": {"context": 2, "context_mode": "ring"},
        "FSDP x ring, media balanced": {"context": 2, "context_mode": "ring", "balance_media": True},
        "HSDP x TP": {"replicate": 2, "tensor": 2},
        "HSDP x Ulysses": {"replicate": 2, "context": 2, "context_mode": "ulysses"},
        "TP x ring": {"context": 2, "tensor": 2, "context_mode": "ring"},
        "TP x all-gather": {"context": 2, "tensor": 2, "context_mode": "allgather"},
        "TP x Ulysses": {"context": 2, "tensor": 2, "context_mode": "ulysses"},
    },
    8: {
        "HSDP x TP": {"replicate": 2, "tensor": 2},
        "FSDP x TP x ring": {"context": 2, "tensor": 2, "context_mode": "ring"},
        "FSDP x TP x Ulysses, media balanced": {
            **{"context": 2, "tensor": 2, "context_mode": "ulysses"},
            **{"balance_media": True, "tower_sharding": "block"},
        },
        "HSDP x ring": {"replicate": 2, "context": 4, "context_mode": "ring"},
    },
}
FACTORS = {
    "mix": MIXES,
    "accumulate": (1, 3),
    "recompute": ("none", "selective", "full"),
    "accumulate_mode": ("sharded", "local"),
    "trains": ("everything", "projectors"),
    "tied": (True, False),
}


@dataclass(frozen=True)
class Case:
    layout: str
    mix: str
    accumulate: int
    recompute: str
    accumulate_mode: str
    trains: str
    tied: bool
    precision: str = "fp32"

    def config(self, layout: dict[str, Any]) -> Config:
        model = {**TREE["model"]}
        model["decoder"] = {**model["decoder"], "num_heads": 8, "num_kv_heads": 4, "tie_embedding": self.tied}
        model["decoder"] |= {"qkv_bias": self.tied, "qk_norm": not self.tied}
        tree = {**TREE, "model": model, "parallel": layout}
        names = config.MODULES if self.trains == "everything" else ("vision_projector", "audio_projector")
        tree["stages"] = [{"name": "all", "steps": 20, "train": list(names)}]
        recompute = dict.fromkeys(("decoder", "vision", "audio"), self.recompute)
        tree["train"] = {"accumulate_mode": self.accumulate_mode, "recompute": recompute, "precision": self.precision}
        return config.resolve(tree, "equivalence")

    def mixes(self, data_size: int) -> list[str]:
        """Of the rows of a step, row i of which is data rank i mod size's."""
        different = ("both", "text", "image", "audio")
        count = data_size * self.accumulate
        return [different[i % 4] if self.mix == "different" else self.mix for i in range(count)]


def cover(layouts: list[str], seed: int = 0, **fixed: Any) -> list[Case]:
    """Cases in which any two values of two factors meet, greedily: each takes most of what is left to meet."""
    factors = {"layout": tuple(layouts), **FACTORS, **{key: (value,) for key, value in fixed.items()}}
    generator = random.Random(seed)
    pairs = lambda case: {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}
    left = set().union(
        *({frozenset(((a, x), (b, y))) for x in factors[a] for y in factors[b]} for a, b in itertools.combinations(factors, 2))
    )
    cases = []
    while left:
        first = sorted(min(left, key=lambda pair: sorted(map(str, pair))), key=str)
        draws = [{key: generator.choice(values) for key, values in factors.items()} | dict(first) for _ in range(40)]
        best = max(draws, key=lambda case: len(pairs(case) & left))
        left -= pairs(best)
        cases.append(Case(**best))
    return sorted(cases, key=lambda case: layouts.index(case.layout))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


@functools.lru_cache(maxsize=64)
def alone(case: Case, num_rows: int) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, gradient norm and gradients of the plain model; ``case`` holds what matters to it alone."""
    cfg = case.config({})
    model = AVLM(cfg.model)
    init(model, cfg.seed)
    optimizer.freeze(model, cfg.stages[0])
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    compute = AVLM(cfg.model)
    compute.load_state_dict(model.state_dict())
    compute.to(dtype)
    optimizer.freeze(compute, cfg.stages[0])
    rows = make_rows(cfg, case.mixes(num_rows))
    num_targets = sum(len(row.target_R) for row in rows)
    gradients = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters() if p.requires_grad}
    total = 0.0
    for row in rows:  # summed in float32, as the reduction of FSDP does
        compute.zero_grad()
        loss, _ = compute(row)
        (loss / num_targets).backward()
        total += loss.item() / num_targets
        for name, parameter in compute.named_parameters():
            if parameter.grad is not None:
                gradients[name] += parameter.grad.float()
    norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    return total, norm, gradients


def build(cfg: Config, shape_worlds: dict[tuple, mesh.World]) -> tuple[mesh.World, AVLM]:
    shape = mesh.sizes(cfg.parallel, dist.get_world_size())
    if shape not in shape_worlds:
        shape_worlds[shape] = mesh.lay_out(shape, torch.device("cpu"))
    world = shape_worlds[shape]
    with torch.device("meta"):
        model = AVLM(cfg.model)
    parallel.apply(model, world, cfg)
    weights.start(model, cfg.init_from, cfg.seed)
    parallel.warm_up(model, cfg, world)
    optimizer.freeze(model, cfg.stages[0])
    return world, model


def run_case(case: Case, layout: dict[str, Any], worlds: dict) -> tuple[float, float, dict[str, torch.Tensor], int]:
    """Loss, gradient norm and whole gradients of one step of a sharded model; and how many rows it took."""
    cfg = case.config(layout)
    world, model = build(cfg, worlds)
    rows = make_rows(cfg, case.mixes(world.data_size))
    num_targets = sum(len(row.target_R) for row in rows)
    parts = [parallel.own_part(row, cfg, world) for row in rows[world.data_rank :: world.data_size]]
    found: dict[str, torch.Tensor] = {}

    class Observed:  # stands for the optimizer: the gradients are looked at where it would use them
        step = staticmethod(lambda: found.update({n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        zero_grad = staticmethod(lambda: None)

    values = train_step(model, parts, num_targets, Observed, 1e9, world, cfg.train.accumulate_mode)
    gradients = {name: whole(gradient) for name, gradient in found.items()}
    return values[:-2].sum().item() / num_targets, values[-2].item(), gradients, len(rows)


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of the worst parameter, by the rule of docs/architecture.md."""
    assert found.keys() == expected.keys(), f"gradients of {sorted(found.keys() ^ expected.keys())}"
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    return max(relative((found[name] - g).norm(), torch.maximum(g.norm(), 1e-3 * norm)) for name, g in expected.items())


def relative(error: float | torch.Tensor, size: float | torch.Tensor) -> float:
    """error / size; 0 / 0 is 0, and NaN is infinite."""
    ratio = float(error) / max(float(size), 1e-30)
    return ratio if ratio == ratio else float("inf")


def compare(case: Case, layout: dict[str, Any], worlds: dict) -> tuple[bool, str]:
    """Whether a case agrees, and its line of the table."""
    started = time.perf_counter()
    loss, norm, gradients, num_rows = run_case(case, layout, worlds)
    if dist.get_rank():
        return True, ""
    same = dict(layout="", recompute="none", accumulate_mode="sharded")
    expected = alone(Case(**{**vars(case), **same}), num_rows // case.accumulate)
    errors = [relative(abs(loss - expected[0]), expected[0]), relative(abs(norm - expected[1]), expected[1])]
    errors.append(distance(gradients, expected[2]))
    agrees = max(errors) <= TOLERANCE
    cells = [f"{case.layout:<36}", f"{case.mix:<9}", f"{case.accumulate} {case.accumulate_mode:<7}", f"{case.recompute:<9}"]
    cells += [f"{case.trains:<10}", "tied  " if case.tied else "untied", *(f"{error:.1e}" for error in errors)]
    return agrees, "  ".join([*cells, f"{time.perf_counter() - started:4.1f} s", "ok" if agrees else "FAILS"])


def compare_all(cases: list[Case], layouts: dict[str, dict[str, Any]]) -> list[tuple[bool, str]]:
    """Runs on every rank; the lines of rank 0 count."""
    dist.init_process_group("gloo")
    worlds: dict[tuple, mesh.World] = {}
    lines = []
    for case in cases:
        lines.append(compare(case, layouts[case.layout], worlds))
        if dist.get_rank() == 0:
            print(f"{dist.get_world_size()}  {lines[-1][1]}", flush=True)
    mesh.stop()
    return lines

"""Every layout gives the numbers of one process.

    python -m tests.measurements.equivalence [--quick] [--world-sizes 1 2 4]

A case is a layout, what media the rows hold, how many rows a rank accumulates, what is recomputed and what trains; any
two settings of two of these factors meet in some case (pairwise covering). It is compared with the plain model in one
process: loss, gradient norm and every gradient, by the rule of docs/contracts.md. Prints a line a case, and exits
with 1 when one fails.
"""

import argparse
import functools
import itertools
import random
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from avlm.config.load import resolve_config
from avlm.config.model import MODULES
from avlm.config.run import Config
from avlm.models import freezing
from avlm.models.avlm import AVLM
from avlm.models.batch import KINDS
from avlm.models.initial import init
from avlm.models.moe import set_balance
from avlm.parallel import mesh
from avlm.parallel.apply import own_part
from tests.measurements import demo_curve, no_hang
from tests.measurements.layouts import EXPERTS, KV_HEADS, LAYOUTS
from tests.parallel.small import MODELS, TREE, build, make_rows, whole
from tests.parallel.spawn import run_ranks
from train import train_step

TOLERANCE = 1e-5
MIXES = ("text", "image", "audio", "both", "different")  # different: no two neighbouring ranks have the same
WINDOWED = ("FSDP", "TP", "all-gather", "Ulysses")  # on 2 ranks
MASKED = {"gemma": ("TP", "all-gather"), "prefix": ("FSDP", "Ulysses")}  # model -> layouts, on 2 ranks
# Towers of any grid, with windows, or with DeepStack and a position table; M-RoPE in sections, or interleaved. Views of
# an image, whose features are joined and stretched across the borders of ranks, with learned rows in between.
OTHER_IMAGES = {
    2: ("FSDP", "FSDP, towers by block", "FSDP, towers replicated", "FSDP, media balanced", "TP", "ring", "all-gather")
    + ("Ulysses",),
    4: ("FSDP x ring, media balanced", "TP x ring", "HSDP x TP"),
}
CONNECTED = {4: ("TP x Ulysses", "Ulysses x ring", "FSDP x TP")}  # of resamplers and cross-attention, besides those
COMPILED = {"FSDP": "full", "TP": "none", "ring": "selective"}  # layout, on 2 ranks -> what is recomputed
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
    compile: bool = False
    window: int | None = None  # of the second layer
    model: str = "square"
    num_kv_heads: int = 4

    def config(self, layout: dict[str, Any]) -> Config:
        model = {**MODELS[self.model]}
        model["decoder"] = {
            **model["decoder"],
            "num_heads": 8,
            "num_kv_heads": self.num_kv_heads,
            "tie_embedding": self.tied,
        }
        model["decoder"] |= {"qkv_bias": self.tied, "qk_norm": not self.tied}
        if self.window:
            model["decoder"] |= {"sliding_window": self.window, "window_layers": [1]}
        tree = {**TREE, "model": model, "parallel": layout}
        names = [name for name in MODULES if name in model]
        if self.trains != "everything":
            names = ["vision_projector", "audio_projector"]
        tree["stages"] = [{"name": "all", "steps": 20, "train": names}]
        recompute = dict.fromkeys(("decoder", "vision", "audio"), self.recompute)
        tree["train"] = {"accumulate_mode": self.accumulate_mode, "recompute": recompute}
        tree["train"] |= {"precision": self.precision, "compile": self.compile}
        if "experts" in model["decoder"]:
            tree["train"]["balance_loss"] = 0.5
        return resolve_config(tree, "equivalence")

    def line(self, errors: list[float]) -> str:
        """Of the table that main() prints."""
        numbers = "  ".join(f"{error:.1e}" for error in errors)
        if self.precision == "bf16":
            numbers = f"{errors[0]:.2f} x the error of one process"
        compiled = "compiled" if self.compile else ""
        cells = [f"{self.layout:<36}", self.precision, f"{self.mix:<9}", f"{self.accumulate} {self.accumulate_mode:<7}"]
        cells += [f"{self.recompute:<9}", f"{self.trains:<10}", "tied  " if self.tied else "untied", f"{compiled:<8}"]
        cells.append("window " if self.window else f"{self.model:<7}")
        return "  ".join([*cells, f"{numbers:<32}"])

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
        *(
            {frozenset(((a, x), (b, y))) for x in factors[a] for y in factors[b]}
            for a, b in itertools.combinations(factors, 2)
        )
    )
    cases = []
    while left:
        first = sorted(min(left, key=lambda pair: sorted(map(str, pair))), key=str)
        draws = [{key: generator.choice(values) for key, values in factors.items()} | dict(first) for _ in range(40)]
        best = max(draws, key=lambda case: len(pairs(case) & left))
        left -= pairs(best)
        cases.append(Case(**best))
    return sorted(cases, key=lambda case: layouts.index(case.layout))


@functools.lru_cache(maxsize=64)
def alone(case: Case, num_rows: int) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, gradient norm and gradients of the plain model; ``case`` holds what matters to it alone."""
    cfg = case.config({})
    model = AVLM(cfg.model)
    init(model, cfg.seed)
    freezing.freeze(model, cfg.stages[0])
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    compute = AVLM(cfg.model)
    compute.load_state_dict(model.state_dict())
    compute.to(dtype)
    freezing.freeze(compute, cfg.stages[0])
    rows = make_rows(cfg, case.mixes(num_rows))
    num_targets = sum(len(row.target_R) for row in rows)
    gradients = {
        name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters() if p.requires_grad
    }
    total = 0.0
    set_balance(compute, cfg.train.balance_loss, len(rows))
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


def run_case(case: Case, layout: dict[str, Any], worlds: dict) -> tuple[float, float, dict[str, torch.Tensor], int]:
    """Loss, gradient norm and whole gradients of one step of a sharded model; and how many rows it took."""
    cfg = case.config(layout)
    world, model = build(cfg, worlds)
    rows = make_rows(cfg, case.mixes(world.data_size))
    num_targets = sum(len(row.target_R) for row in rows)
    parts = [own_part(row, cfg.model, world) for row in rows[world.data_rank :: world.data_size]]
    set_balance(model, cfg.train.balance_loss, len(rows))
    found: dict[str, torch.Tensor] = {}

    class Observed:  # stands for the optimizer: the gradients are looked at where it would use them
        step = staticmethod(
            lambda: found.update({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        )
        zero_grad = staticmethod(lambda: None)

    values = train_step(model, parts, num_targets, Observed, 1e9, world, cfg.train.accumulate_mode)
    gradients = {name: whole(gradient) for name, gradient in found.items()}
    *losses, norm, _ = values[: len(KINDS) + 2].tolist()
    return sum(losses) / num_targets, norm, gradients, len(rows)


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of the worst parameter, by the rule of docs/contracts.md."""
    assert found.keys() == expected.keys(), f"gradients of {sorted(found.keys() ^ expected.keys())}"
    found, expected = with_gates_together(found), with_gates_together(expected)
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    return max(relative((found[name] - g).norm(), torch.maximum(g.norm(), 1e-3 * norm)) for name, g in expected.items())


def with_gates_together(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gates of all layers of cross-attention as one vector: each is one number, whose gradient may happen to be as
    small as its rounding."""
    gates = {name: g for name, g in gradients.items() if name.startswith("cross.") and "_gate." in name}
    others = {name: g for name, g in gradients.items() if name not in gates}
    return {**others, "cross.gates": torch.cat(list(gates.values()))} if gates else gradients


def relative(error: float | torch.Tensor, size: float | torch.Tensor) -> float:
    """error / size; 0 / 0 is 0, and NaN is infinite."""
    ratio = float(error) / max(float(size), 1e-30)
    return ratio if ratio == ratio else float("inf")


def total_distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, as one vector."""
    length = lambda vectors: torch.stack([v.float().norm() for v in vectors]).norm()
    return relative(length(found[name] - g for name, g in expected.items()), length(expected.values()))


def judge(
    case: Case, loss: float, norm: float, gradients: dict[str, torch.Tensor], data_size: int
) -> tuple[bool, list[float]]:
    """Whether the numbers of a sharded step are those of one process, and their errors.

    float32: of loss, norm and the worst gradient. bf16: that of all gradients against float32, as a multiple of the
    error that one process has in bf16; at most 2.
    """
    same = {"layout": "", "recompute": "none", "accumulate_mode": "sharded", "compile": False}
    plain = replace(case, **same)
    exact = alone(replace(plain, precision="fp32"), data_size)
    if case.precision == "bf16":
        of_one = total_distance(alone(plain, data_size)[2], exact[2])
        ratio = total_distance(gradients, exact[2]) / of_one
        return ratio <= 2, [ratio]
    errors = [relative(abs(loss - exact[0]), exact[0]), relative(abs(norm - exact[1]), exact[1])]
    errors.append(distance(gradients, exact[2]))
    return max(errors) <= TOLERANCE, errors


def compare_all(cases: list[Case], layouts: dict[str, dict[str, Any]], verbose: bool) -> list[str]:
    """Runs on every rank. The lines of the cases that do not agree, on rank 0."""
    worlds: dict[tuple, mesh.World] = {}
    failed = []
    for case in cases:
        started = time.perf_counter()
        *found, num_rows = run_case(case, layouts[case.layout], worlds)
        if dist.get_rank():
            continue
        agrees, errors = judge(case, *found, num_rows // case.accumulate)
        line = f"{dist.get_world_size()}  {case.line(errors)}  {time.perf_counter() - started:5.1f} s  "
        line += "ok" if agrees else "FAILS"
        if verbose:
            print(line, flush=True)
        if not agrees:
            failed.append(line)
    mesh.stop()
    return failed


def choose(world_size: int, quick: bool) -> list[Case]:
    cases = _choose(world_size, quick)
    return [replace(case, num_kv_heads=KV_HEADS.get(case.layout, case.num_kv_heads)) for case in cases]


def _choose(world_size: int, quick: bool) -> list[Case]:
    """All pairs of settings, each layout in bf16, some compiled; quick: each layout once, every fourth in bf16."""
    left_out = [f"{name}, of experts" for name in EXPERTS[world_size]]
    layouts = [name for name, sizes in LAYOUTS[world_size].items() if "replicate" not in sizes.values()]
    layouts = [name for name in layouts if name not in left_out]
    settings = {"mix": "different", "accumulate": 1, "recompute": "none", "accumulate_mode": "sharded"}
    in_bf16 = [
        Case(layout=layout, **settings, trains="everything", tied=bool(i % 2), precision="bf16")
        for i, layout in enumerate(layouts)
    ]
    frozen = [Case("FSDP, towers replicated", **settings, trains="projectors", tied=True)] if world_size == 2 else []
    if world_size == 2:
        frozen += [Case(layout, **settings, trains="everything", tied=False, window=3) for layout in WINDOWED]
        for model, layouts_of_model in MASKED.items():
            masked = {**settings, "recompute": "selective"}
            frozen += [
                Case(layout, **masked, trains="everything", tied=True, model=model) for layout in layouts_of_model
            ]
    frozen += of_other_images(world_size, quick) + of_experts(world_size, quick)
    frozen += of_connectors(world_size, quick)
    if not quick:
        compiled = [replace(case, precision="fp32", compile=True) for case in in_bf16 if case.layout in COMPILED]
        compiled = [replace(case, recompute=COMPILED[case.layout]) for case in compiled]
        return cover(layouts) + in_bf16 + frozen + (compiled if world_size == 2 else [])
    settings = [{key: FACTORS[key][i % len(FACTORS[key])] for key in FACTORS} for i in range(-1, len(layouts) - 1)]
    return [Case(layout=layout, **setting) for layout, setting in zip(layouts, settings)] + in_bf16[::4] + frozen


def of_other_images(world_size: int, quick: bool) -> list[Case]:
    """All models in each layout; quick: in turn. What is recomputed, and what trains, differs from layout to
    layout."""
    cases = []
    for i, layout in enumerate(OTHER_IMAGES.get(world_size, ())):
        for n, model in enumerate(("windows", "deep", "tiles")):
            if quick and (i + n) % 3:
                continue
            setting = {key: FACTORS[key][(i + n) % len(FACTORS[key])] for key in ("accumulate", "recompute", "trains")}
            if layout == "FSDP, towers replicated":
                setting["trains"] = "projectors"
            cases.append(
                Case(layout, "different", **setting, accumulate_mode="sharded", tied=model == "windows", model=model)
            )
    if world_size == 2:
        cases += [replace(case, precision="bf16", trains="everything") for case in cases[: 3 - quick]]
        cases += [] if quick else [replace(cases[0], compile=True)]
    return cases


def of_experts(world_size: int, quick: bool) -> list[Case]:
    """Each layout; some compiled. In bf16 those without sums over the tensor axis: where these are rounded otherwise, a
    token between two experts may take the other one, which no tolerance of rounding covers."""
    cases = []
    for i, name in enumerate(EXPERTS[world_size]):
        if quick and i % 2 and world_size == 4:
            continue
        for n in range(1 if quick else 3):
            setting = {key: FACTORS[key][(i + n) % len(FACTORS[key])] for key in FACTORS}
            cases.append(Case(f"{name}, of experts", **setting, model="experts"))
    if world_size == 2:
        of_shards = [replace(cases[0], layout=f"{name}, of experts") for name in ("FSDP", "experts exchanged")]
        cases += [replace(case, precision="bf16", mix="different", trains="everything") for case in of_shards]
        cases += [] if quick else [replace(case, compile=True, recompute="selective") for case in of_shards]
    return cases


def of_connectors(world_size: int, quick: bool) -> list[Case]:
    """Resamplers and layers of cross-attention in each layout; quick: in turn."""
    cases = []
    for i, layout in enumerate(OTHER_IMAGES.get(world_size, ()) + CONNECTED.get(world_size, ())):
        for n, model in enumerate(("queries", "cross", "last")):
            if quick and (i + n) % 3:
                continue
            setting = {key: FACTORS[key][(i + n) % len(FACTORS[key])] for key in FACTORS}
            if layout == "FSDP, towers replicated":
                setting["trains"] = "projectors"
            cases.append(Case(layout, **setting, model=model))
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="each layout once")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    print("ranks, layout, media, rows a rank, recompute, trains, head, model  |  errors of loss, norm, worst gradient")
    failed = []
    for world_size in arguments.world_sizes:
        cases = choose(world_size, arguments.quick)
        failed += run_ranks(compare_all, world_size, cases, LAYOUTS[world_size], True, timeout=1500)[0]
    failed += no_hang.run(arguments.world_sizes, arguments.quick)
    if not arguments.quick:
        failed += demo_curve.run()
    print(f"{len(failed)} cases fail" + "".join(f"\n  {line}" for line in failed) if failed else "every case agrees")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

"""How many bytes a rank sends in a training step, counted and by formula:  python -m tests.measurements.wire

Collectives are counted where torch hands them to the backend, forward and backward. Each counts as in a ring of n
ranks, whatever gloo or NCCL choose to do:

    all-gather, reduce-scatter   (n - 1) / n of the whole tensor      all-to-all   rows for other ranks
    all-reduce                   2 (n - 1) / n of the tensor          send         the tensor

The formulas are those of wire_formula.py. One micro-batch, nothing recomputed, everything trains, bf16. The tokens of
rows and the counts of targets, which go over the host before the step, are not counted.
"""

import math
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from avlm.config.run import Config
from avlm.models.avlm import AVLM
from avlm.models.batch import Batch
from avlm.models.moe import mixtures, set_balance
from avlm.parallel import mesh
from avlm.parallel.apply import own_part
from avlm.parallel.fsdp import fsdp_modules
from avlm.parallel.mesh import World
from avlm.training import optimizer
from tests.measurements.equivalence import Case
from tests.measurements.layouts import KV_HEADS, LAYOUTS
from tests.measurements.wire_formula import ASKERS, Bytes, axis_of, formula, ranks_of_axes
from tests.parallel.small import build, make_config, make_rows
from tests.parallel.spawn import run_ranks
from train import train_step

WITH_EXPERTS = ("HSDP, experts", "experts gathered", "FSDP x TP, experts", "TP x Ulysses, experts exchanged")
MIXES = ("video", "text", "audio", "image")  # of the rows of the data ranks
CHOSEN = ("FSDP", "HSDP", "TP", "ring", "all-gather", "Ulysses", "Ulysses x ring", "TP x ring")
CHOSEN += ("FSDP x ring, media balanced",)
OF_OTHERS = ("TP x ring", "FSDP x ring, media balanced")
OTHER_MODELS = {"DeepStack": "deep", "tiles": "tiles", "resamplers": "queries", "cross-attention": "cross"}
FOR_OTHERS = ("swap", "gathered", "scattered")
SILENT = ("wait_tensor", "_wrap_tensor_autograd", "recv_")


class Wire(TorchDispatchMode):
    """``sent``: bytes of the collectives inside the ``with``, on this thread; on the CPU a backward runs on it too."""

    def __init__(self, world: World):
        super().__init__()
        self.axes = ranks_of_axes(world)
        self.sent = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor goes first; its own collectives come back here
        name = function._schema.name.partition("::")[2]
        if function.namespace in ("c10d", "_c10d_functional") and name not in SILENT:
            self.note(name, args)
        return function(*args, **(kwargs or {}))

    def note(self, name: str, args: tuple) -> None:
        group = group_of(args)
        ranks = sorted(dist.get_process_group_ranks(group))
        if len(ranks) > 1:
            axis = axis_of(self.axes, asker(), ranks)
            kind, count = sent_by(name, args, len(ranks), group.rank())
            self.sent[axis, kind] += count


def group_of(args: tuple) -> dist.ProcessGroup:
    if isinstance(args[-1], str):  # a functional collective: the group comes last, by name
        return _resolve_process_group(args[-1])
    boxed = next(x for x in args if isinstance(x, torch.ScriptObject))
    return _resolve_process_group(dist.ProcessGroup.unbox(boxed).group_name)


def asker() -> tuple[str, ...]:
    """The axes of the innermost of ASKERS that is being called; of what exchange.py does for others, of them."""
    frame = sys._getframe(1)
    while frame is not None:
        for part, axes in ASKERS.items():
            if part in frame.f_code.co_filename and frame.f_code.co_name not in FOR_OTHERS:
                return axes
        frame = frame.f_back
    raise AssertionError("a collective that none of ASKERS asked for")


def sent_by(name: str, args: tuple, n: int, rank: int) -> tuple[str, float]:
    """(kind, bytes) of one collective on ``rank`` of ``n``; its arguments as the schema of the op has them."""
    match name:
        case "_allgather_base_":  # result, own part
            return "all-gather", (n - 1) * args[1].nbytes
        case "all_gather_into_tensor":  # own part
            return "all-gather", (n - 1) * args[0].nbytes
        case "_reduce_scatter_base_":  # result, the whole
            return "reduce-scatter", (n - 1) * args[0].nbytes
        case "reduce_scatter_tensor":  # the whole
            return "reduce-scatter", (n - 1) / n * args[0].nbytes
        case "allreduce_":
            return "all-reduce", 2 * (n - 1) / n * args[0][0].nbytes
        case "all_reduce":
            return "all-reduce", 2 * (n - 1) / n * args[0].nbytes
        case "send":
            return "send", args[0][0].nbytes
        case "alltoall_base_":  # result, sent tensor, group, rows of the result by source, sent rows by destination
            sent = args[1]
            rows = args[4] or [sent.shape[0] // n] * n
            return "all-to-all", sent.nbytes * (sum(rows) - rows[rank]) / max(sum(rows), 1)
        case "allgather_":  # Python objects: their sizes, then their bytes
            return "objects", (n - 1) * args[1][0].nbytes
    raise AssertionError(f"{name} is not counted yet")


def count_step(config: Config, world: World, model: AVLM, rows: list[Batch], num_targets: float) -> Bytes:
    """Bytes of a step, the first after a forward without a backward."""
    set_balance(model, config.train.balance_loss, world.data_size)
    adam = optimizer.build(model, config.stages[0].optimizer)
    optimizer.schedule(adam, config.stages[0].optimizer, 0, 1)
    with Wire(world) as wire:
        parts = [own_part(row, config.model, world) for row in rows]
        train_step(model, parts, num_targets, adam, 1.0, world, config.train.accumulate_mode)
    return wire.sent


def count_all(of_others: tuple[str, ...] = ()) -> dict[str, tuple[Bytes, Bytes]]:
    """Runs on every rank: (counted, formula) of a step in each layout, and of some with DeepStack and images of any
    grid, with tiles whose rows go to several ranks, with resamplers and with cross-attention."""
    worlds: dict[tuple, World] = {}
    found = {}
    labels = {name: ("square", name) for name in CHOSEN}
    labels |= {f"{name}, {label}": (kind, name) for name in of_others for label, kind in OTHER_MODELS.items()}
    labels |= {name: ("experts", f"{name}, of experts") for name in WITH_EXPERTS if of_others}
    for label, (kind, name) in labels.items():
        case = Case(name, "both", 1, "none", "sharded", "everything", tied=False, precision="bf16", model=kind)
        case = replace(case, num_kv_heads=KV_HEADS.get(name, case.num_kv_heads))
        config = case.config(LAYOUTS[4][name])
        world, model = build(config, worlds)
        rows = make_rows(config, MIXES[: world.data_size])
        num_targets = sum(len(row.target_R) for row in rows)
        chosen: list[Tensor] = []
        for mixture in mixtures(model):
            mixture.experts.register_forward_pre_hook(lambda _, inputs, note=chosen.append: note(inputs[1]))
        counted = count_step(config, world, model, [rows[world.data_rank]], num_targets)
        found[label] = counted, formula(config, world, rows, chosen)
    mesh.stop()
    return found


def count_options(options: list[dict[str, Any]], num_batches: int) -> list[tuple[Bytes, int, bool]]:
    """Runs on every rank, for configs that differ in how a step is run: bytes of a step of some micro-batches, units of
    FSDP, and whether blocks prefetch the weights of the next."""
    worlds: dict[tuple, World] = {}
    found = []
    for option in options:
        config = make_config(**option)
        world, model = build(config, worlds)
        rows = make_rows(config, ["both"]) * num_batches
        counted = count_step(config, world, model, rows, 10.0)
        state = model.decoder.blocks[0]._get_fsdp_state()
        found.append((counted, len(fsdp_modules(model)), bool(state._states_to_forward_prefetch)))
    mesh.stop()
    return found


def main() -> None:
    ranks = run_ranks(count_all, 4)
    print(f"{'layout, 4 ranks':<28} {'axis':<37} {'collective':<15} {'counted':>9} {'formula':>9}  ratio")
    for name in CHOSEN:
        counted, expected = Counter(), Counter()
        for rank in ranks:
            of_rank, by_formula = rank[name]
            counted += of_rank
            expected += by_formula
        for axis, kind in sorted(counted | expected):
            a = counted[axis, kind] / len(ranks)
            b = expected[axis, kind] / len(ranks)
            ratio = a / b if b else math.inf
            label = f"{name:<28} {axis:<37} {kind:<15}"
            print(f"{label} {a:>9,.0f} {b:>9,.0f}  {ratio:.3f}")
    print("bytes that a rank sends in a step of a tiny model, mean of the ranks")


if __name__ == "__main__":
    main()

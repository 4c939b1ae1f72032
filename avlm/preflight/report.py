"""What a rank will need, as text, and what would make it fit."""

import functools
import math
from collections.abc import Callable
from typing import Any

from avlm.config.load import resolve_config, to_dict
from avlm.config.run import Config
from avlm.models.freezing import trained_names
from avlm.models.shapes import parameter_shapes
from avlm.parallel import mesh
from avlm.parallel.check import check_layout
from avlm.preflight import memory
from avlm.preflight.check import check
from avlm.preflight.layout import layout_of
from avlm.preflight.memory import GIB


def report(config: Config, world_size: int) -> str:
    """The checks, and for each stage an estimate of tokens and of memory as text (``avlm.preflight.memory``)."""
    check(config, world_size)
    shapes, layout = parameter_shapes(config.model), layout_of(config, world_size)
    count = lambda names: sum(math.prod(shapes[name]) for name in names)
    lines = []
    for stage in config.stages:
        rows, length = layout.replicate * layout.shard * config.train.accumulate, stage.data.seq_length
        found = memory.estimate(config, stage, world_size, shapes)
        lines += [
            f"{stage.name}: {stage.steps} steps of up to {rows * length:,} tokens; "
            f"trains {count(trained_names(stage, config.model, shapes)):,} of {count(shapes):,} parameters",
            f"  {rows} rows of {length:,} tokens a step: {config.train.accumulate} in turn on a rank, which holds "
            f"{length // layout.row_ranks:,} tokens of each",
            *(_memory_line(name, size, memory.NOTES[name]) for name, size in found.device.items() if size),
            _memory_line("sum", found.total, f"on the device, at the worst moment: {found.moment}"),
            *(_memory_line(f"{name} (host)", size, "not in the sum") for name, size in found.host.items() if size),
            "",
        ]
    axes = zip(("replicate", "shard", "context", "tensor"), mesh.sizes(config.parallel, world_size))
    return "\n".join(lines) + (
        f"{world_size} ranks ({' x '.join(f'{axis} {size}' for axis, size in axes)}), compute in "
        f"{str(layout.dtype).removeprefix('torch.')}. Assumed: every token has a target, rows are full of images or of "
        "sound.\nCUDA, NCCL and fragmentation take some GiB a rank on top."
    )


def _memory_line(name: str, size: int, note: str) -> str:
    amount = f"{size / GIB:8.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:8.2f} MiB"
    return f"    {name:<24}{amount}   {note}"


# What takes memory off a device, the cheapest first: one of these, or several from the first on.
MENDS = (
    ("train.accumulate_mode", "sharded"),
    ("parallel.reshard", True),
    ("parallel.replicate", 1),
    ("train.recompute.decoder", "selective"),
    ("train.recompute.vision", "full"),
    ("train.recompute.audio", "full"),
    ("parallel.tower_sharding", "block"),
    ("train.recompute.decoder", "full"),
    ("train.offload_activations", True),
    ("parallel.context", 2),
    ("parallel.tensor", 2),
    ("parallel.context", 4),
    ("parallel.tensor", 4),
    ("parallel.context", 8),
    ("parallel.tensor", 8),
    ("parallel.cpu_offload", True),
)


def check_memory(config: Config, world_size: int, device_memory_gib: float) -> None:
    """Raise ValueError when a stage is estimated to need more than that on a device, with what would make it fit."""
    if not device_memory_gib > 0:
        raise ValueError(f"--device-memory-gib must be positive, not {device_memory_gib}")
    shapes = parameter_shapes(config.model)
    need = lambda config, stage: memory.estimate(config, stage, world_size, shapes).total / GIB
    needs = lambda config: max(need(config, stage) for stage in config.stages)
    if needs(config) <= device_memory_gib:
        return
    stage = max(config.stages, key=lambda stage: need(config, stage))
    turns, least = _mend(config, world_size, device_memory_gib, needs)
    wording = " ".join(f"{key}={str(value).lower() if value is True else value}" for key, value in turns)
    mend = f"{wording} would need {least:.2f}" if turns else "nothing in train.* or parallel.* would lower it"
    if least > device_memory_gib:
        mend += "; take more ranks, a shorter data.seq_length or a smaller model"
    raise ValueError(
        f"stage {stage.name} needs {needs(config):.2f} GiB a rank, {needs(config) - device_memory_gib:.2f} more than "
        f"--device-memory-gib {device_memory_gib:g}: {mend}"
    )


def _mend(
    config: Config, world_size: int, bound: float, needs: Callable[[Config], float]
) -> tuple[list[tuple[str, Any]], float]:
    """What to turn, and the GiB that are needed then: one option that is enough, else all that help until it is."""
    for key, value in MENDS:
        changed = _turned(config, key, value, world_size)
        if changed and needs(changed) <= bound:
            return [(key, value)], needs(changed)
    turns: dict[str, Any] = {}
    for key, value in MENDS:
        changed = _turned(config, key, value, world_size)
        if changed and needs(changed) < needs(config) and needs(config) > bound:
            config, turns[key] = changed, value
    return list(turns.items()), needs(config)


def _turned(config: Config, key: str, value: Any, world_size: int) -> Config | None:
    """The config with another value, or None where that is no change, a step back, or refused."""
    tree = to_dict(config)
    *path, last = key.split(".")
    section = functools.reduce(dict.__getitem__, path, tree)
    if section[last] == value or (last in ("context", "tensor") and value < section[last]):
        return None
    section[last] = value
    tree["parallel"]["shard"] = -1  # the rest of the world
    try:
        changed = resolve_config(tree, key)
        check_layout(changed, world_size)
    except ValueError:
        return None
    return changed

"""What a rank will need, as text, and what would make it fit."""

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch

from avlm.config.load import resolve_config, to_dict
from avlm.config.run import Config, StageConfig, is_json, shares
from avlm.config.values import counted
from avlm.models.freezing import trained_names
from avlm.models.shapes import Shapes, parameter_shapes
from avlm.parallel import mesh
from avlm.parallel.apply import compute_dtype
from avlm.parallel.check import check_layout
from avlm.preflight import memory, step_time
from avlm.preflight.check import check
from avlm.preflight.described_step import typical_row
from avlm.preflight.layout import layout_of
from avlm.preflight.memory import GIB, MIB
from avlm.preflight.rates import GPUS
from avlm.storage.run_folder import find
from avlm.training.console import describe_length
from avlm.training.epochs import with_steps


def report(config: Config, world_size: int) -> str:
    """The checks, then the tokens and the estimated memory of each stage as text (``avlm.preflight.memory``)."""
    epochs = check(config, world_size)
    layout = layout_of(config, world_size)
    config = with_steps(config, epochs, layout.data_ranks, find(config)[0])
    lines = []
    for stage, epoch in zip(config.stages, epochs):
        lines += _stage_lines(config, stage, world_size)
        lines += [f"  {line}" for line in describe_length(stage, epoch, layout.rows_per_step(config.train))]
        lines.append("")
    axes = zip(("replicate", "shard", "context", "tensor"), mesh.sizes(config.parallel, world_size))
    shape = " x ".join(f"{axis} {size}" for axis, size in axes)
    if config.parallel.expert > 1:
        shape += f", experts shared out over {config.parallel.expert}"
    dtype = str(layout.dtype).removeprefix("torch.")
    lines += [
        f"{counted(world_size, 'rank')} ({shape}), compute in {dtype}. Assumed: every token has a target, rows are "
        "full of images or of audio.",
        "CUDA, NCCL and fragmentation take some GiB a rank on top.",
        *_this_machine(config),
    ]
    return "\n".join(lines)


def _this_machine(config: Config) -> list[str]:
    """What a run here would do differently from the GPU that ``device: auto`` stands for."""
    if config.device != "auto" or torch.cuda.is_available():
        return []
    here = str(compute_dtype(config.train.precision, torch.device("cpu"))).removeprefix("torch.")
    return [f"This machine has no GPU: a run on its CPUs would compute in {here}, and the estimate is for a GPU."]


def _stage_lines(config: Config, stage: StageConfig, world_size: int) -> list[str]:
    layout = layout_of(config, world_size)
    shapes = parameter_shapes(config.model)
    trained = _count(shapes, trained_names(stage, config.model, shapes))
    rows = layout.rows_per_step(config.train)
    length = stage.data.seq_length
    lines = [
        f"{stage.name}: {stage.steps} steps of up to {rows * length:,} tokens; "
        f"trains {trained:,} of {_count(shapes, shapes):,} parameters",
        f"  {counted(rows, 'row')} of {length:,} tokens a step: {rows // layout.data_ranks} in turn on a rank, which "
        f"holds {length // layout.row_ranks:,} tokens of each",
    ]
    found = memory.estimate(config, stage, world_size, shapes)
    for name, size in found.device.items():
        if size:
            lines.append(_memory_line(name, size, memory.NOTES[name]))
    lines.append(_memory_line("sum", found.total, f"on the device, at the worst moment: {found.moment}"))
    for name, size in found.host.items():
        if size:
            lines.append(_memory_line(f"{name} (host)", size, "not in the sum"))
    if any(not is_json(source) and not source.startswith("synthetic") for source in shares(stage.data.train)):
        most = max(stage.data.num_workers, 1) * stage.data.shuffle_buffer_bytes
        lines.append(_memory_line("shuffling (host)", most, "at most, in the data workers of a rank, not in the sum"))
    return lines + _time_lines(config, stage, world_size)


def _time_lines(config: Config, stage: StageConfig, world_size: int) -> list[str]:
    """What bounds a step on H100s (``avlm.preflight.step_time``); nothing for contrastive stages, for a run in float32,
    or with weights on the host, of which no time is known."""
    is_known = stage.objective == "answers" and not config.parallel.cpu_offload
    if not is_known or layout_of(config, world_size).dtype != torch.bfloat16:
        return []
    row = typical_row(stage.data, config.model)
    found = step_time.estimate(config, stage, world_size, GPUS["h100"], row)
    return [
        f"  {step_time.rounded(found.seconds)} s a step on H100s, MFU {found.mfu:.0%}; its first wall: {found.wall}",
        "  (from rates that are assumptions, avlm/preflight/rates.py; not measured)",
    ]


def _count(shapes: Shapes, names: Iterable[str]) -> int:
    return sum(math.prod(shapes[name]) for name in names)


def _memory_line(name: str, size: int, note: str) -> str:
    amount = f"{size / GIB:8.2f} GiB" if size >= 0.1 * GIB else f"{size / MIB:8.2f} MiB"
    return f"    {name:<24}{amount}   {note}"


# Settings that save device memory, cheapest first. Each is tried alone, then they are accumulated in this order.
SAVINGS = (
    ("train.accumulate_mode", "sharded"),
    ("parallel.reshard", True),
    ("parallel.replicate", 1),
    ("train.recompute.decoder", "selective"),
    ("train.recompute.vision", "full"),
    ("train.recompute.audio", "full"),
    ("train.recompute.text", "full"),
    ("parallel.tower_sharding", "block"),
    ("train.recompute.decoder", "full"),
    ("train.offload_activations", True),
    ("parallel.context", 2),
    ("parallel.tensor", 2),
    ("parallel.context", 4),
    ("parallel.tensor", 4),
    ("parallel.context", 8),
    ("parallel.tensor", 8),
    ("parallel.expert", 2),
    ("parallel.expert", 4),
    ("parallel.expert", 8),
    ("parallel.cpu_offload", True),
)


def check_memory(config: Config, world_size: int, device_memory_gib: float) -> None:
    """Raise ValueError if a stage is estimated to need more than this on a device, with settings that would make it
    fit."""
    if not device_memory_gib > 0:
        raise ValueError(f"--device-memory-gib must be positive, not {device_memory_gib}")
    needs = _needs(config, world_size)
    stage, most = max(needs.items(), key=lambda item: item[1])
    if most <= device_memory_gib:
        print(f"It fits: at most {most:.2f} GiB a rank, of {device_memory_gib:g}.")
        return
    settings, least = _fit(config, world_size, device_memory_gib)
    if settings:
        words = " ".join(f"{key}={'true' if value is True else value}" for key, value in settings.items())
        advice = f"{words} would need {least:.2f}"
    else:
        advice = "nothing in train.* or parallel.* would lower it"
    if least > device_memory_gib:
        advice += "; take more ranks, a shorter data.seq_length or a smaller model"
    raise ValueError(
        f"stage {stage} needs {most:.2f} GiB a rank, {most - device_memory_gib:.2f} more than "
        f"--device-memory-gib {device_memory_gib:g}: {advice}"
    )


def _needs(config: Config, world_size: int) -> dict[str, float]:
    """Stage -> GiB a rank."""
    shapes = parameter_shapes(config.model)
    return {stage.name: memory.estimate(config, stage, world_size, shapes).total / GIB for stage in config.stages}


def _fit(config: Config, world_size: int, bound: float) -> tuple[dict[str, Any], float]:
    """Settings, and the GiB that are needed with them: one that is enough, else all that help until the bound."""

    def most(config: Config) -> float:
        return max(_needs(config, world_size).values())

    for key, value in SAVINGS:
        changed = _with_setting(config, key, value, world_size)
        if changed and most(changed) <= bound:
            return {key: value}, most(changed)
    settings = {}
    for key, value in SAVINGS:
        changed = _with_setting(config, key, value, world_size)
        if changed and most(changed) < most(config) and most(config) > bound:
            config = changed
            settings[key] = value
    return settings, most(config)


def _with_setting(config: Config, key: str, value: Any, world_size: int) -> Config | None:
    """The config with another value, or None if that is no change, a step back, or refused."""
    tree = to_dict(config)
    *path, last = key.split(".")
    section = functools.reduce(dict.__getitem__, path, tree)
    is_step_back = last in ("context", "tensor", "expert") and value < section[last]
    if section[last] == value or is_step_back:
        return None
    section[last] = value
    tree["parallel"]["shard"] = -1  # all ranks that are left
    try:
        changed = resolve_config(tree, key)
        check_layout(changed, world_size)
    except ValueError:
        return None
    return changed

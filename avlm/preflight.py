"""Everything that can be known to be wrong before ranks start, and the errors that a person sees."""

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from avlm import config_file, locks, memory, weights_plan
from avlm.checkpoint import complete_checkpoints, find, read_progress
from avlm.config import Config, StageConfig
from avlm.freezing import trained_names
from avlm.layout import layout_of
from avlm.memory import GIB
from avlm.parallel import mesh
from avlm.parallel.context_attention import choose_mode
from avlm.parallel.exit import one_line_errors as one_line_errors  # commands find it here
from avlm.parallel.mesh import World
from avlm.parallel.tensor import check_sizes
from avlm.preflight_data import check_data

MAY_CHANGE_IN_DATA = ("validation", "metrics", "max_bad_fraction", "media_root", "num_workers")
MAY_CHANGE = (
    "output_dir",
    "resume",
    "checkpoint",
    "parallel",
    "wandb",
    "device",
    "debug",
    "model.audio.log_mel",
)  # sections and keys, between a run and its resume
MAY_CHANGE_IN_TRAIN = (
    *("log_every", "validate_every", "validate_batches", "validate_answers", "validate_new_tokens"),
    *("stop_after", "accumulate", "accumulate_mode", "recompute", "offload_activations", "compile"),
)


def check(config: Config, world_size: int) -> None:
    """Raise ValueError or FileNotFoundError for what would fail later: mesh, start weights, data sources, tokenizer."""
    check_layout(config, world_size)
    if find(config)[0] is None:  # else the checkpoint has the weights
        weights_plan.check(config.model, memory.parameter_shapes(config.model), config.init_from)
    check_data(config)


def check_layout(config: Config, world_size: int) -> None:
    """Raise ValueError for a mesh that this world, model or row length does not fit."""
    parallel = config.parallel
    mesh.sizes(parallel, world_size)
    check_sizes(config.model, parallel.tensor)
    shapes = memory.parameter_shapes(config.model)
    choose_mode(parallel.context_mode, config.model.decoder.num_kv_heads // parallel.tensor, parallel.context)
    _check_recompute(config)
    sharers = parallel.context * parallel.tensor
    for stage in config.stages:
        length = stage.data.seq_length
        if length % sharers:
            raise ValueError(
                f"stage {stage.name}: data.seq_length={length} is not a multiple of parallel.context x "
                f"parallel.tensor = {sharers}, which share its rows: take {-(-length // sharers) * sharers}"
            )
        trained = {name.split(".")[0] for name in trained_names(stage, config.model, shapes)}
        if parallel.tower_sharding == "replicate" and {"vision", "audio"} & trained:
            raise ValueError(
                f"parallel.tower_sharding=replicate keeps frozen copies, but stage {stage.name} trains "
                f"{', '.join(sorted({'vision', 'audio'} & trained))}: choose unit or block"
            )
        _check_media(config, stage, trained)


def _check_recompute(config: Config) -> None:
    train, recompute = config.train, config_file.to_dict(config.train.recompute)
    for name, mode in recompute.items():
        if mode != "none" and getattr(config.model, name) is None:
            raise ValueError(f"train.recompute.{name}={mode}, but there is no model.{name}: set it to none")
        if train.offload_activations and mode == "selective":
            raise ValueError(
                "train.offload_activations=true moves block inputs alone, but "
                f"train.recompute.{name}=selective keeps more: set it to full, or to none"
            )
    if train.offload_activations and "full" not in recompute.values():
        raise ValueError(
            "train.offload_activations=true moves what full recomputation keeps, and nothing is recomputed: set "
            "train.recompute.decoder=full, or train.offload_activations=false"
        )


def _check_media(config: Config, stage: StageConfig, trained: set[str]) -> None:
    """A stage that trains a tower or its projector has to have room for its media. Windows of true length may be
    short, and a stage of text needs no room: there a sample that is too long is skipped by its name."""
    for name, what in (("vision", "an image"), ("audio", "a window of sound")):
        if not {name, f"{name}_projector"} & trained:
            continue
        if name == "audio" and config.model.audio.window == "true":
            continue
        _, rows = memory.media_rows(name, config.model)
        if rows > stage.data.seq_length:
            raise ValueError(
                f"stage {stage.name}: {what} takes {rows} rows, more than data.seq_length={stage.data.seq_length}: "
                f"raise it, or model.{name}_projector.downsample"
            )


def check_resume(config: Config, checkpoint: Path | None) -> None:
    """Refuse to go on with another model, data or stages than the run began with, naming the key; and to begin a run
    over the checkpoints of another."""
    if checkpoint is None:
        if complete_checkpoints(Path(config.output_dir)):
            raise ValueError(
                f"{config.output_dir} holds an earlier run: set resume=auto to go on, or another output_dir"
            )
        return
    at, steps = read_progress(checkpoint), [stage.steps for stage in config.stages]
    stored = config_file.to_dict(config_file.load(checkpoint.parent.parent / "config.yaml"))
    for key, (was, wanted) in _differences(stored, config_file.to_dict(config)).items():
        section, _, name = key.partition(".")
        if {section, key} & set(MAY_CHANGE) or (section == "train" and name.split(".")[0] in MAY_CHANGE_IN_TRAIN):
            continue
        if ".data." in key and key.split(".data.")[1].split(".")[0] in MAY_CHANGE_IN_DATA:
            continue
        raise ValueError(
            f"{key} is {wanted!r}, but {checkpoint} was made with {was!r}: set it back, or choose another output_dir"
        )
    if at.stage >= len(steps) or at.stage_step > steps[at.stage] or at.step != sum(steps[: at.stage]) + at.stage_step:
        raise ValueError(
            f"{checkpoint} says step {at.step}, which is step {at.stage_step} of stage {at.stage}: the stages have "
            f"{steps} steps, so it is damaged"
        )


def _differences(a: Any, b: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys at which two configs differ, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = [(key, a.get(key), b.get(key)) for key in {**a, **b}]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and any(isinstance(x, dict) for x in a):
        pairs = [(x.get("name", str(i)), x, y) for i, (x, y) in enumerate(zip(a, b))]
    else:
        return {} if a == b else {where: (a, b)}
    found = {}
    for key, x, y in pairs:
        found |= _differences(x, y, f"{where}.{key}" if where else str(key))
    return found


def check_skipped(read: float, skipped: float, max_fraction: float) -> None:
    """Stop a run whose data is mostly broken; ten bad samples are forgiven, however early they come."""
    if skipped > max(10.0, max_fraction * read):
        raise ValueError(
            f"{skipped:.0f} of {read:.0f} samples were bad and skipped (named above), more than "
            f"data.max_bad_fraction={max_fraction}: mend the data, or raise it"
        )


def claim(config: Config, world: World) -> IO[str] | None:
    """Make the run folder this run's own until the returned file is closed."""
    folder = Path(config.output_dir)
    failure, lock = "", None
    if world.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+")  # noqa: SIM115  (held until the run ends)
        if not locks.lock(lock, wait=False):
            lock.seek(0)
            failure = f"{folder} belongs to a run that is live ({lock.read().strip()}): wait for it, or set output_dir"
    if world.sum([float(bool(failure))])[0]:
        raise ValueError(failure or f"{folder} belongs to a run that is live")
    if lock is not None:
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        lock.flush()
    return lock


def report(config: Config, world_size: int) -> str:
    """The checks, and for each stage an estimate of tokens and of memory as text (``avlm.memory``)."""
    check(config, world_size)
    shapes, layout = memory.parameter_shapes(config.model), layout_of(config, world_size)
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
    shapes = memory.parameter_shapes(config.model)
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
    tree = config_file.to_dict(config)
    *path, last = key.split(".")
    section = functools.reduce(dict.__getitem__, path, tree)
    if section[last] == value or (last in ("context", "tensor") and value < section[last]):
        return None
    section[last] = value
    tree["parallel"]["shard"] = -1  # the rest of the world
    try:
        changed = config_file.resolve(tree, key)
        check_layout(changed, world_size)
    except ValueError:
        return None
    return changed

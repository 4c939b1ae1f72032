"""Everything that can be known to be wrong before ranks start, and the errors that a person sees."""

from pathlib import Path
from typing import Any

from avlm.config.load import load_config, to_dict
from avlm.config.run import Config, StageConfig
from avlm.models.freezing import trained_names
from avlm.models.shapes import parameter_shapes
from avlm.parallel import mesh
from avlm.parallel.context_attention import choose_mode
from avlm.parallel.tensor import check_sizes
from avlm.preflight import memory
from avlm.preflight.data import check_data
from avlm.storage.run_folder import complete_checkpoints, find, read_progress
from avlm.weights import plan as weights_plan

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
        weights_plan.check(config.model, parameter_shapes(config.model), config.init_from)
    check_data(config)


def check_layout(config: Config, world_size: int) -> None:
    """Raise ValueError for a mesh that this world, model or row length does not fit."""
    parallel = config.parallel
    mesh.sizes(parallel, world_size)
    check_sizes(config.model, parallel.tensor)
    shapes = parameter_shapes(config.model)
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
    train, recompute = config.train, to_dict(config.train.recompute)
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
    stored = to_dict(load_config(checkpoint.parent.parent / "config.yaml"))
    for key, (was, wanted) in _differences(stored, to_dict(config)).items():
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

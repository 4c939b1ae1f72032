"""What may change between a run and its resume: the fields that ``avlm.config.run`` marks, and what is asked for."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from avlm.config.load import load_config
from avlm.config.run import Config
from avlm.config.values import counted
from avlm.storage.run_folder import Progress, complete_checkpoints, read_progress


def check_resume(config: Config, checkpoint: Path | None, data_ranks: int) -> list[str]:
    """Raise ValueError, naming the key, if a run would continue with a different model, data or stages than it began
    with; and if a new run would write over the checkpoints of an earlier one.

    Two things may change: the last stage may get more steps, and the optimizer's keys that ``resume.allow`` names.
    Returns a line for each such change, and one if a step has other rows on these ``data_ranks`` than it had.
    """
    if checkpoint is None:
        if complete_checkpoints(Path(config.output_dir)):
            raise ValueError(
                f"{config.output_dir} holds an earlier run: set resume=auto to continue it, or another output_dir"
            )
        return []
    stored = load_config(checkpoint.parent.parent / "config.yaml")
    last = config.stages[-1].name
    notes = []
    for key, was, wanted in _differences(stored, config):
        _, _, option = key.partition(".optimizer.")
        if key == f"stages.{last}.steps" and wanted > was:
            notes.append(f"stage {last} grows from {was} to {wanted} steps, and so does its learning rate's schedule")
        elif option and f"optimizer.{option}" in config.resume.allow:
            notes.append(f"{key} changes from {was!r} to {wanted!r}, which resume.allow permits")
        else:
            raise ValueError(
                f"{key} is {wanted!r}, but {checkpoint} was made with {was!r}: set it back, "
                f"{_permission(key, last)}or choose another output_dir"
            )
    progress = read_progress(checkpoint)
    steps = [stage.steps for stage in stored.stages]
    fits = progress.stage < len(steps) and progress.stage_step <= steps[progress.stage]
    if not fits or progress.step != sum(steps[: progress.stage]) + progress.stage_step:
        raise ValueError(
            f"{checkpoint} is at step {progress.step}, which is step {progress.stage_step} of stage {progress.stage}: "
            f"the stages have {steps} steps, so it is damaged"
        )
    return notes + _other_rows(config, progress, data_ranks)


def _other_rows(config: Config, progress: Progress, data_ranks: int) -> list[str]:
    """A line if steps get larger or smaller. What they had is not known of checkpoints that are older than this."""
    rows, had = data_ranks * config.train.micro_batches(data_ranks), progress.rows_per_step
    if had in (0, rows):
        return []
    length = config.stages[progress.stage].data.seq_length
    advice = f": train.rows_per_step={had} keeps it as it was" if had % data_ranks == 0 else ""
    return [
        f"warning: a step has {counted(rows, 'row')} ({rows * length:,} tokens) and had {counted(had, 'row')} "
        f"({had * length:,} tokens), with the same learning rate{advice}"
    ]


def _permission(key: str, last: str) -> str:
    """How a difference could be permitted."""
    _, _, option = key.partition(".optimizer.")
    if option:
        return f"permit it with resume={{allow: [optimizer.{option}]}}, "
    return "take more of them, " if key == f"stages.{last}.steps" else ""


def _differences(a: Any, b: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value of ``a``, value of ``b``) of each field that differs and may not change."""
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        for field in dataclasses.fields(a):
            if not field.metadata.get("may_change"):
                inner = f"{key}.{field.name}" if key else field.name
                yield from _differences(getattr(a, field.name), getattr(b, field.name), inner)
    elif key == "stages" and len(a) == len(b):
        for stage, other in zip(a, b):
            yield from _differences(stage, other, f"{key}.{stage.name}")
    elif a != b:
        yield key, _plain(a), _plain(b)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value

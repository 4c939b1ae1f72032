"""The folder of a run: where its config, checkpoints and metrics are, and how they are found.

config.yaml       the whole config, as it was resolved
checkpoints/      one folder per step (``avlm.training.checkpoint``)
metrics.jsonl     one record per step and per validation
.lock             held by the process that trains
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from avlm.config.load import load_config
from avlm.config.run import Config
from avlm.config.values import NonNegative, Whole, config, shown
from avlm.parallel.mesh import World
from avlm.storage import locks
from avlm.storage.checkpoint_files import MARKER, read_marker

Record = dict[str, Any]  # a line of metrics.jsonl


@config
class Progress:
    """Where a run stands: steps done over all stages, the stage it is in, steps done within it."""

    step: Whole = 0
    stage: Whole = 0
    stage_step: Whole = 0
    read: NonNegative = 0.0  # samples
    skipped: NonNegative = 0.0  # bad samples among them
    rows_per_step: Whole = 0  # of its last step, over all ranks; 0: not known
    best_step: Whole = 0  # the step with the best validation so far; 0: none
    best_metric: str = ""  # val/NAME/METRIC that it is best in
    best_value: float = 0.0

    def after_step(self, read: float, skipped: float, rows: int) -> "Progress":
        """The progress after one more step of so many ``rows``, in which ``read`` samples were read and ``skipped`` of
        them skipped."""
        return dataclasses.replace(
            self,
            step=self.step + 1,
            stage_step=self.stage_step + 1,
            read=self.read + read,
            skipped=self.skipped + skipped,
            rows_per_step=rows,
        )

    def with_best_of(self, other: "Progress") -> "Progress":
        return dataclasses.replace(
            self, best_step=other.best_step, best_metric=other.best_metric, best_value=other.best_value
        )


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def complete_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(marker.parent for marker in run.glob(f"checkpoints/step_*/{MARKER}"))


def find(config: Config) -> tuple[Path | None, str]:
    """The checkpoint that ``resume`` asks for, and a note on half-written ones that were passed over."""
    wanted = config.resume.checkpoint
    if wanted == "never":
        return None, ""
    if wanted != "auto":
        path = Path(wanted)
        if not (path / MARKER).is_file():
            raise FileNotFoundError(f"resume={path} is not a complete checkpoint (it has no file named {MARKER!r})")
        later = [other.name for other in complete_checkpoints(Path(config.output_dir)) if other.name > path.name]
        if later:  # a later resume would take them for the newest of this run
            raise ValueError(f"{config.output_dir} holds later checkpoints ({', '.join(later)}): remove them first")
        return path, ""
    run = Path(config.output_dir)
    done = complete_checkpoints(run)
    newest = done[-1] if done else None
    broken = []
    for folder in sorted(run.glob("checkpoints/step_*")):
        is_newer = newest is None or folder.name > newest.name
        if folder not in done and is_newer:
            broken.append(folder.name)
    note = f"{', '.join(broken)} is incomplete; " if broken else ""
    return newest, note


def read_progress(path: Path, run: Path | None = None) -> Progress:
    """Where a checkpoint stands. If ``run`` is another run that continues from it, the best step is dropped: it belongs
    to the old run. ValueError for a marker that is damaged or does not fit its folder."""
    found = {key: value for key, value in read_marker(path).items() if key != "files"}
    try:
        progress = Progress(**found)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path / MARKER}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if path.name.startswith("step_") and path.name != folder_of(path, progress.step).name:
        raise ValueError(
            f"{path / MARKER} records step {progress.step}: the folder was renamed, or the file is damaged"
        )
    if run is not None and path.resolve().parents[1] != run.resolve():
        return progress.with_best_of(Progress())
    return progress


def is_run(path: Path) -> bool:
    """Whether a folder is a run or a checkpoint of one, complete or not. A folder with a config.json is a Hugging Face
    folder or an export, whatever else it holds."""
    if (path / "config.json").is_file():
        return False
    return _is_checkpoint(path) or (path / "config.yaml").is_file() or (path / "checkpoints").is_dir()


def _is_checkpoint(path: Path) -> bool:
    path = path.resolve()
    in_place = path.is_dir() and path.parent.name == "checkpoints" and path.name.startswith("step_")
    return in_place or (path / MARKER).is_file()


def read_run(path: Path | str, step: int | None = None) -> tuple[Config, Path]:
    """(config, complete checkpoint) of a run, the newest or that of ``step``; or of a checkpoint folder itself."""
    path = Path(path)
    if _is_checkpoint(path) and step is None:
        if not (path / MARKER).is_file():
            raise FileNotFoundError(f"{path} is not a complete checkpoint (it has no file named {MARKER!r})")
        return load_config(path.resolve().parent.parent / "config.yaml"), path
    done = complete_checkpoints(path)
    if not done:
        raise FileNotFoundError(f"{path} holds no complete checkpoint")
    if step is not None and folder_of(path, step) not in done:
        steps = ", ".join(str(read_progress(each).step) for each in done)
        raise ValueError(f"{path} holds no complete checkpoint of step {step}: there are those of steps {steps}")
    return load_config(path / "config.yaml"), done[-1] if step is None else folder_of(path, step)


def write_durably(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: the new content is on disk before it takes the name."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def claim(config: Config, world: World) -> IO[str] | None:
    """Lock the run folder for this process until the returned file is closed."""
    folder = Path(config.output_dir)
    failure = ""
    lock = None
    if world.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+")  # noqa: SIM115  (held until the run ends)
        if not locks.lock(lock, wait=False):
            lock.seek(0)
            owner = lock.read().strip()
            failure = f"{folder} belongs to a run that is live ({owner}): wait for it, or set another output_dir"
    if world.sum([float(bool(failure))])[0]:
        raise ValueError(failure or f"{folder} belongs to a run that is live")
    if lock is not None:
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        lock.flush()
    return lock


def read_records(path: Path) -> list[Record]:
    """The records of a metrics.jsonl, without a last line that was cut short. ValueError for any other bad line."""
    if not path.is_file():
        return []
    records = []
    lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        if not line.strip(b"\0 \t\r"):  # a power cut leaves empty blocks
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not valid JSON ({shown(str(error))}): remove it") from None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise ValueError(f"{path}, line {number} is not a record with a step: remove it")
        records.append(record)
    return records


def find_checkpoint(run: Path, step: str) -> tuple[Config, Path]:
    """(config, checkpoint) of a run: that of a step, "best" or "latest"."""
    if step == "best":
        pointer = run / "checkpoints" / "best"
        if not pointer.is_file():
            raise FileNotFoundError(f"{run} has no best checkpoint: checkpoint.best was not set, or nothing validated")
        step = pointer.read_text().removeprefix("step_")
    if step != "latest" and not step.isdecimal():
        raise ValueError(f"--step {step}: give a number, best or latest")
    return read_run(run, None if step == "latest" else int(step))

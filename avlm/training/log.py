"""What a run reports: metrics.jsonl, console lines, wandb and TensorBoard. ``avlm.training.curves`` draws them."""

import errno
import importlib.util
import json
import math
import os
import resource
import sys
import time
import uuid
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from avlm.config.load import to_dict
from avlm.config.run import Config
from avlm.config.values import counted
from avlm.data.bad_samples import by_reason
from avlm.models.batch import KINDS, PLACEHOLDERS, Batch
from avlm.models.costs import counts
from avlm.parallel.apply import compute_dtype
from avlm.parallel.mesh import World
from avlm.process.exit import NonFiniteLoss
from avlm.storage.run_folder import Progress, Record, read_records
from avlm.training import flops
from avlm.training.console import ending, step_line
from avlm.training.expert_load import expert_load
from avlm.training.slowest import Slowest

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Log:
    """The records of a run. Values of a step stay on the device until ``flush``, which fetches all of them together."""

    def __init__(self, config: Config, world: World, first_step: int):
        self.config = config
        self.world = world
        self.path = Path(config.output_dir) / "metrics.jsonl"
        self.records: list[Record] = []  # of steps that are not fetched yet
        self.values: list[Tensor] = []  # what ``train_step`` returned, for each record
        self.keys: list[list[str]] = []  # sample keys of this rank, for each record
        self.first_step = first_step
        self.last_step = min(config.train.stop_after or config.total_steps, config.total_steps)
        self.started = self.timed_from = time.perf_counter()
        self.training_since: float | None = None  # after initialisation
        self.slowest = Slowest(world)
        self.unwritten: list[Record] = []  # while the disk is full
        self.bad: set[str] = set()  # keys of skipped samples that have been named
        # Compute in float32 is not measured against the bf16 peak.
        is_bf16 = compute_dtype(config.train.precision, world.device) == torch.bfloat16
        self.peak = flops.peak(world.device) if is_bf16 else None
        self.run = self.board = None
        if world.is_first:
            _cut(self.path, first_step)
            self.bar = tqdm(total=config.total_steps, initial=first_step, disable=not sys.stderr.isatty(), unit="step")
            if config.wandb.mode != "disabled":
                self.run = _wandb_run(config, first_step)
            if config.tensorboard:
                self.board = _tensorboard(config, first_step)

    def step(self, record: Record, values: Tensor, keys: list[str]) -> None:
        """Note a step; ``values``: what ``train_step`` returned."""
        self.records.append(record)
        self.values.append(values)
        self.keys.append(keys)
        self.slowest.waits.append(record["data_seconds"])
        if self.world.is_first:
            self.bar.update()
        if self._is_shown(record) or values.device.type == "cpu":
            self.flush()

    def flush(self) -> None:
        """Fetch, check and write the records so far. Raises NonFiniteLoss, on every rank, at the first bad step."""
        if not self.records:
            return
        fetched = torch.stack(self.values).tolist()
        seconds = (time.perf_counter() - self.timed_from) / len(self.records)
        self.timed_from = time.perf_counter()
        for i, (record, values, keys) in enumerate(zip(self.records, fetched, self.keys)):
            losses, rest = values[: len(KINDS)], values[len(KINDS) :]
            norm, own_loss, *seen = rest
            self._complete(record, losses, norm, seconds)
            if seen:
                record |= expert_load(seen, self.config.model.decoder.experts)
            if not math.isfinite(record["loss"]) or not math.isfinite(norm):
                self.write(self.records[:i])
                own = "" if math.isfinite(own_loss) else f"; samples of this rank: {', '.join(keys)}"
                raise NonFiniteLoss(f"loss {record['loss']}, gradient norm {norm} at step {record['step']}{own}")
            of_ranks = ""
            if self._is_shown(record):
                worst, of_ranks = self.slowest.compare(record)
                record |= worst
            if self._is_shown(record) or record["step"] == 1:
                self.message(f"{self._line(record)}  {of_ranks}".rstrip())
        self.write(self.records)
        self.records = []
        self.values = []
        self.keys = []

    def _is_shown(self, record: Record) -> bool:
        return record["step"] % self.config.train.log_every == 0

    def _complete(self, record: Record, losses: list[float], norm: float, seconds: float) -> None:
        """Add to a step's record what is known once its values are fetched."""
        counts = [record[f"targets/{kind}"] for kind in KINDS]
        record["loss"] = sum(losses) / (sum(counts) or 1)
        for kind, loss, count in zip(KINDS, losses, counts):
            if count:
                record[f"loss/{kind}"] = loss / count
        record["grad_norm"] = norm
        record["step_seconds"] = seconds
        record["tokens_per_second"] = record["tokens"] / seconds
        record["padding"] = 1 - record["tokens"] / (record.pop("row_tokens") or 1)
        record["flops"] = sum(value for name, value in record.items() if name.startswith("flops/"))
        if self.peak:
            possible = seconds * self.world.size * self.peak
            record["mfu"] = record["flops"] / possible
            record["hfu"] = (record["flops"] + record["recomputed_flops"]) / possible
        record["memory_gib"] = _peak_memory(self.world.device) / 2**30

    def _line(self, record: Record) -> str:
        done = self.records[-1]["step"] - self.first_step  # a GPU's steps are fetched several at a time
        elapsed = time.perf_counter() - (self.training_since or self.started)
        left = (self.last_step - record["step"]) * elapsed / done
        return step_line(record, self.config.total_steps, elapsed, left)

    def validation(self, progress: Progress, stage: str, results: dict[str, float]) -> None:
        """Write and show what validation found after a step."""
        self.write([{"step": progress.step, "stage": stage, **results}])
        shown = [f"{name} {value:.4f}" for name, value in results.items()]
        if progress.best_step == progress.step:
            shown.append("(the best so far)")
        self.message("  ".join(shown))

    def restart_clock(self) -> None:
        """Leave what happened since the last flush (initialisation, validation, saving) out of the next steps' time."""
        self.timed_from = time.perf_counter()
        self.training_since = self.training_since or self.timed_from

    def write(self, records: list[Record]) -> None:
        """Append records and put them on disk. While the disk is full they wait for the next ones."""
        if not self.world.is_first:
            return
        has_warned = bool(self.unwritten)
        records = [*self.unwritten, *records]
        content = "".join(json.dumps(record) + "\n" for record in records).encode()
        failure = self._append(content)
        if failure:
            self.unwritten = records
            if not has_warned:
                self.message(f"warning: {self.path}: {failure.lower()}; its lines wait until there is room")
            return
        self.unwritten = []
        if self.run is not None:
            for record in records:
                self.run.log(record, step=record["step"])
        if self.board is not None:
            for record in records:
                for name, value in record.items():
                    if name != "step" and isinstance(value, int | float):
                        self.board.add_scalar(name, value, record["step"])

    def _append(self, content: bytes) -> str:
        """Returns "", or why the disk has no room; then the file is as it was."""
        with open(self.path, "ab", buffering=0) as file:  # what a buffer holds would be written again on closing
            end = file.tell()
            try:
                if file.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in DISK_IS_FULL:
                    raise
                file.truncate(end)
                return error.strerror
        return ""

    def message(self, line: str) -> None:
        """One line for the person at the terminal, from the first rank."""
        if self.world.is_first:
            self._print(line, sys.stdout)

    def skipped(self, batch: Batch, where: str = "") -> None:
        """Name the skipped samples of a row by their reasons: each rank its own, and each sample once, however often it
        is read."""
        new = {key: reason for key, reason in batch.skipped if key not in self.bad}
        self.bad |= new.keys()
        for reason, keys in by_reason(list(new.items())):
            self._print(f"skipped {counted(len(keys), 'sample')}{where}: {reason} ({', '.join(keys)})", sys.stderr)

    def _print(self, line: str, file: TextIO) -> None:
        try:
            tqdm.write(line, file=file)
            file.flush()
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal that was closed: its own signal ends the run
                raise

    def close(self, progress: Progress) -> None:
        """Say where the run ended, and close what is open."""
        seconds = time.perf_counter() - self.started
        for line in ending(self.config, progress, progress.step > self.first_step, seconds):
            self.message(line)
        if self.world.is_first:
            self.bar.close()
            if self.unwritten:
                raise OSError(f"no space left for the last {len(self.unwritten)} lines of {self.path}")
            if self.run is not None:
                self.run.finish()
            if self.board is not None:
                self.board.close()


def tally(batches: list[Batch], costs: flops.Costs) -> dict[str, float]:
    """What ranks sum for a step, by the names of metrics.jsonl, with the same names whatever the batches hold."""
    names = ["tokens", "row_tokens"]
    names += [f"tokens/{modality}" for modality in PLACEHOLDERS]
    names += ["target_tokens", "recomputed_flops", "read", "skipped"]
    names += [f"targets/{kind}" for kind in KINDS]
    names += [f"flops/{module}" for module, _ in costs]
    total = dict.fromkeys(names, 0.0)
    for batch in batches:
        total["tokens"] += batch.num_tokens
        total["row_tokens"] += len(batch.token_T)
        for modality, media in batch.media.items():
            total[f"tokens/{modality}"] += len(media.rows)
        total["target_tokens"] += batch.num_targets
        total["read"] += batch.read
        total["skipped"] += len(batch.skipped)
        factor_R = None if batch.factor_R is None else batch.factor_R.double()
        targets = torch.bincount(batch.kind_R, factor_R, minlength=len(KINDS))
        for kind, count in zip(KINDS, targets.tolist()):
            total[f"targets/{kind}"] += count
        for module, (forward, backward, recomputed) in flops.by_module(costs, counts(batch)).items():
            total[f"flops/{module}"] += forward + backward
            total["recomputed_flops"] += recomputed
    return total


def _wandb_run(config: Config, first_step: int) -> Any:
    """The wandb run of this folder. A resumed run continues the one that it began; steps that wandb already has stay as
    they were."""
    import wandb  # takes half a second and starts a process: only for those who use it

    path = Path(config.output_dir) / "wandb_id"
    if not first_step or not path.is_file():
        path.write_text(uuid.uuid4().hex[:8])
    options = {"project": config.wandb.project, "mode": config.wandb.mode, "dir": config.output_dir}
    return wandb.init(**options, id=path.read_text(), resume="allow", config=to_dict(config))


def check_log(config: Config) -> None:
    """ValueError for what the run is to write and cannot."""
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("tensorboard=true needs the package tensorboard: pip install tensorboard")


def _tensorboard(config: Config, first_step: int) -> Any:
    """The writer of this run's events. A resumed run hides those that an interrupted one wrote after ``first_step``."""
    from torch.utils.tensorboard import SummaryWriter  # an optional package

    return SummaryWriter(str(Path(config.output_dir) / "tensorboard"), purge_step=first_step + 1)


def _peak_memory(device: torch.device) -> int:
    """Peak bytes of this rank: of its tensors on a GPU, of its whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _cut(path: Path, step: int) -> None:
    """Drop the records after ``step``, which a resumed run writes again, and a last line that a crash cut short."""
    records = read_records(path) if step else []
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records if record["step"] <= step))
    partial.rename(path)

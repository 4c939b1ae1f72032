"""What a run reports: metrics.jsonl, console lines, wandb, and the curves of ``python -m avlm.training.plots RUN``."""

import errno
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
from avlm.models.avlm import AVLM
from avlm.models.batch import KINDS, Batch
from avlm.parallel.apply import compute_dtype
from avlm.parallel.mesh import World
from avlm.process.exit import NonFiniteLoss
from avlm.storage.run_folder import read_rows
from avlm.training import flops, timing

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Log:
    """Rows of a run. Values of a step stay on the device until ``flush``, which fetches all of them together."""

    def __init__(self, config: Config, world: World, model: AVLM, first_step: int):
        self.config, self.world = config, world
        self.part_clock = timing.PartClock(model, world.device)
        self.path = Path(config.output_dir) / "metrics.jsonl"
        self.rows: list[dict[str, Any]] = []  # of steps not fetched yet
        self.values: list[Tensor] = []  # (loss of each kind, gradient norm, local loss), per row
        self.keys: list[list[str]] = []  # sample keys of this rank, per row
        self.marks: list[list[timing.Mark]] = []  # where the step's time went on this rank, per row
        self.timed_from = time.perf_counter()
        self.unwritten: list[dict[str, Any]] = []  # while the disk is full
        self.bad: set[str] = set()  # keys of samples that were said to be skipped
        # A share of the bf16 peak says nothing of steps in float32.
        is_bf16 = compute_dtype(config, world.device) == torch.bfloat16
        self.peak = flops.peak(world.device) if is_bf16 else None
        self.run = None
        if world.is_first:
            _cut(self.path, first_step)
            self.bar = tqdm(total=config.total_steps, initial=first_step, disable=not sys.stderr.isatty(), unit="step")
            if config.wandb.mode != "disabled":
                self.run = _wandb_run(config, first_step)

    def step(self, row: dict[str, Any], values: Tensor, keys: list[str]) -> None:
        """Note a step; ``values`` float32 (len(KINDS) + 2,): loss sum of each kind, gradient norm, own loss sum."""
        self.rows.append(row)
        self.values.append(values)
        self.keys.append(keys)
        self.marks.append(self.part_clock.stop())
        if self.world.is_first:
            self.bar.update()
        if row["step"] % self.config.train.log_every == 0 or values.device.type == "cpu":
            self.flush()

    def flush(self) -> None:
        """Fetch, check and write the rows so far. Raises NonFiniteLoss, on every rank, at the first bad step."""
        if not self.rows:
            return
        fetched = torch.stack(self.values).tolist()
        seconds = (time.perf_counter() - self.timed_from) / len(self.rows)
        self.timed_from = time.perf_counter()
        for row, values, keys, marks in zip(self.rows, fetched, self.keys, self.marks):
            *losses, norm, own_loss = values
            counts = [row[f"targets/{kind}"] for kind in KINDS]
            row["loss"] = sum(losses) / max(sum(counts), 1)
            row |= {f"loss/{kind}": x / n for kind, x, n in zip(KINDS, losses, counts) if n}
            row |= {"grad_norm": norm, "step_seconds": seconds, "tokens_per_second": row["tokens"] / seconds}
            row |= {f"seconds/{part}": passed for part, passed in timing.seconds(marks).items()}
            row["padding"] = 1 - row["tokens"] / row.pop("row_tokens")
            row["flops"] = sum(value for name, value in row.items() if name.startswith("flops/"))
            if self.peak:
                peak = seconds * self.world.size * self.peak
                row |= {"mfu": row["flops"] / peak, "hfu": (row["flops"] + row["recomputed_flops"]) / peak}
            if not math.isfinite(row["loss"]) or not math.isfinite(norm):
                self.write(self.rows[: self.rows.index(row)])
                own = f"; samples of this rank: {', '.join(keys)}" if not math.isfinite(own_loss) else ""
                raise NonFiniteLoss(f"loss {row['loss']}, gradient norm {norm} at step {row['step']}{own}")
            row["memory_gib"] = _peak_memory(self.world.device) / 2**30
            if row["step"] % self.config.train.log_every == 0 or row["step"] == 1:
                mfu = f"  mfu {row['mfu']:.1%}" if self.peak else ""
                self.say(
                    f"step {row['step']}/{self.config.total_steps} {row['stage']}  loss {row['loss']:.4f}  "
                    f"grad {norm:.3f}  lr {row['lr']:.2e}  {row['tokens_per_second']:,.0f} tokens/s{mfu}"
                )
        self.write(self.rows)
        self.rows, self.values, self.keys, self.marks = [], [], [], []

    def restart_clock(self) -> None:
        """Leave what happened since the last flush (start, validation, saving) out of the next steps' time."""
        self.timed_from = time.perf_counter()

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows and put them on disk. Where that is full they wait for the next ones."""
        if not self.world.is_first:
            return
        rows, waited = [*self.unwritten, *rows], bool(self.unwritten)
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        with open(self.path, "ab", buffering=0) as file:  # what a buffer holds would be written again on closing
            end = file.tell()
            try:
                if file.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in FULL:
                    raise
                file.truncate(end)
                self.unwritten = rows
                if not waited:
                    self.say(f"warning: {self.path}: {error.strerror.lower()}; its lines wait until there is room")
                return
        self.unwritten = []
        if self.run is not None:
            for row in rows:
                self.run.log(row, step=row["step"])

    def say(self, line: str) -> None:
        """One line for the person at the terminal, from the first rank."""
        if self.world.is_first:
            self._print(line, sys.stdout)

    def skipped(self, batch: Batch, where: str = "") -> None:
        """Name the samples of a row that were skipped, from each rank its own, each once however often it is read."""
        for key, reason in batch.skipped:
            if key not in self.bad:
                self.bad.add(key)
                self._print(f"skipped sample {key}{where}: {reason}", sys.stderr)

    def _print(self, line: str, file: TextIO) -> None:
        try:
            tqdm.write(line, file=file)
            file.flush()
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal that was closed; the signal that says so comes by itself
                raise

    def close(self) -> None:
        if self.world.is_first:
            self.bar.close()
            if self.unwritten:
                raise OSError(f"no space left for the last {len(self.unwritten)} lines of {self.path}")
            if self.run is not None:
                self.run.finish()


def tally(batches: list[Batch], costs: flops.Costs) -> dict[str, float]:
    """What ranks sum for a step, by the names of metrics.jsonl, with the same names whatever the batches hold."""
    names = [
        "tokens",
        "row_tokens",
        "tokens/image",
        "tokens/audio",
        "target_tokens",
        "recomputed_flops",
        "read",
        "skipped",
    ]
    names += [f"targets/{kind}" for kind in KINDS] + [f"flops/{module}" for module, _ in costs]
    total = dict.fromkeys(names, 0.0)
    for batch in batches:
        total["tokens"] += batch.num_tokens
        total["row_tokens"] += len(batch.token_T)
        total["tokens/image"] += len(batch.image_rows_F)
        total["tokens/audio"] += len(batch.audio_rows_G)
        total["target_tokens"] += len(batch.target_R)
        total["read"] += batch.read
        total["skipped"] += len(batch.skipped)
        for kind, count in zip(KINDS, torch.bincount(batch.kind_R, minlength=len(KINDS)).tolist()):
            total[f"targets/{kind}"] += count
        for module, work in flops.by_module(costs, flops.counts(batch)).items():
            total[f"flops/{module}"] += work[0] + work[1]
            total["recomputed_flops"] += work[2]
    return total


def _wandb_run(config: Config, first_step: int) -> Any:
    """The run of this folder at wandb: a resume goes on with the one that its first start began. Steps that are there
    already, from before a crash, stay as they were."""
    import wandb  # half a second, and a process of its own: only for those who use it

    path = Path(config.output_dir) / "wandb_id"
    if not first_step or not path.is_file():
        path.write_text(uuid.uuid4().hex[:8])
    options = {"project": config.wandb.project, "mode": config.wandb.mode, "dir": config.output_dir}
    return wandb.init(**options, id=path.read_text(), resume="allow", config=to_dict(config))


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors of this rank took on its GPU, or on the CPU the most that its process did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _cut(path: Path, step: int) -> None:
    """Drop the rows after ``step``: a resumed run writes them again. What a crash left half-written goes as well."""
    rows = [row for row in read_rows(path) if row["step"] <= step] if step else []
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.rename(path)


def describe(model: AVLM) -> str:
    """One line with the parameters of every module."""
    count = lambda module: sum(p.numel() for p in module.parameters())
    parts = ", ".join(f"{name} {count(module):,}" for name, module in model.named_children())
    return f"{count(model):,} parameters: {parts}"

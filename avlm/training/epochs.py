"""How long stages are: in steps, rows, and epochs, which are passes over all samples of a source.

How many samples share a row depends on their lengths. It is measured on the first rows that training would read, so
the epochs of a number of steps, and the steps of a number of epochs, are close estimates.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from avlm.config.load import load_config
from avlm.config.run import Config, DataConfig, shares
from avlm.data.check import count_samples
from avlm.data.loader import open_loader
from avlm.data.stream import Stream


@dataclass(frozen=True)
class Epoch:
    num_samples: int
    num_rows: float

    def of_steps(self, steps: int, rows_per_step: int) -> float:
        """Epochs that a number of steps takes."""
        return steps * rows_per_step / self.num_rows


def measure(config: Config) -> list[Epoch | None]:
    """An epoch of each stage; None for synthetic rows, which have no end."""
    found: list[Epoch | None] = []
    measured: list[tuple[DataConfig, Epoch | None]] = []
    for stage in config.stages:
        # One worker, in this process; a shuffle buffer would be filled with samples that nobody looks at.
        data = dataclasses.replace(stage.data, num_workers=0, shuffle_buffer=0, validation={}, metrics={})
        known = [epoch for other, epoch in measured if other == data]
        epoch = known[0] if known else _measure(data, config)
        measured.append((data, epoch))
        found.append(epoch)
    return found


def _measure(data: DataConfig, config: Config) -> Epoch | None:
    counts = [count_samples(source, data) for source in shares(data.train)]
    if not counts or None in counts:
        return None
    num_samples = sum(counts)
    stream = Stream(data.train, data, config.model, rank=0, world=1, seed=config.seed, train=True)
    rows = samples = read = 0
    for batch in open_loader(stream):
        if batch.read and read:  # what was read first has come out in rows, but for the last one
            break
        rows += 1
        read += batch.read
        samples += len(batch.keys) + len(batch.skipped)
    return Epoch(num_samples, num_samples * rows / max(samples, 1))


def with_steps(config: Config, epochs: list[Epoch | None], data_ranks: int, resumed: Path | None = None) -> Config:
    """The config with the steps of each stage whose length is given in epochs. A run that continues from ``resumed``
    keeps the steps that its stages had, unless their epochs changed. ValueError for epochs of synthetic rows."""
    had = {}
    if resumed is not None:
        had = {stage.name: stage for stage in load_config(resumed.parent.parent / "config.yaml").stages}
    stages = []
    for stage, epoch in zip(config.stages, epochs, strict=True):
        steps = stage.steps
        before = had.get(stage.name)
        if not steps and before is not None and before.epochs == stage.epochs:
            steps = before.steps
        if not steps and epoch is None:
            raise ValueError(f"stage {stage.name}: epochs={stage.epochs} of data that have no end: give steps")
        if not steps:
            steps = max(1, math.ceil(stage.epochs * epoch.num_rows / (data_ranks * config.train.accumulate)))
        stages.append(dataclasses.replace(stage, steps=steps))
    return dataclasses.replace(config, stages=stages)

"""How long stages are: in steps, rows, and epochs, which are passes over all samples of a source.

How many samples share a row depends on their lengths, which are known of the first ones (``avlm.data.bad_samples``). So
the epochs of a number of steps, and the steps of a number of epochs, are estimates.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from avlm.config.load import load_config
from avlm.config.run import Config, DataConfig, shares
from avlm.data.bad_samples import Look
from avlm.data.packing import tokens_of_rows


@dataclass(frozen=True)
class Epoch:
    """A pass over all samples of a stage's sources. Of a blend it draws as many samples as there are, each source's
    share of them."""

    num_samples: dict[str, int]  # of each source
    num_rows: float

    @property
    def total(self) -> int:
        return sum(self.num_samples.values())

    def of_steps(self, steps: int, rows_per_step: int) -> float:
        """Epochs that a number of steps takes."""
        return steps * rows_per_step / self.num_rows

    def passes(self, epochs: float, shares: dict[str, float]) -> dict[str, float]:
        """How often a number of epochs draws each sample of a source, on average."""
        drawn = epochs * self.total
        return {source: drawn * shares[source] / count for source, count in self.num_samples.items()}


def epoch_of(data: DataConfig, looks: list[Look]) -> Epoch | None:
    """An epoch of sources, from the lengths of their first samples; None for synthetic rows, which have no end, and for
    a set that streams without saying how many samples it has."""
    lengths = [length for each in looks for length in each.lengths]
    if not lengths or any(each.num_samples is None for each in looks):
        return None
    num_samples = {each.source: each.num_samples for each in looks}
    weights = shares(data.train)
    tokens = 0.0  # of a sample that is drawn
    for each in looks:
        tokens += weights[each.source] * sum(each.lengths) / each.looked_at
    rows = tokens_of_rows(lengths, data)
    rows.remove(min(rows))  # one that training would pack again, with what follows
    if rows:
        fill = sum(rows) / len(rows) / data.seq_length
    else:
        fill = min(1.0, data.packing_buffer * tokens / data.seq_length)
    return Epoch(num_samples, sum(num_samples.values()) * tokens / (fill * data.seq_length))


def with_steps(config: Config, epochs: list[Epoch | None], data_ranks: int, resumed: Path | None = None) -> Config:
    """The config with the steps of each stage whose length is given in epochs. A run that continues from ``resumed``
    keeps the steps that its stages had, unless their epochs changed. ValueError for epochs of data whose end is not
    known."""
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
            raise ValueError(f"stage {stage.name}: epochs={stage.epochs} of data whose end is not known: give steps")
        if not steps:
            steps = max(
                1, math.ceil(stage.epochs * epoch.num_rows / (data_ranks * config.train.micro_batches(data_ranks)))
            )
        stages.append(dataclasses.replace(stage, steps=steps))
    return dataclasses.replace(config, stages=stages)

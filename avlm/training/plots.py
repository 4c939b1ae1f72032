"""The curves of a run in one image: ``python -m avlm.training.plots RUN``."""

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

from avlm.process.exit import run_command

matplotlib.use("Agg")  # draw to a file, without a window
from matplotlib import pyplot
from matplotlib.axes import Axes

from avlm.storage.run_folder import Record, read_records

SPAN = 5  # steps on either side of a mean


def plot(run: Path) -> Path:
    """Draw loss (all, by modality, validation), learning rate and gradient norm, throughput, the shares of tokens and
    FLOPs, and metrics of validation, each if the run has it; writes RUN/metrics.png. ValueError without steps."""
    records = read_records(run / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    if not steps:
        raise ValueError(f"{run / 'metrics.jsonl'} holds no steps yet")
    panels = [_loss, _optimizer, _throughput, _shares]
    if not all(name.endswith("/loss") for name in _names(records, "val/")):
        panels.append(_validation)
    columns = math.ceil(len(panels) / 2)
    figure, axes = pyplot.subplots(2, columns, figsize=(6.7 * columns, 9), sharex=True)
    for panel, draw in zip(axes.flat, panels):
        draw(panel, steps, records)
        _mark_stages(panel, steps)
        panel.tick_params(labelbottom=True)  # the panel below may be hidden
    for panel in axes.flat:
        panel.set_visible(bool(panel.get_legend()))
    for panel in axes[-1]:
        panel.set_xlabel("step")
    figure.suptitle(f"{run}: thin lines are steps, bold ones means of {2 * SPAN + 1} steps around each", fontsize=10)
    figure.tight_layout()
    figure.savefig(run / "metrics.png", dpi=110)
    pyplot.close(figure)
    return run / "metrics.png"


def _loss(axes: Axes, steps: list[Record], records: list[Record]) -> None:
    _curve(axes, steps, "loss", "all", "k", width=2.0)
    for i, name in enumerate(_names(steps, "loss/")):
        _curve(axes, steps, name, name.removeprefix("loss/"), f"C{i}")
    _points(axes, records, lambda name: name.endswith("/loss"))
    axes.set(ylabel="loss per target token (nats)", yscale="log", title="loss")
    axes.legend(fontsize=8)


def _optimizer(axes: Axes, steps: list[Record], records: list[Record]) -> None:
    _curve(axes, steps, "lr", "learning rate", "C0", span=0)
    axes.set(ylabel="learning rate", title="learning rate and gradient norm")
    other = axes.twinx()
    _curve(other, steps, "grad_norm", "gradient norm", "C1")
    other.set(ylabel="gradient norm before clipping", yscale="log")
    _legend(axes, other)


def _throughput(axes: Axes, steps: list[Record], records: list[Record]) -> None:
    _curve(axes, steps, "tokens_per_second", "tokens/s without padding", "C2")
    axes.set(ylabel="tokens per second", title="throughput", ylim=(0, None))
    other = axes.twinx()
    _curve(other, steps, "data_seconds", "wait for data", "C3", percent=True, of="step_seconds")
    _curve(other, steps, "padding", "padding", "C4", percent=True)
    if _names(steps, "mfu"):
        _curve(other, steps, "mfu", "MFU", "C5", percent=True)
    other.set(ylabel="%", ylim=(0, 100))
    _legend(axes, other)


def _validation(axes: Axes, steps: list[Record], records: list[Record]) -> None:
    """Every validation metric except the loss."""
    _points(axes, records, lambda name: not name.endswith("/loss"))
    axes.set(ylabel="share, or errors per word or letter", title="validation", ylim=(0, None))
    if axes.lines:
        axes.legend(fontsize=8)


def _shares(axes: Axes, steps: list[Record], records: list[Record]) -> None:
    """Solid: tokens of the rows by modality. Dashed: FLOPs by module."""
    modalities = _names(steps, "tokens/")
    for i, name in enumerate(modalities):
        _curve(axes, steps, name, name, f"C{i}", percent=True, of="tokens")
    for i, name in enumerate(_names(steps, "flops/"), start=len(modalities)):
        if any(record.get(name) for record in steps):
            _curve(axes, steps, name, name, f"C{i}", percent=True, of="flops", style="--")
    axes.set(ylabel="%", ylim=(0, 100), title="share of tokens and of FLOPs")
    axes.legend(fontsize=8, ncols=2)


def _points(axes: Axes, records: list[Record], wanted: Callable[[str], bool]) -> None:
    """A mark for each value that validation measured."""
    names = filter(wanted, _names(records, "val/"))
    for name, marker in zip(names, itertools.cycle("osD^v")):
        steps = [record["step"] for record in records if name in record]
        values = [record[name] for record in records if name in record]
        axes.plot(steps, values, f":{marker}", ms=5, mfc="none", lw=0.8, label=name.removesuffix("/loss"))


def _names(records: list[Record], prefix: str) -> list[str]:
    return sorted({name for record in records for name in record if name.startswith(prefix)})


def _curve(
    axes: Axes,
    steps: list[Record],
    name: str,
    label: str,
    colour: str,
    percent: bool = False,
    of: str = "",
    width: float = 1.1,
    style: str = "-",
    span: int = SPAN,
) -> None:
    """A value over the steps, thin, and its mean within each stage, bold. Steps that lack it are left out.

    ``percent``: the value, or its share ``of`` another one, is drawn in percent.
    """
    for _, stage in itertools.groupby(steps, key=lambda record: record["stage"]):
        records = [record for record in stage if name in record]
        if not records:
            continue
        x = [record["step"] for record in records]
        y = [record[name] for record in records]
        if of:
            y = [share / (record[of] or 1) for share, record in zip(y, records)]
        if percent:
            y = [100 * share for share in y]
        if span:
            axes.plot(x, y, color=colour, lw=0.5, alpha=0.35)
        axes.plot(x, centred_means(y, span), color=colour, lw=width, ls=style, label=label)
        label = "_"  # one entry in the legend


def _legend(axes: Axes, other: Axes) -> None:
    """One legend for two axes that share a panel."""
    lines = [line for line in [*axes.lines, *other.lines] if not line.get_label().startswith("_")]
    axes.legend(handles=lines, fontsize=8)


def centred_means(values: Sequence[float], span: int) -> list[float]:
    """The mean of each value and its neighbours: up to ``span`` of them on each side, the same number on both, so that
    the means of a straight line lie on it."""
    sums = list(itertools.accumulate(values, initial=0.0))
    means = []
    for i in range(len(values)):
        reach = min(span, i, len(values) - 1 - i)
        means.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return means


def _mark_stages(axes: Axes, steps: list[Record]) -> None:
    """A line where each stage begins, with its name if the stage is long enough."""
    for name, stage in itertools.groupby(steps, key=lambda record: record["stage"]):
        numbers = [record["step"] for record in stage]
        axes.axvline(numbers[0], color="0.7", lw=0.8, ls=":")
        if len(numbers) > len(steps) / 50:
            place = {"transform": axes.get_xaxis_transform(), "rotation": 90, "va": "bottom"}
            axes.text(numbers[0], 0.01, name, fontsize=7, color="0.4", **place)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the curves of a run.")
    parser.add_argument("run", type=Path, help="run folder")
    arguments = parser.parse_args()
    print(plot(arguments.run))


if __name__ == "__main__":
    run_command(main)

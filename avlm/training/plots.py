"""The curves of a run, drawn by ``python -m avlm.training.plots RUN``: one picture with what to look at first."""

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

from avlm.process.exit import run_command

matplotlib.use("Agg")  # a file, no window
from matplotlib import pyplot
from matplotlib.axes import Axes

from avlm.storage.run_folder import Record, read_records

SPAN = 5  # steps to either side that a mean takes in


def plot(run: Path) -> Path:
    """Draw loss (all, by modality, validation), learning rate and gradient norm, throughput, the shares of tokens and
    FLOPs, and metrics of validation, each if the run has it; writes RUN/metrics.png. ValueError without steps."""
    records = read_records(run / "metrics.jsonl")
    steps = [row for row in records if "loss" in row]
    if not steps:
        raise ValueError(f"{run / 'metrics.jsonl'} holds no steps yet")
    figure, axes = pyplot.subplots(2, 3, figsize=(20, 9), sharex=True)
    panels = (_loss, _optimizer, _throughput, _shares, _validation)
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
    kinds = sorted({key for row in steps for key in row if key.startswith("loss/")})
    _curve(axes, steps, lambda row: row["loss"], "all", "k", 2.0)
    for i, kind in enumerate(kinds):
        _curve(axes, steps, lambda row, kind=kind: row.get(kind), kind.removeprefix("loss/"), f"C{i}")
    _points(axes, records, lambda name: name.endswith("/loss"))
    axes.set(ylabel="loss per target token (nats)", yscale="log", title="loss")
    axes.legend(fontsize=8)


def _optimizer(axes: Axes, steps: list[Record], records: list[Record]) -> None:
    _curve(axes, steps, lambda row: row["lr"], "learning rate", "C0", span=0)
    axes.set(ylabel="learning rate", title="learning rate and gradient norm")
    other = axes.twinx()
    _curve(other, steps, lambda row: row["grad_norm"], "gradient norm", "C1")
    other.set(ylabel="gradient norm before clipping", yscale="log")
    _legend(axes, other)


def _throughput(axes: Axes, steps: list[Record], records: list[Record]) -> None:
    _curve(axes, steps, lambda row: row["tokens_per_second"], "tokens/s without padding", "C2")
    axes.set(ylabel="tokens per second", title="throughput", ylim=(0, None))
    other = axes.twinx()
    _curve(other, steps, lambda row: 100 * row["data_seconds"] / row["step_seconds"], "wait for data", "C3")
    _curve(other, steps, lambda row: _percent(row, "padding"), "padding", "C4")
    if any("mfu" in row for row in steps):
        _curve(other, steps, lambda row: _percent(row, "mfu"), "MFU", "C5")
    other.set(ylabel="%", ylim=(0, 100))
    _legend(axes, other)


def _validation(axes: Axes, steps: list[Record], records: list[Record]) -> None:
    """Every metric of validation but the loss."""
    _points(axes, records, lambda name: not name.endswith("/loss"))
    axes.set(ylabel="share, or errors per word or letter", title="validation", ylim=(0, None))
    if axes.lines:
        axes.legend(fontsize=8)


def _shares(axes: Axes, steps: list[Record], records: list[Record]) -> None:
    """Solid: tokens of the rows. Dashed: FLOPs by module."""
    for i, name in enumerate(("tokens/image", "tokens/audio")):
        _curve(axes, steps, lambda row, name=name: _percent(row, name, "tokens"), name, f"C{i}")
    for i, name in enumerate(sorted({key for row in steps for key in row if key.startswith("flops/")})):
        if any(row.get(name) for row in steps):
            _curve(axes, steps, lambda row, name=name: _percent(row, name, "flops"), name, f"C{i + 2}", style="--")
    axes.set(ylabel="%", ylim=(0, 100), title="share of tokens and of FLOPs")
    axes.legend(fontsize=8, ncols=2)


def _points(axes: Axes, records: list[Record], wanted: Callable[[str], bool]) -> None:
    """What validation measured, a mark each time."""
    names = sorted({key for row in records for key in row if key.startswith("val/") and wanted(key)})
    for name, marker in zip(names, itertools.cycle("osD^v")):
        found = [(row["step"], row[name]) for row in records if name in row]
        axes.plot(*zip(*found), f":{marker}", ms=5, mfc="none", lw=0.8, label=name.removesuffix("/loss"))


def _percent(row: Record, name: str, of: str | None = None) -> float | None:
    """None where a row lacks it: MFU on unknown devices, and what older versions did not write."""
    if name not in row:
        return None
    return 100 * row[name] / max(row[of], 1) if of else 100 * row[name]


def _curve(
    axes: Axes,
    steps: list[Record],
    value: Callable[[Record], float | None],
    label: str,
    colour: str,
    width: float = 1.1,
    style: str = "-",
    span: int = SPAN,
) -> None:
    """One value over the steps, and bolder its mean within each stage; steps that lack it are left out."""
    for _, stage in itertools.groupby(steps, key=lambda row: row["stage"]):
        points = [(row["step"], value(row)) for row in stage]
        points = [(step, y) for step, y in points if y is not None]
        if not points:
            continue
        x, y = zip(*points)
        if span:
            axes.plot(x, y, color=colour, lw=0.5, alpha=0.35)
        axes.plot(x, centred_means(y, span), color=colour, lw=width, ls=style, label=label)
        label = "_"  # once in the legend


def _legend(axes: Axes, other: Axes) -> None:
    """One legend for two axes that share a panel."""
    lines = [line for line in (*axes.lines, *other.lines) if not line.get_label().startswith("_")]
    axes.legend(handles=lines, fontsize=8)


def centred_means(values: Sequence[float], span: int) -> list[float]:
    """The mean of each value and its neighbours, up to ``span`` on each side and the same number on both. Means of
    values on a straight line lie on it, and the first and last are the values themselves."""
    sums = list(itertools.accumulate(values, initial=0.0))
    reach = [min(span, i, len(values) - 1 - i) for i in range(len(values))]
    return [(sums[i + n + 1] - sums[i - n]) / (2 * n + 1) for i, n in enumerate(reach)]


def _mark_stages(axes: Axes, steps: list[Record]) -> None:
    """A line where each stage begins, and its name where the stage is long enough for one."""
    for name, stage in itertools.groupby(steps, key=lambda row: row["stage"]):
        numbers = [row["step"] for row in stage]
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

"""The curves of a run, drawn from its metrics.jsonl."""

import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draw to a file, without a window
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from avlm.storage.run_folder import Record, read_records

SPAN = 5  # steps on either side of a mean
FIRST = 3  # panels that are drawn unless all are asked for
ERRORS = ("wer", "cer")  # how metrics that count errors begin: lower is better, and there may be more than words
# One colour for one thing, in every panel: a modality, its tower and its projector share theirs.
COLOURS = {"all": "black", "text": "tab:gray", "image": "tab:blue", "audio": "tab:orange"}
COLOURS |= {"video": "tab:green", "mixed": "tab:red", "decoder": "tab:brown", "head": "tab:pink"}
COLOURS |= {"vision": COLOURS["image"], "vision_projector": COLOURS["image"], "audio_projector": COLOURS["audio"]}
COLOURS |= {"learning rate": "tab:cyan", "gradient norm": "tab:purple", "tokens/s without padding": "tab:olive"}
COLOURS |= {"wait for data": "firebrick", "padding": "darkgray", "MFU": "black"}
SETS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d")  # validation sets, in their order
Panel = Callable[[Axes, list[Record], list[Record]], None]


def plot(run: Path, everything: bool = False) -> Path:
    """Draw loss, scores and errors of validation, learning rate with gradient norm, throughput, and the shares of
    tokens and FLOPs: the first three that the run has, or all of them. Writes RUN/metrics.png.

    Raises FileNotFoundError for a folder that is no run, ValueError for one without steps.
    """
    steps, records, panels = _read(run)
    if not everything:
        panels = panels[:FIRST]
    columns = min(FIRST, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(6.2 * columns, 5.6 * lines), layout="constrained", squeeze=False
    )
    for place, panel in zip(axes.flat, panels):
        _draw(place, panel, steps, records)
    for place in axes.flat[len(panels) :]:
        place.set_visible(False)
    figure.suptitle(f"{run.resolve().name}: {smoothing()}", fontsize=11)
    (run / "metrics.png").write_bytes(_png(figure))
    return run / "metrics.png"


def panel_images(run: Path) -> list[bytes]:
    """The first panels as PNG images of their own. Raises what ``plot`` raises."""
    steps, records, panels = _read(run)
    images = []
    for panel in panels[:FIRST]:
        figure, axes = pyplot.subplots(figsize=(5.6, 4.9), layout="constrained")
        _draw(axes, panel, steps, records)
        images.append(_png(figure))
    return images


def smoothing() -> str:
    return f"pale lines are steps, bold ones means of up to {2 * SPAN + 1} values around each"


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    pyplot.close(figure)
    return content.getvalue()


def _read(run: Path) -> tuple[list[Record], list[Record], list[Panel]]:
    """The records of steps, all records, and the panels that they fill, the most telling first."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        reason = "holds no metrics.jsonl" if run.is_dir() else "does not exist"
        raise FileNotFoundError(f"{run} {reason}: give the folder of a run, its output_dir")
    records = read_records(path)
    steps = [record for record in records if "loss" in record]
    if not steps:
        raise ValueError(f"{path} holds no steps yet")
    panels: list[Panel] = [_loss]
    if _scores(records):
        panels.append(_validation_scores)
    if _errors(records):
        panels.append(_validation_errors)
    return steps, records, [*panels, _optimizer, _throughput, _shares]


def _draw(axes: Axes, panel: Panel, steps: list[Record], records: list[Record]) -> None:
    panel(axes, steps, records)
    axes.set_title(axes.get_title(), pad=42)  # above the names of stages
    _mark_stages(axes, steps)
    axes.set_xlabel("step")
    lines = [line for each in _twins(axes) for line in each.lines if not str(line.get_label()).startswith("_")]
    axes.legend(handles=lines, fontsize=8, ncols=3, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13))


def _twins(axes: Axes) -> list[Axes]:
    """The axes of a panel, the one that it was given first."""
    return [axes, *(each for each in axes.figure.axes if each is not axes and each.bbox.bounds == axes.bbox.bounds)]


def _loss(axes: Axes, steps: list[Record], records: list[Record]) -> None:
    _curve(axes, steps, "loss", "all", width=2.0)
    for name in _names(steps, "loss/"):
        _curve(axes, steps, name, name.removeprefix("loss/"))
    _points(axes, records, [name for name in _names(records, "val/") if name.endswith("/loss")])
    axes.set(ylabel="loss per target token (nats)", yscale="log", title="loss")


def _scores(records: list[Record]) -> list[str]:
    return [name for name in _names(records, "val/") if not name.rpartition("/")[2].startswith(("loss", *ERRORS))]


def _errors(records: list[Record]) -> list[str]:
    return [name for name in _names(records, "val/") if name.rpartition("/")[2].startswith(ERRORS)]


def _validation_scores(axes: Axes, steps: list[Record], records: list[Record]) -> None:
    _points(axes, records, _scores(records))
    axes.set(ylabel="score", title="validation: scores, higher is better", ylim=(0, None))


def _validation_errors(axes: Axes, steps: list[Record], records: list[Record]) -> None:
    _points(axes, records, _errors(records))
    axes.set(
        ylabel="errors per word (wer) or letter (cer)", title="validation: errors, lower is better", ylim=(0, None)
    )


def _optimizer(axes: Axes, steps: list[Record], records: list[Record]) -> None:
    _curve(axes, steps, "lr", "learning rate", span=0)
    axes.set(ylabel="learning rate", title="learning rate and gradient norm")
    other = axes.twinx()
    _curve(other, steps, "grad_norm", "gradient norm")
    other.set(ylabel="gradient norm before clipping", yscale="log")


def _throughput(axes: Axes, steps: list[Record], records: list[Record]) -> None:
    _curve(axes, steps, "tokens_per_second", "tokens/s without padding")
    axes.set(ylabel="tokens per second", title="throughput", ylim=(0, None))
    other = axes.twinx()
    _curve(other, steps, "data_seconds", "wait for data", percent=True, of="step_seconds")
    _curve(other, steps, "padding", "padding", percent=True)
    if _names(steps, "mfu"):
        _curve(other, steps, "mfu", "MFU", percent=True)
    other.set(ylabel="%", ylim=(0, 100))


def _shares(axes: Axes, steps: list[Record], records: list[Record]) -> None:
    """Solid: tokens of the rows by modality. Dashed, projectors dotted: FLOPs by module."""
    for name in [*_names(steps, "tokens/"), *_names(steps, "flops/")]:
        if any(record.get(name) for record in steps):
            of = name.partition("/")[0]
            style = "-" if of == "tokens" else ":" if name.endswith("_projector") else "--"
            _curve(axes, steps, name, name, percent=True, of=of, style=style)
    axes.set(ylabel="%", ylim=(0, 100), title="share of tokens and of FLOPs")


def _points(axes: Axes, records: list[Record], names: list[str]) -> None:
    """A mark for each value that validation measured: a colour for each set, a mark for each metric."""
    sets = list(dict.fromkeys(name.split("/", 1)[1].rpartition("/")[0] for name in _names(records, "val/")))
    metrics = list(dict.fromkeys(name.rpartition("/")[2] for name in names))
    for name in names:
        of_set, _, metric = name.split("/", 1)[1].rpartition("/")
        colour, marker = SETS[sets.index(of_set) % len(SETS)], "osD^v"[metrics.index(metric) % 5]
        label = name.removesuffix("/loss")
        for _, stage in itertools.groupby(records, key=lambda record: record["stage"]):
            measured = [record for record in stage if name in record]
            if measured:
                values = [record[name] for record in measured]
                where = [record["step"] for record in measured]
                axes.plot(where, values, f":{marker}", color=colour, ms=5, mfc="none", lw=0.8, label=label)
                label = "_"  # one entry in the legend


def _names(records: list[Record], prefix: str) -> list[str]:
    return sorted({name for record in records for name in record if name.startswith(prefix)})


def _curve(
    axes: Axes,
    steps: list[Record],
    name: str,
    label: str,
    percent: bool = False,
    of: str = "",
    width: float = 1.1,
    style: str = "-",
    span: int = SPAN,
) -> None:
    """A value over the steps, pale, and its mean, bold. Neither crosses the end of a stage, or a stretch of steps that
    lack the value.

    ``percent``: the value, or its share ``of`` another one, is drawn in percent.
    """
    colour = COLOURS.get(label) or COLOURS.get(label.rpartition("/")[2], "tab:olive")
    for stretch in stretches(steps, name):
        x = [record["step"] for record in stretch]
        y = [record[name] for record in stretch]
        if of:
            y = [share / (record[of] or 1) for share, record in zip(y, stretch)]
        if percent:
            y = [100 * share for share in y]
        if span:
            axes.plot(x, y, color=colour, lw=0.5, alpha=0.35)
        marker = "." if len(x) == 1 else ""
        axes.plot(x, centred_means(y, span), marker=marker, color=colour, lw=width, ls=style, label=label)
        label = "_"  # one entry in the legend


def stretches(steps: list[Record], name: str) -> Iterator[list[Record]]:
    """The records that have a value, in one list for each stage and each run of steps without a gap. Up to SPAN steps
    may lack it: not every row has all modalities."""
    for _, stage in itertools.groupby(steps, key=lambda record: record["stage"]):
        stretch: list[Record] = []
        for record in stage:
            if name not in record:
                continue
            if stretch and record["step"] - stretch[-1]["step"] > SPAN:
                yield stretch
                stretch = []
            stretch.append(record)
        if stretch:
            yield stretch


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
    """A line where each stage begins, with its name above it if the stage is long enough."""
    for name, stage in itertools.groupby(steps, key=lambda record: record["stage"]):
        numbers = [record["step"] for record in stage]
        axes.axvline(numbers[0], color="0.7", lw=0.8, ls=":")
        if len(numbers) > len(steps) / 50:
            place = {"transform": axes.get_xaxis_transform(), "rotation": 20, "va": "bottom"}
            axes.text(numbers[0], 1.01, name, fontsize=7, color="0.4", **place)

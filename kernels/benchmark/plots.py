"""PNGs of results: lines over a sweep of shapes; bars for shapes that have nothing in common; the roofline."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kernels.benchmark.report import mask_name

OURS, PEERS = "tab:blue", "tab:gray"
BARS_HIGH, BARS_WIDE = 0.24, 7.0  # inches of a bar's height and a figure's width
Groups = dict[tuple[str, ...], list[dict]]


def lines(rows: list[dict], folder: Path, prefix: str) -> list[Path]:
    """One PNG for each kernel, direction, head dim and mask, with a line for each provider. Returns their paths."""

    def key(row: dict) -> tuple[str, ...]:
        head_dim = f"hd{row['head_dim']}" if "head_dim" in row else ""
        return row["kernel"], row["mode"], head_dim, mask_name(row)

    paths = []
    for (kernel, *words), members in _grouped(rows, key).items():
        words = [word for word in words if word]
        path = folder / f"{prefix}_{'_'.join(words)}.png"
        _lines(members, " ".join([kernel, *words]), path)
        paths.append(path)
    return paths


def _grouped(rows: list[dict], key: Callable[[dict], tuple[str, ...]]) -> Groups:
    groups: Groups = defaultdict(list)
    for row in rows:
        if not row.get("reason"):
            groups[key(row)].append(row)
    return groups


def _rate(row: dict) -> tuple[str, str]:
    return ("gb_per_s", "GB/s") if "gb_per_s" in row else ("tflops", "TFLOP/s")


def _lines(rows: list[dict], title: str, path: Path) -> None:
    rate, unit = _rate(rows[0])
    labels = list(dict.fromkeys((row["shape"], row["x"]) for row in rows))
    of_provider: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        of_provider[row["provider"]].append(row)
    figure = Figure(figsize=(max(6, 1.1 * len(labels)), 5), layout="constrained")
    axes = figure.add_subplot()
    for provider, line in of_provider.items():
        places = [labels.index((row["shape"], row["x"])) for row in line]
        axes.plot(places, [row[rate] for row in line], marker="o", label=provider)
    axes.set_xticks(range(len(labels)), [f"{shape}, {x}" for shape, x in labels], rotation=30, ha="right")
    axes.set(ylabel=unit, ylim=(0, None))
    axes.set_title(f"{title}, {rows[0]['dtype']}\n{_device(rows[0])}", fontsize=10)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def bars(rows: list[dict], folder: Path) -> list[Path]:
    """One PNG for each kernel and direction, with bars for the providers of each shape, and one of the roofline."""
    paths = []
    for (kernel, mode), members in _grouped(rows, lambda row: (row["kernel"], row["mode"])).items():
        path = folder / f"{kernel}_{mode}.png"
        _bars(members, f"{kernel} {mode}, {members[0]['dtype']}\n{_device(members[0])}", path)
        paths.append(path)
    counted = [row for row in rows if "tflops" in row]
    if counted:
        _roofline(counted, folder / "roofline.png")
        paths.append(folder / "roofline.png")
    return paths


def _bars(rows: list[dict], title: str, path: Path) -> None:
    rate, unit = _rate(rows[0])
    shapes = _grouped(rows, lambda row: (row["shape"], str(row["x"]), str(row.get("head_dim", ""))))
    heights = [len(members) + 1.5 for members in shapes.values()]
    figure = Figure(figsize=(BARS_WIDE, BARS_HIGH * sum(heights) + 1), layout="constrained")
    panels = figure.subplots(len(shapes), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    widest = max(row[rate] for row in rows)
    for axes, ((shape, x, head_dim), members) in zip(panels, shapes.items()):
        members = sorted(members, key=lambda row: row[rate])
        colors = [OURS if row["provider"].startswith("ours") else PEERS for row in members]
        bar = axes.barh([row["provider"] for row in members], [row[rate] for row in members], color=colors)
        axes.bar_label(bar, [f"{row[rate]:.3g}  ({row['ms_p50']:.3g} ms)" for row in members], padding=3, fontsize=7)
        axes.set_title(f"{shape}, {x}" + (f", head dim {head_dim}" if head_dim else ""), fontsize=8, loc="left")
        axes.tick_params(labelsize=7)
        axes.set_xlim(0, 1.25 * widest)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(f"{unit}, median (more is better)", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def _roofline(rows: list[dict], path: Path) -> None:
    """Our rows, and the fastest other of each shape, under the roof that their bounds were computed with."""
    figure = Figure(figsize=(BARS_WIDE, 4.5), layout="constrained")
    axes = figure.add_subplot()
    ours = [row for row in rows if row["provider"].startswith("ours")]
    cases = _grouped(rows, lambda row: (row["kernel"], row["mode"], row["shape"], str(row["x"]), mask_name(row)))
    others = []
    for members in cases.values():
        peers = [row for row in members if not row["provider"].startswith("ours") and row["verdict"] == "ok"]
        others += sorted(peers, key=lambda row: row["ms_p50"])[:1]
    for name, color, marker, chosen in (("the fastest peer", PEERS, "x", others), ("ours", OURS, "o", ours)):
        points = [(row["flop_per_byte"], row["tflops"]) for row in chosen]
        if points:
            axes.scatter(*zip(*points), c=color, marker=marker, s=18, label=name)
    _roof(axes, rows)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that has to move", ylabel="TFLOP/s")
    axes.set_title(f"Roofline\n{_device(rows[0])}", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)


def _roof(axes: Axes, rows: list[dict]) -> None:
    """A row's bound is a point of the roof: its FLOPs in its best time."""
    roof = sorted({(row["flop_per_byte"], row["tflops"] * 100 / row["percent_of_bound"]) for row in rows})
    axes.plot(*zip(*roof), color="black", linewidth=1, label="bound")


def _device(row: dict) -> str:
    return row["gpu"] or row["device"]

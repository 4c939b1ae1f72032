"""How results are shown and kept: a table on the console, a CSV in the columns of Liger's, a plot."""

import csv
from pathlib import Path

COLUMNS = (
    # what was measured
    *("kernel", "provider", "mode", "metric", "shape", "x", "dtype", "head_dim", "causal"),
    # how fast it is; spread: between the medians of the rounds
    *("ms_p50", "ms_p20", "ms_p80", "spread_percent", "tflops", "percent_of_datasheet", "percent_of_gemm"),
    *("gb_per_s", "percent_of_copy"),
    # how much memory a call holds at most, above its inputs, and what it keeps of its forward for its backward
    *("peak_mib", "saved_mib"),
    # how right it is: relative to float64, and that over the error of plain PyTorch in the same dtype
    *("error", "error_ratio"),
    # why there is no number
    "reason",
    # where
    *("device", "gpu", "driver", "power_limit_w", "sm_clock_mhz", "torch", "triton", "timestamp"),
)
# column: (heading, format) on the console
TIME = {
    "ms_p50": ("ms", ".4f"),
    "ms_p20": ("p20", ".4f"),
    "ms_p80": ("p80", ".4f"),
    "spread_percent": ("spread %", ".1f"),
}
ARITHMETIC = {
    "tflops": ("TFLOP/s", ".4g"),
    "percent_of_datasheet": ("% sheet", ".1f"),
    "percent_of_gemm": ("% GEMM", ".1f"),
}
TRAFFIC = {"gb_per_s": ("GB/s", ".4g"), "percent_of_copy": ("% copy", ".1f")}
MEMORY = {"peak_mib": ("MiB", ".1f"), "saved_mib": ("saved", ".1f")}
ERRORS = {"error": ("error", ".1e"), "error_ratio": ("ratio", ".2f")}


def table(rows: list[dict]) -> str:
    """The providers of one shape and direction, under a line that names both."""
    first = rows[0]
    mask = {True: "causal", False: "full", None: ""}[first.get("causal")]
    width = f"head dim {first['head_dim']}" if "head_dim" in first else ""
    device = "" if first["device"] == "cuda" else f"device={first['device']}"
    title = [first["kernel"], first["mode"], first["shape"], f"x {first['x']}", width, mask, first["dtype"], device]
    rates = TRAFFIC if any("gb_per_s" in row for row in rows) else ARITHMETIC
    memory = {name: cell for name, cell in MEMORY.items() if any(name in row for row in rows)}
    cells = TIME | rates | memory | ERRORS
    name_width = max(20, *(len(row["provider"]) for row in rows))
    lines = [
        "  ".join(filter(None, title)),
        f"  {'provider':{name_width}}" + "".join(f"{name:>10}" for name, _ in cells.values()),
    ]
    for row in rows:
        if row.get("reason"):
            values = f"  - {row['reason'][:90]}"
        else:
            values = "".join(
                f"{format(row[column], style) if column in row else '':>10}" for column, (_, style) in cells.items()
            )
        lines.append(f"  {row['provider']:{name_width}}{values}")
    return "\n".join(lines)


def open_csv(path: Path) -> None:
    """Make the file with its header unless it is there: later runs append to it. ValueError if it has other columns."""
    header = ",".join(COLUMNS)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(header + "\n")
    elif path.read_text().partition("\n")[0] != header:
        raise ValueError(f"{path} has other columns than this version writes: move it away")


def append_csv(path: Path, rows: list[dict]) -> None:
    rounded = [{key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()} for row in rows]
    with path.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(rounded)


def plot(rows: list[dict], folder: Path, prefix: str) -> list[Path]:
    """One PNG per kernel, direction, head dim and mask: a line per provider over the shapes. Returns their paths."""
    from matplotlib.figure import Figure  # slow to import, and only for this

    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if not row.get("reason"):
            groups.setdefault((row["kernel"], row["mode"], row.get("head_dim"), row.get("causal")), []).append(row)
    paths = []
    for (kernel, mode, head_dim, causal), members in groups.items():
        rate, unit = ("gb_per_s", "GB/s") if "gb_per_s" in members[0] else ("tflops", "TFLOP/s")
        labels = list(dict.fromkeys((row["shape"], row["x"]) for row in members))
        figure = Figure(figsize=(max(6, 1.1 * len(labels)), 5), layout="constrained")
        axes = figure.add_subplot()
        for provider in dict.fromkeys(row["provider"] for row in members):
            line = [row for row in members if row["provider"] == provider]
            axes.plot(
                [labels.index((row["shape"], row["x"])) for row in line],
                [row[rate] for row in line],
                marker="o",
                label=provider,
            )
        axes.set_xticks(range(len(labels)), [f"{shape}, {x}" for shape, x in labels], rotation=30, ha="right")
        axes.set(ylabel=unit, ylim=(0, None))
        words = [kernel, mode, f"hd{head_dim}" if head_dim else "", {True: "causal", False: "full"}.get(causal, "")]
        where = members[0]["gpu"] or members[0]["device"]
        axes.set_title(f"{' '.join(filter(None, words))}, {members[0]['dtype']}\n{where}", fontsize=10)
        axes.legend()
        axes.grid(alpha=0.3)
        paths.append(folder / f"{prefix}_{'_'.join(filter(None, words[1:]))}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths

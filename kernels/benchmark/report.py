"""How results are shown and stored: a table on the console, a CSV with the columns of Liger's, plots."""

import csv
from pathlib import Path

COLUMNS = (
    # what was measured
    "kernel",
    "provider",
    "mode",
    "metric",
    "shape",
    "x",
    "dtype",
    "head_dim",
    "causal",
    # times and rates; spread: between the medians of the rounds
    "ms_p50",
    "ms_p20",
    "ms_p80",
    "spread_percent",
    "tflops",
    "percent_of_datasheet",
    "percent_of_gemm",
    "gb_per_s",
    "percent_of_copy",
    # memory: the peak of a call on top of its inputs, and what its forward saves for its backward
    "peak_mib",
    "saved_mib",
    # error relative to float64, and its ratio to the error of plain PyTorch in the same dtype
    "error",
    "error_ratio",
    # why there are no numbers
    "reason",
    # device and software
    "device",
    "gpu",
    "driver",
    "power_limit_w",
    "sm_clock_mhz",
    "torch",
    "triton",
    "timestamp",
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
    """The providers of one shape and direction, under a title that names both."""
    first = rows[0]
    title = [first["kernel"], first["mode"], first["shape"], f"x {first['x']}"]
    if "head_dim" in first:
        title += [f"head dim {first['head_dim']}", mask_name(first)]
    title.append(first["dtype"])
    if first["device"] != "cuda":
        title.append(f"device={first['device']}")
    present = set().union(*rows)
    rates = TRAFFIC if "gb_per_s" in present else ARITHMETIC
    memory = {column: cell for column, cell in MEMORY.items() if column in present}
    cells = TIME | rates | memory | ERRORS
    name_width = max(20, *(len(row["provider"]) for row in rows))
    headings = "".join(f"{heading:>10}" for heading, _ in cells.values())
    lines = ["  ".join(title), f"  {'provider':{name_width}}{headings}"]
    for row in rows:
        if row.get("reason"):
            values = f"  - {row['reason'][:90]}"
        else:
            values = "".join(_cell(row, column, style) for column, (_, style) in cells.items())
        lines.append(f"  {row['provider']:{name_width}}{values}")
    return "\n".join(lines)


def _cell(row: dict, column: str, style: str) -> str:
    text = format(row[column], style) if column in row else ""
    return f"{text:>10}"


def mask_name(row: dict) -> str:
    """Empty for kernels without a mask."""
    if row.get("causal") is None:
        return ""
    return "causal" if row["causal"] else "full"


def open_csv(path: Path) -> None:
    """Create the file with its header; later runs append to it. ValueError if a file has different columns."""
    header = ",".join(COLUMNS)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(header + "\n")
    elif path.read_text().partition("\n")[0] != header:
        raise ValueError(f"{path} has different columns from those that this version writes: move it away")


def append_csv(path: Path, rows: list[dict]) -> None:
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        for row in rows:
            writer.writerow({key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()})


def plot(rows: list[dict], folder: Path, prefix: str) -> list[Path]:
    """One PNG for each kernel, direction, head dim and mask, with a line for each provider. Returns their paths."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if not row.get("reason"):
            head_dim = f"hd{row['head_dim']}" if "head_dim" in row else ""
            key = (row["kernel"], row["mode"], head_dim, mask_name(row))
            groups.setdefault(key, []).append(row)
    paths = []
    for (kernel, *words), members in groups.items():
        words = [word for word in words if word]
        path = folder / f"{prefix}_{'_'.join(words)}.png"
        _plot_group(members, " ".join([kernel, *words]), path)
        paths.append(path)
    return paths


def _plot_group(rows: list[dict], title: str, path: Path) -> None:
    from matplotlib.figure import Figure  # slow to import, and needed only here

    rate, unit = ("gb_per_s", "GB/s") if "gb_per_s" in rows[0] else ("tflops", "TFLOP/s")
    labels = list(dict.fromkeys((row["shape"], row["x"]) for row in rows))
    lines: dict[str, list[dict]] = {}
    for row in rows:
        lines.setdefault(row["provider"], []).append(row)
    figure = Figure(figsize=(max(6, 1.1 * len(labels)), 5), layout="constrained")
    axes = figure.add_subplot()
    for provider, line in lines.items():
        places = [labels.index((row["shape"], row["x"])) for row in line]
        axes.plot(places, [row[rate] for row in line], marker="o", label=provider)
    axes.set_xticks(range(len(labels)), [f"{shape}, {x}" for shape, x in labels], rotation=30, ha="right")
    axes.set(ylabel=unit, ylim=(0, None))
    device = rows[0]["gpu"] or rows[0]["device"]
    axes.set_title(f"{title}, {rows[0]['dtype']}\n{device}", fontsize=10)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)

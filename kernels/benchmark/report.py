"""How results are shown and stored: a table on the console, and a CSV with the columns of Liger's."""

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
    # the same call replayed from a CUDA graph, or why that cannot be
    "graph_ms",
    "graph_reason",
    "tflops",
    "percent_of_datasheet",
    "percent_of_gemm",
    "gb_per_s",
    "percent_of_copy",
    # roofline
    "flop_per_byte",
    "bound_ms",
    "bound_by",
    "percent_of_bound",
    # memory: the peak of a call on top of its inputs, and what its forward saves for its backward
    "peak_mib",
    "saved_mib",
    # error relative to float64, and its ratio to the error of plain PyTorch in the same dtype
    "error",
    "error_ratio",
    "verdict",
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
# column: (heading, format) on the console; the verdict "wrong" is an exclamation mark after the ratio
TIME = {
    "ms_p50": ("ms", ".4f"),
    "ms_p20": ("p20", ".4f"),
    "ms_p80": ("p80", ".4f"),
    "spread_percent": ("spread %", ".1f"),
    "graph_ms": ("graph ms", ".4f"),
}
ARITHMETIC = {
    "tflops": ("TFLOP/s", ".4g"),
    "percent_of_datasheet": ("% sheet", ".1f"),
    "percent_of_gemm": ("% GEMM", ".1f"),
}
TRAFFIC = {
    "gb_per_s": ("GB/s", ".4g"),
    "percent_of_datasheet": ("% sheet", ".1f"),
    "percent_of_copy": ("% copy", ".1f"),
}
ROOF = {"percent_of_bound": ("% bound", ".1f")}
MEMORY = {"peak_mib": ("MiB", ".1f"), "saved_mib": ("saved", ".1f")}
ERRORS = {"error": ("error", ".1e"), "error_ratio": ("ratio", ".2f")}


def table(rows: list[dict]) -> str:
    """The providers of one shape and direction, under a title that names both."""
    title = [title_of(rows[0]), rows[0]["dtype"]]
    if rows[0]["device"] != "cuda":
        title.append(f"device={rows[0]['device']}")
    cells = shown_columns(rows)
    name_width = max(20, *(len(row["provider"]) for row in rows))
    headings = "".join(f"{heading:>10}" for heading, _ in cells.values())
    lines = ["  ".join(title), f"  {'provider':{name_width}}{headings}"]
    for row in rows:
        if row.get("reason"):
            values = f"  - {row['reason'][:90]}"
        else:
            values = "".join(f"{cell(row, column, style):>10}" for column, (_, style) in cells.items())
        lines.append(f"  {row['provider']:{name_width}}{values}")
    return "\n".join(lines)


def title_of(row: dict) -> str:
    title = [row["kernel"], row["mode"], row["shape"], f"x {row['x']}"]
    if "head_dim" in row:
        title += [f"head dim {row['head_dim']}", mask_name(row)]
    return "  ".join(title)


def shown_columns(rows: list[dict]) -> dict[str, tuple[str, str]]:
    """The columns of a table, without those that no row has: column -> (heading, format)."""
    present = set().union(*rows)
    rates = TRAFFIC if "gb_per_s" in present else ARITHMETIC
    columns = TIME | rates | ROOF | MEMORY | ERRORS
    return {column: shown for column, shown in columns.items() if column in present}


def cell(row: dict, column: str, style: str) -> str:
    text = format(row[column], style) if column in row else ""
    return f"{text} !" if column == "error_ratio" and row.get("verdict") == "wrong" else text


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


def wrong(rows: list[dict]) -> list[dict]:
    """Rows whose error is more than twice that of plain PyTorch."""
    return [row for row in rows if row.get("verdict") == "wrong"]

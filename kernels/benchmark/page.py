"""The page of a folder of results: where it was measured, what the columns mean, plots, tables, what is missing."""

from pathlib import Path

from kernels.benchmark import report
from kernels.benchmark.measure import MAX_RATIO, Session

MEANING = f"""\
- **ms** is the median of eager calls with the L2 cache flushed before each, **p20** and **p80** its quantiles,
  **spread** the difference between the medians of two rounds. **graph ms** is the same call replayed from a CUDA graph:
  where it is much smaller, the eager call waits for the host.
- **% sheet** is relative to the card's data sheet, **% GEMM** and **% copy** to a matrix product and a copy measured in
  the same run, **% bound** to the roofline: the larger of the FLOPs and of the bytes at their peaks.
- **MiB** is the peak memory of the call on top of its inputs.
- **error** is relative to float64, **ratio** that error over the one of plain PyTorch in the same dtype; an exclamation
  mark follows a ratio above {MAX_RATIO}.
- FLOPs, bytes and modes are defined at the top of each suite in `kernels/benchmark/`."""


def write(
    folder: Path, rows: list[dict], images: list[Path], session: Session, command: str, not_run: list[str]
) -> None:
    sections = [
        f"# Kernels on {session.gpu or session.label}",
        f"`{command}`",
        _machine(rows[0], session),
        _verdict(rows),
        _summary(rows),
    ]
    if not_run:
        sections.append("Not run, or not all of it, because the time was over:\n" + _listed(not_run))
    sections += ["## Columns", MEANING, "Every number of every row: [rows.csv](rows.csv)."]
    sections.append("## Plots")
    sections += [f"![{image.stem.replace('_', ' ')}]({image.name})" for image in images]
    sections.append("## Tables")
    sections += _tables(rows)
    sections += ["## Without numbers", _missing(rows)]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n")


def _machine(row: dict, session: Session) -> str:
    facts = {
        "date": row["timestamp"],
        "device": row["device"],
        "driver": row.get("driver", ""),
        "power limit, W": row.get("power_limit_w", ""),
        "SM clock after the first rows, MHz": row.get("sm_clock_mhz", ""),
        "torch, triton": f"{row['torch']}, {row['triton']}",
        "matrix product, TFLOP/s": f"{session.gemm_tflops:.4g}",
        "copy, GB/s": f"{session.copy_gb_per_s:.4g}",
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value)


def _verdict(rows: list[dict]) -> str:
    wrong = report.wrong(rows)
    measured = sum("verdict" in row for row in rows)
    if not wrong:
        return f"**Errors:** all {measured} rows with numbers are within {MAX_RATIO} times plain PyTorch's."
    names = [f"{row['provider']}: {report.title_of(row)}, ratio {row['error_ratio']:.2f}" for row in wrong]
    return f"**Errors:** {len(wrong)} of {measured} rows are above {MAX_RATIO} times plain PyTorch's:\n" + _listed(
        names
    )


def _summary(rows: list[dict]) -> str:
    """The fastest of ours against the fastest of the others that are right, for each shape and direction."""
    lines = ["| | ours, ms | % bound | fastest other | ms | its time / ours |", "|---|--:|--:|---|--:|--:|"]
    for title, members in _by_title(rows).items():
        right = sorted((row for row in members if row.get("verdict") == "ok"), key=lambda row: row["ms_p50"])
        ours = [row for row in right if row["provider"].startswith("ours")]
        others = [row for row in right if not row["provider"].startswith("ours")]
        if ours and others:
            a, b = ours[0], others[0]
            cells = [title, f"{a['ms_p50']:.4g}", f"{a['percent_of_bound']:.0f}", b["provider"], f"{b['ms_p50']:.4g}"]
            lines.append("| " + " | ".join([*cells, f"{b['ms_p50'] / a['ms_p50']:.2f}"]) + " |")
    return "\n".join(lines)


def _by_title(rows: list[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(report.title_of(row), []).append(row)
    return groups


def _tables(rows: list[dict]) -> list[str]:
    tables = []
    for title, members in _by_title(rows).items():
        measured = [row for row in members if not row.get("reason")]
        if not measured:
            continue
        columns = report.shown_columns(measured)
        lines = [
            "| provider | " + " | ".join(heading for heading, _ in columns.values()) + " |",
            "|---|" + "--:|" * len(columns),
        ]
        for row in sorted(measured, key=lambda row: row["ms_p50"]):
            cells = [report.cell(row, column, style) for column, (_, style) in columns.items()]
            lines.append(f"| {row['provider']} | " + " | ".join(cells) + " |")
        tables += [f"### {title}", "\n".join(lines)]
    return tables


def _missing(rows: list[dict]) -> str:
    """Each provider that has no number, or no graph, once for each reason."""
    reasons = [f"{row['provider']} ({row['kernel']}): {row['reason']}" for row in rows if row.get("reason")]
    reasons += [
        f"{row['provider']} ({row['kernel']} {row['mode']}), CUDA graph: {row['graph_reason']}"
        for row in rows
        if row.get("graph_reason")
    ]
    return _listed(list(dict.fromkeys(reasons)) or ["nothing"])


def _listed(items: list[str]) -> str:
    return "\n".join(f"- {item}" for item in items)

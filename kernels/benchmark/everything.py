"""``python -m kernels.benchmark all``: every suite, what matters first, into a folder with a CSV, plots and a page.

The CSV grows with every group of rows, plots and page are written again after every part: a run that is ended leaves
what it has measured. With ``quick`` it measures a choice of shapes and providers, and begins nothing after
QUICK_SECONDS.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from kernels.benchmark import page, plots, report
from kernels.benchmark.measure import Session
from kernels.benchmark.suites import SUITES

QUICK_SECONDS = 210
BOTH = ("fwd", "bwd")
# What a compiler has to be run for takes minutes over all shapes.
FAST = ("ours", "sdpa", "nested", "varlen", "flash_attn", "eager", "checkpointed", "liger", "cut", "addmm")


@dataclass(frozen=True)
class Part:
    suite: str
    shapes: str
    modes: tuple[str, ...] = BOTH
    providers: tuple[str, ...] = ("",)
    chosen: tuple[int, ...] | None = None  # of the set, by index; None: all of it

    @property
    def title(self) -> str:
        some = "" if self.chosen is None else f", shapes {', '.join(map(str, self.chosen))} of the set"
        return f"{self.suite} --shapes {self.shapes}{some}"


FULL = (
    Part("attention", "packed"),
    Part("attention", "avlm"),
    Part("cross_entropy", "llama"),
    Part("elementwise", "llama"),
    Part("projector", "placement"),
    Part("attention", "others"),
    Part("attention", "decode", ("fwd",)),
    Part("cross_entropy", "others"),
    Part("elementwise", "qwen"),
    Part("projector", "mlp"),
    Part("attention", "long"),
    Part("attention", "convention"),
)
QUICK = (
    Part("attention", "packed", chosen=(0,), providers=(*FAST, "flex")),  # 32/8 heads of 128
    Part("attention", "avlm", chosen=(6,), providers=FAST),  # Llama-3-8B, 8k
    Part("attention", "avlm", chosen=(0,), providers=FAST),  # CLIP, 16 images
    Part("cross_entropy", "llama", ("bwd",), chosen=(0,), providers=FAST),  # 30 % of the rows
    Part("elementwise", "llama"),
    Part("attention", "packed", chosen=(1, 2), providers=FAST),  # 14/2 and 16 heads of 64
    Part("projector", "placement", ("bwd",), chosen=(0,), providers=FAST),  # 16 images
    Part("attention", "decode", ("fwd",), chosen=(13,), providers=FAST),  # batch 8, 16k
    Part("attention", "avlm", chosen=(2, 4, 8), providers=FAST),  # Whisper, 8 clips; Llama-3-8B, 2k and 32k
    Part("attention", "others", chosen=(0, 1), providers=FAST),  # SigLIP, the tower of Qwen2-VL
    Part("cross_entropy", "others", ("bwd",), chosen=(1,), providers=FAST),  # Qwen2-7B
)


def run_all(parts: tuple[Part, ...], session: Session, out: Path, command: str, seconds: float | None) -> list[dict]:
    """Run the parts and write ``out``/<gpu>/: rows.csv, PNGs and README.md. Returns the rows."""
    folder = out / folder_name(session)
    csv_path = folder / "rows.csv"
    folder.mkdir(parents=True, exist_ok=True)
    for old in (csv_path, *folder.glob("*.png")):
        old.unlink(missing_ok=True)
    report.open_csv(csv_path)
    end = None if seconds is None else time.monotonic() + seconds
    rows: list[dict] = []
    for number, part in enumerate(parts):
        is_over = False
        for new_rows in run_part(part, session):
            print("\n" + report.table(new_rows), flush=True)
            rows += new_rows
            report.append_csv(csv_path, new_rows)
            is_over = end is not None and time.monotonic() > end
            if is_over:
                break
        left = parts[number if is_over else number + 1 :]
        page.write(folder, rows, plots.bars(rows, folder), session, command, [part.title for part in left])
        if is_over:
            print(f"\nthe time is over; {folder / 'README.md'} says what was not run, or not all of it")
            break
    print(f"\nwrote {folder}", flush=True)
    return rows


def run_part(part: Part, session: Session) -> Iterator[list[dict]]:
    suite = SUITES[part.suite]
    shapes = list(suite.sets[part.shapes]())
    if part.chosen is not None:
        shapes = [shapes[i] for i in part.chosen]
    yield from suite.run(shapes, part.modes, replace(session, wanted=part.providers))


def folder_name(session: Session) -> str:
    """nvidia_h200, or cpu."""
    return re.sub(r"[^a-z0-9]+", "_", (session.gpu or "cpu").lower()).strip("_")

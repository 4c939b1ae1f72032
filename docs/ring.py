"""Draws docs/ring.png: how context parallelism shares a packed row, and what the steps of ring attention compute.

    python docs/ring.py

Shares and blocks are not drawn by hand: they are what avlm/parallel/shares.py and context_plan.py plan for this row.
"""

import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

sys.path.insert(0, str(Path(__file__).parent.parent))
from avlm.parallel.context_plan import context_plan
from avlm.parallel.shares import Shares, share

WIDTH, HEIGHT = 14.0, 10.4
INK, PALE = "#22303c", "#5d6b78"
COLORS = ("#8fb0d6", "#eeb35c", "#86c483", "#c99bc9")  # ranks
HIDDEN = "#f4f6f8"
LENGTHS, CONTEXT, STEP, RANK = [3, 33, 1, 1, 1, 9], 4, 1, 1


def title(axes: Axes, x: float, y: float, text: str, note: str) -> None:
    axes.text(x, y, text, ha="left", va="center", fontsize=13, weight="bold", color=INK)
    axes.text(x, y - 0.3, note, ha="left", va="center", fontsize=11, color=PALE, style="italic")


def cells(axes: Axes, left: float, bottom: float, size: float, owners: list[int], rows: list[int]) -> None:
    """A row of tokens in the colours of the ranks that hold them; a bar where a document ends."""
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    for n, (owner, row) in enumerate(zip(owners, rows)):
        axes.add_patch(Rectangle((left + n * size, bottom), size, 0.4, fc=COLORS[owner], ec="white", lw=0.8))
        last = n + 1 == len(rows) or rows[n + 1] >= next(end for end in ends if end > row)
        if last:
            axes.plot([left + (n + 1) * size] * 2, [bottom - 0.08, bottom + 0.48], color=INK, lw=2)


def zigzag(axes: Axes, rows_CL: torch.Tensor) -> None:
    note = "colours are ranks, bars end documents; every rank holds 12 of 48 tokens, and only long documents are cut"
    title(axes, 0.4, 10.05, "The cut", note)
    owner_T = torch.empty(sum(LENGTHS), dtype=torch.int64)
    for rank, rows_L in enumerate(rows_CL):
        owner_T[rows_L] = rank
    size = 13.1 / len(owner_T)
    cells(axes, 0.45, 8.95, size, owner_T.tolist(), list(range(len(owner_T))))
    start = 0
    for length in LENGTHS:
        axes.text(0.45 + (start + length / 2) * size, 8.72, str(length), ha="center", va="center", color=PALE)
        start += length
    keys_T = torch.cat([torch.arange(1, length + 1) for length in LENGTHS])
    for rank, rows_L in enumerate(rows_CL):
        x, y = 0.45 + (rank % 2) * 6.85, 7.85 - (rank // 2) * 0.62
        cells(axes, x + 0.85, y, size, [rank] * len(rows_L), rows_L.tolist())
        axes.text(x, y + 0.2, f"rank {rank}", ha="left", va="center", fontsize=11.5, weight="bold", color=INK)
        text = f"{keys_T[rows_L].sum()} pairs of query and key"
        axes.text(x + 4.25, y + 0.2, text, ha="left", va="center", fontsize=10.5, color=PALE)


def steps(axes: Axes, shares: Shares) -> None:
    """What rank RANK computes at every step: queries down, keys across, a cell filled where the query sees the key."""
    note = f"rank {RANK}: its queries down, the keys that arrive across, filled where they are seen"
    title(axes, 0.4, 6.5, "The steps of a ring", note)
    held = shares.rows_CL.tolist()
    plan = context_plan(shares, RANK)
    block(axes, 0.95, f"step 0: keys of rank {RANK}", held[RANK], held[RANK], RANK)
    for number, step in enumerate(plan.ring, start=1):
        ((source, _, count),) = step.receives  # the first so many of what it holds
        text = f"step {number}: {count} keys of rank {source}"
        block(axes, 0.95 + number * 4.4, text, held[RANK][: step.num_queries], held[source][:count], source)


def block(axes: Axes, left: float, text: str, queries: list[int], keys: list[int], source: int) -> None:
    document_T = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    size, top = 0.2, 5.55
    axes.text(left + 1.2, top + 0.33, text, ha="center", fontsize=11, color=INK)
    for i, query in enumerate(queries):
        for j, key in enumerate(keys):
            seen = bool(document_T[query] == document_T[key]) and key <= query
            color = COLORS[source] if seen else HIDDEN
            box = Rectangle((left + j * size, top - (i + 1) * size), size, size, fc=color, ec="white", lw=0.8)
            axes.add_patch(box)
    for rows, others, vertical in ((queries, keys, True), (keys, queries, False)):
        for n in range(1, len(rows)):
            if document_T[rows[n]] != document_T[rows[n - 1]]:
                far = size * len(others)
                x = [left, left + far] if vertical else [left + n * size] * 2
                y = [top - n * size] * 2 if vertical else [top, top - far]
                axes.plot(x, y, color=INK, lw=1.2)


def exchange(axes: Axes, shares: Shares) -> None:
    """Step STEP on all ranks: who computes with whose keys, and what is under way meanwhile."""
    note = "while a rank computes with one block, the next arrives; in the backward its gradients go back to its rank"
    title(axes, 0.4, 2.65, f"Step {STEP} of the ring", note)
    centres = [1.9 + 3.4 * rank for rank in range(CONTEXT)]
    arrow = dict(arrowstyle="-|>", mutation_scale=14, color=PALE, lw=1.6, shrinkA=0, shrinkB=0)
    for rank, x in enumerate(centres):
        ring = context_plan(shares, rank).ring
        boxes = [(-0.62, rank, f"q {rank}")] if ring else [(0.0, rank, "no ring")]
        for source, _, _ in ring[STEP - 1].receives if ring else ():
            boxes.append((0.62, source, f"k, v of {source}"))
        for to, _, _ in ring[STEP - 1].sends if ring else ():
            start, end = x - 0.62, centres[to] + 0.62
            if to == rank + 1:
                axes.add_patch(FancyArrowPatch((x + 1.27, 1.6), (centres[to] - 1.27, 1.6), **arrow))
            else:
                axes.plot([start, start, end], [1.0, 0.62, 0.62], color=PALE, lw=1.6)
                axes.add_patch(FancyArrowPatch((end, 0.62), (end, 1.32), **arrow))
        for dx, owner, text in boxes:
            axes.add_patch(Rectangle((x + dx - 0.6, 1.35), 1.2, 0.5, fc=COLORS[owner], ec="white", lw=1.5))
            axes.text(x + dx, 1.6, text, ha="center", va="center", fontsize=11, color=INK)
        axes.text(x, 1.13, f"rank {rank}", ha="center", va="center", fontsize=11, weight="bold", color=INK)
    text = "k, v of what is seen, in the compute dtype.  Backward: these again, and dk, dv of them in float32."
    axes.text(7.0, 0.3, text, ha="center", va="center", fontsize=11, color=PALE, style="italic")


def main() -> None:
    figure = pyplot.figure(figsize=(WIDTH, HEIGHT), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    shares = share(LENGTHS, CONTEXT)
    zigzag(axes, shares.rows_CL)
    steps(axes, shares)
    exchange(axes, shares)
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()

"""Draws docs/data_flow.png: how a sample becomes a loss.

    python docs/data_flow.py

Names and letters are those of avlm/models/batch.py and avlm/models/. One unit of the drawing is 100 pixels.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

WIDTH, HEIGHT = 14.0, 11.0
INK, PALE = "#22303c", "#5d6b78"
TEXT, IMAGE, AUDIO, PLAIN = "#dce6f2", "#fbe3c0", "#d5ecd4", "#ffffff"  # what a box or a row of tokens holds
DEEP = {TEXT: "#8fb0d6", IMAGE: "#eeb35c", AUDIO: "#86c483", PLAIN: "#b7c0c9"}  # edges, and cells of the packed row
LEFT, MIDDLE, RIGHT = 2.55, 6.95, 11.55  # centres of the columns: tokens, pictures, sound


def box(axes: Axes, x: float, y: float, w: float, h: float, title: str, lines: str = "", color: str = PLAIN) -> None:
    """A box around its centre: a title in bold, what it does or holds below."""
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x - w / 2, y - h / 2), w, h, boxstyle=style, fc=color, ec=DEEP[color], lw=1.6))
    top = y + h / 2 - 0.11 if lines else y + 0.1
    axes.text(x, top, title, ha="center", va="top", fontsize=12, weight="bold", color=INK)
    axes.text(x, top - 0.27, lines, ha="center", va="top", fontsize=11, color=INK, linespacing=1.3)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], label: str = "") -> None:
    """An arrow, with a label to the right of its middle."""
    axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": PALE, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
    )
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    axes.text(x + 0.12, y, label, ha="left", va="center", fontsize=11, color=PALE, style="italic")


def band(axes: Axes, bottom: float, top: float, label: str) -> None:
    axes.add_patch(Rectangle((0.15, bottom), WIDTH - 0.3, top - bottom, fc="#f4f6f8", ec="none", zorder=-1))
    axes.text(0.38, (bottom + top) / 2, label, rotation=90, ha="center", va="center", fontsize=11.5, color=PALE)


def files(axes: Axes) -> None:
    band(axes, 8.25, 10.85, "one sample: avlm/data")
    columns = ((LEFT, "messages"), (5.8, "image bytes"), (8.85, "video bytes"), (12.1, "audio bytes"))
    for x, name in columns:
        axes.text(x, 10.66, name, ha="center", va="center", fontsize=12, color=INK, style="italic")
        arrow(axes, (x, 10.5), (x, 10.28))
    box(axes, LEFT, 9.92, 3.8, 0.7, "chat.py", "pieces of a template: ids, learned?", TEXT)
    box(axes, 5.8, 9.92, 2.3, 0.7, "image.py", "uint8 (3, S, S)", IMAGE)
    box(axes, 8.85, 9.92, 1.9, 0.7, "video.py", "frames, sound")
    box(axes, 12.1, 9.92, 3.0, 0.7, "audio.py", "log-mel windows (M, W)", AUDIO)
    arrow(axes, (7.88, 9.92), (6.97, 9.92))
    arrow(axes, (9.82, 9.92), (10.58, 9.92))
    for x in (LEFT, 5.8, 12.1):
        arrow(axes, (x, 9.55), (x, 9.18))
    held = "token_T, an IMAGE or AUDIO id for each feature to come     target_T     media: items by modality"
    box(axes, 7.13, 8.8, 12.96, 0.72, "sample.py: EncodedSample", held)


def batch(axes: Axes) -> None:
    band(axes, 6.0, 8.1, "one row: avlm/data")
    arrow(axes, (7.13, 8.42), (7.13, 7.96), "many samples")
    axes.text(7.13, 7.78, "packing.py: Batch", ha="center", va="center", fontsize=12, weight="bold", color=INK)
    tokens = "token_T   position_T\nsegments (documents)\ntarget_rows_R   target_R   kind_R"
    box(axes, LEFT, 6.98, 3.8, 1.15, "tokens", tokens, TEXT)
    box(
        axes,
        MIDDLE,
        6.98,
        4.1,
        1.15,
        "image: Media",
        "values (I, 3, S, S) uint8\nsegments (images)\nsources   rows",
        IMAGE,
    )
    sound = "values (I, M, W)   kept\nsegments (windows)\nsources   rows"
    box(axes, RIGHT, 6.98, 4.1, 1.15, "audio: Media", sound, AUDIO)


def model(axes: Axes) -> None:
    band(axes, 0.15, 5.85, "the model: avlm/models")
    for x in (LEFT, MIDDLE, RIGHT):
        arrow(axes, (x, 6.4), (x, 5.67))
    box(axes, LEFT, 5.3, 3.8, 0.7, "embedding", "of ids; zeros for a placeholder", TEXT)
    box(axes, MIDDLE, 5.3, 4.1, 0.7, "VisionTower", "normalises; features (P, width)", IMAGE)
    box(axes, RIGHT, 5.3, 4.1, 0.7, "AudioTower", "features (P, width) of kept rows", AUDIO)
    for x, title, shape, color in (
        (MIDDLE, "sources", "(F, width * downsample^2)", IMAGE),
        (RIGHT, "sources", "(F, width * downsample)", AUDIO),
    ):
        arrow(axes, (x, 4.95), (x, 4.68))
        box(axes, x, 4.32, 4.1, 0.7, title, shape, color)
        arrow(axes, (x, 3.97), (x, 3.7))
        box(axes, x, 3.43, 4.1, 0.5, "Projector", color=color)
    arrow(axes, (LEFT, 4.95), (LEFT, 2.74), "writes every row")
    arrow(axes, (MIDDLE, 3.18), (MIDDLE, 2.74), "writes at image.rows")
    arrow(axes, (RIGHT, 3.18), (RIGHT, 2.74), "writes at audio.rows")


def packed_row(axes: Axes) -> None:
    """The row of token features, cell by cell: three documents with two images and two clips, and the rest."""
    row = "tttiiiittttttiiiitaaatttttaaat  "
    fill = {"t": DEEP[TEXT], "i": DEEP[IMAGE], "a": DEEP[AUDIO], " ": PLAIN}
    left, width = 1.75, 11.4 / len(row)
    for n, kind in enumerate(row):
        axes.add_patch(Rectangle((left + n * width, 2.3), width, 0.42, fc=fill[kind], ec="white"))
    for n in (9, 23, 30):
        axes.plot([left + n * width] * 2, [2.2, 2.82], color=INK, lw=2)
    axes.text(1.6, 2.51, "x_TD", ha="right", va="center", fontsize=12, weight="bold", color=INK)
    note(axes, 7.9, 2.02, "bars: where segments end; attention never crosses them")


def loss(axes: Axes) -> None:
    y = 1.1
    arrow(axes, (LEFT, 2.28), (LEFT, 1.57))
    box(axes, LEFT, y, 3.4, 0.9, "Decoder", "blocks, with position_T\nand segments", TEXT)
    box(axes, 6.75, y, 3.2, 0.9, "norm", "of target_rows_R alone:\nhidden_RD", TEXT)
    box(axes, 10.5, y, 2.5, 0.9, "Head", "against target_R,\nlogits by chunks", TEXT)
    for start, end in ((4.27, 5.13), (8.37, 9.23), (11.77, 12.35)):
        arrow(axes, (start, y), (end, y))
    axes.text(12.9, y, "loss_R", ha="center", va="center", fontsize=13, weight="bold", color=INK)
    text = "loss of a step = sum of loss_R over all micro-batches and ranks / the number of their targets"
    note(axes, 7.13, 0.38, text)


def note(axes: Axes, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, ha="center", va="center", fontsize=11, color=PALE, style="italic")


def main() -> None:
    figure = pyplot.figure(figsize=(WIDTH, HEIGHT), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    for part in (files, batch, model, packed_row, loss):
        part(axes)
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()

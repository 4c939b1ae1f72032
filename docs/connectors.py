"""Draws docs/connectors.png: four ways of a photo from its tower to the decoder.

    python docs/connectors.py

The numbers of rows are those of the demo's tower and of the four configs of tests/measurements/connectors.py. One unit
of the drawing is a pixel.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

sys.path.insert(0, str(Path(__file__).parent.parent))
from avlm.config.load import load_config
from avlm.config.model import ModelConfig
from tests.measurements.connectors import CONNECTORS, ROOT, stages

WIDTH, HEIGHT, PANEL = 1600, 760, 400
TOWER_Y, CONNECTOR_Y, TOKENS_Y, DECODER_Y = 90, 235, 400, 500  # centres; of the decoder its lowest layer
CELL = 17
INK, PALE, PAPER = "#22303c", "#8a96a3", "#ffffff"
ROWS, FEATURES, TEXT, QUERIES, LAYER, CROSS = "#f8d8a0", "#e8913a", "#d3e0f0", "#b9dfb4", "#eef1f4", "#f2a9bc"
SAYS = {
    "projector": "n x n rows side by side,\ntwo linears",
    "Q-Former": "queries exchange, then read\nall rows (post-norm)",
    "Perceiver": "queries read all rows\nand each other (pre-norm)",
    "cross-attention": "a linear; features in\na row of their own",
}


def main() -> None:
    figure = pyplot.figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    for number, name in enumerate(CONNECTORS):
        overrides = [*CONNECTORS[name], stages(name, 10), "output_dir=unused"]
        draw(axes, PANEL * number + PANEL / 2, name, load_config(ROOT / "configs/demo.yaml", overrides).model)
    figure.savefig(Path(__file__).with_suffix(".png"))


def draw(axes: Axes, x: float, name: str, model: ModelConfig) -> None:
    """A panel around ``x``, from the tower at the bottom to the decoder at the top."""
    vision, projector = model.vision, model.vision_projector
    grid = (vision.patches_per_side,) * 2
    num_features, num_tokens = model.features_of("vision", grid), model.tokens_of("vision", grid)
    axes.text(x, HEIGHT - 28, name, ha="center", va="center", fontsize=15, color=INK, weight="bold")
    num_rows = vision.rows_of(grid)
    cells(axes, x, TOWER_Y, num_rows, [ROWS] * num_rows)
    of_photo = f"{num_rows} rows of a photo, the class token first"
    axes.text(x, TOWER_Y - 28, of_photo, ha="center", va="center", fontsize=10, color=PALE)
    arrow(axes, (x, TOWER_Y + 12), (x, CONNECTOR_Y - 40))
    box(axes, x, CONNECTOR_Y, 250, 74, PAPER)
    if projector.resampler is not None:
        cells(axes, x, CONNECTOR_Y + 18, num_features, [QUERIES] * num_features)
    says = CONNECTOR_Y - (14 if projector.resampler is not None else 0)
    axes.text(x, says, SAYS[name], ha="center", va="center", fontsize=10.5, color=INK)
    tokens = [TEXT] * 3 + [FEATURES] * num_tokens + [TEXT] * 5
    if model.cross is None:
        arrow(axes, (x, CONNECTOR_Y + 40), (x, TOKENS_Y - 13))
        cells(axes, x, TOKENS_Y, len(tokens), tokens)
    else:
        cells(axes, x + 60, TOKENS_Y, len(tokens), tokens)
        left = x - 120
        cells(axes, left, TOKENS_Y - 62, num_features // 2, [FEATURES] * (num_features // 2))
        cells(axes, left, TOKENS_Y - 62 - CELL - 2, num_features // 2, [FEATURES] * (num_features // 2))
        arrow(axes, (x - 60, CONNECTOR_Y + 40), (left, TOKENS_Y - 92))
    takes = f"{num_tokens} rows among the tokens" if model.cross is None else "1 learned row stands for it"
    axes.text(x + 60 * (model.cross is not None), TOKENS_Y + 24, takes, ha="center", fontsize=10, color=PALE)
    layers(axes, x, model)


def layers(axes: Axes, x: float, model: ModelConfig) -> None:
    """The decoder, its lowest layer first, with the layers of cross-attention between."""
    y = DECODER_Y - 22
    arrow(axes, (x + 60 * (model.cross is not None), TOKENS_Y + 46), (x + 60 * (model.cross is not None), y - 4))
    for i in range(model.decoder.num_layers):
        if model.cross is not None and i % model.cross.every == 0:
            box(axes, x + 60, y + 13, 200, 26, CROSS)
            axes.text(x + 60, y + 13, "gated cross-attention", ha="center", va="center", fontsize=9.5, color=INK)
            bend = (x - 120, TOKENS_Y - 48)
            axes.plot([bend[0], bend[0]], [bend[1], y + 13], color=INK, linewidth=1.2)
            arrow(axes, (bend[0], y + 13), (x - 42, y + 13))
            y += 33
        box(axes, x + 60 * (model.cross is not None), y + 13, 200, 26, LAYER)
        label = f"layer {i} of the decoder"
        axes.text(x + 60 * (model.cross is not None), y + 13, label, ha="center", va="center", fontsize=9.5, color=INK)
        y += 33


def cells(axes: Axes, x: float, y: float, count: int, colors: list[str]) -> None:
    """A row of cells, centred."""
    left = x - count * CELL / 2
    for i, color in enumerate(colors):
        axes.add_patch(
            Rectangle(
                (left + i * CELL, y - CELL / 2), CELL - 2, CELL - 2, facecolor=color, edgecolor=INK, linewidth=0.6
            )
        )


def box(axes: Axes, x: float, y: float, width: float, height: float, color: str) -> None:
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=6"
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=color, edgecolor=INK, linewidth=0.9))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=INK, linewidth=1.2))


if __name__ == "__main__":
    main()

"""Draws docs/packed_row.png: how speech, a photo and a question become one packed row, and where the loss is.

    python docs/packed_row.py

The row is a real one: the demo's loader packed it, at a length that leaves every token readable. The cell of a feature
shows the frames or patches that the feature is made of. One unit of the drawing is a pixel.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy

matplotlib.use("Agg")
import torch
from einops import rearrange
from matplotlib import pyplot
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from avlm.config.load import load_config
from avlm.config.model import ModelConfig
from avlm.config.run import Config
from avlm.data.loader import open_loader
from avlm.data.media.patches import frames_of
from avlm.data.stream import Stream
from avlm.data.text.tokenizer import Tokenizer
from avlm.demo.build import ensure
from avlm.models.batch import AUDIO, IMAGE, Batch

SEQ_LENGTH = 50  # in training 1,024
SEED = 2  # chosen for a photo that is easy to recognise
TASKS = ["caption", "mixed", "transcribe"]  # a photo; speech and a photo; speech
FOLLOWED = 1  # the sample that is drawn on its way into the row

WIDTH, HEIGHT = 1600, 860
INPUT_Y, ENCODER_Y, ROW_Y, DECODER_Y, LOSS_Y = 709, 529, 327, 194, 80  # centres
INPUT_HEIGHT, ENCODER_HEIGHT, ROW_HEIGHT, DECODER_HEIGHT, LOSS_HEIGHT = 190, 70, 130, 56, 100
MARGIN, CELL, GAP = 34, 30, 16  # beside the row; a cell's width; between two samples
COLUMNS = {  # centre, width, what comes in, what encodes it, what comes out
    "audio": (480, 270, "speech (log-mel)", "audio tower", "audio\nfeatures"),
    "image": (770, 190, "photo", "vision tower", "image\nfeatures"),
    "prompt": (1060, 220, "question", "embedding", ""),
}

INK, PALE, PAPER = "#22303c", "#8a96a3", "#ffffff"
FILL = {"audio": "#b9dfb4", "image": "#f8d8a0", "prompt": "#d3e0f0", "answer": "#f2a9bc"}
DEEP = {"audio": "#2b7a36", "image": "#a86400", "prompt": "#33608f", "answer": "#b3264e"}
MEL = LinearSegmentedColormap.from_list("mel", ["#0d2b17", "#2b7a36", "#8ecb87", "#f6fcec"])


@dataclass(frozen=True)
class Cell:
    x: float  # centre
    kind: str
    text: str  # of the token; empty for a feature
    piece: Tensor | None  # what a feature is made of: patches, uint8 (side, side, 3), or frames, float32 (mels, frames)
    target: str | None  # text of the token to predict here; None where there is no loss


def training_row(config: Config) -> Batch:
    """The first full row that holds samples of TASKS, in this order."""
    data = config.stages[-1].data
    for batch in open_loader(Stream(data.train, data, config.model, rank=0, world=1, seed=SEED, train=True)):
        tasks = [key.split("_")[0] for key in batch.keys]
        if tasks == TASKS and batch.num_tokens == SEQ_LENGTH:
            return batch


def pieces_of_features(batch: Batch, model: ModelConfig) -> dict[int, Tensor]:
    """What each feature is made of, by its position in the row."""
    side = model.vision.patch_size * model.vision_projector.downsample
    images = torch.cat(frames_of(batch.image, model.vision, model.vision_projector.downsample))
    squares = rearrange(images, "i c (y h) (x w) -> (i y x) h w c", h=side, w=side)
    pieces = dict(zip(batch.image.rows.tolist(), squares))

    frames = 2 * model.audio_projector.downsample  # the tower halves the frame rate
    slices = []
    for window, (_, length) in zip(batch.audio.values, batch.audio.segments.spans):
        slices += window[:, : 2 * length].split(frames, dim=1)
    pieces.update(zip(batch.audio.rows.tolist(), slices))
    return pieces


def cells_of_sample(number: int, batch: Batch, pieces: dict[int, Tensor], tokenizer: Tokenizer) -> list[Cell]:
    positions_with_loss = set(batch.target_rows_R.tolist())
    start, length = batch.segments.spans[number]
    cells = []
    for position in range(start, start + length):
        token = batch.token_T[position].item()
        target = None
        if position in positions_with_loss:
            target = tokenizer.decode([batch.token_T[position + 1].item()])
        kind_of_text = "answer" if position - 1 in positions_with_loss else "prompt"
        kind = {AUDIO: "audio", IMAGE: "image"}.get(token, kind_of_text)
        text = "" if position in pieces else tokenizer.decode([token])
        x = MARGIN + CELL * (position + 0.5) + GAP * number
        cells.append(Cell(x, kind, text, pieces.get(position), target))
    return cells


def write(x: float, y: float, text: str, color: str = INK, size: float = 19, align: str = "center", **style) -> None:
    pyplot.text(x, y, text, color=color, fontsize=size, ha=align, va="center", linespacing=1.4, zorder=4, **style)


def write_token(x: float, y: float, text: str, color: str) -> None:
    shown = text.strip().replace("<|im_end|>", "end")
    write(x, y, shown or "\u21b5", color, size=15.5, rotation=90)


def box(x: float, y: float, width: float, height: float, color: str, edge: str = PAPER, rounding: int = 10) -> None:
    style = f"round,pad=0,rounding_size={rounding}"
    corner = (x - width / 2, y - height / 2)
    pyplot.gca().add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, fc=color, ec=edge, lw=2, zorder=2))


def picture(x: float, y: float, width: float, height: float, values: Tensor) -> None:
    """A photo or a spectrogram."""
    extent = (x - width / 2, x + width / 2, y - height / 2, y + height / 2)
    origin = "upper" if values.ndim == 3 else "lower"
    pyplot.imshow(values, extent=extent, origin=origin, cmap=MEL, vmin=-0.7, vmax=1.3, aspect="auto", zorder=3)


def arrow(x: float, top: float, bottom: float, color: str) -> None:
    style = {"arrowstyle": "-|>", "color": color, "shrinkA": 0, "shrinkB": 0}
    pyplot.annotate("", (x, bottom), (x, top), arrowprops=style)


def ribbon(top: tuple[float, float, float], bottom: tuple[float, float, float], color: str) -> None:
    """From one place to a lower one, each (x, width, y)."""
    t = numpy.linspace(0, 1, 100)
    smooth = t * t * (3 - 2 * t)
    x, width = numpy.outer(top[:2], 1 - smooth) + numpy.outer(bottom[:2], smooth)
    y = numpy.linspace(top[2], bottom[2], 100)
    pyplot.fill_betweenx(y, x - width / 2, x + width / 2, color=color, alpha=0.6, lw=0)


def draw_input(kind: str, cells: list[Cell]) -> None:
    """Speech, a photo or a question, what encodes it, and the way of the result to its cells."""
    x, width, name, encoder, result = COLUMNS[kind]
    write(x, INPUT_Y + 123, name)
    pieces = [cell.piece for cell in cells]
    if kind == "audio":
        picture(x, INPUT_Y, width, INPUT_HEIGHT, torch.cat(pieces, dim=1))
    elif kind == "image":
        picture(x, INPUT_Y, width, INPUT_HEIGHT, rearrange(pieces, "(y x) h w c -> (y h) (x w) c", y=2))
    else:
        box(x, INPUT_Y, width, INPUT_HEIGHT, FILL[kind])
        write(x, INPUT_Y, "".join(cell.text for cell in cells), DEEP[kind], size=22)
    ribbon((x, width, INPUT_Y - 100), (x, 210, ENCODER_Y + 35), FILL[kind])
    box(x, ENCODER_Y, 220, ENCODER_HEIGHT, DEEP[kind])
    write(x, ENCODER_Y, encoder, PAPER, weight="bold")
    middle = (cells[0].x + cells[-1].x) / 2
    ribbon((x, 150, ENCODER_Y - 35), (middle, CELL * len(cells), ROW_Y + 69), FILL[kind])
    write((x + middle) / 2, 443, result, DEEP[kind], size=16)


def draw_cell(cell: Cell) -> None:
    box(cell.x, ROW_Y, CELL, ROW_HEIGHT, FILL[cell.kind], rounding=0)
    if cell.kind == "image":
        picture(cell.x, ROW_Y, CELL - 5, CELL - 5, cell.piece)
    elif cell.kind == "audio":
        num_frames = cell.piece.shape[1]  # fewer in the last one of a clip
        picture(cell.x, ROW_Y, 1.8 * num_frames, ROW_HEIGHT - 18, cell.piece)
    else:
        write_token(cell.x, ROW_Y, cell.text, DEEP[cell.kind])
    arrow(cell.x, ROW_Y - 68, DECODER_Y + 30, PALE)
    if cell.target:
        arrow(cell.x, DECODER_Y - 28, LOSS_Y + 50, DEEP["answer"])
        box(cell.x, LOSS_Y, CELL, LOSS_HEIGHT, PAPER, edge=DEEP["answer"], rounding=0)
        write_token(cell.x, LOSS_Y, cell.target, DEEP["answer"])


def main() -> None:
    config = load_config("configs/demo.yaml", [f"data.seq_length={SEQ_LENGTH}"])
    ensure(config)
    batch = training_row(config)
    tokenizer = Tokenizer(config.stages[-1].data.tokenizer)
    pieces = pieces_of_features(batch, config.model)
    samples = [cells_of_sample(number, batch, pieces, tokenizer) for number in range(len(TASKS))]

    figure = pyplot.figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100)
    figure.add_axes((0, 0, 1, 1)).axis("off")
    for kind in COLUMNS:
        draw_input(kind, [cell for cell in samples[FOLLOWED] if cell.kind == kind and cell.text != "\n"])
    for cells in samples:
        for cell in cells:
            draw_cell(cell)
    for cells in samples[1:]:
        pyplot.vlines(cells[0].x - (CELL + GAP) / 2, ROW_Y - 77, ROW_Y + 77, color=INK, lw=3)
    box(WIDTH / 2, DECODER_Y, WIDTH - 2 * MARGIN, DECODER_HEIGHT, INK)
    write(WIDTH / 2, DECODER_Y, "decoder", PAPER, weight="bold")
    write(MARGIN, ROW_Y + 137, "one packed row", align="left", weight="bold")
    write(MARGIN, ROW_Y + 97, "three samples, end to end", align="left")
    write(samples[FOLLOWED][-1].x + CELL / 2, ROW_Y + 97, "answer", DEEP["answer"], align="right")
    write(660, LOSS_Y, "next-token loss\non the answers only", DEEP["answer"], weight="bold")
    pyplot.axis((0, WIDTH, 0, HEIGHT))
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()

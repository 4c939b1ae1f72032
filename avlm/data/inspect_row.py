"""A picture of a packed row: whose its tokens are, which are learned, and its media as the towers get them."""

from pathlib import Path

from matplotlib.figure import Figure

from avlm.config.model import ModelConfig
from avlm.data.media.patches import frames_of
from avlm.models.batch import NEWLINE, PLACEHOLDERS, Batch

MAX_PANELS = 64  # images, and the same number of audio windows
COLUMNS = 8
# Of a token, in the order of the legend.
COLOURS = {"text": "#b8b8b8", "learned": "#2e9e4f", "image": "#3b8fd1", "audio": "#e08a2e", "padding": "#f2f2f2"}


def draw_row(batch: Batch, model: ModelConfig, path: Path) -> None:
    panels = [*batch.audio.values[:MAX_PANELS]]
    if model.vision is not None:
        images = frames_of(batch.image, model.vision, model.vision_projector.downsample)
        panels = [*(frames[0] for frames in images[:MAX_PANELS]), *panels]
    lines = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(2 * COLUMNS, 2.4 + 2 * lines), layout="constrained")
    grid = figure.add_gridspec(lines + 1, COLUMNS, height_ratios=[0.9] + [1.0] * lines)
    axes = figure.add_subplot(grid[0, :])
    _draw_tokens(axes, batch)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(grid[1 + number // COLUMNS, number % COLUMNS])
        axes.set_axis_off()
        if panel.ndim == 3:
            axes.imshow(panel.permute(1, 2, 0).numpy())
        else:
            axes.imshow(panel.numpy(), origin="lower", aspect="auto")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")


def _draw_tokens(axes, batch: Batch) -> None:
    """A bar of the row's tokens, with the key of a sample above its tokens where there is room for it."""
    for name, spans in _spans(batch).items():
        axes.broken_barh(spans, (0, 1), color=COLOURS[name], label=name)
    num_tokens = len(batch.token_T)
    for key, (start, length) in zip(batch.keys, batch.segments.spans):
        axes.axvline(start, color="black", linewidth=0.6)
        if length > num_tokens / 60:
            axes.text(start, 1.05, key, fontsize=7, rotation=30, ha="left", va="bottom")
    axes.set_xlim(0, num_tokens)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.set_xlabel(f"{num_tokens:,} tokens of a row, {len(batch.keys)} samples")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)


def _spans(batch: Batch) -> dict[str, list[tuple[int, int]]]:
    """(start, length) of neighbouring tokens of one kind, by the names of COLOURS."""
    names = ["text"] * batch.num_tokens + ["padding"] * (len(batch.token_T) - batch.num_tokens)
    for position in batch.target_rows_R.tolist():
        following = position + (batch.pairs is None)  # a target is the token that follows
        if following < len(names):  # that of a duplex model's last row does not
            names[following] = "learned"
    for modality, placeholder in [*PLACEHOLDERS.items(), ("image", NEWLINE)]:
        for position in (batch.token_T == placeholder).nonzero().flatten().tolist():
            names[position] = modality
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in COLOURS}
    start = 0
    for position in range(1, len(names) + 1):
        if position == len(names) or names[position] != names[start]:
            found[names[start]].append((start, position - start))
            start = position
    return {name: spans for name, spans in found.items() if spans}

"""Which rows of a tower's output make each feature: index work on the host, from sizes alone.

F features   U projected rows   S tower rows that make one (see ``avlm.models.batch``)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from avlm.config.model import ModelConfig, VisionConfig
from avlm.data.media.area import halved
from avlm.data.media.tiles import Size, Tiling, bilinear_taps, shown_part, stretched_grid
from avlm.models.batch import Features
from avlm.models.patches import Grid, tower_layout


@dataclass(frozen=True)
class Group:
    """Items that follow each other, and the features that they give together: the views of an image, or the frames of a
    video."""

    num_items: int
    features: Features


def of_windows(lengths: list[int], stack: int) -> Features:
    """Of windows of audio, by the rows of each: neighbours within a window. -1 pads the last feature of a window."""
    sources = [torch.empty(0, stack, dtype=torch.int64)]
    start = 0
    for length in lengths:
        num_features = -(-length // stack)
        padded = torch.full((num_features * stack,), -1)
        padded[:length] = torch.arange(start, start + length)
        sources.append(padded.view(num_features, stack))
        start += length
    return Features(torch.cat(sources))


def of_images(grids: Sequence[Grid], model: ModelConfig) -> Features:
    """Of images that stand for themselves: neighbouring patches, line by line (pixel shuffle); or their queries."""
    projector = model.vision_projector
    if projector.resampler is not None:
        count = sum(projector.outputs_of(model.vision.outputs_of(grid)) for grid in grids)
        return Features(torch.arange(count)[:, None])
    return _filled(_sources(grids, model.vision, projector.downsample), model)


def of_tiles(source: Size, tiling: Tiling, grid: Grid, model: ModelConfig) -> tuple[Features, Grid]:
    """Of the whole image and then of its tiles, which are joined to one grid and freed of its padding; and the lines
    and columns of that grid. ``source``: the size of the image in pixels; ``grid``: patches of a view."""
    vision, projector = model.vision, model.vision_projector
    side = grid[0] // projector.downsample
    sources = _sources([grid] * tiling.num_tiles, vision, projector.downsample)
    sides = {"l": tiling.lines, "k": tiling.columns, "y": side}
    joined = rearrange(sources, "(l k y x) s -> (l y) (k x) s", **sides)
    top, bottom, left, right = shown_part(source, *joined.shape[:2])
    shown = joined[top:bottom, left:right]
    lines, columns = shown.shape[:2]
    of_joined = _filled(shown.flatten(0, 1), model)
    into = stretched_grid(lines, columns, side, projector.stretch_above_tiles)
    if into != (lines, columns):
        of_joined = Features(of_joined.sources, *bilinear_taps(lines, columns, into))
    num_rows = vision.outputs_of(grid)
    return Features.joined([of_images([grid], model), of_joined], [num_rows, num_rows * tiling.num_tiles]), into


def of_frame(grid: Grid, model: ModelConfig) -> Features:
    """Of a frame of a video, or of frames that share patches."""
    projector = model.vision_projector
    if projector.halve_frames == "mean":
        return Features(_sources([grid], model.vision, 2))
    features = of_images([grid], model)
    if projector.halve_frames == "none":
        return features
    lines, columns = (count // projector.downsample for count in grid)
    return Features(features.sources, *bilinear_taps(lines, columns, halved((lines, columns), model)))


def _sources(grids: Sequence[Grid], vision: VisionConfig, downsample: int) -> Tensor:
    """int64 (F, downsample^2). A class token is the first row of an image and belongs to no feature."""
    sources = [torch.empty(0, downsample**2, dtype=torch.int64)]
    start = 0
    for grid in grids:
        sources.append(tower_layout(grid, vision, downsample).sources + start + vision.class_token)
        start += vision.rows_of(grid)
    return torch.cat(sources)


def _filled(sources: Tensor, model: ModelConfig) -> Features:
    """Padded with -1, which does not count in a mean, to the number of sources that the projector takes at most."""
    missing = model.vision.rows_per_feature(model.vision_projector) - sources.shape[1]
    return Features(torch.cat([sources, sources.new_full((len(sources), missing), -1)], 1) if missing else sources)

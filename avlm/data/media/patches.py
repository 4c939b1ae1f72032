"""Frames of one size -> patches, as the vision tower's first layer reads them, and back.

N numbers of a patch: its channels, frames, lines and columns, in this order
"""

import torch
from einops import rearrange
from torch import Tensor

from avlm.config.model import VisionConfig
from avlm.models.batch import Media
from avlm.models.patches import tower_layout


def cut_into_patches(frames: Tensor, vision: VisionConfig) -> Tensor:
    """(frames_per_patch, 3, H, W) -> (lines, columns, N). Pixels past the last whole patch are dropped, as a
    convolution does."""
    side = vision.patch_size
    lines, columns = frames.shape[2] // side, frames.shape[3] // side
    whole = frames[:, :, : lines * side, : columns * side]
    return rearrange(whole, "t c (line y) (column x) -> line column (c t y x)", y=side, x=side)


def frames_of(media: Media, vision: VisionConfig, downsample: int) -> list[Tensor]:
    """The frames of each image of a row, (frames_per_patch, 3, H, W)."""
    found = []
    for patches_PN, grid in zip(media.items(vision), media.sizes):
        line_by_line = torch.empty_like(patches_PN)
        line_by_line[tower_layout(grid, vision, downsample).order] = patches_PN
        sides = {"line": grid[0], "c": 3, "t": vision.frames_per_patch, "y": vision.patch_size}
        pattern = "(line column) (c t y x) -> t c (line y) (column x)"
        found.append(rearrange(line_by_line, pattern, **sides))
    return found

"""Positions of a sample's tokens on the three axes of M-RoPE: time, line and column.

Text counts on, with the same number on all axes. An image or a video begins where the text before it ends; each of its
features adds its own time, line and column. What follows continues after the largest number so far on any axis: the
rule that Qwen2-VL was published with and trained by, as were its successors. transformers 5.17 continues after
max(lines, columns) of the medium instead, and cuts the seconds of a temporal patch to a whole number before it
multiplies. Both agree on images, on videos whose time advances by less than max(lines, columns), and on whole seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avlm.config.model import ModelConfig


@dataclass(frozen=True)
class Placed:
    """Features that share a beginning: of an image, of a video, or of one patch of its frames if text parts them.

    start  of the first one among the tokens; they have the order (time, line, column)
    grid   their temporal patches, lines and columns
    step   of time between temporal patches
    """

    start: int
    grid: tuple[int, int, int]
    step: float = 1.0


def place(items: list[Tensor], start: int, model: ModelConfig, step: float = 1.0) -> Placed:
    """Items (lines, columns, N) of patches whose features follow each other from a token on."""
    downsample = model.vision_projector.downsample
    lines, columns, _ = items[0].shape
    return Placed(start, (len(items), lines // downsample, columns // downsample), step)


def position_of(num_tokens: int, placed: Sequence[Placed], model: ModelConfig) -> Tensor | None:
    """For EncodedSample.position_T: None where they are 0, 1, 2, ..."""
    if model.decoder.mrope_sections is None or not placed:
        return None
    return positions(num_tokens, placed)


def positions(num_tokens: int, placed: Sequence[Placed]) -> Tensor:
    """int64 (3, T). Times are rounded down, in float32 as the published code has them."""
    parts = []
    following = 0  # position of the next token
    done = 0  # tokens
    for each in placed:
        parts.append(_text(following, each.start - done))
        following += each.start - done
        times, lines, columns = (torch.arange(count) for count in each.grid)
        axes = torch.meshgrid((times * each.step).long(), lines, columns, indexing="ij")
        part = torch.stack(axes).flatten(1) + following
        parts.append(part)
        following = int(part.max()) + 1
        done = each.start + part.shape[1]
    parts.append(_text(following, num_tokens - done))
    return torch.cat(parts, dim=1)


def _text(first: int, count: int) -> Tensor:
    return torch.arange(first, first + count).expand(3, -1)

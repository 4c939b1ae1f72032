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
    """Tokens whose positions are not those of text.

    start      the first one
    offsets    int64 (3, n): what each adds to where they begin
    continues  they begin where those before them did, as the frames and the sound of a video
    """

    start: int
    offsets: Tensor
    continues: bool = False


def of_grid(times: Sequence[int], lines: int, columns: int, step: float = 1.0) -> Tensor:
    """Offsets of features in the order (time, line, column), for temporal patches with these numbers and ``step`` of
    time between neighbours. Times are rounded down, in float32 as the published code has them."""
    time = (torch.tensor(times) * step).long()
    axes = torch.meshgrid(time, torch.arange(lines), torch.arange(columns), indexing="ij")
    return torch.stack(axes).flatten(1)


def of_text(first: int, count: int) -> Tensor:
    return torch.arange(first, first + count).expand(3, -1)


def position_of(num_tokens: int, placed: Sequence[Placed], model: ModelConfig) -> Tensor | None:
    """For EncodedSample.position_T: None where they are 0, 1, 2, ..."""
    if model.decoder.mrope_sections is None or not placed:
        return None
    return positions(num_tokens, placed)


def positions(num_tokens: int, placed: Sequence[Placed]) -> Tensor:
    """int64 (3, T)."""
    parts = []
    begin = following = 0  # position at which the last placed tokens began, and that of the next token
    done = 0  # tokens
    for each in placed:
        parts.append(of_text(following, each.start - done))
        following += each.start - done
        begin = begin if each.continues else following
        parts.append(each.offsets + begin)
        following = max(following, int(parts[-1].max()) + 1)
        done = each.start + each.offsets.shape[1]
    parts.append(of_text(following, num_tokens - done))
    return torch.cat(parts, dim=1)

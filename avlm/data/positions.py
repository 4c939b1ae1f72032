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
    offsets    int64 or float64 (3, n): what each adds to where they begin
    continues  they begin where those before them did, as the frames and the sound of a video
    """

    start: int
    offsets: Tensor
    continues: bool = False


def of_grid(times: Sequence[int], lines: int, columns: int, step: float = 1.0, is_fractional: bool = False) -> Tensor:
    """Offsets of features in the order (time, line, column), for temporal patches with these numbers and ``step`` of
    time between neighbours. Times are rounded down, in float32 as the published code has them, or float64 as they
    are."""
    time = torch.tensor(times, dtype=torch.float64) * step if is_fractional else (torch.tensor(times) * step).long()
    lines_and_columns = torch.arange(lines).to(time.dtype), torch.arange(columns).to(time.dtype)
    return torch.stack(torch.meshgrid(time, *lines_and_columns, indexing="ij")).flatten(1)


def of_text(first: int | float, count: int) -> Tensor:
    """int64, or float64 after a position that is no whole number."""
    position_T = torch.arange(count)
    if not float(first).is_integer():
        position_T = position_T.double()
        return (position_T + first).expand(3, -1)
    return (position_T + int(first)).expand(3, -1)


def position_of(num_tokens: int, placed: Sequence[Placed], model: ModelConfig) -> Tensor | None:
    """For EncodedSample.position_T: None where they are 0, 1, 2, ..."""
    if model.decoder.mrope_sections is None or not placed:
        return None
    return positions(num_tokens, placed)


def positions(num_tokens: int, placed: Sequence[Placed]) -> Tensor:
    """(3, T): int64, or float64 if any is no whole number."""
    parts = []
    begin: int | float = 0  # position at which the last placed tokens began
    following: int | float = 0  # that of the next token
    done = 0  # tokens
    for each in placed:
        parts.append(of_text(following, each.start - done))
        following += each.start - done
        begin = begin if each.continues else following
        parts.append(each.offsets + begin)
        following = max(following, parts[-1].max().item() + 1)
        done = each.start + each.offsets.shape[1]
    parts.append(of_text(following, num_tokens - done))
    return torch.cat(parts, dim=1)

"""Cross-attention over ranks that share a row: each writes an equal part of the features of its media, and all of them
are gathered where tokens read them.

The exchange after the towers takes features to the ranks that write them (``media.py``), so that the gather is of equal
parts. Every rank then computes keys and values for its own tokens, and the gradient of a feature is the sum over ranks.

M features of a row
"""

import functools
import math
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from avlm.models.avlm import AVLM
from avlm.models.reading import MediaRow
from avlm.parallel.gather import Gather


@dataclass(frozen=True, kw_only=True)
class SharedMediaRow(MediaRow):
    """A row of media that ranks share. ``group``: them; None: those that share a row of tokens."""

    num_ranks: int
    group: ProcessGroup | None

    @property
    def num_own(self) -> int:
        return own_features(self.num_rows, self.num_ranks)


def own_features(num_rows: int, num_ranks: int) -> int:
    """Features that each rank writes; those of the last ranks may be fewer, and are followed by zeros."""
    return max(1, math.ceil(num_rows / num_ranks))


def share_row(row: MediaRow, num_ranks: int, group: ProcessGroup | None) -> MediaRow:
    if num_ranks == 1:
        return row
    known = {each.name: getattr(row, each.name) for each in fields(row)}
    return SharedMediaRow(**known, num_ranks=num_ranks, group=group)


def apply_cross(model: AVLM, group: ProcessGroup) -> None:
    """Gather features before they are read. ``group``: the ranks of a row, on the device."""
    assert model.cross is not None
    model.cross.features.register_forward_pre_hook(functools.partial(_gather, group))


def _gather(group: ProcessGroup, features: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, MediaRow]:
    own_MD, row = inputs
    if not isinstance(row, SharedMediaRow):
        return own_MD, row
    features_MD = Gather.apply(own_MD, row.group or group)
    return features_MD[: row.num_rows], row

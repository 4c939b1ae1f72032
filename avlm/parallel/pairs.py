"""Contrastive stages over ranks: each rank compares its own media and captions with those of all ranks.

    gathered = rows of all ranks, rank after rank        d own = sum over the ranks of d gathered, of this rank's rows

The ranks may have different numbers of pairs. The micro-batches of a rank are joined to one row before its forward: a
pair is compared with all of a step, so none of them can be left behind. What a rank keeps grows with them.

N own pairs   M pairs of the rank with most   A pairs of all ranks   C size of an embedding
"""

from itertools import accumulate

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from avlm.config.model import TOWERS, ModelConfig
from avlm.models.avlm import AVLM
from avlm.models.batch import Batch, Media, Pairs, Pooled, media_of
from avlm.parallel.gather import Gather
from avlm.parallel.mesh import World
from kernels.segments import Segments


def apply_pairs(model: AVLM, world: World) -> None:
    """Compare with the pairs of all ranks. Called on every rank, in a run of several."""
    if model.contrastive is not None and world.size > 1:
        model.contrastive.gather = AllGather(dist.group.WORLD)


class AllGather(nn.Module):
    def __init__(self, group: dist.ProcessGroup):
        super().__init__()
        self.group = group

    def forward(self, own_NC: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, int]:
        """Rows of all ranks, (A, C), and where the own ones begin. ``counts``: of each rank."""
        most = max(counts)
        if not most:
            return own_NC, 0
        padded_MC = F.pad(own_NC, (0, 0, 0, most - len(own_NC)))
        of_ranks = Gather.apply(padded_MC, self.group).split(most)
        all_AC = torch.cat([rows[:count] for rows, count in zip(of_ranks, counts)])
        return all_AC, sum(counts[: self.group.rank()])


def joined(rows: list[Batch], model: ModelConfig) -> Batch:
    """Rows of captions and media as one, on the host."""
    if len(rows) == 1:
        return rows[0]
    token_starts = [0, *accumulate(len(row.token_T) for row in rows)]
    pair_starts = [0, *accumulate(len(row.target_R) for row in rows)]
    media = {name: _joined_media(name, [row.media[name] for row in rows], model) for name in TOWERS}
    pooled = dict.fromkeys(TOWERS.values())
    for modality, tower in model.modalities.items():
        if tower in model.pools:
            outputs = [_outputs(row.media[modality], getattr(model, tower)) for row in rows]
            pooled[tower] = _joined_pooled([row.pairs.media[tower] for row in rows], outputs, pair_starts)
    return Batch(
        token_T=torch.cat([row.token_T for row in rows]),
        position_T=torch.cat([row.position_T for row in rows]),
        segments=Segments.of([length for row in rows for _, length in row.segments.spans]),
        target_rows_R=torch.cat([row.target_rows_R + start for row, start in zip(rows, token_starts)]),
        target_R=torch.cat([row.target_R for row in rows]),
        kind_R=torch.cat([row.kind_R for row in rows]),
        **media,
        pairs=Pairs(**pooled, counts=(pair_starts[-1],)),
        keys=[key for row in rows for key in row.keys],
    )


def _joined_media(modality: str, parts: list[Media], model: ModelConfig) -> Media:
    tower = getattr(model, TOWERS[modality])
    sizes = [size for part in parts for size in part.sizes]
    items = [item for part in parts for item in part.items(tower)] if sizes else []
    return media_of(modality, items, sizes, model)


def _outputs(media: Media, tower: object) -> int:
    return sum(tower.outputs_of(size) for size in media.sizes)


def _joined_pooled(parts: list[Pooled], outputs: list[int], pair_starts: list[int]) -> Pooled:
    """``outputs``: rows of the tower's output that each part has."""
    row_starts = [0, *accumulate(outputs)]
    media_starts = [0, *accumulate(len(part.counts) for part in parts)]
    return Pooled(
        torch.cat([part.rows + start for part, start in zip(parts, row_starts)]),
        torch.cat([part.owner + start for part, start in zip(parts, media_starts)]),
        torch.cat([part.counts for part in parts]),
        torch.cat([part.pairs + start for part, start in zip(parts, pair_starts)]),
    )

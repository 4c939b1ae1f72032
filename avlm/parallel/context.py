"""Context parallelism, the cut: the part of a packed row that one of the ranks that share it works on.

Everything is made on the CPU before the batch goes to its device. Who holds which tokens: shares.py. What attention has
to know of it: context_plan.py.

T tokens of the row   C context ranks   L = T / C tokens of a rank   R tokens that carry a target
"""

from dataclasses import replace

import torch
from torch import Tensor

from avlm.models.batch import Batch
from avlm.models.codes import Codes
from avlm.models.reading import MediaRow
from avlm.parallel.context_plan import ContextPlan, IntervalPlan, context_plan, interval_plan
from avlm.parallel.shares import share
from kernels.segments import Intervals, Segments


def cut(batch: Batch, rank: int, context: int, together: int = 1) -> tuple[Batch, Tensor]:
    """The tokens of one context rank, with local ``target_rows_R`` and plans for segments; and place_T, int64: where
    each token of the whole row lies among the tokens of all ranks, rank after rank. Media stay as they are.

    ``together``: so many neighbours of the axis exchange heads for tokens (``context_attention.heads_together``). The
    row is shared among groups of them, and a plan is that of a group, whose tokens are dealt out in their order.

    Raises ValueError when the ranks do not divide the row.
    """
    T = batch.token_T.shape[0]
    if context == 1:
        return batch, torch.arange(T)
    if T % context:
        raise ValueError(
            f"parallel.context={context} does not divide a row of {T} tokens: change data.seq_length or "
            "parallel.context"
        )
    shares = share(batch.segments.cu_seqlens.diff().tolist(), context // together)
    rows_CL = shares.rows_CL.view(context, -1)
    rows_L = rows_CL[rank]
    place_T = torch.empty(T, dtype=torch.int64)
    place_T[rows_CL.flatten()] = torch.arange(T)
    place_R = place_T[batch.target_rows_R] - rank * len(rows_L)
    held_R = ((place_R >= 0) & (place_R < len(rows_L))).nonzero().flatten()
    held_R = held_R[place_R[held_R].argsort()]
    plan = context_plan(shares, rank // together)

    def of(segments: Segments) -> ContextPlan | IntervalPlan:
        if segments.intervals is None:
            return plan
        return interval_plan(plan, segments.intervals, shares, rank // together)

    of_rank = replace(
        batch,
        token_T=batch.token_T[rows_L],
        position_T=batch.position_T[..., rows_L],
        target_rows_R=place_R[held_R],
        target_R=batch.target_R[held_R],
        kind_R=batch.kind_R[held_R],
        codes=None if batch.codes is None else _held_codes(batch.codes, place_T, rank * len(rows_L), len(rows_L)),
        factor_R=None if batch.factor_R is None else batch.factor_R[held_R],
        segments=of(batch.segments),
        windowed=None if batch.windowed is None else of(batch.windowed),
        media_row=None if batch.media_row is None else _media_row(batch.media_row, rows_L),
    )
    return of_rank, place_T


def _media_row(row: MediaRow, rows_L: Tensor) -> MediaRow:
    """What the tokens of a rank see: of the documents that it holds tokens of, which stand one after the other."""
    seen = row.tokens.intervals
    assert seen is not None
    document_T = torch.arange(len(row.tokens)).repeat_interleave(row.tokens.cu_seqlens.diff())
    document_N, length_N = document_T[rows_L].unique_consecutive(return_counts=True)
    spans = [row.features.spans[document] for document in document_N.tolist()]
    order = torch.cat([torch.arange(0), *(torch.arange(start, start + count) for start, count in spans)])
    tokens, features = Segments.of(length_N.tolist()), Segments.of([count for _, count in spans])
    intervals = Intervals.of(seen.first_T[rows_L], seen.last_T[rows_L], tokens, features)
    return MediaRow(row.num_rows, replace(tokens, intervals=intervals), features, order)


def _held_codes(codes: Codes, place_T: Tensor, start: int, count: int) -> Codes:
    """Those of a rank's tokens, in their order."""
    place_F = place_T[codes.rows] - start
    held_F = ((place_F >= 0) & (place_F < count)).nonzero().flatten()
    held_F = held_F[place_F[held_F].argsort()]
    return Codes(place_F[held_F], codes.before_FK[held_F], codes.code_FK[held_F])

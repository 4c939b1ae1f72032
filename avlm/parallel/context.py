"""Context parallelism, the cut: which tokens of a packed row each of the ranks that share it holds.

A rank's rows of a document are two runs, a head and a tail. Heads stand at the front of the document in an order of
places, tails behind them in the opposite order, so that who has early rows, which see few keys, has late ones as well:

    head 0 | head 1 | ... | head C-1 | tail C-1 | ... | tail 1 | tail 0

Everything is made on the CPU before the batch goes to its device; attention over such rows: context_attention.py.

T tokens of the row   C context ranks   L = T / C rows of a rank   N documents   R rows that carry a target
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from avlm.models.batch import Batch
from kernels.segments import Segments


@dataclass(frozen=True, eq=False)
class Shares:
    """What each rank holds. Its rows ascend: document after document, the head before the tail.

    rows_CL          int64: the row of the whole packed row that a rank holds at each of its own rows
    head_NC, tail_NC int64: rows in a rank's head and tail of each document
    order_NC         int64: the place of a rank in a document's order of heads
    """

    rows_CL: Tensor
    head_NC: Tensor
    tail_NC: Tensor
    order_NC: Tensor


@dataclass(frozen=True, eq=False)
class ContextPlan:
    """What attention on one rank has to know; stands where ``Segments`` stands. Queries are the rank's own rows.

    whole      documents of the whole row
    place_T    int64: place of each row of the whole row among the rows of all ranks, rank after rank
    rows_T     int64: the row that lies at each of those places
    ring       C pairs (queries, keys), one for each step: at step i the keys are those of rank (own rank - i) mod C.
               Step 0 is causal and its two are one; the others are not causal
    queries    head and tail of each document, for the two below
    heads, tails  the keys in the whole row that heads see, and those that tails see; causal
    """

    whole: Segments
    place_T: Tensor
    rows_T: Tensor
    ring: tuple[tuple[Segments, Segments], ...]
    queries: Segments
    heads: Segments
    tails: Segments

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ContextPlan":
        move = lambda x: x.to(device, non_blocking=non_blocking)
        own = move(self.ring[0][0])
        ring = ((own, own), *((move(queries), move(keys)) for queries, keys in self.ring[1:]))
        names = ("whole", "place_T", "rows_T", "queries", "heads", "tails")
        return ContextPlan(ring=ring, **{name: move(getattr(self, name)) for name in names})


def plan(lengths: list[int], context: int) -> Shares:
    """Share documents of these lengths among ``context`` ranks, each of which gets T / C rows.

    A rank gets L // C or one more of the rows of a document of length L. Pairs of a query and a key that it sees are
    the cost of causal attention; documents are dealt out from the longest on, so that short ones even out the pairs.
    Raises ValueError when the ranks do not divide the row.
    """
    if sum(lengths) % context:
        raise ValueError(
            f"parallel.context={context} does not divide a row of {sum(lengths)} tokens: change data.seq_length or "
            "parallel.context"
        )
    rows, pairs = [0] * context, [0] * context
    head, tail, order = ([[0] * context for _ in lengths] for _ in range(3))
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        length = lengths[n]
        share, rest = divmod(length, context)
        quota = [share] * context
        for c in sorted(range(context), key=lambda c: (rows[c], pairs[c]))[:rest]:
            quota[c] += 1
        first, end = 0, length  # rows between the heads and tails that are dealt out
        # With odd quotas the first in order gets the most pairs: the one that would be left with the fewest.
        for place, c in enumerate(sorted(range(context), key=lambda c: pairs[c] + quota[c] * (length + 1) / 2)):
            head[n][c], tail[n][c], order[n][c] = quota[c] // 2, quota[c] - quota[c] // 2, place
            pairs[c] += _pairs(first, head[n][c]) + _pairs(end - tail[n][c], tail[n][c])
            rows[c] += quota[c]
            first, end = first + head[n][c], end - tail[n][c]
    head_NC, tail_NC, order_NC = (torch.tensor(x, dtype=torch.int64).view(-1, context) for x in (head, tail, order))
    return Shares(_rows(torch.tensor(lengths), head_NC, tail_NC, order_NC), head_NC, tail_NC, order_NC)


def _pairs(first: int, count: int) -> int:
    """Keys that ``count`` rows of a document from row ``first`` on see together: first + 1 + first + 2 + ..."""
    return count * first + count * (count + 1) // 2


def _runs(length_N: Tensor, head_NC: Tensor, tail_NC: Tensor, order_NC: Tensor) -> tuple[Tensor, Tensor]:
    """First row of each head and each tail within its document, (N, C) each."""
    before = order_NC[:, :, None] > order_NC[:, None, :]  # (N, C, C): the second stands before the first
    first_head_NC = (before * head_NC[:, None]).sum(-1)
    return first_head_NC, length_N[:, None] - (before * tail_NC[:, None]).sum(-1) - tail_NC


def _rows(length_N: Tensor, head_NC: Tensor, tail_NC: Tensor, order_NC: Tensor) -> Tensor:
    document_N1 = (length_N.cumsum(0) - length_N)[:, None]
    first_NC2 = torch.stack([document_N1 + first for first in _runs(length_N, head_NC, tail_NC, order_NC)], -1)
    count = torch.stack([head_NC, tail_NC], -1).transpose(0, 1).flatten()  # of each run: rank, document, head or tail
    ahead = first_NC2.transpose(0, 1).flatten() - (count.cumsum(0) - count)  # of where the run stands in the result
    rows = torch.arange(int(count.sum())) + ahead.repeat_interleave(count)
    return rows.view(head_NC.shape[1], -1)


def cut(batch: Batch, rank: int, context: int) -> tuple[Batch, Tensor]:
    """The rows of one context rank, with local ``target_rows_R`` and a ContextPlan for segments; and place_T, int64:
    where each row of the whole batch lies among the rows of all ranks, rank after rank. Media are left as they are."""
    T = batch.token_T.shape[0]
    if context == 1:
        return batch, torch.arange(T)
    lengths = batch.segments.cu_seqlens.diff().tolist()
    shares = plan(lengths, context)
    rows_T = shares.rows_CL.flatten()
    place_T = torch.empty_like(rows_T)
    place_T[rows_T] = torch.arange(T)
    rows_L = shares.rows_CL[rank]
    place_R = place_T[batch.target_rows_R] - rank * len(rows_L)
    held_R = (place_R >= 0) & (place_R < len(rows_L))
    of_rank = replace(
        batch,
        token_T=batch.token_T[rows_L],
        position_T=batch.position_T[rows_L],
        target_rows_R=place_R[held_R],
        target_R=batch.target_R[held_R],
        kind_R=batch.kind_R[held_R],
        segments=_context_plan(batch.segments, torch.tensor(lengths), shares, rank, place_T),
    )
    return of_rank, place_T


def _context_plan(whole: Segments, length_N: Tensor, shares: Shares, rank: int, place_T: Tensor) -> ContextPlan:
    context = shares.rows_CL.shape[0]
    head_N, tail_N = shares.head_NC[:, rank], shares.tail_NC[:, rank]
    own = Segments.of((head_N + tail_N).tolist())
    first_head_NC, first_tail_NC = _runs(length_N, shares.head_NC, shares.tail_NC, shares.order_NC)
    nothing_N = torch.zeros_like(length_N)
    return ContextPlan(
        whole=whole,
        place_T=place_T,
        rows_T=shares.rows_CL.flatten(),
        ring=((own, own), *(_ring_step(shares, rank, (rank - i) % context) for i in range(1, context))),
        queries=_slots((head_N, tail_N)),
        # A slot is a document, of which keys up to the last of these queries are used; the other runs have no keys.
        heads=_slots((length_N, nothing_N), (first_head_NC[:, rank] + head_N, nothing_N)),
        tails=_slots((nothing_N, length_N), (nothing_N, first_tail_NC[:, rank] + tail_N)),
    )


def _ring_step(shares: Shares, rank: int, source: int) -> tuple[Segments, Segments]:
    """Queries of a rank and keys of another, two segments for each document.

    The other stands before in the order: all own rows come after its head and before its tail; they see its head.
    It stands after: its rows lie between the own head, which sees none of them, and the own tail, which sees all.
    """
    head_N, tail_N = shares.head_NC[:, rank], shares.tail_NC[:, rank]
    source_head_N, source_tail_N = shares.head_NC[:, source], shares.tail_NC[:, source]
    before_N = shares.order_NC[:, source] < shares.order_NC[:, rank]
    nothing_N = torch.zeros_like(head_N)
    either = lambda a_N, b_N: torch.where(before_N, a_N, b_N)
    queries = _slots((either(head_N + tail_N, head_N), either(nothing_N, tail_N)))
    rows_N = source_head_N + source_tail_N
    room = either(rows_N, nothing_N), either(nothing_N, rows_N)
    return queries, _slots(room, (either(source_head_N, nothing_N), either(nothing_N, rows_N)))


def _slots(lengths: tuple[Tensor, Tensor], used: tuple[Tensor, Tensor] | None = None) -> Segments:
    """Two segments for each document, with these lengths, of which the first ``used`` rows count."""
    segments = Segments.of(torch.stack(lengths, 1).flatten().tolist())
    return segments if used is None else replace(segments, lengths=torch.stack(used, 1).flatten().int())

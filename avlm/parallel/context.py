"""Context parallelism, the cut: which tokens of a packed row each of the ranks that share it holds.

A rank holds two runs of every document, an early part and a late part. The early parts stand at the front of the
document in some order of the ranks, the late parts after them in the opposite order. So a rank whose early part sees
few keys has a late part that sees many:

    early 0 | early 1 | ... | early C-1 | late C-1 | ... | late 1 | late 0

Everything is made on the CPU before the batch goes to its device; attention over such parts: context_attention.py.

T tokens of the row   C context ranks   L = T / C tokens of a rank   N documents   R tokens that carry a target
2 early and late part
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from avlm.models.batch import Batch
from kernels.segments import Intervals, Segments

EARLY, LATE = torch.tensor([1, 0]), torch.tensor([0, 1])  # times a number for each document: it counts for one part


@dataclass(frozen=True, eq=False)
class Shares:
    """What each rank holds. Its tokens ascend: document after document, the early part before the late one.

    rows_CL    int64: the place in the whole packed row of each token that a rank holds
    first_NC2  int64: the position in its document at which each part begins
    count_NC2  int64: tokens of each part
    """

    rows_CL: Tensor
    first_NC2: Tensor
    count_NC2: Tensor


@dataclass(frozen=True, eq=False)
class ContextPlan:
    """Everything that attention on one rank has to know; it stands where ``Segments`` stand. Queries are the rank's
    own tokens.

    whole    documents of the whole row
    place_T  int64: place of each token of the whole row among the tokens of all ranks, rank after rank
    rows_T   int64: the token of the whole row that lies at each of those places
    ring     C pairs (queries, keys), one for each step: at step i the keys are those of rank (own rank - i) mod C.
             Step 0 is causal and its pair is one object twice; the others are not causal
    queries  early and late part of each document, for the two below
    early, late  the keys in the whole row that early parts see, and those that late parts see; causal
    """

    whole: Segments
    place_T: Tensor
    rows_T: Tensor
    ring: tuple[tuple[Segments, Segments], ...]
    queries: Segments
    early: Segments
    late: Segments

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ContextPlan":
        def move(part: Any) -> Any:
            return part.to(device, non_blocking=non_blocking)

        own, _ = self.ring[0]
        own = move(own)
        ring = [(own, own)]
        for queries, keys in self.ring[1:]:
            ring.append((move(queries), move(keys)))
        moved = {"ring": tuple(ring)}
        for entry in fields(self):
            if entry.name != "ring":
                moved[entry.name] = move(getattr(self, entry.name))
        return ContextPlan(**moved)


@dataclass(frozen=True, eq=False)
class WindowPlan:
    """The same for layers with a sliding window, in modes in which a rank has all keys that its queries see.

    whole    documents of the whole row, with intervals
    own      the rank's tokens of each document, with the intervals of their keys in the whole row
    place_T, rows_T  as above
    """

    whole: Segments
    own: Segments
    place_T: Tensor
    rows_T: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "WindowPlan":
        return WindowPlan(*(getattr(self, entry.name).to(device, non_blocking=non_blocking) for entry in fields(self)))


def share(lengths: list[int], context: int) -> Shares:
    """Share documents of these lengths among ``context`` ranks, each of which gets T / C tokens.

    A rank gets L // C tokens of a document of length L, or one more. The cost of causal attention is the number of
    pairs of a query and a key that it sees. The longest documents are dealt out first, so that short ones even out the
    pairs.
    Raises ValueError when the ranks do not divide the row.
    """
    if sum(lengths) % context:
        raise ValueError(
            f"parallel.context={context} does not divide a row of {sum(lengths)} tokens: change data.seq_length or "
            "parallel.context"
        )
    num_held = [0] * context
    num_pairs = [0] * context
    first = [[(0, 0)] * context for _ in lengths]
    count = [[(0, 0)] * context for _ in lengths]
    for n in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[n]
        quota = _quotas(length, num_held, num_pairs)
        # With odd quotas the first in order gets the most pairs: the rank that would be left with the fewest.
        expected = [pairs + tokens * (length + 1) / 2 for pairs, tokens in zip(num_pairs, quota)]
        start, end = 0, length  # of the middle, which is not dealt out yet
        for c in sorted(range(context), key=expected.__getitem__):
            num_early = quota[c] // 2
            num_late = quota[c] - num_early
            end -= num_late
            first[n][c] = start, end
            count[n][c] = num_early, num_late
            num_held[c] += quota[c]
            num_pairs[c] += _pairs(start, num_early) + _pairs(end, num_late)
            start += num_early
    first_NC2 = torch.tensor(first, dtype=torch.int64).view(-1, context, 2)
    count_NC2 = torch.tensor(count, dtype=torch.int64).view(-1, context, 2)
    return Shares(_rows(first_NC2, count_NC2), first_NC2, count_NC2)


def _quotas(length: int, num_held: list[int], num_pairs: list[int]) -> list[int]:
    """Tokens of a document for each rank; the remainder goes to the ranks that hold least so far."""
    context = len(num_held)
    quotient, remainder = divmod(length, context)
    quota = [quotient] * context
    load = list(zip(num_held, num_pairs))
    for c in sorted(range(context), key=load.__getitem__)[:remainder]:
        quota[c] += 1
    return quota


def _pairs(first: int, count: int) -> int:
    """Keys that ``count`` queries of a document from position ``first`` on see: first + 1 + first + 2 + ..."""
    return count * first + count * (count + 1) // 2


def _rows(first_NC2: Tensor, count_NC2: Tensor) -> Tensor:
    """``Shares.rows_CL``."""
    length_N = count_NC2.sum((1, 2))
    document_N = length_N.cumsum(0) - length_N  # where each document begins in the row
    first_NC2 = first_NC2 + document_N[:, None, None]
    first = first_NC2.transpose(0, 1).flatten()  # of each run: by rank, then document, then early or late
    count = count_NC2.transpose(0, 1).flatten()
    shift = first - (count.cumsum(0) - count)  # from the place of a run in the result
    rows = torch.arange(int(count.sum())) + shift.repeat_interleave(count)
    return rows.view(count_NC2.shape[1], -1)


def cut(batch: Batch, rank: int, context: int) -> tuple[Batch, Tensor]:
    """The tokens of one context rank, with local ``target_rows_R`` and a ContextPlan for segments; and place_T, int64:
    where each token of the whole row lies among the tokens of all ranks, rank after rank. Media stay as they are."""
    T = batch.token_T.shape[0]
    if context == 1:
        return batch, torch.arange(T)
    shares = share(batch.segments.cu_seqlens.diff().tolist(), context)
    place_T = torch.empty(T, dtype=torch.int64)
    place_T[shares.rows_CL.flatten()] = torch.arange(T)
    rows_L = shares.rows_CL[rank]
    place_R = place_T[batch.target_rows_R] - rank * len(rows_L)
    is_held_R = (place_R >= 0) & (place_R < len(rows_L))
    of_rank = replace(
        batch,
        token_T=batch.token_T[rows_L],
        position_T=batch.position_T[..., rows_L],
        target_rows_R=place_R[is_held_R],
        target_R=batch.target_R[is_held_R],
        kind_R=batch.kind_R[is_held_R],
        segments=_context_plan(batch.segments, shares, rank, place_T),
    )
    if batch.windowed is None:
        return of_rank, place_T
    windowed = of_rank.segments  # where no document is longer than the window
    if batch.windowed.intervals is not None:
        windowed = _window_plan(batch.windowed, shares, rank, place_T)
    return replace(of_rank, windowed=windowed), place_T


def _context_plan(whole: Segments, shares: Shares, rank: int, place_T: Tensor) -> ContextPlan:
    context = len(shares.rows_CL)
    count_N2 = shares.count_NC2[:, rank]
    own = Segments.of(count_N2.sum(1).tolist())
    ring = [(own, own)]
    for step in range(1, context):
        ring.append(_ring_step(shares, rank, (rank - step) % context))
    # A slot is a document, of which the keys up to the last of these queries are used; the other part has no keys.
    length_N1 = shares.count_NC2.sum((1, 2))[:, None]
    used_N2 = shares.first_NC2[:, rank] + count_N2
    return ContextPlan(
        whole=whole,
        place_T=place_T,
        rows_T=shares.rows_CL.flatten(),
        ring=tuple(ring),
        queries=_slots(count_N2),
        early=_slots(length_N1 * EARLY, used_N2 * EARLY),
        late=_slots(length_N1 * LATE, used_N2 * LATE),
    )


def _window_plan(whole: Segments, shares: Shares, rank: int, place_T: Tensor) -> WindowPlan:
    rows_L = shares.rows_CL[rank]
    own = Segments.of(shares.count_NC2[:, rank].sum(1).tolist())
    seen = whole.intervals
    intervals = Intervals.of(seen.first_T[rows_L], seen.last_T[rows_L], own, whole)
    return WindowPlan(whole, replace(own, intervals=intervals), place_T, shares.rows_CL.flatten())


def _ring_step(shares: Shares, rank: int, source: int) -> tuple[Segments, Segments]:
    """Queries of a rank and keys of another one, two segments for each document.

    If the other rank stands before this one in the order, all own tokens lie between its early and its late part: they
    see its early part. If it stands after, its tokens lie between the own early part, which sees none of them, and the
    own late part, which sees all.
    """
    own_N2 = shares.count_NC2[:, rank]
    source_N2 = shares.count_NC2[:, source]
    own_N1 = own_N2.sum(1, keepdim=True)
    held_N1 = source_N2.sum(1, keepdim=True)
    is_before_N1 = shares.first_NC2[:, source, 1:] > shares.first_NC2[:, rank, 1:]  # late parts stand in reverse order
    queries_N2 = torch.where(is_before_N1, own_N1 * EARLY, own_N2)
    keys_N2 = torch.where(is_before_N1, held_N1 * EARLY, held_N1 * LATE)
    used_N2 = torch.where(is_before_N1, source_N2 * EARLY, held_N1 * LATE)
    return _slots(queries_N2), _slots(keys_N2, used_N2)


def _slots(length_N2: Tensor, used_N2: Tensor | None = None) -> Segments:
    """Two segments for each document, with these lengths, of which the first ``used_N2`` tokens count."""
    segments = Segments.of(length_N2.flatten().tolist())
    if used_N2 is None:
        return segments
    return replace(segments, lengths=used_N2.flatten().int())

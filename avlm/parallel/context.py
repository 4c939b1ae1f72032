"""Context parallelism, the cut: which tokens of a packed row each of the ranks that share it holds.

A rank holds two runs of every document, an early part and a late part. The early parts stand at the front of the
document in some order of the ranks, the late parts after them in the opposite order. So a rank whose early part sees
few keys has a late part that sees many:

    early 0 | early 1 | ... | early C-1 | late C-1 | ... | late 1 | late 0

Everything is made on the CPU before the batch goes to its device; attention over such parts: context_attention.py.

T tokens of the row   C context ranks   L = T / C tokens of a rank   N documents   R tokens that carry a target
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from avlm.models.batch import Batch
from kernels.segments import Segments


@dataclass(frozen=True, eq=False)
class Shares:
    """What each rank holds. Its tokens ascend: document after document, the early part before the late one.

    rows_CL            int64: the place in the whole packed row of each token that a rank holds
    early_NC, late_NC  int64: tokens in a rank's early and late part of each document
    order_NC           int64: the place of a rank among the early parts of a document
    """

    rows_CL: Tensor
    early_NC: Tensor
    late_NC: Tensor
    order_NC: Tensor


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
        own, _ = self.ring[0]
        own = own.to(device, non_blocking=non_blocking)
        ring = [(own, own)]
        for queries, keys in self.ring[1:]:
            ring.append((queries.to(device, non_blocking=non_blocking), keys.to(device, non_blocking=non_blocking)))
        moved = {"ring": tuple(ring)}
        for entry in fields(self):
            if entry.name != "ring":
                moved[entry.name] = getattr(self, entry.name).to(device, non_blocking=non_blocking)
        return ContextPlan(**moved)


def plan(lengths: list[int], context: int) -> Shares:
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
    early = [[0] * context for _ in lengths]
    late = [[0] * context for _ in lengths]
    order = [[0] * context for _ in lengths]
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        quota = _quotas(lengths[n], num_held, num_pairs)
        # With odd quotas the first in order gets the most pairs: the rank that would be left with the fewest.
        expected = [num_pairs[c] + quota[c] * (lengths[n] + 1) / 2 for c in range(context)]
        first, end = 0, lengths[n]  # what lies between the parts that are dealt out
        for place, c in enumerate(sorted(range(context), key=lambda c: expected[c])):
            num_early = quota[c] // 2
            num_late = quota[c] - num_early
            num_pairs[c] += _pairs(first, num_early) + _pairs(end - num_late, num_late)
            num_held[c] += quota[c]
            first += num_early
            end -= num_late
            early[n][c], late[n][c], order[n][c] = num_early, num_late, place
    early_NC = torch.tensor(early, dtype=torch.int64).view(-1, context)
    late_NC = torch.tensor(late, dtype=torch.int64).view(-1, context)
    order_NC = torch.tensor(order, dtype=torch.int64).view(-1, context)
    return Shares(_rows(torch.tensor(lengths), early_NC, late_NC, order_NC), early_NC, late_NC, order_NC)


def _quotas(length: int, num_held: list[int], num_pairs: list[int]) -> list[int]:
    """Tokens of a document for each rank; what does not divide goes to the ranks that hold least so far."""
    context = len(num_held)
    share, rest = divmod(length, context)
    quota = [share] * context
    for c in sorted(range(context), key=lambda c: (num_held[c], num_pairs[c]))[:rest]:
        quota[c] += 1
    return quota


def _pairs(first: int, count: int) -> int:
    """Keys that ``count`` queries of a document from position ``first`` on see: first + 1 + first + 2 + ..."""
    return count * first + count * (count + 1) // 2


def _first_positions(length_N: Tensor, early_NC: Tensor, late_NC: Tensor, order_NC: Tensor) -> tuple[Tensor, Tensor]:
    """The position in its document at which each early and each late part begins, (N, C) each."""
    is_before_NCC = order_NC[:, :, None] > order_NC[:, None, :]  # the second rank stands before the first
    first_early_NC = (is_before_NCC * early_NC[:, None]).sum(-1)
    end_late_NC = length_N[:, None] - (is_before_NCC * late_NC[:, None]).sum(-1)
    return first_early_NC, end_late_NC - late_NC


def _rows(length_N: Tensor, early_NC: Tensor, late_NC: Tensor, order_NC: Tensor) -> Tensor:
    """``Shares.rows_CL``."""
    first_early_NC, first_late_NC = _first_positions(length_N, early_NC, late_NC, order_NC)
    document_N11 = (length_N.cumsum(0) - length_N)[:, None, None]
    first_NC2 = document_N11 + torch.stack([first_early_NC, first_late_NC], -1)
    count_NC2 = torch.stack([early_NC, late_NC], -1)
    first = first_NC2.transpose(0, 1).flatten()  # of each run: by rank, then document, then early or late
    count = count_NC2.transpose(0, 1).flatten()
    shift = first - (count.cumsum(0) - count)  # from the place of a run in the result
    rows = torch.arange(int(count.sum())) + shift.repeat_interleave(count)
    return rows.view(early_NC.shape[1], -1)


def cut(batch: Batch, rank: int, context: int) -> tuple[Batch, Tensor]:
    """The tokens of one context rank, with local ``target_rows_R`` and a ContextPlan for segments; and place_T, int64:
    where each token of the whole row lies among the tokens of all ranks, rank after rank. Media stay as they are."""
    T = batch.token_T.shape[0]
    if context == 1:
        return batch, torch.arange(T)
    lengths = batch.segments.cu_seqlens.diff().tolist()
    shares = plan(lengths, context)
    place_T = torch.empty(T, dtype=torch.int64)
    place_T[shares.rows_CL.flatten()] = torch.arange(T)
    rows_L = shares.rows_CL[rank]
    place_R = place_T[batch.target_rows_R] - rank * len(rows_L)
    is_held_R = (place_R >= 0) & (place_R < len(rows_L))
    of_rank = replace(
        batch,
        token_T=batch.token_T[rows_L],
        position_T=batch.position_T[rows_L],
        target_rows_R=place_R[is_held_R],
        target_R=batch.target_R[is_held_R],
        kind_R=batch.kind_R[is_held_R],
        segments=_context_plan(batch.segments, torch.tensor(lengths), shares, rank, place_T),
    )
    return of_rank, place_T


def _context_plan(whole: Segments, length_N: Tensor, shares: Shares, rank: int, place_T: Tensor) -> ContextPlan:
    context = shares.rows_CL.shape[0]
    early_N, late_N = shares.early_NC[:, rank], shares.late_NC[:, rank]
    first_early_NC, first_late_NC = _first_positions(length_N, shares.early_NC, shares.late_NC, shares.order_NC)
    own = Segments.of((early_N + late_N).tolist())
    ring = [(own, own)]
    for step in range(1, context):
        ring.append(_ring_step(shares, rank, (rank - step) % context))
    zero_N = torch.zeros_like(length_N)
    # A slot is a document, of which the keys up to the last of these queries are used; the other part has no keys.
    last_early_N = first_early_NC[:, rank] + early_N
    last_late_N = first_late_NC[:, rank] + late_N
    return ContextPlan(
        whole=whole,
        place_T=place_T,
        rows_T=shares.rows_CL.flatten(),
        ring=tuple(ring),
        queries=_slots((early_N, late_N)),
        early=_slots((length_N, zero_N), (last_early_N, zero_N)),
        late=_slots((zero_N, length_N), (zero_N, last_late_N)),
    )


def _ring_step(shares: Shares, rank: int, source: int) -> tuple[Segments, Segments]:
    """Queries of a rank and keys of another one, two segments for each document.

    If the other rank stands before this one in the order, all own tokens lie between its early and its late part: they
    see its early part. If it stands after, its tokens lie between the own early part, which sees none of them, and the
    own late part, which sees all.
    """
    early_N, late_N = shares.early_NC[:, rank], shares.late_NC[:, rank]
    source_early_N = shares.early_NC[:, source]
    held_N = source_early_N + shares.late_NC[:, source]
    is_before_N = shares.order_NC[:, source] < shares.order_NC[:, rank]
    zero_N = torch.zeros_like(early_N)
    queries = _slots((torch.where(is_before_N, early_N + late_N, early_N), torch.where(is_before_N, zero_N, late_N)))
    first_slot_N = torch.where(is_before_N, held_N, zero_N)
    second_slot_N = torch.where(is_before_N, zero_N, held_N)
    first_used_N = torch.where(is_before_N, source_early_N, zero_N)
    return queries, _slots((first_slot_N, second_slot_N), (first_used_N, second_slot_N))


def _slots(lengths: tuple[Tensor, Tensor], used: tuple[Tensor, Tensor] | None = None) -> Segments:
    """Two segments for each document, with these lengths, of which the first ``used`` tokens count."""
    segments = Segments.of(torch.stack(lengths, 1).flatten().tolist())
    if used is None:
        return segments
    return replace(segments, lengths=torch.stack(used, 1).flatten().int())

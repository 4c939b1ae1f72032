"""Context parallelism, the shares: which tokens of a packed row each of the ranks that share it holds.

A document stays whole on one rank if it has room there; one that is cut lies on as few ranks as have room for it, its
members. A member holds two runs of it, an early part and a late part: the early parts stand at the front of the
document in the order of the ranks, the late parts after them in the opposite order. So a member whose early part sees
few keys has a late part that sees many, and all see about as many keys for each token that they hold:

    early 0 | early 1 | ... | early k-1 | late k-1 | ... | late 1 | late 0

T tokens of the row   C context ranks   L = T / C tokens of a rank   N documents   2 early and late part
"""

from dataclasses import dataclass
from functools import cached_property

import numpy
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Shares:
    """What each rank holds. Documents stand in an order of their own: those with most members come first, so that the
    tokens of documents that a rank shares with others are its first ones.

    rows_T     int64: the place in the packed row of each token, document after document in this order
    length_N   int64: tokens of each document
    first_NC2  int64: the position in its document at which each part begins
    count_NC2  int64: tokens of each part. The tokens of a rank: document after document, early part before late part
    """

    rows_T: Tensor
    length_N: Tensor
    first_NC2: Tensor
    count_NC2: Tensor

    @property
    def rows_CL(self) -> Tensor:
        """int64: the place in the packed row of each token that a rank holds."""
        return self.rows_T[self.held_CL]

    @cached_property
    def held_CL(self) -> Tensor:
        """int64: the tokens that each rank holds, as indices of ``rows_T``."""
        document_N = self.length_N.cumsum(0) - self.length_N
        first_NC2 = self.first_NC2 + document_N[:, None, None]
        first = first_NC2.transpose(0, 1).flatten()  # of each run: by rank, then document, then early or late
        count = self.count_NC2.transpose(0, 1).flatten()
        shift = first - (count.cumsum(0) - count)  # from the place of a run in the result
        held = torch.arange(len(self.rows_T)) + shift.repeat_interleave(count)
        return held.view(self.count_NC2.shape[1], -1)


def share(lengths: list[int], context: int) -> Shares:
    """Share documents of these lengths, a multiple of ``context`` in all, among so many ranks: each gets T / C tokens.
    Where ranks exchange heads, "rank" here means a group of those that do (``context.cut``)."""
    assert sum(lengths) % context == 0, "context.cut refuses such a row"
    length_N = numpy.array(lengths, dtype=numpy.int64)
    quota_NC = _deal(length_N, context)
    order_N = numpy.argsort(-(quota_NC > 0).sum(1), kind="stable")
    begin_N = length_N.cumsum() - length_N  # in the packed row
    begin_N, length_N, quota_NC = (torch.from_numpy(x[order_N]) for x in (begin_N, length_N, quota_NC))
    shift_N = begin_N - (length_N.cumsum(0) - length_N)
    rows_T = torch.arange(int(length_N.sum())) + shift_N.repeat_interleave(length_N)
    early_NC = quota_NC // 2
    late_NC = quota_NC - early_NC
    first_early_NC = early_NC.cumsum(1) - early_NC
    first_late_NC = length_N[:, None] - late_NC.cumsum(1)
    first_NC2 = torch.stack([first_early_NC, first_late_NC], dim=2)
    return Shares(rows_T, length_N, first_NC2, torch.stack([early_NC, late_NC], dim=2))


def _deal(length_N: numpy.ndarray, context: int) -> numpy.ndarray:
    """quota_NC: how many tokens of each document each rank gets, T / C in all.

    The cost of causal attention is the number of pairs of a query and a key that it sees. From the longest document to
    the shortest: one of more than T / C tokens is cut over the least number of ranks that have room for it, those with
    most room, as evenly as their room allows. Any other goes whole to the rank with the fewest pairs among those with
    room for it (compare ``media.assign``). Documents that fit nowhere are left to the end, and fill what room there is
    from rank to rank.

    Fewer than C documents are cut because they are longer than T / C, and fewer than C because they fit nowhere. All
    ranks hold the same number of tokens, but a token of a long document sees more keys than one of a short one: no rank
    has more pairs than T / C times half the length of the longest document that it holds, and pairs are as even as
    whole documents of T / C tokens can make them.
    """
    held = int(length_N.sum()) // context
    quota_NC = numpy.zeros((len(length_N), context), dtype=numpy.int64)
    room_C = numpy.full(context, held)
    pairs_C = numpy.zeros(context)
    unplaced = []
    for n in numpy.argsort(-length_N, kind="stable").tolist():
        length = int(length_N[n])
        if length > held:
            quota_C = _shares_of_long(length, room_C, pairs_C)
            quota_NC[n] = quota_C
            room_C -= quota_C
            pairs_C += quota_C * (length + 1) / 2
            continue
        rank = numpy.where(room_C >= length, pairs_C, numpy.inf).argmin()
        if room_C[rank] < length:
            unplaced.append(n)
            continue
        quota_NC[n, rank] = length
        room_C[rank] -= length
        pairs_C[rank] += length * (length + 1) / 2
    # Two lines of equal length, the room that is left and the documents that are left: a quota is where two overlap.
    end_C = room_C.cumsum()
    end_U1 = length_N[unplaced].cumsum()[:, None]
    first_UC = numpy.maximum(end_C - room_C, end_U1 - length_N[unplaced][:, None])
    quota_NC[unplaced] = (numpy.minimum(end_C, end_U1) - first_UC).clip(min=0)
    return quota_NC


def _shares_of_long(length: int, room_C: numpy.ndarray, pairs_C: numpy.ndarray) -> numpy.ndarray:
    ranks = numpy.lexsort((pairs_C, -room_C))
    num_members = int(numpy.searchsorted(room_C[ranks].cumsum(), length)) + 1
    quota_C = numpy.zeros_like(room_C)
    for num_left in range(num_members, 0, -1):  # from the least room to the most
        rank = ranks[num_left - 1]
        quota_C[rank] = min(room_C[rank], -(-length // num_left))
        length -= quota_C[rank]
    return quota_C

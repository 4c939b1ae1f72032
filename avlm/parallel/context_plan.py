"""Context parallelism, the plans: what attention on one rank has to know of the shares of a row (shares.py). They stand
where ``Segments`` stand.

Tokens and documents are in the order of ``Shares``: the documents with most members first.

T tokens of the row   C context ranks   L = T / C tokens of a rank   N documents   2 early and late part
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from avlm.parallel.shares import Shares
from kernels.segments import Intervals, Segments

EARLY, LATE = torch.tensor([1, 0]), torch.tensor([0, 1])  # times a number for each document: it counts for one part
Message = tuple[int, int, int]  # (rank of the context axis, first row, row after the last)


@dataclass(frozen=True, eq=False)
class RingStep:
    """One exchange of keys and values, and what this rank's queries do with those that arrive.

    sends     rows of the own keys that go to other ranks
    receives  rows of the block of keys that arrives, by the rank that sends them
    queries   segments of the first ``num_queries`` own tokens, one or two for each document
    keys      those of the block: all keys of a segment are seen by all of its queries
    """

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]
    num_queries: int
    queries: Segments
    keys: Segments

    @property
    def num_keys(self) -> int:
        """Rows that arrive."""
        return self.receives[-1][2] if self.receives else 0

    @property
    def returns(self) -> tuple[Message, ...]:
        """Where the gradients of what was sent arrive, one message after the other."""
        returns = []
        start = 0
        for rank, first, last in self.sends:
            returns.append((rank, start, start + last - first))
            start += last - first
        return tuple(returns)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "RingStep":
        queries, keys = (x.to(device, non_blocking=non_blocking) for x in (self.queries, self.keys))
        return replace(self, queries=queries, keys=keys)

    def pin_memory(self) -> "RingStep":
        return replace(self, queries=self.queries.pin_memory(), keys=self.keys.pin_memory())


@dataclass(eq=False)  # not frozen: torch.compile would take it apart, and compile again for rings of another length
class ContextPlan:
    """Queries are the rank's own tokens.

    own      documents that this rank holds, or its parts of them
    ring     what it does with keys of other ranks, see ``_ring``
    whole    documents of the whole row
    place_T  int64: place of each token of the whole row among the tokens of all ranks, rank after rank
    rows_T   int64: the token of the whole row that lies at each of those places
    queries  early and late part of each document, for the two below
    early, late  the keys in the whole row that early parts see, and those that late parts see; causal
    """

    own: Segments
    ring: tuple[RingStep, ...]
    whole: Segments
    place_T: Tensor
    rows_T: Tensor
    queries: Segments
    early: Segments
    late: Segments

    @property
    def num_shared(self) -> int:
        """Own tokens, from the first on, of documents that other ranks hold parts of."""
        return max((step.num_queries for step in self.ring), default=0)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ContextPlan":
        moved = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name == "ring":
                moved["ring"] = tuple(step.to(device, non_blocking) for step in value)
            else:
                moved[entry.name] = value.to(device, non_blocking=non_blocking)
        return ContextPlan(**moved)

    def pin_memory(self) -> "ContextPlan":
        pinned = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        ring = tuple(step.pin_memory() for step in pinned.pop("ring"))
        return ContextPlan(**{name: value.pin_memory() for name, value in pinned.items()}, ring=ring)


@dataclass(frozen=True, eq=False)
class IntervalPlan:
    """The same where intervals say what queries see, in modes in which a rank has all keys that its queries see.

    whole    documents of the whole row, with intervals
    own      the rank's tokens of each document, with the intervals of their keys in the whole row
    place_T, rows_T  as above
    """

    whole: Segments
    own: Segments
    place_T: Tensor
    rows_T: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "IntervalPlan":
        moved = (getattr(self, entry.name).to(device, non_blocking=non_blocking) for entry in fields(self))
        return IntervalPlan(*moved)

    def pin_memory(self) -> "IntervalPlan":
        return IntervalPlan(*(getattr(self, entry.name).pin_memory() for entry in fields(self)))


def context_plan(shares: Shares, rank: int) -> ContextPlan:
    count_N2 = shares.count_NC2[:, rank]
    held_N = count_N2.sum(1)
    rows_T = shares.held_CL.flatten()
    place_T = torch.empty_like(rows_T)
    place_T[rows_T] = torch.arange(len(rows_T))
    # A slot is a document, of which the keys up to the last of these queries are used; the other part has no keys.
    used_N2 = (shares.first_NC2[:, rank] + count_N2) * (held_N > 0)[:, None]
    return ContextPlan(
        own=Segments.of(held_N[held_N > 0].tolist()),
        ring=_ring(shares.count_NC2, rank),
        whole=Segments.of(shares.length_N.tolist()),
        place_T=place_T,
        rows_T=rows_T,
        queries=_slots(count_N2),
        early=_slots(shares.length_N[:, None] * EARLY, used_N2 * EARLY),
        late=_slots(shares.length_N[:, None] * LATE, used_N2 * LATE),
    )


def interval_plan(plan: ContextPlan, seen: Intervals, shares: Shares, rank: int) -> IntervalPlan:
    """``seen``: by each token of the packed row."""
    tensors = (getattr(seen, entry.name)[shares.rows_T] for entry in fields(Intervals))
    whole = replace(plan.whole, intervals=Intervals(*tensors))
    held_L = shares.held_CL[rank]
    own = Segments.of(shares.count_NC2[:, rank].sum(1).tolist())
    intervals = Intervals.of(whole.intervals.first_T[held_L], whole.intervals.last_T[held_L], own, whole)
    return IntervalPlan(whole, replace(own, intervals=intervals), plan.place_T, plan.rows_T)


def _slots(length_N2: Tensor, used_N2: Tensor | None = None) -> Segments:
    """Two segments for each document, with these lengths, of which the first ``used_N2`` tokens count."""
    segments = Segments.of(length_N2.flatten().tolist())
    if used_N2 is None:
        return segments
    return replace(segments, lengths=used_N2.flatten().int())


@dataclass
class _Part:
    """Of a document that is cut: the own rank is its member ``index``, and holds its rows from ``first`` on."""

    index: int
    first: int
    members: list[int]
    counts: list[tuple[int, int]]  # tokens of each member, early and late


def _ring(count_NC2: Tensor, rank: int) -> tuple[RingStep, ...]:
    """The members of a document stand in a ring of their own: at step i, from 1 on, each has the keys of the member i
    before it and sends its own to the member i after it. A rank runs as many steps as its documents have other members
    at most, and none if nothing of it is cut."""
    quota_NC = count_NC2.sum(2)
    num_members_N = (quota_NC > 0).sum(1)
    parts = []
    first = 0
    for n in ((num_members_N > 1) & (quota_NC[:, rank] > 0)).nonzero().flatten().tolist():
        members = quota_NC[n].nonzero().flatten().tolist()
        counts = count_NC2[n, members].tolist()
        parts.append(_Part(members.index(rank), first, members, counts))
        first += int(quota_NC[n, rank])
    num_steps = len(parts[0].members) if parts else 1
    return tuple(_ring_step([part for part in parts if step < len(part.members)], step) for step in range(1, num_steps))


def _ring_step(parts: list[_Part], step: int) -> RingStep:
    """If the other member stands before this one in the order, all own tokens lie between its early and its late part:
    they see its early part. If it stands after, its tokens lie between the own early part, which sees none of them, and
    the own late part, which sees all. Only what is seen travels."""
    sends, receives = [], []
    queries, keys = [], []
    num_queries = num_keys = 0
    for part in parts:
        size = len(part.members)
        early, late = part.counts[part.index]
        to, source = (part.index + step) % size, (part.index - step) % size
        source_early, source_late = part.counts[source]
        num_sent = early if to > part.index else early + late
        if source < part.index:
            queries.append(early + late)
            arriving = [source_early]
        else:
            queries += [early, late]
            arriving = [0, source_early + source_late]
        if num_sent:
            sends.append((part.members[to], part.first, part.first + num_sent))
        if sum(arriving):
            receives.append((part.members[source], num_keys, num_keys + sum(arriving)))
        keys += arriving
        num_queries += early + late
        num_keys += sum(arriving)
    return RingStep(tuple(sends), tuple(receives), num_queries, Segments.of(queries), Segments.of(keys))

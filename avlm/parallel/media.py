"""Media parallelism: which rank encodes which image or audio window, and to which ranks its rows go.

Towers are not sharded along tokens. The images and windows of a row are divided among the ranks that work on it, by the
cost of their encoding, and each is encoded once. With ``balance``, those of all rows are divided among all ranks: media
differ far more from row to row than tokens do, and the slowest rank sets the time of a step. Each modality is divided
on its own, as no rank can run ahead of the exchange after a tower.

All ranks of a row hold the same batch, so each computes the same plan without communication, on the host.

T tokens of the whole row   F features   U projected rows   S tower rows of one   P tower rows of all items of the row
N ranks at most that a tower row goes to
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from avlm.config.model import ModelConfig
from avlm.models.batch import TAPS, Batch, Features, Media, Size, media_of
from avlm.models.costs import item_costs
from avlm.parallel.exchange import RoutedSegments, swap
from avlm.parallel.mesh import World
from kernels.segments import Segments


@dataclass(frozen=True)
class Share:
    """The ranks that share the encoding: those of one row of tokens, its home, or of several rows, home after home."""

    group: dist.ProcessGroup
    home: int  # of this rank
    ranks_per_home: int
    tokens_per_rank: int

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def num_ranks(self) -> int:
        return self.group.size()


@dataclass(frozen=True)
class MediaPlan:
    """Which rank encodes which item of one modality: those of the first home, then of the second, and so on."""

    share: Share
    sizes: list[Size]  # of each item
    lengths: list[int]  # its rows in the tower
    outputs: list[int]  # its rows of the tower's output
    encoders: list[int]  # the rank that encodes it
    senders: list[int]  # the rank of its home that hands it to the encoder
    own: range  # the items of this rank's home
    mine: list[int]  # the items that this rank encodes


def split(
    batch: Batch,
    place_T: Tensor,
    model: ModelConfig,
    world: World,
    balance: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Batch:
    """The batch with the media that this rank encodes and the features that land on it; the rest stays as it is.

    Token t of the batch is token place_T[t] of all ranks of the row, one rank after the other; all hold the same
    number. ``rows`` become tokens of this rank, ``sources`` become rows that arrive after the tower. ``group`` is the
    ranks that hold the row, by default context x tensor. All ranks of the group call this together, and with
    ``balance`` all ranks of the world.
    """
    group = group or world.row_mesh.get_group("row")
    row_ranks = group.size()
    balance = balance and world.data_size > 1
    if row_ranks == 1 and not balance:
        return batch
    assert len(place_T) % row_ranks == 0, f"{row_ranks} ranks cannot hold {len(place_T)} tokens evenly"
    tokens_per_rank = len(place_T) // row_ranks
    sizes = {name: batch.media[name].sizes for name in model.modalities}
    homes = [sizes]
    share = Share(group, 0, row_ranks, tokens_per_rank)
    if balance:
        homes = world.gather(sizes if world.leads_row else None)[::row_ranks]
        share = Share(dist.group.WORLD, world.data_rank, row_ranks, tokens_per_rank)
    changes = {}
    for name in model.modalities:
        plan = make_plan(name, share, [home[name] for home in homes], model)
        changes[name] = split_media(name, batch.media[name], place_T, plan, model)
    return replace(batch, **changes)


def make_plan(modality: str, share: Share, sizes_of_homes: list[list[Size]], model: ModelConfig) -> MediaPlan:
    """The same on every rank. An encoder of the item's home has the item already; to other encoders the ranks of the
    home send in turn."""
    sizes = list(chain.from_iterable(sizes_of_homes))
    tower = getattr(model, model.modalities[modality])
    lengths = [tower.rows_of(size) for size in sizes]
    outputs = [tower.outputs_of(size) for size in sizes]
    encoders = assign(item_costs(modality, sizes, model), share.num_ranks)
    senders = []
    own = range(0)
    for home, of_home in enumerate(sizes_of_homes):
        first = len(senders)
        items = range(first, first + len(of_home))
        if home == share.home:
            own = items
        for item in items:
            sender = encoders[item]
            if sender // share.ranks_per_home != home:
                sender = home * share.ranks_per_home + item % share.ranks_per_home
            senders.append(sender)
    mine = [item for item, encoder in enumerate(encoders) if encoder == share.rank]
    return MediaPlan(share, sizes, lengths, outputs, encoders, senders, own, mine)


def assign(costs: list[int], num_ranks: int) -> list[int]:
    """The rank of each item: from the largest to the smallest, each to the rank with the least so far.

    Ties go to the earlier item and the lower rank. No rank gets more than the mean plus the last item that it was
    given, and the slowest takes at most 4/3 of the time of the best assignment (Graham 1969).
    """
    loads = [(0, rank) for rank in range(num_ranks)]
    ranks = [0] * len(costs)
    for item in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        load, rank = loads[0]
        ranks[item] = rank
        heapq.heapreplace(loads, (load + costs[item], rank))
    return ranks


def split_media(modality: str, media: Media, place_T: Tensor, plan: MediaPlan, model: ModelConfig) -> Media:
    """The items that this rank encodes, and the features that land on its tokens. Windows travel without padding."""
    tower = getattr(model, model.modalities[modality])
    shapes = [tower.item_shape(size) for size in plan.sizes]
    items = _hand_over(media.items(tower), media.values, shapes, plan)
    num_ranks = TAPS if getattr(model, f"{model.modalities[modality]}_projector").stretches else 1
    segments, rows_F, features = _route(media, place_T, plan, num_ranks)
    sizes = [plan.sizes[item] for item in plan.mine]
    newlines, owner_L = _placed(media.newlines, place_T, plan.share)
    return media_of(modality, items, sizes, model, features, rows_F, newlines[owner_L == plan.share.rank], segments)


def _placed(rows: Tensor, place_T: Tensor, share: Share) -> tuple[Tensor, Tensor]:
    """Rows of the home's tokens as rows of their ranks, and these ranks."""
    place = place_T[rows]
    owner = share.home * share.ranks_per_home + place // share.tokens_per_rank
    return place % share.tokens_per_rank, owner


def _route(media: Media, place_T: Tensor, plan: MediaPlan, num_ranks: int) -> tuple[RoutedSegments, Tensor, Features]:
    """The exchange after the tower, and the features that land here, with their rows.

    Rows go from rank to rank in the order of the items and of the rows in them, which both sides know. Rows that are
    part of no feature (class tokens) go nowhere. Features that are weighted sums may share a row across the border of
    two ranks, or of up to ``num_ranks`` if these hold few tokens: it goes to each of them.
    """
    share = plan.share
    row_F, owner_F = _placed(media.rows, place_T, share)
    outputs = [plan.outputs[item] for item in plan.own]
    destination_PN = _destinations(media.features, owner_F, sum(outputs), num_ranks)
    send_rows_S, send_counts = _departures(destination_PN, outputs, plan)
    arrived_P, receive_counts = _arrivals(destination_PN, outputs, plan)
    boundaries = Segments.of([plan.lengths[item] for item in plan.mine])
    segments = RoutedSegments(
        boundaries.cu_seqlens,
        boundaries.max_length,
        send_rows_S=send_rows_S,
        send_counts=send_counts,
        receive_counts=receive_counts,
        group=share.group,
        repeats=num_ranks > 1,
    )
    lands_F = owner_F == share.rank
    return segments, row_F[lands_F], _landed(media.features, lands_F, arrived_P)


def _destinations(features: Features, owner_F: Tensor, num_rows: int, num_ranks: int) -> Tensor:
    """int64 (P, N): the ranks that need each row of the tower's output, and -1."""
    sources, owner = features.sources, owner_F
    if features.mix is not None:
        sources, owner = sources[features.mix.flatten()], owner_F.repeat_interleave(features.mix.shape[1])
    is_row = sources >= 0
    row, rank = sources[is_row], owner[:, None].expand_as(sources)[is_row]
    destination_PN = torch.full((num_rows, num_ranks), -1)
    if num_ranks == 1:
        destination_PN[row, 0] = rank
        return destination_PN
    row, rank = torch.stack([row, rank]).unique(dim=1).contiguous()  # in the order of the rows
    first = torch.searchsorted(row, row)  # of the ranks of the same row
    destination_PN[row, torch.arange(len(row)) - first] = rank
    return destination_PN


def _landed(features: Features, lands_F: Tensor, arrived_P: Tensor) -> Features:
    """The features that land here, of rows that have arrived."""
    if features.mix is None:
        return Features(arrived_P[features.sources[lands_F]])
    assert features.weights is not None
    used, mix = features.mix[lands_F].unique(return_inverse=True)
    return Features(arrived_P[features.sources[used]], mix, features.weights[lands_F])


def _departures(destination_PN: Tensor, outputs: list[int], plan: MediaPlan) -> tuple[Tensor, list[int]]:
    """Rows of the tower's output on this rank in the order in which they are sent, and how many go to each rank."""
    num_ranks = destination_PN.shape[1]
    shapes = [(count, num_ranks) for count in plan.outputs]
    of_items = _hand_over(destination_PN.split(outputs), destination_PN, shapes, plan)
    mine = torch.cat([destination_PN[:0], *of_items]).flatten()
    counts = mine[mine >= 0].bincount(minlength=plan.share.num_ranks)
    num_staying = len(mine) - int(counts.sum())
    return mine.argsort(stable=True)[num_staying:] // num_ranks, counts.tolist()


def _arrivals(destination_PN: Tensor, outputs: list[int], plan: MediaPlan) -> tuple[Tensor, list[int]]:
    """Where each row of the home's items lies among those that arrive here, else -1; and how many each rank sends."""
    encoders = torch.tensor([plan.encoders[item] for item in plan.own], dtype=torch.int64)
    encoder_P = encoders.repeat_interleave(torch.tensor(outputs, dtype=torch.int64))
    arriving = (destination_PN == plan.share.rank).any(1).nonzero().flatten()
    from_rank = encoder_P[arriving]
    in_order = arriving[from_rank.argsort(stable=True)]
    arrived_P = torch.full((len(destination_PN) + 1,), -1)  # a source of -1 picks the last one: -1 again
    arrived_P[in_order] = torch.arange(len(in_order))
    return arrived_P, from_rank.bincount(minlength=plan.share.num_ranks).tolist()


def _hand_over(
    own_items: Sequence[Tensor], like: Tensor, shapes: Sequence[tuple[int, ...]], plan: MediaPlan
) -> list[Tensor]:
    """The items that this rank encodes, from the items of its home; ``shapes`` of all items of the plan."""
    share = plan.share
    if share.num_ranks == share.ranks_per_home:
        return [own_items[item] for item in plan.mine]
    outgoing = [item for item in plan.own if plan.senders[item] == share.rank]
    outgoing.sort(key=plan.encoders.__getitem__)
    incoming = sorted(plan.mine, key=plan.senders.__getitem__)
    numels = [math.prod(shape) for shape in shapes]
    send_counts = [0] * share.num_ranks
    receive_counts = [0] * share.num_ranks
    for item in outgoing:
        send_counts[plan.encoders[item]] += numels[item]
    for item in incoming:
        receive_counts[plan.senders[item]] += numels[item]
    flat = [own_items[item - plan.own.start].flatten() for item in outgoing]
    sent = torch.cat([like.new_empty(0), *flat])
    arrived = swap(sent, send_counts, receive_counts, share.group)
    pieces = dict(zip(incoming, arrived.split([numels[item] for item in incoming])))
    return [pieces[item].view(shapes[item]) for item in plan.mine]

"""Media parallelism: which rank encodes which image or audio window, and to which ranks its rows go.

Towers are not sharded along tokens. The images and windows of a row are divided among the ranks that work on it, by the
cost of their encoding, and each is encoded once. With ``parallel.balance_media``, those of several rows are divided
among the ranks of all of these: media differ far more from row to row than tokens do, and the slowest rank sets the
time of a step. Each modality is divided on its own, as no rank can run ahead of the exchange after a tower.

All ranks of a row know its sizes, so each computes the same plan, on the host. The values of its media are on the rank
that loaded the row, the first of its ranks, which hands each item to the rank that encodes it.

T tokens of the whole row   F features   U projected rows   S tower rows of one   P tower rows of all items of the row
N ranks at most that a tower row goes to
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from avlm.config.model import ModelConfig
from avlm.models.batch import TAPS, Batch, Features, Media, Size, media_of
from avlm.models.costs import item_costs
from avlm.models.reading import MediaRow
from avlm.parallel.cross import own_features, share_row
from avlm.parallel.exchange import RoutedSegments, swap
from avlm.parallel.mesh import World
from kernels.segments import Segments


@dataclass(frozen=True)
class Share:
    """The ranks that share the encoding: those of one row of tokens, its home, or of several rows, home after home.

    group       their communicator for rows of the tower
    host_group  another one, on the host, for the media; None if each rank holds those of its home
    """

    group: dist.ProcessGroup
    host_group: dist.ProcessGroup | None
    home: int  # of this rank
    ranks_per_home: int
    tokens_per_rank: int

    @staticmethod
    def of_rows(world: World, num_tokens: int) -> "Share":
        """Those that share the media of rows of ``num_tokens``: more than one rank."""
        assert world.media_group is not None
        home = world.media_group.rank() // world.row_size
        per_rank = num_tokens // world.row_size
        return Share(world.media_group, world.media_host_group, home, world.row_size, per_rank)

    @staticmethod
    def of_prompts(group: dist.ProcessGroup, num_tokens: int) -> "Share":
        """A group whose ranks all hold the same prompts."""
        return Share(group, None, 0, group.size(), num_tokens // group.size())

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def num_ranks(self) -> int:
        return self.group.size()

    @property
    def num_homes(self) -> int:
        return self.num_ranks // self.ranks_per_home

    def leader(self, home: int) -> int:
        """The rank that has loaded the row of a home."""
        return home * self.ranks_per_home


@dataclass(frozen=True)
class MediaPlan:
    """Which rank encodes which item of one modality: those of the first home, then of the second, and so on."""

    share: Share
    sizes: list[Size]  # of each item
    lengths: list[int]  # its rows in the tower
    outputs: list[int]  # its rows of the tower's output, or of its resampler's
    encoders: list[int]  # the rank that encodes it
    leaders: list[int]  # the rank that has loaded it, and hands it to the encoder
    own: range  # the items of this rank's home
    mine: list[int]  # the items that this rank encodes


def split(batch: Batch, place_T: Tensor, model: ModelConfig, share: Share) -> Batch:
    """The batch with the media that this rank encodes and the features that land on it; the rest stays as it is.

    Token t of the batch is token place_T[t] of all ranks of the row, one rank after the other; all hold the same
    number. ``rows`` become tokens of this rank, ``sources`` become rows that arrive after the tower. All ranks of the
    share call this together.
    """
    if share.num_ranks == 1:  # prompts of a tensor axis of one rank
        return batch
    held = share.ranks_per_home * share.tokens_per_rank
    assert len(place_T) == held, f"{share.ranks_per_home} ranks cannot hold {len(place_T)} tokens evenly"
    homes = [{name: batch.media[name].sizes for name in model.modalities}]
    if share.num_homes > 1:
        of_ranks: list[Any] = [None] * share.num_ranks
        dist.all_gather_object(of_ranks, homes[0], group=share.host_group)
        homes = of_ranks[:: share.ranks_per_home]
    places = Places.of(place_T, batch.media_row, share)
    changes: dict[str, Any] = {}
    for name in model.modalities:
        plan = make_plan(name, share, [home[name] for home in homes], model)
        changes[name] = split_media(name, batch.media[name], places, plan, model)
    if batch.media_row is not None:
        group = share.group if share.host_group is None else None
        changes["media_row"] = share_row(batch.media_row, share.ranks_per_home, group)
    return replace(batch, **changes)


@dataclass(frozen=True)
class Places:
    """Where rows of the home lie: its tokens, and behind them the features in its row of media, of which each rank
    writes as many.

    owner  int64: the rank
    row    int64: the row of that rank
    """

    owner: Tensor
    row: Tensor

    @staticmethod
    def of(place_T: Tensor, media_row: MediaRow | None, share: Share) -> "Places":
        num_tokens = share.tokens_per_rank
        owner, row = place_T // num_tokens, place_T % num_tokens
        if media_row is not None:
            feature_M = torch.arange(media_row.num_rows)
            num_own = own_features(media_row.num_rows, share.ranks_per_home)
            owner = torch.cat([owner, feature_M // num_own])
            row = torch.cat([row, num_tokens + feature_M % num_own])
        return Places(share.home * share.ranks_per_home + owner, row)


def make_plan(modality: str, share: Share, sizes_of_homes: list[list[Size]], model: ModelConfig) -> MediaPlan:
    """The same on every rank."""
    sizes = list(chain.from_iterable(sizes_of_homes))
    tower = getattr(model, model.modalities[modality])
    lengths = [tower.rows_of(size) for size in sizes]
    projector = getattr(model, f"{model.modalities[modality]}_projector")
    outputs = [projector.outputs_of(tower.outputs_of(size)) for size in sizes]
    encoders = assign(item_costs(modality, sizes, model), share.num_ranks)
    counts = [len(of_home) for of_home in sizes_of_homes]
    leaders = [share.leader(home) for home, count in enumerate(counts) for _ in range(count)]
    first = sum(counts[: share.home])
    own = range(first, first + counts[share.home])
    mine = [item for item, encoder in enumerate(encoders) if encoder == share.rank]
    return MediaPlan(share, sizes, lengths, outputs, encoders, leaders, own, mine)


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


def split_media(modality: str, media: Media, places: Places, plan: MediaPlan, model: ModelConfig) -> Media:
    """The items that this rank encodes, and the features that land on its tokens. Windows travel without padding."""
    tower = getattr(model, model.modalities[modality])
    shapes = [tower.item_shape(size) for size in plan.sizes]
    if plan.share.host_group is None:
        items = _own(media.items(tower), plan)
    else:
        items = _hand_over(media.items(tower) if len(media.values) else [], media.values, shapes, plan)
    num_ranks = TAPS if getattr(model, f"{model.modalities[modality]}_projector").stretches else 1
    segments, rows_F, features = _route(media, places, plan, num_ranks)
    sizes = [plan.sizes[item] for item in plan.mine]
    own_newlines = media.newlines[places.owner[media.newlines] == plan.share.rank]
    return media_of(modality, items, sizes, model, features, rows_F, places.row[own_newlines], segments)


def _route(media: Media, places: Places, plan: MediaPlan, num_ranks: int) -> tuple[RoutedSegments, Tensor, Features]:
    """The exchange after the tower, and the features that land here, with their rows.

    Rows go from rank to rank in the order of the items and of the rows in them, which both sides know. Rows that are
    part of no feature (class tokens) go nowhere. Features that are weighted sums may share a row across the border of
    two ranks, or of up to ``num_ranks`` if these hold few tokens: it goes to each of them.
    """
    share = plan.share
    row_F, owner_F = places.row[media.rows], places.owner[media.rows]
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
    of_items = destination_PN.split(outputs)
    if plan.share.num_homes == 1:
        of_items = _own(of_items, plan)
    else:
        of_items = _hand_over(of_items, destination_PN, shapes, plan)
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


def _own(items: Sequence[Tensor], plan: MediaPlan) -> list[Tensor]:
    """Those that this rank encodes, of items that every rank of the only home holds."""
    return [items[item] for item in plan.mine]


def _hand_over(
    own_items: Sequence[Tensor], like: Tensor, shapes: Sequence[tuple[int, ...]], plan: MediaPlan
) -> list[Tensor]:
    """The items that this rank encodes, from the leaders of all homes, of which this rank's has ``own_items``;
    ``shapes`` of all items of the plan."""
    share = plan.share
    outgoing = [item for item in plan.own if plan.leaders[item] == share.rank]
    outgoing.sort(key=plan.encoders.__getitem__)
    numels = [math.prod(shape) for shape in shapes]
    send_counts = [0] * share.num_ranks
    receive_counts = [0] * share.num_ranks
    for item in outgoing:
        send_counts[plan.encoders[item]] += numels[item]
    for item in plan.mine:  # in the order of the homes, and so of their leaders
        receive_counts[plan.leaders[item]] += numels[item]
    flat = [own_items[item - plan.own.start].flatten() for item in outgoing]
    sent = torch.cat([like.new_empty(0), *flat])
    arrived = swap(sent, send_counts, receive_counts, share.host_group)
    pieces = arrived.split([numels[item] for item in plan.mine])
    return [piece.view(shapes[item]) for piece, item in zip(pieces, plan.mine)]

"""Media parallelism: which rank encodes which image or window, and which of its rows go where.

Towers are not sharded along tokens. The images and windows of a row are shared out among the ranks that work on it, by
the cost of their encoding, and each is encoded once. With ``balance``, those of all rows are shared out among all
ranks: media differ far more from row to row than tokens do, and the slowest rank is the step. Each tower's items are
assigned apart from the other's, as the exchange behind a tower lets no rank run ahead of the rest.

A batch is known to all ranks of its row, so these make the same plan without a word. Everything is done on the host.

T tokens of the whole row   F features   S tower rows of a feature   P tower rows of all items of the row
N items (images or windows of sound)   M mel bins   W frames
"""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from avlm.config.model import AudioConfig, ModelConfig, VisionConfig
from avlm.models.batch import Batch
from avlm.parallel.exchange import RoutedSegments, swap
from avlm.parallel.mesh import World
from kernels.segments import Segments


def image_cost(vision: VisionConfig, num_rows: int) -> int:
    """FLOPs of the tower's forward over an image of ``num_rows`` rows."""
    patch = 2 * 3 * vision.patch_size**2 * vision.hidden_size * num_rows
    return patch + _cost_of_blocks(vision, vision.num_layers + 1 + vision.feature_layer, num_rows)


def window_cost(audio: AudioConfig, num_rows: int) -> int:
    """FLOPs of the tower's forward over a window of which ``num_rows`` rows are kept (two frames each)."""
    convolutions = 2 * 3 * (2 * audio.num_mels + audio.hidden_size) * audio.hidden_size * num_rows
    return convolutions + _cost_of_blocks(audio, audio.num_layers, num_rows)


def _cost_of_blocks(config: VisionConfig | AudioConfig, num_layers: int, num_rows: int) -> int:
    weights = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    return num_layers * (2 * weights * num_rows + 4 * config.hidden_size * num_rows**2)


def assign(costs: list[int], num_ranks: int) -> list[int]:
    """The rank of each item: from the largest to the smallest, each to the rank with the least so far.

    Ties go to the earlier item and the lower rank. No rank gets more than the mean plus the last item that it was
    given, and the slowest takes at most 4/3 of what the best assignment would (Graham 1969).
    """
    loads = [(0, rank) for rank in range(num_ranks)]
    ranks = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, ranks[item] = loads[0]
        heapq.heapreplace(loads, (load + costs[item], ranks[item]))
    return ranks


def split(
    batch: Batch,
    place_T: Tensor,
    model: ModelConfig,
    world: World,
    balance: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Batch:
    """The batch with the media that this rank encodes and the features that land on it; the rest is untouched.

    Row t of the batch is row place_T[t] of the token rows of all ranks of the row, one rank after the other; each
    holds as many. ``*_rows`` become rows of this rank's own, sources become rows of what arrives behind the tower.
    ``group`` is whose ranks hold the row, by default context x tensor. All ranks of the group call this together, and
    with ``balance`` all ranks of the world.
    """
    group = group or world.row_mesh.get_group("row")
    balance = balance and world.data_size > 1
    if group.size() == 1 and not balance:
        return batch
    assert len(place_T) % group.size() == 0, f"{group.size()} ranks cannot hold {len(place_T)} rows evenly"
    rows_per_rank = len(place_T) // group.size()
    lengths = [[length for _, length in segments.spans] for segments in (batch.image_segments, batch.audio_segments)]
    if balance:
        leaders = world.gather(lengths if world.leads_row else None)[:: group.size()]
        share = Share(dist.group.WORLD, world.data_rank, group.size(), rows_per_rank)
    else:
        leaders, share = [lengths], Share(group, 0, group.size(), rows_per_rank)
    images_of_homes, windows_of_homes = zip(*leaders)
    changes = {}
    if model.vision is not None:
        plan = make_plan(share, images_of_homes, partial(image_cost, model.vision))
        changes |= _split_images(batch, place_T, plan)
    if model.audio is not None:
        plan = make_plan(share, windows_of_homes, partial(window_cost, model.audio))
        changes |= _split_sound(batch, place_T, plan)
    return replace(batch, **changes)


@dataclass(frozen=True)
class Share:
    """Ranks that share the encoding: those of one row of tokens, its home, or those of several, home after home."""

    group: dist.ProcessGroup
    home: int  # of this rank
    ranks_per_home: int
    rows_per_rank: int  # tokens


@dataclass(frozen=True)
class Plan:
    """Who encodes what, of the items of one tower: those of the first home, then of the second, and so on."""

    share: Share
    lengths: list[int]  # tower rows of each item
    encoders: list[int]  # the rank that encodes it
    senders: list[int]  # the rank that hands it over
    own: range  # the items of this rank's home
    mine: list[int]  # those that this rank encodes
    is_pooled: bool


def make_plan(share: Share, lengths_of_homes: list[list[int]], cost: Callable[[int], int]) -> Plan:
    """The same on every rank. An encoder at the item's home has it; elsewhere the home's ranks send in turn."""
    lengths = [length for of_home in lengths_of_homes for length in of_home]
    encoders = assign([cost(length) for length in lengths], share.group.size())
    senders = []
    for home, of_home in enumerate(lengths_of_homes):
        for _ in of_home:
            at_home = encoders[len(senders)] // share.ranks_per_home == home
            turn = home * share.ranks_per_home + len(senders) % share.ranks_per_home
            senders.append(encoders[len(senders)] if at_home else turn)
    starts = [0, *accumulate(len(of_home) for of_home in lengths_of_homes)]
    mine = [item for item, encoder in enumerate(encoders) if encoder == share.group.rank()]
    own = range(starts[share.home], starts[share.home + 1])
    return Plan(share, lengths, encoders, senders, own, mine, is_pooled=len(lengths_of_homes) > 1)


def _split_images(batch: Batch, place_T: Tensor, plan: Plan) -> dict[str, Tensor | Segments]:
    image = batch.pixels.shape[1:]
    mine = _hand_over(batch.pixels, batch.pixels, lambda num_rows: image, plan)
    segments, rows_F, sources_FS = _route(batch.image_rows_F, batch.patch_rows_F, place_T, plan)
    return {
        "pixels": torch.stack(mine) if mine else batch.pixels[:0],
        "image_segments": segments,
        "image_rows_F": rows_F,
        "patch_rows_F": sources_FS,
    }


def _split_sound(batch: Batch, place_T: Tensor, plan: Plan) -> dict[str, Tensor | Segments]:
    """Windows go as long as they are; beside longer ones the same zeros follow as in the loader."""
    num_mels = batch.mel.shape[1]
    windows = [mel[:, : 2 * plan.lengths[item]] for item, mel in zip(plan.own, batch.mel)]
    mine = _hand_over(windows, batch.mel, lambda num_rows: (num_mels, 2 * num_rows), plan)
    longest = max([2, *(window.shape[1] for window in mine)])
    mel = batch.mel.new_zeros(len(mine), num_mels, longest)
    for window, given in zip(mel, mine):
        window[:, : given.shape[1]] = given
    kept = [torch.arange(given.shape[1] // 2) + i * (longest // 2) for i, given in enumerate(mine)]
    segments, rows_G, sources_GS = _route(batch.audio_rows_G, batch.frame_rows_G, place_T, plan)
    return {
        "mel": mel,
        "mel_rows_K": torch.cat([torch.arange(0), *kept]),
        "audio_segments": segments,
        "audio_rows_G": rows_G,
        "frame_rows_G": sources_GS,
    }


def _route(rows_F: Tensor, sources_FS: Tensor, place_T: Tensor, plan: Plan) -> tuple[RoutedSegments, Tensor, Tensor]:
    """The exchange behind the tower, and rows and sources of the features that land here.

    Rows go from rank to rank in the order of the items and of the rows in them, which both sides know. Of an item's
    rows, those that no feature is made of (the class token) go nowhere: their destination is -1.
    """
    share, size = plan.share, plan.share.group.size()
    owner_F = share.home * share.ranks_per_home + place_T[rows_F] // share.rows_per_rank
    lengths = [plan.lengths[item] for item in plan.own]
    destination_P = torch.full((sum(lengths),), -1)
    is_row_FS = sources_FS >= 0
    destination_P[sources_FS[is_row_FS]] = owner_F[:, None].expand_as(sources_FS)[is_row_FS]

    handed = _hand_over(destination_P.split(lengths), destination_P, lambda num_rows: (num_rows,), plan)
    mine = torch.cat([destination_P[:0], *handed])
    send_counts = mine[mine >= 0].bincount(minlength=size)
    send_rows_S = mine.argsort(stable=True)[len(mine) - int(send_counts.sum()) :]  # those that stay come first

    encoders = torch.tensor(plan.encoders, dtype=torch.int64)[plan.own.start : plan.own.stop]
    encoder_P = encoders.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    arriving = (destination_P == share.group.rank()).nonzero().flatten()
    from_rank = encoder_P[arriving]
    arrived_P = torch.full((len(destination_P) + 1,), -1)  # what a source of -1 picks is the last: -1 again
    arrived_P[arriving[from_rank.argsort(stable=True)]] = torch.arange(len(arriving))

    boundaries = Segments.of([plan.lengths[item] for item in plan.mine])
    segments = RoutedSegments(
        boundaries.cu_seqlens,
        boundaries.max_length,
        send_rows_S=send_rows_S,
        send_counts=send_counts.tolist(),
        receive_counts=from_rank.bincount(minlength=size).tolist(),
        group=share.group,
    )
    lands_F = owner_F == share.group.rank()
    return segments, place_T[rows_F[lands_F]] % share.rows_per_rank, arrived_P[sources_FS[lands_F]]


def _hand_over(items: list[Tensor], like: Tensor, shape: Callable[[int], tuple], plan: Plan) -> list[Tensor]:
    """What this rank encodes, of items of which each home has its own; ``shape`` of one, by its tower rows."""
    if not plan.is_pooled:
        return [items[item] for item in plan.mine]
    rank, size = plan.share.group.rank(), plan.share.group.size()
    numel = lambda item: math.prod(shape(plan.lengths[item]))
    outgoing = sorted((i for i in plan.own if plan.senders[i] == rank), key=lambda i: plan.encoders[i])
    incoming = sorted(plan.mine, key=lambda i: plan.senders[i])
    send_counts, receive_counts = [0] * size, [0] * size
    for item in outgoing:
        send_counts[plan.encoders[item]] += numel(item)
    for item in incoming:
        receive_counts[plan.senders[item]] += numel(item)
    sent = torch.cat([like.new_empty(0), *(items[item - plan.own.start].flatten() for item in outgoing)])
    arrived = swap(sent, send_counts, receive_counts, plan.share.group).split([numel(item) for item in incoming])
    pieces = {item: piece.view(shape(plan.lengths[item])) for item, piece in zip(incoming, arrived)}
    return [pieces[item] for item in plan.mine]

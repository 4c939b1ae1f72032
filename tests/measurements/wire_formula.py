"""What a rank sends in a training step, by formula, from the config, the rows and the plan of the media. All that is
known here of the code that communicates is which axes its collectives run over (``ASKERS``). What follows from
sizes and the layout alone is in ``avlm/preflight/wire.py``; here is what a real row and its ranks add.

L tokens of a rank   C ranks of context   U of them that exchange heads   t of tensor
"""

import math
import pickle
from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor

from avlm.config.run import Config
from avlm.models.batch import KINDS, TAPS, Batch, Media
from avlm.models.moe import SUMS
from avlm.models.shapes import parameter_shapes
from avlm.parallel import media
from avlm.parallel.context import cut
from avlm.parallel.experts import expert_mode
from avlm.parallel.mesh import World
from avlm.parallel.shares import share
from avlm.preflight import wire
from avlm.preflight.layout import layout_of
from avlm.preflight.wire import ring

FSDP, DTENSOR, OURS = "torch/distributed/fsdp/", "torch/distributed/tensor/", "avlm/parallel/"
# File that asks for a collective -> its axes. Where two axes have the same ranks, only this tells them apart.
ASKERS = {
    DTENSOR: ("tensor",),
    OURS + "tensor.py": ("tensor",),
    OURS + "context_attention.py": ("context", "heads"),
    OURS + "ring.py": ("context", "ring"),
    OURS + "experts.py": ("expert", "row"),
    OURS + "exchange.py": ("row", "world"),
    OURS + "gather.py": ("expert", "row"),
    OURS + "media.py": ("row", "world"),
    FSDP: ("replicate", "shard_context", "shard_context_tensor", "shard_of_expert"),
    OURS + "mesh.py": ("world",),
    "avlm/training/optimizer.py": ("world",),
    "train.py": ("world",),
}
Bytes = Counter[tuple[str, str]]  # (axis, kind) -> bytes that this rank sends
ITEMSIZE = 2  # bf16


def ranks_of_axes(world: World) -> dict[str, list[int]]:
    """The ranks that this one shares each axis with."""
    meshes = {"shard_context": world.decoder_mesh, "shard_context_tensor": world.tower_mesh}
    if world.expert_mesh is not None:
        meshes |= {"shard_of_expert": world.expert_mesh, "expert": world.expert_mesh}
    found = {"world": list(range(world.size))}
    for name, mesh in meshes.items():
        found[name] = sorted(dist.get_process_group_ranks(mesh.get_group(name)))
    ranks = torch.arange(world.size).view(*world.shape.values())
    own = [world.axis(name)[0] for name in world.shape]
    for dim, name in enumerate(world.shape):
        found[name] = ranks[tuple(slice(None) if i == dim else at for i, at in enumerate(own))].tolist()
    # Of four context ranks that share two heads: two neighbours, and the two that have the same place among theirs.
    place = world.axis("context")[0]
    found["heads"] = found["context"][place // 2 * 2 :][:2]
    found["ring"] = found["context"][place % 2 :: 2]
    first = world.rank // world.row_size * world.row_size
    found["row"] = list(range(first, first + world.row_size))
    return found


def axis_of(axes: dict[str, list[int]], candidates: tuple[str, ...], ranks: list[int]) -> str:
    """The axis of these ranks; both names where decoder and towers are sharded over the same ranks."""
    same = [name for name in candidates if axes.get(name) == ranks]
    assert same, f"a collective over ranks {ranks}, none of {candidates}"
    if same[0] == "shard_context":
        return " = ".join(same)
    return same[0]


def formula(config: Config, world: World, rows: list[Batch], chosen: list[Tensor]) -> Bytes:
    """What a step over ``rows``, one for each data rank, should send. Exact: padding is in it. ``chosen``: the experts
    of this rank's tokens in each layer that has some, (T, K)."""
    own = rows[world.data_rank]
    part, _ = cut(own, *world.axis("context"), together(config))
    num_tokens = len(part.token_T)
    experts = config.model.decoder.experts
    seen = len(chosen) * (experts.num + len(SUMS)) if experts else 0
    norm_and_losses = 4 * (1 + len(KINDS) + seen)  # losses by kind
    sent = of_weights(config, world)
    sent["world", "all-reduce"] = ring(world.size, 2 * norm_and_losses)
    tensor = wire.tensor_bytes(config.model, config.parallel.tensor, num_tokens, len(part.target_R), ITEMSIZE)
    for kind, count in tensor.items():
        sent["tensor", kind] = count
    sent.update(of_context(config, num_tokens, own, world))
    sent.update(of_experts(config, world, chosen))
    if world.media_group is None:
        return sent
    if own.media_row is not None and world.row_size > 1:
        count = wire.features_bytes(own.media_row.num_rows, world.row_size, config.model.decoder.hidden_size, ITEMSIZE)
        sent["row", "all-gather"] = sent["row", "reduce-scatter"] = count
    share = media.Share.of_rows(world, len(own.token_T))
    if share.num_homes > 1:
        sent["world", "all-to-all"] = of_media(config, world, rows, share)
        sent["world", "objects"] = of_lengths(config, share, rows)
    else:
        sent["row", "all-to-all"] = of_media(config, world, [own], share)
    return sent


def of_weights(config: Config, world: World) -> Bytes:
    """FSDP, unit by unit: gathered for the forward, and again for the backward where it was freed; gradients summed in
    float32. Dim 0 of every tensor is padded to a multiple of the ranks."""
    shapes = parameter_shapes(config.model)
    axes = ranks_of_axes(world)
    layout = layout_of(config, world.size)
    copies = len(axes["replicate"])
    sent = Counter()
    for unit in wire.units(config, shapes):
        n = len(axes[unit.axis])
        padded = wire.padded_numbers(shapes, unit.prefixes, layout)
        name = axis_of(axes, ASKERS[FSDP], axes[unit.axis])
        sent[name, "all-gather"] += ring(n, unit.num_gathers * ITEMSIZE * padded)
        sent[name, "reduce-scatter"] += ring(n, 4 * padded)
        sent["replicate", "all-reduce"] += ring(copies, 2 * 4 * padded / n)
    return sent


def of_experts(config: Config, world: World, chosen: list[Tensor]) -> Bytes:
    """Balance losses count assignments and tokens of a row. Tokens go to all ranks, or to those of their experts."""
    decoder, e = config.model.decoder, config.parallel.expert
    found: Bytes = Counter()
    if decoder.experts is None:
        return found
    if config.train.balance_loss and world.row_size > 1:
        counted = wire.num_mixtures(decoder) * 4 * (decoder.experts.num + 1)
        axes = ranks_of_axes(world)
        axis = axis_of(axes, ASKERS[OURS + "experts.py"], axes["row"])
        found[axis, "all-reduce"] = ring(world.row_size, 2 * counted)
    if e == 1:
        return found
    num_tokens = len(chosen[0])
    if expert_mode(decoder, config.parallel) == "gather":
        gathered = wire.gathered_experts_bytes(decoder, e, num_tokens, ITEMSIZE)
        return found + Counter({("expert", kind): count for kind, count in gathered.items()})
    held = decoder.experts.num // e
    first = world.rank // e * e
    crossing = 0
    for expert_TK in chosen:
        to_RR = torch.stack(world.gather(torch.bincount(expert_TK.flatten() // held, minlength=e + 1)[:e]))
        own = world.rank - first
        among_RR = to_RR[first : first + e]
        crossing += int(among_RR[own].sum() + among_RR[:, own].sum() - 2 * among_RR[own, own])
    found["expert", "all-to-all"] = wire.exchanged_experts_bytes(decoder, e, crossing, ITEMSIZE)
    return found


def together(config: Config) -> int:
    """Context ranks that exchange heads with each other."""
    parallel = config.parallel
    if parallel.context_mode == "ulysses_ring":
        return math.gcd(config.model.decoder.num_kv_heads // parallel.tensor, parallel.context)
    return parallel.context if parallel.context_mode == "ulysses" else 1


def of_context(config: Config, L: int, row: Batch, world: World) -> Bytes:
    """Every layer, with k and v, or q, k and v, of a rank's own tokens:

    ring        k, v to the ranks that see them, forward and backward; dk, dv of those that arrived in float32
    allgather   k, v to all; dk, dv in float32 from all
    ulysses     q, k, v to the ranks of their heads, the result back; all of it again in the backward
    ulysses_ring  both: the ring among groups, with all tokens of a group and a share of the heads
    """
    decoder = config.model.decoder
    mode = config.parallel.context_mode
    rank, C = world.axis("context")
    if C == 1:
        return Counter()
    t = config.parallel.tensor
    if mode == "allgather":
        gathered = wire.gathered_bytes(decoder, t, C, L, ITEMSIZE)
        return Counter({("context", kind): count for kind, count in gathered.items()})
    U = together(config)
    found = Counter()
    if mode != "ring":
        found["heads" if U < C else "context", "all-to-all"] = wire.exchanged_bytes(decoder, t, U, L, ITEMSIZE)
    if mode != "ulysses":
        sent, arriving = seen_elsewhere(row, rank // U, C // U)
        forward, backward = wire.ring_bytes(wire.key_numbers(decoder, t, U), sent, arriving, ITEMSIZE)
        found["ring" if U > 1 else "context", "send"] = decoder.num_layers * (forward + backward)
    return found


def seen_elsewhere(row: Batch, rank: int, C: int) -> tuple[int, int]:
    """Keys of this rank that others see, once for each of them, and keys of others that this rank sees. Of a document
    that several ranks hold, those after a rank in the order see its early part, those before it both of its parts."""
    shares = share(row.segments.cu_seqlens.diff().tolist(), C)
    sent = arriving = 0
    for parts in shares.count_NC2.tolist():
        members = [c for c in range(C) if sum(parts[c])]
        if rank in members:
            others = [c for c in members if c != rank]
            sent += sum(parts[rank][0] if c > rank else sum(parts[rank]) for c in others)
            arriving += sum(parts[c][0] if c < rank else sum(parts[c]) for c in others)
    return sent, arriving


def of_media(config: Config, world: World, homes: list[Batch], share: media.Share) -> int:
    """Tower rows go from the rank that encodes them to the rank that holds the token of their feature, and their
    gradients back. An image (uint8) or window (float32) first goes from the leader of its row to its encoder, and with
    balance 8 bytes a tower row that say where the row is to go, or four times as many where it may go to several
    ranks."""
    model = config.model
    total = 0
    for name, tower in model.modalities.items():
        sizes = [home.media[name].sizes for home in homes]
        plan = media.make_plan(name, share, sizes, model)
        width = getattr(model, f"{tower}_projector").input_width(getattr(model, tower))
        num_ranks = TAPS if getattr(model, f"{tower}_projector").stretches else 1
        total += ITEMSIZE * width * crossings(plan, name, homes, config, world)
        for size, count, leader, encoder in zip(plan.sizes, plan.outputs, plan.leaders, plan.encoders):
            if leader == share.rank != encoder:
                total += item_bytes(homes[0].media[name], getattr(model, tower).item_shape(size))
                total += 8 * num_ranks * count * (share.num_homes > 1)
    return total


def item_bytes(media: Media, shape: tuple[int, int]) -> int:
    """An image is uint8, a window float32."""
    return media.values.element_size() * math.prod(shape)


def of_lengths(config: Config, share: media.Share, rows: list[Batch]) -> int:
    """With balance every rank sends the sizes of its media to all, padded to the longest message, and 8 bytes that
    say how long it is."""
    longest = 0
    for row in rows:
        sizes = {name: row.media[name].sizes for name in config.model.modalities}
        longest = max(longest, len(pickle.dumps(sizes)))
    return (share.num_ranks - 1) * (8 + longest)


def crossings(plan: media.MediaPlan, modality: str, homes: list[Batch], config: Config, world: World) -> int:
    """Tower rows that this rank encodes for others, and those that others encode for it."""
    share = plan.share
    _, context = world.axis("context")
    first = count = 0
    for home, batch in enumerate(homes):
        items = batch.media[modality]
        _, place_T = cut(batch, 0, context, together(config))
        own = slice(first, first + len(items.segments))
        first = own.stop
        encoders = torch.tensor(plan.encoders[own], dtype=torch.int64)
        outputs = torch.tensor(plan.outputs[own], dtype=torch.int64)
        encoder_P = encoders.repeat_interleave(outputs)
        first_rank = home * share.ranks_per_home
        places = media.Places.of(place_T, batch.media_row, share)
        owner_F = first_rank + places.owner[items.rows] - share.home * share.ranks_per_home
        sources, owner = items.sources, owner_F
        if items.features.mix is not None:  # a row may go to several ranks
            sources, owner = sources[items.features.mix.flatten()], owner_F.repeat_interleave(TAPS)
        pairs = torch.stack([sources, owner[:, None].expand_as(sources)], dim=-1)[sources >= 0].unique(dim=0)
        encoder, owner = encoder_P[pairs[:, 0]], pairs[:, 1]
        count += int(((encoder != owner) & ((encoder == share.rank) | (owner == share.rank))).sum())
    return count

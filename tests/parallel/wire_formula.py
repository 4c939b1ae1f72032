"""What a rank sends in a training step, by formula, from the config, the rows and the plan of the media. Of the code
that communicates nothing is known here but which axes its collectives run over (``ASKERS``).

c bytes of a number in compute   T tokens of the row   C, t ranks of context, tensor   L = T / C   R target rows
D decoder width   H, K heads of queries, of keys   E head dim
"""

import math
import pickle
from collections import Counter

import torch
import torch.distributed as dist

from avlm.config.run import Config
from avlm.models.avlm import AVLM
from avlm.models.batch import KINDS, Batch, Media
from avlm.models.costs import item_costs
from avlm.parallel import media
from avlm.parallel.context import cut
from avlm.parallel.mesh import World

FSDP, DTENSOR, OURS = "torch/distributed/fsdp/", "torch/distributed/tensor/", "avlm/parallel/"
# Who asks for a collective -> the axes that it may mean. Axes of the same ranks could not be told apart otherwise.
ASKERS = {
    DTENSOR: ("tensor",),
    OURS + "tensor.py": ("tensor",),
    OURS + "context_attention.py": ("context",),
    OURS + "exchange.py": ("row", "world"),
    FSDP: ("replicate", "shard_context", "shard_context_tensor"),
    OURS + "mesh.py": ("world",),
    "avlm/training/optimizer.py": ("world",),
    "train.py": ("world",),
}
Bytes = Counter[tuple[str, str]]  # (axis, kind) -> bytes that this rank sends


def ranks_of_axes(world: World) -> dict[str, list[int]]:
    """The ranks that this one shares each axis with."""
    meshes = {"replicate": world.mesh, "context": world.mesh, "tensor": world.mesh, "row": world.row_mesh}
    meshes |= {"shard_context": world.decoder_mesh, "shard_context_tensor": world.tower_mesh}
    axes = {name: seen.get_group(name) for name, seen in meshes.items()} | {"world": dist.group.WORLD}
    return {name: sorted(dist.get_process_group_ranks(group)) for name, group in axes.items()}


def axis_of(axes: dict[str, list[int]], candidates: tuple[str, ...], ranks: list[int]) -> str:
    """The axis of these ranks; both names where decoder and towers are sharded over the same ranks."""
    same = [name for name in candidates if axes[name] == ranks]
    assert same, f"a collective over ranks {ranks}, none of {candidates}"
    return " = ".join(same) if same[0] == "shard_context" else same[0]


def formula(config: Config, world: World, rows: list[Batch]) -> Bytes:
    """What a step over ``rows``, one for each data rank, should send. Exact: padding is in it."""
    axes, sent = ranks_of_axes(world), Counter()

    def add(candidates: tuple[str, ...], axis: str, kind: str, count: float) -> None:
        if count:
            sent[axis_of(axes, candidates, axes[axis]), kind] += count

    for (axis, kind), count in of_weights(config, world).items():
        add(ASKERS[FSDP], axis, kind, count)
    part, _ = cut(rows[world.data_rank], *world.axis("context"))
    of_parts = of_tensor(config, len(part.token_T), len(part.target_R)) + of_context(config, len(part.token_T))
    for (axis, kind), count in of_parts.items():
        add((axis,), axis, kind, count)
    for (axis, kind), count in of_media(config, world, rows).items():
        add(ASKERS[OURS + "exchange.py"] if kind == "all-to-all" else (axis,), axis, kind, count)
    add(("world",), "world", "all-reduce", ring(world.size, 2 * 4 * (1 + len(KINDS))))  # norm, losses of each kind
    return sent


def ring(n: int, count: float) -> float:
    return count * (n - 1) / n


def of_weights(config: Config, world: World) -> Bytes:
    """FSDP, unit by unit: gathered for the forward, and again for the backward where it was freed; gradients summed in
    float32. Dim 0 of every tensor is padded to a multiple of the ranks."""
    sent, c, tensor = Counter(), 2, config.parallel.tensor
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in AVLM(config.model).named_parameters()}
    copies = world.axis("replicate")[1]
    for prefixes, axis, is_freed in units(config):
        n = {"shard_context": world.decoder_mesh, "shard_context_tensor": world.tower_mesh}[axis][axis].size()
        held = [share_of(name, shape, tensor) for name, shape in shapes.items() if name.startswith(prefixes)]
        padded = sum(-(-first // n) * n * width for first, width in held)
        sent[axis, "all-gather"] += ring(n, (1 + is_freed) * c * padded)
        sent[axis, "reduce-scatter"] += ring(n, 4 * padded)
        sent["replicate", "all-reduce"] += ring(copies, 2 * 4 * padded / n)
    return sent


def share_of(name: str, shape: torch.Size, t: int) -> tuple[int, int]:
    """(rows, numbers in a row) that a rank of the tensor axis has of a parameter."""
    rows, width = shape[0], math.prod(shape[1:])
    if not name.startswith("decoder.") or "norm" in name:
        return rows, width
    return (rows, width // t) if name.endswith(("attention.o.weight", "ffn.down.weight")) else (rows // t, width)


def units(config: Config) -> list[tuple[tuple[str, ...], str, bool]]:
    """Of each unit of FSDP, with tower_sharding=unit and an untied head: names, axis, whether the forward frees it."""
    blocks = [f"decoder.blocks.{i}." for i in range(config.model.decoder.num_layers)]
    freed = config.parallel.reshard
    of_decoder = [((name,), "shard_context", freed) for name in ("decoder.embedding.", *blocks)]
    of_towers = [((name,), "shard_context_tensor", freed) for name in ("vision.", "audio.")]
    of_towers += [((f"{name}_projector.",), "shard_context_tensor", False) for name in ("vision", "audio")]
    return [*of_decoder, *of_towers, (("decoder.norm.", "decoder.head."), "shard_context", False)]


def of_tensor(config: Config, L: int, R: int) -> Bytes:
    """Each block gathers rows twice and scatters sums twice, and so does its backward the other way round; the
    embedding scatters, the end of the decoder gathers. The head adds up 4 numbers a target row, and dhidden. Gradients
    of norms are parts: of the rows, or of the heads, of each rank."""
    decoder, t, c = config.model.decoder, config.parallel.tensor, 2
    whole = c * L * decoder.hidden_size
    norms = decoder.num_layers * (2 * decoder.hidden_size + 2 * decoder.head_dim * decoder.qk_norm)
    return Counter(
        {
            ("tensor", "all-gather"): ring(t, (4 * decoder.num_layers + 2) * whole),
            ("tensor", "reduce-scatter"): ring(t, (4 * decoder.num_layers + 1) * whole),
            ("tensor", "all-reduce"): ring(t, 2 * (4 * 4 * R + c * R * decoder.hidden_size + c * norms)),
        }
    )


def of_context(config: Config, L: int) -> Bytes:
    """Every layer, with k and v, or q, k and v, of a rank's own rows:

    ring        k, v: C - 1 moves forward, C - 1 backward; dk, dv in float32: C moves, the last brings them home
    allgather   k, v to all; dk, dv in float32 from all
    ulysses     q, k, v to the ranks of their heads, the result back; all of it again in the backward
    """
    decoder, layout, c = config.model.decoder, config.parallel, 2
    C, layers = layout.context, decoder.num_layers
    q, kv = (L * heads * decoder.head_dim // layout.tensor for heads in (decoder.num_heads, 2 * decoder.num_kv_heads))
    if C == 1:
        return Counter()
    if layout.context_mode == "ring":
        return Counter({("context", "send"): layers * kv * (2 * c * (C - 1) + 4 * C)})
    if layout.context_mode == "allgather":
        kinds = {"all-gather": c, "reduce-scatter": 4}
        return Counter({("context", kind): layers * ring(C, width * C * kv) for kind, width in kinds.items()})
    return Counter({("context", "all-to-all"): layers * ring(C, 2 * c * (2 * q + kv))})


def of_media(config: Config, world: World, rows: list[Batch]) -> Bytes:
    """Tower rows go from who encodes them to who holds the token of their feature, and their gradients back. With
    balance an image (uint8) or window (float32) first goes to its encoder, and with it 8 bytes a tower row that say
    where the row is to go."""
    model, c, row = config.model, 2, world.row_mesh["row"].size()
    balance = config.parallel.balance_media and len(rows) > 1
    if row == 1 and not balance:
        return Counter()
    axis, homes = ("world", rows) if balance else ("row", [rows[world.data_rank]])
    group = dist.group.WORLD if balance else world.row_mesh.get_group("row")
    share = media.Share(group, world.data_rank if balance else 0, row, len(rows[0].token_T) // row)
    sent = Counter()
    lengths = [{name: items.lengths for name, items in home.media.items()} for home in homes]
    for name, tower in model.modalities.items():
        plan = media.make_plan(share, [of_home[name] for of_home in lengths], item_costs(name, model))
        crossing = crossings(plan, [home.media[name] for home in homes], homes, world)
        sent[axis, "all-to-all"] += c * getattr(model, tower).hidden_size * crossing
        for length, sender, encoder in zip(plan.lengths, plan.senders, plan.encoders):
            if balance and sender == group.rank() != encoder:
                pixels, frames = 3 * model.vision.image_size**2, 4 * model.audio.num_mels * 2 * length
                sent[axis, "all-to-all"] += (pixels if name == "image" else frames) + 8 * length
    if balance:
        sent["world", "objects"] += (world.size - 1) * (8 + max(len(pickle.dumps(x)) for x in lengths))
    return sent


def crossings(plan: media.MediaPlan, of_homes: list[Media], homes: list[Batch], world: World) -> int:
    """Tower rows that this rank encodes for others, and those that others encode for it."""
    me, first, count = plan.share.group.rank(), 0, 0
    for home, (items, batch) in enumerate(zip(of_homes, homes)):
        _, place_T = cut(batch, 0, world.axis("context")[1])
        own = slice(first, first + len(items.segments))
        first = own.stop
        encoder_P = torch.tensor(plan.encoders)[own].repeat_interleave(torch.tensor(plan.lengths)[own])
        owner_F = home * plan.share.ranks_per_home + place_T[items.rows] // plan.share.tokens_per_rank
        is_row_FS = items.sources >= 0
        encoder = encoder_P[items.sources[is_row_FS]]
        owner = owner_F[:, None].expand_as(items.sources)[is_row_FS]
        crosses = (encoder != owner) & ((encoder == me) | (owner == me))
        count += int(crosses.sum())
    return count

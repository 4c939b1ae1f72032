"""Bytes that a rank hands to its collectives in a micro-batch, by formula. ``tests/measurements/wire.py`` counts them:
they are equal to the byte. docs/parallelism.md has them as a table.

c bytes of a number in compute   C, t ranks of context, tensor   U of C that exchange heads   L tokens of a rank
R its tokens with a target   D decoder width   H, K heads of queries, of keys   E head dim
"""

from collections.abc import Collection
from dataclasses import dataclass

from avlm.config.decoder import DecoderConfig
from avlm.config.model import ModelConfig
from avlm.config.run import Config
from avlm.models.shapes import Shapes
from avlm.parallel.cross import own_features
from avlm.preflight.layout import Layout

# Parts of a projector, without its resampler.
OF_PROJECTORS = ("norm", "merger", "feature_norm", "linear", "gate", "up", "hidden_norm", "down", "output_norm")
OF_PROJECTORS += ("newline",)


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP gathers together: those with these prefixes, over the ranks of an axis. In a micro-batch
    they are gathered once, or twice if the forward frees them and the backward needs them."""

    module: str
    prefixes: tuple[str, ...]
    axis: str
    num_gathers: int


def units(config: Config, trained: Collection[str]) -> list[Unit]:
    """In the order of the forward, towers and their projectors first. A tower that trains nothing is not gathered for
    the backward, nor is an untied embedding, which needs no weights there."""
    parallel = config.parallel
    decoder = config.model.decoder
    twice = 2 if parallel.reshard else 1
    found = []
    for tower in config.model.modalities.values():
        in_backward = any(name.startswith(f"{tower}.") for name in trained)
        gathers = twice if in_backward else 1
        if parallel.tower_sharding == "block":
            for i in range(getattr(config.model, tower).num_blocks):
                found.append(Unit(tower, (f"{tower}.blocks.{i}.",), "shard_context_tensor", gathers))
        elif parallel.tower_sharding == "unit":
            found.append(Unit(tower, (f"{tower}.",), "shard_context_tensor", gathers))
        projector = f"{tower}_projector"
        prefixes = (f"{projector}.",)
        if getattr(config.model, projector).resampler is not None:
            found.append(Unit(projector, (f"{projector}.resampler.",), "shard_context_tensor", twice))
            prefixes = tuple(f"{projector}.{name}" for name in OF_PROJECTORS)
        found.append(Unit(projector, prefixes, "shard_context_tensor", 1))
    if config.model.codec:
        found.append(Unit("codec", ("codec.",), "shard_context", 1))
    ends = ("decoder.norm.", "decoder.head.")
    embedding = ("decoder.embedding.",)
    if decoder.tie_embedding:
        found.append(Unit("embedding", embedding + ends, "shard_context", 1))
    else:
        found.append(Unit("embedding", embedding, "shard_context", 1))
    experts_axis = "shard_context_tensor" if parallel.expert == 1 else "shard_of_expert"
    for i in range(decoder.num_layers):
        cross = config.model.cross
        if cross is not None and i % cross.every == 0:
            found.append(Unit("cross", (f"cross.blocks.{i // cross.every}.",), "shard_context", twice))
        block = f"decoder.blocks.{i}."
        if not decoder.has_experts(i):
            found.append(Unit("decoder", (block,), "shard_context", twice))
            continue
        others = ("attention", "ffn_", "ffn.router.", "ffn.shared")
        found.append(Unit("decoder", tuple(block + name for name in others), "shard_context", twice))
        found.append(Unit("decoder", (f"{block}ffn.experts.",), experts_axis, twice))
    if not decoder.tie_embedding:
        found.append(Unit("head", ends, "shard_context", 1))
    return found


def ring(n: int, count: float) -> float:
    """Bytes that a rank sends when ``count`` bytes go around a ring of n ranks."""
    return count * (n - 1) / n


def padded_numbers(shapes: Shapes, prefixes: tuple[str, ...], layout: Layout) -> int:
    """Numbers of a unit over the ranks that shard it: FSDP pads the sharded dim of every tensor to a multiple."""
    total = 0
    for name, shape in shapes.items():
        if name.startswith(prefixes):
            total += layout.largest_shard(name, shape) * layout.shards_of(name)
    return total


def tensor_bytes(model: ModelConfig, t: int, L: int, R: int, c: int) -> dict[str, float]:
    """Each block gathers tokens twice and scatters sums twice, and its backward does the reverse; so do layers of
    cross-attention. A mixture of experts takes the tokens as they lie, and only a shared expert in it gathers and
    scatters. The embedding scatters, the end of the decoder gathers. The head sums 4 numbers for each target, and
    dhidden. Gradients of norms, routers and gates are partial sums over the tokens, or over the heads, of each
    rank."""
    decoder = model.decoder
    D = decoder.hidden_size
    blocks = 4 * decoder.num_layers
    norms = 2 * D
    if decoder.qk_norm:
        norms += 2 * decoder.head_dim
    whole = c * L * D
    head = (4 * 4 + c * D) * R
    reduced = head + c * decoder.num_layers * norms
    experts = decoder.experts
    if experts is not None:
        blocks -= 2 * num_mixtures(decoder) * (experts.shared_size == 0)
        reduced += c * num_mixtures(decoder) * D * (experts.num + (experts.shared_size > 0))
    if model.cross is not None:
        num_layers = model.cross.num_blocks(decoder.num_layers)
        blocks += 4 * num_layers
        reduced += c * num_layers * (2 * D + 2 + 2 * decoder.head_dim * model.cross.qk_norm)  # norms and gates
    return {
        "all-gather": ring(t, (blocks + 2) * whole),
        "reduce-scatter": ring(t, (blocks + 1) * whole),
        "all-reduce": ring(t, 2 * reduced),
    }


def features_bytes(num_rows: int, ranks: int, D: int, c: int) -> float:
    """Of cross-attention, twice: features of a row to all ranks that share it, and sums of their gradients."""
    return ring(ranks, c * D * ranks * own_features(num_rows, ranks))


def num_mixtures(decoder: DecoderConfig) -> int:
    return sum(decoder.has_experts(i) for i in range(decoder.num_layers))


def gathered_experts_bytes(decoder: DecoderConfig, e: int, T: int, c: int) -> dict[str, float]:
    """Of all mixtures, for T own tokens and experts that e ranks share out: x, with the weights and numbers (int32) of
    its experts, to all, and dy; y and dx, with the gradients of the weights, are summed from all."""
    experts = decoder.experts
    assert experts is not None
    D, K = decoder.hidden_size, experts.per_token
    own = num_mixtures(decoder) * T * (e - 1)
    return {"all-gather": own * (2 * c * D + (c + 4) * K), "reduce-scatter": own * c * (2 * D + K)}


def exchanged_experts_bytes(decoder: DecoderConfig, e: int, crossing: float, c: int) -> float:
    """Of all mixtures: how many assignments each expert gets, to its rank (int32); x to the experts and y back, dy and
    dx. ``crossing``: assignments that leave for another rank or arrive from one, in all mixtures together."""
    assert decoder.experts is not None
    return num_mixtures(decoder) * ring(e, 4 * decoder.experts.num) + 2 * c * decoder.hidden_size * crossing


def key_numbers(decoder: DecoderConfig, t: int, U: int) -> int:
    """Numbers of the keys and values of a token in a layer, on a rank that has a share of the heads."""
    return 2 * decoder.num_kv_heads * decoder.head_dim // (t * U)


def gathered_bytes(decoder: DecoderConfig, t: int, C: int, L: int, c: int) -> dict[str, float]:
    """allgather: k, v to all; dk, dv in float32 from all. Of all layers."""
    numbers = decoder.num_layers * key_numbers(decoder, t, 1)
    scattered = ring(C, 4 * C * L * numbers)
    return {"all-gather": scattered * c / 4, "reduce-scatter": scattered}


def exchanged_bytes(decoder: DecoderConfig, t: int, U: int, L: int, c: int) -> float:
    """ulysses: q, k, v to the ranks of their heads, the result back; all of it again in the backward. All layers."""
    heads = 2 * decoder.num_heads + 2 * decoder.num_kv_heads
    return ring(U, 2 * c * L * heads * decoder.num_layers * decoder.head_dim // t)


def ring_bytes(numbers: int, sent: int, arriving: int, c: int) -> tuple[int, int]:
    """(forward, backward) of a layer's ring: k, v of tokens that other ranks see, in both; dk, dv, in float32, of
    tokens that arrived. ``numbers`` of a token, see ``key_numbers``."""
    return c * sent * numbers, (c * sent + 4 * arriving) * numbers

"""Bytes that a rank hands to its collectives in a micro-batch, by formula. ``tests/measurements/wire.py`` counts them:
they are equal to the byte. docs/parallelism.md has them as a table.

c bytes of a number in compute   C, t ranks of context, tensor   U of C that exchange heads   L tokens of a rank
R its tokens with a target   D decoder width   H, K heads of queries, of keys   E head dim
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

from avlm.config.decoder import DecoderConfig
from avlm.config.run import Config
from avlm.models.shapes import Shapes
from avlm.parallel.tensor import tensor_share


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
        found.append(Unit(projector, (f"{projector}.",), "shard_context_tensor", 1))
    ends = ("decoder.norm.", "decoder.head.")
    embedding = ("decoder.embedding.",)
    if decoder.tie_embedding:
        found.append(Unit("embedding", embedding + ends, "shard_context", 1))
    else:
        found.append(Unit("embedding", embedding, "shard_context", 1))
    for i in range(decoder.num_layers):
        found.append(Unit("decoder", (f"decoder.blocks.{i}.",), "shard_context", twice))
    if not decoder.tie_embedding:
        found.append(Unit("head", ends, "shard_context", 1))
    return found


def ring(n: int, count: float) -> float:
    """Bytes that a rank sends when ``count`` bytes go around a ring of n ranks."""
    return count * (n - 1) / n


def padded_numbers(shapes: Shapes, prefixes: tuple[str, ...], n: int, tensor: int) -> int:
    """Numbers of a unit over n ranks: FSDP pads dim 0 of every tensor to a multiple of them."""
    total = 0
    for name, shape in shapes.items():
        if name.startswith(prefixes):
            rows, *others = tensor_share(name, shape, tensor)
            total += math.ceil(rows / n) * n * math.prod(others)
    return total


def tensor_bytes(decoder: DecoderConfig, t: int, L: int, R: int, c: int) -> dict[str, float]:
    """Each block gathers tokens twice and scatters sums twice, and its backward does the reverse; the embedding
    scatters, the end of the decoder gathers. The head sums 4 numbers for each target, and dhidden. Gradients of norms
    are partial sums over the tokens, or over the heads, of each rank."""
    D = decoder.hidden_size
    blocks = 4 * decoder.num_layers
    norms = 2 * D
    if decoder.qk_norm:
        norms += 2 * decoder.head_dim
    whole = c * L * D
    head = (4 * 4 + c * D) * R
    reduced = head + c * decoder.num_layers * norms
    return {
        "all-gather": ring(t, (blocks + 2) * whole),
        "reduce-scatter": ring(t, (blocks + 1) * whole),
        "all-reduce": ring(t, 2 * reduced),
    }


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

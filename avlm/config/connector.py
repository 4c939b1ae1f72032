"""What may stand between a tower and the decoder besides a projector: a resampler, and layers of cross-attention."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from avlm.config.values import (
    Count,
    Epsilon,
    Heads,
    Kernel,
    Layers,
    NonNegative,
    Stack,
    Width,
    WidthOrDefault,
    config,
    require,
)


@config
class ResamplerConfig:
    """Learned queries that read the rows of an item and stand for them (``avlm.models.resampler``). It runs where the
    item was encoded, so only the queries travel; they are projected as rows of the tower would be.

    With type=conformer there are no queries: blocks of Conformer make as many rows as there are (SALM's adapter)."""

    type: Literal["qformer", "perceiver", "conformer"]
    num_queries: Annotated[int, Field(ge=0, le=2**14)] = 0  # of an item, or of each of its windows
    num_layers: Layers
    num_heads: Heads
    intermediate_size: Width
    hidden_size: WidthOrDefault = 0  # of the queries; 0: the tower's, which a perceiver always has
    num_kv_heads: Annotated[int, Field(ge=0, le=2**14)] = 0  # of a perceiver; 0: num_heads
    head_dim: Annotated[int, Field(ge=0, le=2**14)] = 0  # of a perceiver; 0: hidden_size / num_heads
    window: Count | None = None  # audio: rows of the tower that each set of queries reads; null: the whole item
    read_every: Stack = 1  # of a qformer: layers 0, n, 2 n, ... read the item, all exchange among queries (BLIP-2: 2)
    norm: Literal["layer", "rms"] = "layer"  # of a perceiver
    norm_eps: Epsilon = 1e-5  # BLIP-2: 1e-12
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    gated: bool = False  # of a perceiver: down(activation(gate(x)) * up(x)) (Idefics2)
    conv_kernel: Kernel = 9  # of a conformer: rows that a channel's convolution sees

    def __post_init__(self) -> None:
        of_others: dict[str, Any] = {}
        if self.type != "perceiver":
            of_others |= {"num_kv_heads": 0, "head_dim": 0, "norm": "layer", "gated": False}
        if self.type != "qformer":
            of_others |= {"read_every": 1}
        if self.type == "conformer":
            of_others |= {"num_queries": 0, "window": None, "norm_eps": 1e-5, "activation": "gelu"}
            require(self.conv_kernel % 2 == 1, f"conv_kernel={self.conv_kernel} is even: it has no row in its middle")
        else:
            of_others |= {"conv_kernel": 9}
            require(self.num_queries > 0, f"type={self.type} needs num_queries")
        for key, default in of_others.items():
            value = getattr(self, key)
            require(value == default, f"{key}={value} is for another type than {self.type}")
        require(
            not self.num_kv_heads or self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}",
        )

    def check(self, tower_size: int) -> None:
        """ValueError for a resampler that cannot stand behind a tower of this width."""
        require(
            self.type != "perceiver" or self.hidden_size in (0, tower_size),
            f"resampler.hidden_size={self.hidden_size} of a perceiver must be the tower's, {tower_size} (or 0)",
        )
        require(
            self.type != "conformer" or self.width(tower_size) % 2 == 0,
            f"a conformer resampler needs an even width, not {self.width(tower_size)}",
        )
        require(
            self.head_dim > 0 or self.width(tower_size) % self.num_heads == 0,
            f"resampler.num_heads={self.num_heads} does not divide its width of {self.width(tower_size)}",
        )

    def width(self, tower_size: int) -> int:
        """Numbers of a query behind a tower of this width."""
        return self.hidden_size or tower_size

    def attention_size(self, tower_size: int) -> int:
        """Width of all heads of queries together."""
        return self.num_heads * self.head_dim or self.width(tower_size)

    def sets_of(self, num_rows: int) -> list[tuple[int, int]]:
        """(rows that come out, rows that these read) of each set of queries of an item with so many rows."""
        return [(self.num_queries or length, length) for length in self.windows_of(num_rows)]

    def windows_of(self, num_rows: int) -> list[int]:
        """Rows that each set of queries reads, of an item with so many; the last may read fewer."""
        step = self.window or max(num_rows, 1)
        return [min(step, num_rows - start) for start in range(0, num_rows, step)]

    def outputs_of(self, num_rows: int) -> int:
        """Rows that come out for an item."""
        if self.type == "conformer":
            return num_rows
        return self.num_queries * math.ceil(num_rows / (self.window or max(num_rows, 1)))


@config
class CrossConfig:
    """Gated cross-attention (Flamingo, Alayrac et al. 2022): media do not stand among the tokens, but are read by
    layers of their own before every n-th layer of the decoder (``avlm.models.cross``). Sizes of heads and of the
    feed-forward part are the decoder's."""

    every: Stack  # before the decoder's layers 0, n, 2 n, ...
    sees: Literal["all", "last"] = "all"  # a token sees all media of its document up to it, or the last of them
    qk_norm: bool = False  # RMSNorm on every query and key head
    first_gate: NonNegative = 0.0  # where gates begin; at 0 the model begins as its decoder

    def num_blocks(self, num_layers: int) -> int:
        """Of a decoder with so many layers."""
        return math.ceil(num_layers / self.every)

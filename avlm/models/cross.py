"""Gated cross-attention (Flamingo, Alayrac et al. 2022): layers between those of the decoder, in which tokens read
media.

    x = x + tanh(a) * attention(norm(x), features);  x = x + tanh(b) * mlp(norm(x))

a and b are learned numbers. They begin at 0, so the model begins as its decoder. Features of media do not stand among
the tokens. One learned row stands for each item there, and a token reads the items of its document up to itself. There
are no rotary positions, and a token that reads nothing gets nothing.

T tokens   D decoder width   M features of all media
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from avlm.config.connector import CrossConfig
from avlm.config.decoder import DecoderConfig
from avlm.models.attention import ReadingAttention
from avlm.models.decoder import FeedForward, RMSNorm
from avlm.models.reading import MediaRow


class CrossLayers(nn.Module):
    def __init__(self, config: CrossConfig, decoder: DecoderConfig):
        super().__init__()
        self.config = config
        self.features = FeaturesOfDocuments()
        self.blocks = nn.ModuleList(CrossBlock(config, decoder) for _ in range(config.num_blocks(decoder.num_layers)))

    def forward(
        self, i: int, x_TD: Tensor, features_MD: Tensor | None, row: MediaRow | None, caches: list | None
    ) -> Tensor:
        """What tokens become before block i of the decoder."""
        number, is_between = divmod(i, self.config.every)
        if is_between:
            return x_TD
        return self.blocks[number](x_TD, features_MD, row, caches[number] if caches else None)

    def init_stats(self) -> dict[str, tuple[float, float]]:
        """(mean, std) of the normal from which each parameter is drawn: gates ``first_gate``, norms 1, linears 1 /
        sqrt(inputs), divided by sqrt(2 * layers) if they write into the residual stream."""
        stats = {}
        for name, parameter in self.named_parameters():
            if name.endswith("_gate.weight"):
                stats[name] = (self.config.first_gate, 0.0)
            elif name.endswith("norm.weight"):
                stats[name] = (1.0, 0.0)
            else:
                std = parameter.shape[-1] ** -0.5
                if name.endswith(("attention.o.weight", "down.weight")):
                    std /= math.sqrt(2 * len(self.blocks))
                stats[name] = (0.0, std)
        return stats


class CrossBlock(nn.Module):
    def __init__(self, config: CrossConfig, decoder: DecoderConfig):
        super().__init__()
        D, eps = decoder.hidden_size, decoder.norm_eps
        heads = decoder.num_heads, decoder.num_kv_heads, decoder.head_dim
        self.attention_norm = RMSNorm(D, eps)
        self.attention = ReadingAttention(D, D, *heads, bias=False, qk_norm_eps=eps if config.qk_norm else None)
        self.attention_gate = Gate()
        self.ffn_norm = RMSNorm(D, eps)
        self.ffn = FeedForward(D, decoder.intermediate_size, decoder.activation)
        self.ffn_gate = Gate()

    def forward(self, x_TD: Tensor, features_MD: Tensor | None, row: MediaRow | None, cache: Any = None) -> Tensor:
        tokens, features = (None, None) if row is None else (row.tokens, row.features)
        read_TD = self.attention(self.attention_norm(x_TD), features_MD, tokens, features, cache)
        x_TD = x_TD + self.attention_gate(read_TD)
        return x_TD + self.ffn_gate(self.ffn(self.ffn_norm(x_TD)))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))

    def forward(self, y_TD: Tensor) -> Tensor:
        return self.with_weight(y_TD, self.weight)

    @staticmethod
    def with_weight(y_TD: Tensor, weight: Tensor) -> Tensor:
        return y_TD * torch.tanh(weight)


class FeaturesOfDocuments(nn.Module):
    """A module, so that sharding can gather the features of a row that ranks share."""

    def forward(self, features_MD: Tensor, row: MediaRow) -> Tensor:
        """Those that ``row.features`` cuts."""
        return features_MD if row.order is None else features_MD[row.order]

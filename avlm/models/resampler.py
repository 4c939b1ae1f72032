"""Resamplers: learned queries that read the rows of an item and stand for them, however many these are.

    qformer    x = norm(x + self_attention(x));  x = norm(x + attention(x, rows));  x = norm(x + mlp(x))
               post-norm, with biases; not every layer reads the rows (BLIP-2, Li et al. 2023)
    perceiver  x = x + attention(norm(x), [norm(rows); norm(x)]);  x = x + mlp(norm(x));  a norm in the end
               (Flamingo, Alayrac et al. 2022; Idefics2 has RMSNorm, shared key heads and a gated mlp)
    conformer  x = sqrt(D) * linear(rows), then the blocks of ``avlm.models.conformer``, without queries: as many rows
               come out as go in (SALM's modality adapter, a ConformerEncoder of NeMo without subsampling)

Queries know nothing of places: rows of a tower carry their own. Each item, or each window of its rows, has a set of
queries that sees no other.

P rows of the tower's output, C wide   Q queries of all sets   D their width   F of the mlp
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avlm.config.connector import ResamplerConfig
from avlm.models.attention import ReadingAttention
from avlm.models.batch import Media
from avlm.models.conformer import ConformerBlock, conformer_init_stats, relative_positions
from avlm.models.encoder import NORMS, EncoderAttention, encoder_init_stats
from avlm.models.reading import QuerySets

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class Resampler(nn.Module):
    def __init__(self, config: ResamplerConfig, tower_size: int):
        super().__init__()
        self.config = config
        D = config.width(tower_size)
        self.queries = nn.Parameter(torch.empty(config.num_queries, D))
        if config.type == "qformer":
            self.first_norm = nn.LayerNorm(D, config.norm_eps)
            self.blocks = nn.ModuleList(QFormerBlock(config, i, D, tower_size) for i in range(config.num_layers))
            self.last_norm = nn.Identity()
        else:
            self.first_norm = nn.Identity()
            self.blocks = nn.ModuleList(PerceiverBlock(config, D) for _ in range(config.num_layers))
            self.last_norm = NORMS[config.norm](D, config.norm_eps)

    def forward(self, media: Media, rows_PC: Tensor) -> Tensor:
        """The queries of all items, (Q, D), of the rows of the tower's output. Zero items are legal."""
        sets = media.queries
        assert sets is not None
        x_QD = self.first_norm(self.queries).repeat(len(sets.queries), 1)
        for block in self.blocks:
            x_QD = block(x_QD, rows_PC, sets)
        return self.last_norm(x_QD)

    def init_stats(self) -> dict[str, tuple[float, float]]:
        """(mean, std) of the normal from which each parameter is drawn: queries have std 0.02, or 1 where no norm
        follows them (perceiver); linears 1 / sqrt(inputs), those that write into the residual stream of a perceiver
        divided by sqrt(2 * layers)."""
        stats = {"queries": (0.0, 0.02 if self.config.type == "qformer" else 1.0)}
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm | nn.RMSNorm):
                stats[f"{name}.weight"] = (1.0, 0.0)
            elif isinstance(module, nn.Linear):
                std = 1 / math.sqrt(module.in_features)
                if self.config.type == "perceiver" and name.endswith((".o", ".down")):
                    std /= math.sqrt(2 * self.config.num_layers)
                stats[f"{name}.weight"] = (0.0, std)
            else:
                continue
            stats[f"{name}.bias"] = (0.0, 0.0)
        return stats


class ConformerAdapter(nn.Module):
    def __init__(self, config: ResamplerConfig, tower_size: int):
        super().__init__()
        self.config = config
        D = config.width(tower_size)
        sizes = D, config.intermediate_size, config.num_heads
        self.linear = nn.Linear(tower_size, D)
        self.blocks = nn.ModuleList(
            ConformerBlock(*sizes, kernel=config.conv_kernel, bias=True, conv_bias=True)
            for _ in range(config.num_layers)
        )

    def forward(self, media: Media, rows_PC: Tensor) -> Tensor:
        """(P, D), of the rows of the tower's output. Zero items are legal."""
        assert media.queries is not None
        segments = media.queries.rows
        x_PD = self.linear(rows_PC)
        x_PD = x_PD * math.sqrt(x_PD.shape[1])
        positions_ND = relative_positions(segments, x_PD)
        for block in self.blocks:
            x_PD = block(x_PD, segments, positions_ND)
        return x_PD

    def init_stats(self) -> dict[str, tuple[float, float]]:
        return encoder_init_stats(self, self.config.num_layers) | conformer_init_stats(self)


class QFormerBlock(nn.Module):
    def __init__(self, config: ResamplerConfig, layer: int, D: int, tower_size: int):
        super().__init__()
        heads = config.num_heads
        self.attention = EncoderAttention(D, heads, bias=True, qkv_bias=True, key_bias=True, qk_norm_eps=None)
        self.attention_norm = nn.LayerNorm(D, config.norm_eps)
        self.reading = self.reading_norm = None
        if layer % config.read_every == 0:
            self.reading = ReadingAttention(D, tower_size, heads, heads, D // heads, bias=True)
            self.reading_norm = nn.LayerNorm(D, config.norm_eps)
        self.up = nn.Linear(D, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, D)
        self.ffn_norm = nn.LayerNorm(D, config.norm_eps)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x_QD: Tensor, rows_PC: Tensor, sets: QuerySets) -> Tensor:
        x_QD = self.attention_norm(x_QD + self.attention(x_QD, sets.queries))
        if self.reading is not None and self.reading_norm is not None:
            x_QD = self.reading_norm(x_QD + self.reading(x_QD, rows_PC, sets.queries, sets.rows))
        return self.ffn_norm(x_QD + self.down(self.activation(self.up(x_QD))))


class PerceiverBlock(nn.Module):
    def __init__(self, config: ResamplerConfig, D: int):
        super().__init__()
        self.queries_norm = NORMS[config.norm](D, config.norm_eps)
        self.rows_norm = NORMS[config.norm](D, config.norm_eps)
        head_dim = config.head_dim or D // config.num_heads
        num_kv_heads = config.num_kv_heads or config.num_heads
        self.reading = ReadingAttention(D, D, config.num_heads, num_kv_heads, head_dim, bias=False)
        self.ffn_norm = NORMS[config.norm](D, config.norm_eps)
        self.gate = nn.Linear(D, config.intermediate_size, bias=False) if config.gated else None
        self.up = nn.Linear(D, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, D, bias=False)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x_QD: Tensor, rows_PD: Tensor, sets: QuerySets) -> Tensor:
        normed_QD = self.queries_norm(x_QD)
        both_SD = torch.cat([self.rows_norm(rows_PD), normed_QD])[sets.order]
        x_QD = x_QD + self.reading(normed_QD, both_SD, sets.queries, sets.rows_and_queries)
        normed_QD = self.ffn_norm(x_QD)
        if self.gate is None:
            return x_QD + self.down(self.activation(self.up(normed_QD)))
        return x_QD + self.down(self.activation(self.gate(normed_QD)) * self.up(normed_QD))

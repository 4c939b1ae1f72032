"""Llama-family decoder (Llama 2/3, Mistral, Ministral 3, Qwen2, Qwen3, SmolLM2, Gemma 1 to 3): token features in,
hidden states out.

It is written for one device and one packed row. Position and segments are inputs, so that packing, caches and context
parallelism share the same code; head counts are inferred from the tensors (a tensor-parallel rank holds a share).

T tokens   D hidden   F intermediate   H query heads   K key/value heads   E head dim
R rows with a target   V vocabulary
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avlm.config.decoder import DecoderConfig
from avlm.models.attention import AttentionCore, Scores
from avlm.models.encoder import ACTIVATIONS, OffsetRMSNorm
from avlm.models.lora import lora_init_stats
from avlm.models.moe import MixtureOfExperts
from avlm.models.rope import Rope, decoder_rope, rotate, window_rope
from kernels.cross_entropy import linear_argmax, linear_cross_entropy
from kernels.segments import Segments


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight"""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Float32 inside, in one kernel on a GPU. Rounded once; transformers also rounds before the scale.
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def _norm(config: DecoderConfig, size: int) -> nn.Module:
    return OffsetRMSNorm(size, config.norm_eps) if config.norm_offset else RMSNorm(size, config.norm_eps)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dim = config.head_dim
        D = config.hidden_size
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q = nn.Linear(D, q_size, bias=config.qkv_bias)
        self.k = nn.Linear(D, kv_size, bias=config.qkv_bias)
        self.v = nn.Linear(D, kv_size, bias=config.qkv_bias)
        self.o = nn.Linear(q_size, D, bias=False)
        self.q_norm = _norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = _norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.core = AttentionCore(causal=True, scores=Scores.of(config))

    def forward(self, x_TD: Tensor, rope: Rope, segments: Segments, cache=None) -> Tensor:
        heads = (-1, self.head_dim)
        q_THE = self.q(x_TD).unflatten(-1, heads)
        k_TKE = self.k(x_TD).unflatten(-1, heads)
        v_TKE = self.v(x_TD).unflatten(-1, heads)
        q_THE = rotate(self.q_norm(q_THE), *rope[-2:])
        k_TKE = rotate(self.k_norm(k_TKE), *rope[:2])
        if cache is None:
            out_THE = self.core(q_THE, k_TKE, v_TKE, segments)
        else:
            out_THE = cache.attend(q_THE, k_TKE, v_TKE, segments)
        return self.o(out_THE.flatten(1))


class FeedForward(nn.Module):
    """SwiGLU, or another activation of the gate: down(silu(gate(x)) * up(x))"""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str):
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x_TD: Tensor, real_T: Tensor | None = None) -> Tensor:
        """``real_T`` is for experts alone."""
        return self.down(self.activation(self.gate(x_TD)) * self.up(x_TD))


class TokenEmbedding(nn.Embedding):
    """Placeholders (ids below 0) embed to zero: media overwrite their rows, and the table learns nothing there."""

    def __init__(self, config: DecoderConfig):
        super().__init__(config.vocab_size, config.hidden_size)
        self.scale = math.sqrt(config.hidden_size) if config.embedding_scale else 1

    def forward(self, token_T: Tensor) -> Tensor:
        x_TD = super().forward(token_T.clamp(min=0))
        return x_TD * self.factor(token_T >= 0, x_TD.dtype)

    def factor(self, is_held_T: Tensor, dtype: torch.dtype) -> Tensor:
        """(T, 1): the scale, rounded to ``dtype`` as the model was trained with it, or 0 for what is not held."""
        return is_held_T.unsqueeze(-1).to(dtype) * self.scale


def feed_forward(config: DecoderConfig, layer: int) -> nn.Module:
    if config.experts is None or not config.has_experts(layer):
        return FeedForward(config.hidden_size, config.intermediate_size, config.activation)
    shared_size = config.experts.shared_size
    shared = FeedForward(config.hidden_size, shared_size, config.activation) if shared_size else None
    return MixtureOfExperts(config.experts, config.hidden_size, config.activation, shared)


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        D = config.hidden_size
        self.attention_norm = _norm(config, D)
        self.attention = Attention(config)
        self.attention_post_norm = _norm(config, D) if config.post_norms else nn.Identity()
        self.ffn_norm = _norm(config, D)
        self.ffn = feed_forward(config, layer)
        self.ffn_post_norm = _norm(config, D) if config.post_norms else nn.Identity()

    def forward(self, x_TD: Tensor, rope: Rope, segments: Segments, cache=None, real_T: Tensor | None = None) -> Tensor:
        x_TD = x_TD + self.attention_post_norm(self.attention(self.attention_norm(x_TD), rope, segments, cache))
        return x_TD + self.ffn_post_norm(self.ffn(self.ffn_norm(x_TD), real_T))


class Head(nn.Module):
    """Hidden rows and their targets in, losses out. A module of its own, so that sharding hooks see its weight used."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.softcap = config.logit_softcap

    def forward(
        self, hidden_RD: Tensor, target_R: Tensor | None, predict: bool = False, factor_R: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """The summed loss and, without a graph, the loss of each row times ``factor_R``: float32 () and (R,).
        ``predict`` adds the likeliest token of each row, int64 (R,), at the cost of a second product with the weight.
        Without targets it returns the logits, float32 (R, V), for generation."""
        if target_R is None:
            return self.bounded(F.linear(hidden_RD, self.weight).float())
        losses = linear_cross_entropy(hidden_RD, self.weight, target_R, softcap=self.softcap, factor_R=factor_R)
        return (*losses, linear_argmax(hidden_RD, self.weight)) if predict else losses

    def bounded(self, logits_RV: Tensor) -> Tensor:
        return logits_RV if self.softcap is None else self.softcap * torch.tanh(logits_RV / self.softcap)


@dataclass(frozen=True)
class DeepFeatures:
    """DeepStack: what inner layers of a tower add to the first blocks (Meng et al. 2024).

    rows      int64 (F,): where in the row the media features stand
    features  (F, D) for each of the first blocks, added after it
    """

    rows: Tensor
    features: list[Tensor]


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = _norm(config, config.hidden_size)
        self.head = Head(config)
        self.tie()

    def forward(
        self,
        x_TD: Tensor,
        position_T: Tensor,
        segments: Segments,
        caches: list | None = None,
        windowed: Segments | None = None,
        deep: DeepFeatures | None = None,
        real_T: Tensor | None = None,
        before: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Hidden states before the final norm, (T, D). Positions are (T,), or (3, T) for a decoder with M-RoPE.
        ``caches`` holds one key/value cache per block (generation), ``windowed`` the segments of layers with a sliding
        window; ``real_T``, bool, the tokens that do not just fill the end of a row (default: all); ``before`` is what a
        token goes through before each block (cross-attention)."""
        full = decoder_rope(self.config, position_T), segments
        within = window_rope(self.config, position_T) or full[0], windowed
        for i, block in enumerate(self.blocks):
            cache = caches[i] if caches else None
            rope, seen = within if self.config.has_window(i) else full
            assert seen is not None, "a decoder with a sliding window needs segments for it"
            if before is not None:
                x_TD = before(i, x_TD)
            x_TD = block(x_TD, rope, seen, cache, real_T)
            if deep is not None and i < len(deep.features):
                x_TD = x_TD.index_add(0, deep.rows, deep.features[i].to(x_TD.dtype))
        return x_TD

    def tie(self) -> None:
        """Share the embedding's weight with the head, if configured. Repeat it after replacing parameters."""
        if self.config.tie_embedding:
            self.head.weight = self.embedding.weight  # pyrefly: ignore[bad-assignment]  (torch calls it a Tensor)

    def init_stats(self) -> dict[str, tuple[float, float]]:
        """(mean, std) of the normal from which each parameter is drawn, by name.

        Linears have std 1 / sqrt(inputs), divided by sqrt(2 * layers) if they write into the residual stream (GPT-2);
        embedding and head 0.02; norms are 1, or 0 where they are added to 1; biases 0. (With 0.02 everywhere, which
        suits widths of thousands, a decoder of width 128 is slow to learn to copy a word.)
        """
        stats = lora_init_stats(self)
        for name, parameter in self.named_parameters():
            if name in stats:  # an adapter
                continue
            if name.endswith("norm.weight"):
                stats[name] = (0.0 if self.config.norm_offset else 1.0, 0.0)
            elif name.endswith("bias"):
                stats[name] = (0.0, 0.0)
            elif name in ("embedding.weight", "head.weight"):
                stats[name] = (0.0, 0.02)
            else:
                std = parameter.shape[-1] ** -0.5
                if name.endswith(("attention.o.weight", "down.weight")):
                    std /= math.sqrt(2 * self.config.num_layers)
                stats[name] = (0.0, std)
        return stats

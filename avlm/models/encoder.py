"""The transformer block that the towers of vision, audio and text share.

T rows of all items   D width   H heads   E head dim
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avlm.config.model import AudioConfig, TextConfig, VisionConfig
from avlm.models.attention import AttentionCore
from avlm.models.lora import lora_init_stats
from avlm.models.rope import Rope, rotate
from kernels.segments import Segments


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_tanh": gelu_tanh, "silu": F.silu}


class OffsetRMSNorm(nn.RMSNorm):
    """y = x / sqrt(mean(x^2) + eps) * (1 + weight), in float32 and rounded once."""

    def forward(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(exact), self.normalized_shape, 1 + self.weight.to(exact), self.eps).to(x.dtype)


NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "rms_offset": OffsetRMSNorm}


class EncoderAttention(nn.Module):
    """Attention, bidirectional unless it is causal; Whisper's keys have no bias."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        bias: bool,
        qkv_bias: bool,
        key_bias: bool,
        qk_norm_eps: float | None,
        causal: bool = False,
    ):
        """``qk_norm_eps``: of RMSNorms on queries and keys, over all heads together; None: there are none."""
        super().__init__()
        D = hidden_size
        self.head_dim = D // num_heads
        self.q = nn.Linear(D, D, bias=qkv_bias)
        self.k = nn.Linear(D, D, bias=qkv_bias and key_bias)
        self.v = nn.Linear(D, D, bias=qkv_bias)
        self.o = nn.Linear(D, D, bias=bias)
        self.q_norm = nn.Identity() if qk_norm_eps is None else nn.RMSNorm(D, qk_norm_eps)
        self.k_norm = nn.Identity() if qk_norm_eps is None else nn.RMSNorm(D, qk_norm_eps)
        self.core = AttentionCore(causal)

    def forward(self, x_TD: Tensor, segments: Segments, rope: Rope | None = None) -> Tensor:
        heads = (-1, self.head_dim)
        q_THE = self.q_norm(self.q(x_TD)).unflatten(-1, heads)
        k_THE = self.k_norm(self.k(x_TD)).unflatten(-1, heads)
        v_THE = self.v(x_TD).unflatten(-1, heads)
        if rope is not None:
            q_THE, k_THE = rotate(q_THE, *rope), rotate(k_THE, *rope)
        out_THE = self.core(q_THE, k_THE, v_THE, segments)
        return self.o(out_THE.flatten(1))


class EncoderBlock(nn.Module):
    """Pre-norm transformer block. Its options are those of VisionConfig; the defaults are Whisper's."""

    def __init__(
        self,
        config: VisionConfig | AudioConfig | TextConfig,
        *,
        activation: str = "gelu",
        gated: bool = False,
        norm: str = "layer",
        norm_eps: float = 1e-5,
        bias: bool = True,
        qkv_bias: bool = True,
        key_bias: bool = True,
        qk_norm: bool = False,
        layer_scale: bool = False,
        causal: bool = False,
    ):
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.attention_norm = NORMS[norm](D, norm_eps)
        self.attention = EncoderAttention(
            D,
            config.num_heads,
            bias=bias,
            qkv_bias=bias and qkv_bias,
            key_bias=key_bias,
            qk_norm_eps=norm_eps if qk_norm else None,
            causal=causal,
        )
        self.ffn_norm = NORMS[norm](D, norm_eps)
        self.gate = nn.Linear(D, F, bias=bias) if gated else None
        self.up = nn.Linear(D, F, bias=bias)
        self.down = nn.Linear(F, D, bias=bias)
        self.activation = ACTIVATIONS[activation]
        self.attention_scale = nn.Parameter(torch.empty(D)) if layer_scale else None
        self.ffn_scale = nn.Parameter(torch.empty(D)) if layer_scale else None

    def forward(self, x_TD: Tensor, segments: Segments, rope: Rope | None = None) -> Tensor:
        x_TD = x_TD + scaled(self.attention(self.attention_norm(x_TD), segments, rope), self.attention_scale)
        normed_TD = self.ffn_norm(x_TD)
        if self.gate is None:
            hidden_TF = self.activation(self.up(normed_TD))
        else:
            hidden_TF = self.activation(self.gate(normed_TD)) * self.up(normed_TD)
        return x_TD + scaled(self.down(hidden_TF), self.ffn_scale)


def scaled(x_TD: Tensor, scale_D: Tensor | None) -> Tensor:
    return x_TD if scale_D is None else x_TD * scale_D


def encoder_init_stats(tower: nn.Module, num_layers: int) -> dict[str, tuple[float, float]]:
    """(mean, std) of the normal from which each parameter of a tower is drawn, by name.

    Weights have std 1 / sqrt(inputs), divided by sqrt(2 * layers) if they write into the residual stream. Norms are 1,
    biases 0, factors of a layer scale 0.1 (the default of InternViT).
    """
    stats = lora_init_stats(tower)
    for name, _ in tower.named_parameters():
        if name.endswith("_scale"):
            stats[name] = (0.1, 0.0)
    for name, module in tower.named_modules():
        if f"{name}.weight" in stats:  # an adapter
            continue
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            stats[f"{name}.weight"] = (1.0, 0.0)
        elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            num_inputs = math.prod(module.weight.shape[1:])
            std = 1 / math.sqrt(num_inputs)
            if name.endswith((".o", ".down")):
                std /= math.sqrt(2 * num_layers)
            stats[f"{name}.weight"] = (0.0, std)
        else:
            continue
        if getattr(module, "bias", None) is not None:
            stats[f"{name}.bias"] = (0.0, 0.0)
    return stats

"""The transformer block that the vision tower and the audio tower share.

T rows of all items   D width   H heads   E head dim
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avlm.config.model import AudioConfig, VisionConfig
from avlm.models.attention import AttentionCore
from avlm.models.lora import lora_init_stats
from avlm.models.rope import rotate
from kernels.segments import Segments


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_tanh": gelu_tanh, "silu": F.silu}
NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
Rope = tuple[Tensor, Tensor]  # cos and sin, float32 (T, E)


class EncoderAttention(nn.Module):
    """Bidirectional attention with biases; Whisper's keys have none."""

    def __init__(self, hidden_size: int, num_heads: int, key_bias: bool):
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.k = nn.Linear(hidden_size, hidden_size, bias=key_bias)
        self.v = nn.Linear(hidden_size, hidden_size)
        self.o = nn.Linear(hidden_size, hidden_size)
        self.core = AttentionCore(causal=False)

    def forward(self, x_TD: Tensor, segments: Segments, rope: Rope | None = None) -> Tensor:
        heads = (-1, self.head_dim)
        q_THE = self.q(x_TD).unflatten(-1, heads)
        k_THE = self.k(x_TD).unflatten(-1, heads)
        v_THE = self.v(x_TD).unflatten(-1, heads)
        if rope is not None:
            q_THE, k_THE = rotate(q_THE, *rope), rotate(k_THE, *rope)
        out_THE = self.core(q_THE, k_THE, v_THE, segments)
        return self.o(out_THE.flatten(1))


class EncoderBlock(nn.Module):
    """Pre-norm transformer block. Its options are those of VisionConfig; the defaults are Whisper's."""

    def __init__(
        self,
        config: VisionConfig | AudioConfig,
        *,
        activation: str = "gelu",
        gated: bool = False,
        norm: str = "layer",
        norm_eps: float = 1e-5,
        key_bias: bool = True,
    ):
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.attention_norm = NORMS[norm](D, norm_eps)
        self.attention = EncoderAttention(D, config.num_heads, key_bias)
        self.ffn_norm = NORMS[norm](D, norm_eps)
        self.gate = nn.Linear(D, F) if gated else None
        self.up = nn.Linear(D, F)
        self.down = nn.Linear(F, D)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x_TD: Tensor, segments: Segments, rope: Rope | None = None) -> Tensor:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), segments, rope)
        normed_TD = self.ffn_norm(x_TD)
        if self.gate is None:
            hidden_TF = self.activation(self.up(normed_TD))
        else:
            hidden_TF = self.activation(self.gate(normed_TD)) * self.up(normed_TD)
        return x_TD + self.down(hidden_TF)


def encoder_init_stats(tower: nn.Module, num_layers: int) -> dict[str, tuple[float, float]]:
    """(mean, std) of the normal from which each parameter of a tower is drawn, by name.

    Weights have std 1 / sqrt(inputs), divided by sqrt(2 * layers) if they write into the residual stream. Norms are 1,
    biases 0.
    """
    stats = lora_init_stats(tower)
    for name, module in tower.named_modules():
        if f"{name}.weight" in stats:  # an adapter
            continue
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            stats[f"{name}.weight"] = (1.0, 0.0)
        elif isinstance(module, nn.Linear | nn.Conv1d):
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

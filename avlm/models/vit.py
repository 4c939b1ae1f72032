"""Vision tower: CLIP ViT (Radford et al. 2021) and SigLIP (Zhai et al. 2023), all images in one packed row.

I images   S image side   P patch side   N patches of an image   C class tokens (0 or 1)   L = C + N tokens of an image
T = I * L tokens   D width   H heads   E head dim
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avlm.config.model import VisionConfig
from avlm.models.attention import AttentionCore
from avlm.models.lora import lora_start
from kernels.segments import Segments

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class EncoderAttention(nn.Module):
    """Bidirectional attention with biases; Whisper's keys have none."""

    def __init__(self, hidden_size: int, num_heads: int, key_bias: bool = True):
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.k = nn.Linear(hidden_size, hidden_size, bias=key_bias)
        self.v = nn.Linear(hidden_size, hidden_size)
        self.o = nn.Linear(hidden_size, hidden_size)
        self.core = AttentionCore(causal=False)

    def forward(self, x_TD: Tensor, segments: Segments) -> Tensor:
        q_THE, k_THE, v_THE = (linear(x_TD).unflatten(-1, (-1, self.head_dim)) for linear in (self.q, self.k, self.v))
        return self.o(self.core(q_THE, k_THE, v_THE, segments).flatten(1))


class EncoderBlock(nn.Module):
    """Pre-norm transformer block of both towers."""

    def __init__(self, config, activation: str, key_bias: bool = True, eps: float = 1e-5):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps)
        self.attention = EncoderAttention(config.hidden_size, config.num_heads, key_bias)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x_TD: Tensor, segments: Segments) -> Tensor:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), segments)
        return x_TD + self.down(self.activation(self.up(self.ffn_norm(x_TD))))


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        D, P = config.hidden_size, config.patch_size
        self.patch = nn.Linear(3 * P * P, D, bias=config.patch_bias)  # the patch convolution, as the product that it is
        self.class_token = nn.Parameter(torch.empty(1, D)) if config.class_token else None
        self.position = nn.Parameter(torch.empty(config.num_patches + config.class_token, D))
        self.pre_norm = nn.LayerNorm(D, config.norm_eps) if config.pre_norm else nn.Identity()
        num_built = config.num_layers + 1 + config.feature_layer  # what lies above the feature layer would never run
        self.blocks = nn.ModuleList(
            EncoderBlock(config, config.activation, eps=config.norm_eps) for _ in range(num_built)
        )
        self.post_norm = nn.LayerNorm(D, config.norm_eps) if config.post_norm else nn.Identity()

    def forward(self, pixels_I3SS: Tensor, segments: Segments) -> Tensor:
        """Features of every token, a class token first: (T, D) in the weights' dtype. Zero images are legal."""
        P, side = self.config.patch_size, self.config.patches_per_side
        pixels_I3SS = pixels_I3SS[:, :, : side * P, : side * P]  # a convolution cuts what is no whole patch
        patches = pixels_I3SS.to(self.patch.weight.dtype).unflatten(3, (side, P)).unflatten(2, (side, P))
        x_IND = self.patch(patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        if self.class_token is not None:
            x_IND = torch.cat([self.class_token.expand(x_IND.shape[0], 1, -1), x_IND], dim=1)
        x_TD = self.pre_norm(x_IND + self.position).flatten(0, 1)
        for block in self.blocks:
            x_TD = block(x_TD, segments)
        return self.post_norm(x_TD)


def vision_start(tower: VisionTower) -> dict[str, tuple[float, float]]:
    """Random start, (mean, std) of a normal by parameter name: as ``encoder_start``; positions and class token 0.02."""
    start = encoder_start(tower, tower.config.num_layers)
    return start | {name: (0.0, 0.02) for name in ("position", "class_token") if getattr(tower, name) is not None}


def encoder_start(tower: nn.Module, num_layers: int) -> dict[str, tuple[float, float]]:
    """What both towers share: std 1 / sqrt(inputs), divided by sqrt(2 * layers) for what writes into the residual
    stream; norms are 1, biases 0."""
    start = lora_start(tower)
    for name, module in tower.named_modules():
        if f"{name}.weight" in start:
            continue
        if isinstance(module, nn.LayerNorm):
            start[f"{name}.weight"] = (1.0, 0.0)
        elif isinstance(module, nn.Linear | nn.Conv1d):
            std = 1 / math.sqrt(math.prod(module.weight.shape[1:]))
            start[f"{name}.weight"] = (0.0, std / math.sqrt(2 * num_layers) if name.endswith((".o", ".down")) else std)
        else:
            continue
        if module.bias is not None:
            start[f"{name}.bias"] = (0.0, 0.0)
    return start

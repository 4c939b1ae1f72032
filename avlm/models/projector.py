"""Projectors: tower features -> rows of decoder width, fewer of them when ``downsample`` is above 1.

    linear       y = x @ w.T + b
    mlp2x_gelu   y = gelu(x @ w1.T + b1) @ w2.T + b2          (LLaVA-1.5)

R feature rows   C tower width times what downsampling gathers   F hidden   D decoder width   T token rows
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from avlm.config import ProjectorConfig
from kernels.projector import place_projected


class Projector(nn.Module):
    def __init__(self, config: ProjectorConfig, tower_size: int, gathered: int, decoder_size: int):
        """``gathered``: how many tower features make one row."""
        super().__init__()
        self.config = config
        hidden_size = config.hidden_size or decoder_size
        if config.type == "linear":
            self.linear = nn.Linear(tower_size * gathered, decoder_size)
        else:
            self.up = nn.Linear(tower_size * gathered, hidden_size)
            self.down = nn.Linear(hidden_size, decoder_size)

    def forward(self, into_TD: Tensor, rows_R: Tensor, x_RC: Tensor) -> Tensor:
        """``into`` with the projected features written at ``rows``."""
        if self.config.type == "linear":
            return into_TD.index_copy(0, rows_R, self.linear(x_RC).to(into_TD.dtype))
        return place_projected(into_TD, rows_R, x_RC, self.up.weight, self.up.bias, self.down.weight, self.down.bias)


def shuffle_pixels(x_INC: Tensor, factor: int) -> Tensor:
    """Features of ``factor`` x ``factor`` neighbouring patches side by side: (I * N / factor^2, C * factor^2)."""
    side = math.isqrt(x_INC.shape[1])
    pattern = "i (y fy x fx) c -> (i y x) (fy fx c)"
    return rearrange(x_INC, pattern, y=side // factor, fy=factor, x=side // factor, fx=factor)


def stack_frames(x_KC: Tensor, frame_rows_GS: Tensor) -> Tensor:
    """Features of S successive rows side by side, (G, S * C); row -1 stands for zeros past the end of a window."""
    if frame_rows_GS.shape[1] == 1:
        return x_KC[frame_rows_GS[:, 0]]
    padded = torch.cat([x_KC, x_KC.new_zeros(1, x_KC.shape[1])])  # row -1
    return padded[frame_rows_GS].flatten(1)


def projector_start(projector: Projector) -> dict[str, tuple[float, float]]:
    """Random start, (mean, std) of a normal by parameter name: std 1 / sqrt(inputs), biases 0; the output is brought
    to the scale of a token embedding (0.02)."""
    start = {}
    for name, module in projector.named_modules():
        if isinstance(module, nn.Linear):
            std = 1 / math.sqrt(module.in_features)
            start[f"{name}.weight"] = (0.0, std if name == "up" else 0.02 * std)
            start[f"{name}.bias"] = (0.0, 0.0)
    return start

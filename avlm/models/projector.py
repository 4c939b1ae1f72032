"""Projectors: tower features -> rows of decoder width, fewer of them when ``downsample`` is above 1.

    linear       y = x @ w.T + b
    mlp2x_gelu   y = gelu(x @ w1.T + b1) @ w2.T + b2          (LLaVA-1.5)
    swiglu       y = (silu(x @ wg.T) * (x @ wu.T)) @ wd.T     (Shazeer 2020; biases as above), in plain PyTorch

P tower rows   C tower width   R feature rows   S tower rows that make a feature   F hidden   D decoder width
T token rows
"""

import math
from itertools import chain

import torch.nn.functional as F
from torch import Tensor, nn

from avlm.config.model import ProjectorConfig
from kernels.projector import place_projected, side_by_side

# The linears of each type in the order in which they run; those that share an input together.
LAYERS = {"linear": [("linear",)], "mlp2x_gelu": [("up",), ("down",)], "swiglu": [("gate", "up"), ("down",)]}


class Projector(nn.Module):
    def __init__(self, config: ProjectorConfig, tower_size: int, gathered: int, decoder_size: int):
        """``gathered``: how many tower rows make one feature."""
        super().__init__()
        self.config = config
        hidden_size = config.hidden_size or decoder_size
        wide = tower_size * gathered
        if config.type == "linear":
            self.linear = nn.Linear(wide, decoder_size, bias=config.bias)
        else:
            if config.type == "swiglu":
                self.gate = nn.Linear(wide, hidden_size, bias=config.bias)
            self.up = nn.Linear(wide, hidden_size, bias=config.bias)
            self.down = nn.Linear(hidden_size, decoder_size, bias=config.bias)
        assert [name for name, _ in self.named_children()] == list(chain(*LAYERS[config.type]))

    def forward(self, into_TD: Tensor, rows_R: Tensor, x_PC: Tensor, source_RS: Tensor) -> Tensor:
        """``into`` with the projected features written at ``rows``. ``into`` itself must not be used afterwards.

        Tower rows source_RS[i], side by side, make feature i; -1 means zeros, past the end of a window.
        """
        if self.config.type == "mlp2x_gelu":
            layers = (self.up.weight, _bias(self.up), self.down.weight, _bias(self.down))
            return place_projected(into_TD, rows_R, x_PC, *layers, source_RS=source_RS)
        x_RC = side_by_side(x_PC, source_RS)
        if self.config.type == "linear":
            y_RD = self.linear(x_RC)
        else:
            y_RD = self.down(F.silu(self.gate(x_RC)) * self.up(x_RC))
        return into_TD.index_copy(0, rows_R, y_RD.to(into_TD.dtype))

    def init_stats(self) -> dict[str, tuple[float, float]]:
        """(mean, std) of the normal from which each parameter is drawn: std 1 / sqrt(inputs), biases 0. ``output_std``
        brings the output to the scale of a token embedding."""
        stats = {}
        for name in chain(*LAYERS[self.config.type]):
            linear: nn.Linear = getattr(self, name)
            std = 1 / math.sqrt(linear.in_features)
            if name in ("linear", "down"):  # the last
                std *= self.config.output_std
            stats[f"{name}.weight"] = (0.0, std)
            stats[f"{name}.bias"] = (0.0, 0.0)
        return stats


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias

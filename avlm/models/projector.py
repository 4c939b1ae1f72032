"""Projectors: tower features -> rows of decoder width, fewer of them when ``downsample`` is above 1.

    linear       y = x @ w.T + b
    mlp2x_gelu   y = gelu(x @ w1.T + b1) @ w2.T + b2          (LLaVA-1.5)
    swiglu       y = (silu(x @ wg.T) * (x @ wu.T)) @ wd.T     (Shazeer 2020; biases as above), in plain PyTorch

Tower rows may be normalised before they are put side by side (Qwen2-VL) or after, and so may what the last linear takes
and the feature itself (Ultravox). DeepStack (Meng et al. 2024): the rows of some
inner layers of the tower have a projector each, ``deep``, whose features are added to the decoder's first layers.

P tower rows   C tower width   R feature rows   S tower rows that make a feature   F hidden   D decoder width
T token rows
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from avlm.config.model import ProjectorConfig
from avlm.config.values import Norm
from avlm.models.encoder import NORMS
from kernels.projector import place_projected, side_by_side

# The linears of each type in the order in which they run; those that share an input together.
LAYERS = {"linear": [("linear",)], "mlp2x_gelu": [("up",), ("down",)], "swiglu": [("gate", "up"), ("down",)]}


class Projector(nn.Module):
    def __init__(self, config: ProjectorConfig, tower_size: int, gathered: int, decoder_size: int, num_deep: int = 0):
        """``gathered``: how many tower rows make one feature; ``num_deep``: inner layers of the tower that it takes."""
        super().__init__()
        self.config = config
        self.tower_size = tower_size
        hidden_size = config.hidden_size or decoder_size
        wide = tower_size * gathered
        self.norm = _norm(config.norm, tower_size, config)
        self.feature_norm = _norm(config.feature_norm, wide, config)
        if config.type == "linear":
            self.linear = nn.Linear(wide, decoder_size, bias=config.bias)
        else:
            if config.type == "swiglu":
                self.gate = nn.Linear(wide, hidden_size, bias=config.bias)
            self.up = nn.Linear(wide, hidden_size, bias=config.bias)
            self.hidden_norm = _norm(config.hidden_norm, hidden_size, config)
            self.down = nn.Linear(hidden_size, decoder_size, bias=config.bias)
        self.output_norm = _norm(config.output_norm, decoder_size, config)
        self.deep = nn.ModuleList(DeepProjector(config, wide, hidden_size, decoder_size) for _ in range(num_deep))

    def forward(self, into_TD: Tensor, rows_R: Tensor, x_PC: Tensor, source_RS: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``into`` with the projected features written at ``rows``, and the features of each inner layer, (R, D).
        ``into`` itself must not be used afterwards.

        Tower rows source_RS[i], side by side, make feature i; -1 means zeros, past the end of a window. The rows of
        inner layers stand in ``x`` behind those of the last.
        """
        x_PC, *inner = x_PC.split(self.tower_size, dim=1)
        deep = [project(side_by_side(inner_PC, source_RS)) for project, inner_PC in zip(self.deep, inner)]
        x_PC = self.norm(x_PC)
        if self.config.is_fused:
            layers = (self.up.weight, _bias(self.up), self.down.weight, _bias(self.down))
            return place_projected(into_TD, rows_R, x_PC, *layers, source_RS=source_RS), deep
        y_RD = self.output_norm(self._linears(self.feature_norm(side_by_side(x_PC, source_RS))))
        return into_TD.index_copy(0, rows_R, y_RD.to(into_TD.dtype)), deep

    def _linears(self, x_RC: Tensor) -> Tensor:
        if self.config.type == "linear":
            return self.linear(x_RC)
        if self.config.type == "swiglu":
            hidden_RF = F.silu(self.gate(x_RC)) * self.up(x_RC)
        else:
            hidden_RF = F.gelu(self.up(x_RC))
        return self.down(self.hidden_norm(hidden_RF))

    def init_stats(self) -> dict[str, tuple[float, float]]:
        """(mean, std) of the normal from which each parameter is drawn: std 1 / sqrt(inputs), biases 0, norms 1.
        ``output_std`` brings the output to the scale of a token embedding."""
        stats = {}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = 1 / math.sqrt(module.in_features)
                if name.endswith(("linear", "down")):  # the last
                    std *= self.config.output_std
                stats[f"{name}.weight"] = (0.0, std)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                stats[f"{name}.weight"] = (1.0, 0.0)
            else:
                continue
            stats[f"{name}.bias"] = (0.0, 0.0)
        return stats


class DeepProjector(nn.Module):
    """The projector of an inner layer: tower rows side by side, normalised together, then two linears as above."""

    def __init__(self, config: ProjectorConfig, wide: int, hidden_size: int, decoder_size: int):
        super().__init__()
        self.norm = NORMS["layer" if config.norm == "none" else config.norm](wide, config.norm_eps)
        self.up = nn.Linear(wide, hidden_size, bias=config.bias)
        self.down = nn.Linear(hidden_size, decoder_size, bias=config.bias)

    def forward(self, x_RC: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x_RC))))


def _norm(kind: Norm, size: int, config: ProjectorConfig) -> nn.Module:
    return nn.Identity() if kind == "none" else NORMS[kind](size, config.norm_eps)


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias

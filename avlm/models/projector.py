"""Projectors: tower features -> rows of decoder width, fewer of them when ``downsample`` is above 1.

    linear       y = x @ w.T + b
    mlp2x_gelu   y = gelu(x @ w1.T + b1) @ w2.T + b2          (LLaVA-1.5)
    swiglu       y = (silu(x @ wg.T) * (x @ wu.T)) @ wd.T     (Shazeer 2020; biases as above), in plain PyTorch

x is made of some tower rows side by side, of their mean, or of what a linear, ``merger``, makes of them. Rows may be
normalised before they are put side by side (Qwen2-VL) or after, and so may what the last linear takes and y itself
(Ultravox). A feature is y, or the weighted sum of several (LLaVA-OneVision). DeepStack (Meng et al. 2024): the rows of
some inner layers of the tower have a projector each, ``deep``, whose features are added to the decoder's first layers.

P tower rows   C tower width   U projected rows   S tower rows that make one   F hidden   D decoder width
R features   L rows of the newline   T token rows
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avlm.config.model import ProjectorConfig
from avlm.config.values import Norm
from avlm.models.batch import Features, Media
from avlm.models.encoder import NORMS, OffsetRMSNorm
from avlm.models.resampler import ConformerAdapter, Resampler
from kernels.projector import place_projected, projector_mlp, side_by_side

# The linears of each type in the order in which they run; those that share an input together.
LAYERS = {"linear": [("linear",)], "mlp2x_gelu": [("up",), ("down",)], "swiglu": [("gate", "up"), ("down",)]}


class Projector(nn.Module):
    def __init__(
        self,
        config: ProjectorConfig,
        tower_size: int,
        gathered: int,
        decoder_size: int,
        num_deep: int = 0,
        has_newline: bool = False,
    ):
        """``gathered``: how many tower rows make one projected row; ``num_deep``: inner layers of the tower that it
        takes; ``has_newline``: even if the config has none."""
        super().__init__()
        self.config = config
        self.resampler = None
        if config.resampler is not None:
            kind = ConformerAdapter if config.resampler.type == "conformer" else Resampler
            self.resampler = kind(config.resampler, tower_size)
        tower_size = tower_size if config.resampler is None else config.resampler.width(tower_size)
        self.tower_size = tower_size
        hidden_size = config.hidden_size or decoder_size
        wide = tower_size * (1 if config.takes_mean else gathered)
        self.norm = _norm(config.norm, tower_size, config)
        self.merger = nn.Linear(wide, tower_size, bias=False) if config.merge else None
        wide = tower_size if config.merge else wide
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
        self.newline = nn.Parameter(torch.empty(decoder_size)) if config.newline or has_newline else None
        self.deep = nn.ModuleList(DeepProjector(config, wide, hidden_size, decoder_size) for _ in range(num_deep))

    def forward(self, into_TD: Tensor, media: Media, x_PC: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``into`` with the features of media, made of tower rows x, written at their rows or added to them, and the
        features of each inner layer, (R, D). ``into`` itself must not be used afterwards.

        In each row of ``x`` the numbers of inner layers follow those of the last.
        """
        x_PC, *inner = x_PC.split(self.tower_size, dim=1)
        deep = [project(side_by_side(inner_PC, media.sources)) for project, inner_PC in zip(self.deep, inner)]
        x_PC, source_US = self._rows(self.norm(x_PC), media.sources)
        if self.config.is_fused and media.features.mix is None and not self.config.add:
            into_TD = place_projected(into_TD, media.rows, x_PC, *self._fused_layers(), source_RS=source_US)
        else:
            y_RD = mixed(self._projected(x_PC, source_US), media.features)
            place = into_TD.index_add if self.config.add else into_TD.index_copy
            into_TD = place(0, media.rows, y_RD.to(into_TD.dtype))
        if self.newline is not None:
            newline_LD = self.newline.to(into_TD.dtype).expand(len(media.newlines), -1)
            into_TD = into_TD.index_copy_(0, media.newlines, newline_LD)  # nothing keeps what it was
        return into_TD, deep

    def _rows(self, x_PC: Tensor, source_US: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and sources whose rows side by side are what the linears take."""
        if self.config.takes_mean:
            x_PC = mean_of(x_PC, source_US)
        elif self.merger is not None:
            x_PC = self.merger(side_by_side(x_PC, source_US))
        else:
            return x_PC, source_US
        return x_PC, torch.arange(len(x_PC), device=x_PC.device)[:, None]

    def _projected(self, x_PC: Tensor, source_US: Tensor) -> Tensor:
        """(U, D)"""
        if self.config.is_fused:
            return projector_mlp(x_PC, *self._fused_layers(), source_RS=source_US)
        return self.output_norm(self._linears(self.feature_norm(side_by_side(x_PC, source_US))))

    def _fused_layers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.up.weight, _bias(self.up), self.down.weight, _bias(self.down)

    def _linears(self, x_RC: Tensor) -> Tensor:
        if self.config.type == "linear":
            return self.linear(x_RC)
        if self.config.type == "swiglu":
            hidden_RF = F.silu(self.gate(x_RC)) * self.up(x_RC)
        else:
            hidden_RF = F.gelu(self.up(x_RC))
        return self.down(self.hidden_norm(hidden_RF))

    def init_stats(self) -> dict[str, tuple[float, float]]:
        """(mean, std) of the normal from which each parameter is drawn: std 1 / sqrt(inputs), biases 0, norms 1
        (or 0, where 1 is added).
        ``output_std`` brings the output, and the newline, to the scale of a token embedding."""
        stats = {"newline": (0.0, self.config.output_std)}
        if self.resampler is not None:
            stats |= {f"resampler.{name}": stat for name, stat in self.resampler.init_stats().items()}
        for name, module in self.named_modules():
            if name.startswith("resampler"):
                continue
            if isinstance(module, nn.Linear):
                std = 1 / math.sqrt(module.in_features)
                if name.endswith(("linear", "down")):  # the last
                    std *= self.config.output_std
                stats[f"{name}.weight"] = (0.0, std)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                stats[f"{name}.weight"] = (0.0 if isinstance(module, OffsetRMSNorm) else 1.0, 0.0)
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


def mean_of(x_PC: Tensor, source_US: Tensor) -> Tensor:
    """The mean of the tower rows of each projected row, (U, C); a source of -1 does not count."""
    is_row_US = source_US >= 0
    sum_UC = side_by_side(x_PC, source_US).unflatten(1, (-1, x_PC.shape[1])).sum(1)
    return sum_UC / is_row_US.sum(1, keepdim=True).to(x_PC.dtype)


def mixed(y_UD: Tensor, features: Features) -> Tensor:
    """Features (R, D), of projected rows."""
    if features.mix is None:
        return y_UD
    assert features.weights is not None
    # In float32: the gradient of a projected row is a sum, which bf16 would cut off on a CPU.
    y_RD = F.embedding_bag(features.mix, y_UD.float(), mode="sum", per_sample_weights=features.weights)
    return y_RD.to(y_UD.dtype)


def _norm(kind: Norm, size: int, config: ProjectorConfig) -> nn.Module:
    return nn.Identity() if kind == "none" else NORMS[kind](size, config.norm_eps)


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias

"""Low-rank adapters on named linears of any tower.

    LoRA     y = x @ W.T + b + s * (dropout(x) @ A.T) @ B.T                          (Hu et al. 2021)
    DoRA     y = m / |W + s * B @ A| * (x @ W.T + s * (dropout(x) @ A.T) @ B.T) + b  (Liu et al. 2024, 2402.09353)

s is alpha / r, or alpha / sqrt(r) with ``rslora`` (Kalajdzievski 2023). |.| is the length of each row; no gradient goes
through it (section 4.3 of the paper). A is initialised at random and B to zero, so an adapted model starts out
equal to its base.

W (O, I) base   A (r, I) ``lora_down``   B (O, r) ``lora_up``   m (O,) ``lora_magnitude``
T tokens
"""

import difflib
import fnmatch
import re
from collections.abc import Collection, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avlm.config.model import LoraConfig

WHOLE = ("projector", "cross", "codec", "contrastive")  # end names of modules that get no adapters


class LowRankLinear(nn.Linear):
    """A linear with its adapters as children, so that its own parameters keep their names."""

    def __init__(self, base: nn.Linear, config: LoraConfig):
        # On the meta device, because the weights are those of the base.
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.dropout, self.scale = config.dropout, config.scale
        self.lora_down = nn.Linear(base.in_features, config.rank, bias=False)
        self.lora_up = nn.Linear(config.rank, base.out_features, bias=False)
        self.lora_magnitude = nn.Parameter(torch.empty(base.out_features)) if config.dora else None

    def forward(self, x_TI: Tensor) -> Tensor:
        # Without a graph (validation, generation, a frozen tower) there is no dropout.
        drops = self.dropout > 0 and self.training and torch.is_grad_enabled()
        dropped_TI = F.dropout(x_TI, self.dropout) if drops else x_TI
        adapted_TO = self.lora_up(self.lora_down(dropped_TI) * self.scale)
        if self.lora_magnitude is None:
            return F.linear(x_TI, self.weight, self.bias) + adapted_TO
        with torch.no_grad():
            weight_OI = adapted(self.weight, self.lora_down.weight, self.lora_up.weight, self.scale)
            length_O = row_lengths(weight_OI)
        scale_O = (self.lora_magnitude / length_O).to(x_TI.dtype)
        y_TO = (F.linear(x_TI, self.weight) + adapted_TO) * scale_O
        return y_TO if self.bias is None else y_TO + self.bias


def adapted(weight_OI: Tensor, down_RI: Tensor, up_OR: Tensor, scale: float) -> Tensor:
    """W + s * B @ A in float32."""
    return weight_OI.float() + scale * (up_OR.float() @ down_RI.float())


def row_lengths(weight_OI: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight_OI.float(), dim=1)


def apply_lora(model: nn.Module, config: LoraConfig) -> None:
    """Add adapters to the linears that the targets match. A target is a pattern of module paths, in which * matches
    anything. Raises ValueError for a target that matches none."""
    paths = adaptable(model)
    chosen: set[str] = set()
    of_experts = [name for name, _ in model.named_modules() if ".experts." in name]
    for target in config.targets:
        if grouped := fnmatch.filter(of_experts, target):
            raise ValueError(
                f"model.lora.targets names {target!r}, which matches {collapse(grouped[0])}: a weight of all experts "
                "takes no adapters. Name linears alone, such as [decoder.*.q, decoder.*.k, decoder.*.v, decoder.*.o]"
            )
        found = fnmatch.filter(paths, target)
        if not found:
            known = sorted({collapse(path) for path in paths})
            near = difflib.get_close_matches(target, known, n=4, cutoff=0.4) or known
            raise ValueError(f"model.lora.targets names {target!r}, which matches no linear: the nearest are {near}")
        chosen.update(found)
    for path in paths:
        if path in chosen:
            parent, _, leaf = path.rpartition(".")
            base = model.get_submodule(path)
            assert isinstance(base, nn.Linear)
            setattr(model.get_submodule(parent), leaf, LowRankLinear(base, config))


def adaptable(model: nn.Module) -> list[str]:
    """Paths of the linears of the decoder and the towers. Projectors and heads of embeddings are small, layers of
    cross-attention and the depth decoder new: they train whole."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linears if not name.split(".")[0].endswith(WHOLE)]


def collapse(path: str) -> str:
    """The path with the numbers of layers replaced by *."""
    return re.sub(r"\.\d+\.", ".*.", path)


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return ".lora_" in name


def frozen_base(names: Iterable[str]) -> set[str]:
    """The parameters of modules that have adapters, without the adapters: ``lora.base`` is their dtype."""
    names = list(names)
    adapted_modules = {name.split(".")[0] for name in names if is_adapter(name)}
    return {name for name in names if name.split(".")[0] in adapted_modules and not is_adapter(name)}


def lora_init_stats(module: nn.Module) -> dict[str, tuple[float, float]]:
    """(mean, std) of the normal from which each adapter parameter in a module is drawn, by name: A with PEFT's
    std, B zero. Magnitudes are computed from the weights by ``init_magnitudes``."""
    stats = {}
    for name, linear in module.named_modules():
        if isinstance(linear, LowRankLinear):
            stats[f"{name}.lora_down.weight"] = (0.0, (3 * linear.in_features) ** -0.5)
            stats[f"{name}.lora_up.weight"] = (0.0, 0.0)
            stats[f"{name}.lora_magnitude"] = (1.0, 0.0)
    return stats


@torch.no_grad()
def init_magnitudes(model: nn.Module, skip: Collection[str] = ()) -> None:
    """Make DoRA start out equal to its base: each magnitude, unless ``skip`` names it, becomes the norm of its weight
    row. Call it once the weights have their values."""
    for name, linear in model.named_modules():
        is_dora = isinstance(linear, LowRankLinear) and linear.lora_magnitude is not None
        if is_dora and f"{name}.lora_magnitude" not in skip:
            linear.lora_magnitude.copy_(row_lengths(linear.weight))


def merge(base_OI: Tensor, down_RI: Tensor, up_OR: Tensor, magnitude_O: Tensor | None, config: LoraConfig) -> Tensor:
    """A linear's weight with its adapter merged into it, float32 (O, I). ``magnitude_O`` is DoRA's."""
    weight_OI = adapted(base_OI, down_RI, up_OR, config.scale)
    if magnitude_O is not None:
        weight_OI *= (magnitude_O.float() / row_lengths(weight_OI))[:, None]
    return weight_OI

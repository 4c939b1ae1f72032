"""Low-rank adapters on named linears of any tower.

    LoRA     y = x @ W.T + b + s * (dropout(x) @ A.T) @ B.T                          (Hu et al. 2021)
    DoRA     y = m / |W + s * B @ A| * (x @ W.T + s * (dropout(x) @ A.T) @ B.T) + b  (Liu et al. 2024, 2402.09353)

s is alpha / r, or alpha / sqrt(r) with ``rslora`` (Kalajdzievski 2023). |.| is the length of each row; no gradient goes
through it (section 4.3 of the paper). A begins random and B zero, so an adapted model begins as its base.

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


class LowRankLinear(nn.Linear):
    """A linear with its adapters as children, so that its own parameters keep their names."""

    def __init__(self, base: nn.Linear, config: LoraConfig):
        # On meta: the weights are those of the base.
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.dropout, self.scale = config.dropout, config.scale
        self.lora_down = nn.Linear(base.in_features, config.rank, bias=False)
        self.lora_up = nn.Linear(config.rank, base.out_features, bias=False)
        self.lora_magnitude = nn.Parameter(torch.empty(base.out_features)) if config.dora else None

    def forward(self, x_TI: Tensor) -> Tensor:
        # Where no graph is built (validation, generation, a tower that is frozen) nothing is dropped.
        drops = self.dropout > 0 and self.training and torch.is_grad_enabled()
        dropped_TI = F.dropout(x_TI, self.dropout) if drops else x_TI
        adapted_TO = self.lora_up(self.lora_down(dropped_TI) * self.scale)
        if self.lora_magnitude is None:
            return F.linear(x_TI, self.weight, self.bias) + adapted_TO
        with torch.no_grad():
            length_O = row_lengths(adapted(self.weight, self.lora_down.weight, self.lora_up.weight, self.scale))
        y_TO = (F.linear(x_TI, self.weight) + adapted_TO) * (self.lora_magnitude / length_O).to(x_TI.dtype)
        return y_TO if self.bias is None else y_TO + self.bias


def adapted(weight_OI: Tensor, down_RI: Tensor, up_OR: Tensor, scale: float) -> Tensor:
    """W + s * B @ A in float32."""
    return weight_OI.float() + scale * (up_OR.float() @ down_RI.float())


def row_lengths(weight_OI: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight_OI.float(), dim=1)


def apply_lora(model: nn.Module, config: LoraConfig) -> None:
    """Give adapters to the linears of the model's towers that a target names: a pattern of paths from the root, in
    which * stands for anything. Raises ValueError for a target that names none."""
    paths = adaptable(model)
    chosen = {target: fnmatch.filter(paths, target) for target in config.targets}
    for target, found in chosen.items():
        if not found:
            known = sorted({collapse(path) for path in paths})
            near = difflib.get_close_matches(target, known, n=4, cutoff=0.4) or known
            raise ValueError(f"model.lora.targets names {target!r}, which is no linear: the nearest are {near}")
    for path in paths:
        if any(path in found for found in chosen.values()):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LowRankLinear(model.get_submodule(path), config))


def adaptable(model: nn.Module) -> list[str]:
    """Paths of the linears of every tower; projectors are small, and train whole."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linears if not name.split(".")[0].endswith("projector")]


def collapse(path: str) -> str:
    """Paths of all layers as one: numbers become *."""
    return re.sub(r"\.\d+\.", ".*.", path)


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return ".lora_" in name


def frozen_base(names: Iterable[str]) -> set[str]:
    """The parameters of towers that have adapters, adapters apart: what ``lora.base`` speaks of."""
    names = list(names)
    towers = {name.split(".")[0] for name in names if is_adapter(name)}
    return {name for name in names if name.split(".")[0] in towers and not is_adapter(name)}


def lora_start(module: nn.Module) -> dict[str, tuple[float, float]]:
    """Random start of the adapters in a module, (mean, std) of a normal by parameter name: A with the spread that PEFT
    gives it, B zero. Magnitudes need their weights: ``start_magnitudes``."""
    start = {}
    for name, linear in module.named_modules():
        if isinstance(linear, LowRankLinear):
            start[f"{name}.lora_down.weight"] = (0.0, (3 * linear.in_features) ** -0.5)
            start[f"{name}.lora_up.weight"] = (0.0, 0.0)
            start[f"{name}.lora_magnitude"] = (1.0, 0.0)
    return start


@torch.no_grad()
def start_magnitudes(model: nn.Module, skip: Collection[str] = ()) -> None:
    """DoRA begins as the base: each magnitude is the length of its row, but for those named in ``skip``. Called when
    the weights have their values."""
    for name, linear in model.named_modules():
        is_dora = isinstance(linear, LowRankLinear) and linear.lora_magnitude is not None
        if is_dora and f"{name}.lora_magnitude" not in skip:
            linear.lora_magnitude.copy_(row_lengths(linear.weight))


def merge(base_OI: Tensor, down_RI: Tensor, up_OR: Tensor, magnitude_O: Tensor | None, config: LoraConfig) -> Tensor:
    """A linear's weight with its adapter in it, float32 (O, I). ``magnitude_O``: of DoRA."""
    weight_OI = adapted(base_OI, down_RI, up_OR, config.scale)
    if magnitude_O is not None:
        weight_OI *= (magnitude_O.float() / row_lengths(weight_OI))[:, None]
    return weight_OI

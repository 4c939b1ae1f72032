"""AdamW whose moments are held in bf16: 4 bytes a parameter in place of 8.

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    w = w (1 - lr d) - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

Everything is computed in float32, then m and v are rounded at random, up with the probability that makes the mean
right. Rounded to the nearest, a moment that changes by less than 1 / 256 of itself in a step would not change at all:
with b2 = 0.999 that is v, whenever gradients shrink.

The random bits are a hash of the parameter's name, the step and the place in the whole parameter: the same on any
layout of ranks, and after a resume.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

PIECE = 2**23  # numbers of a parameter that are updated together: their bits and sums take 44 bytes each meanwhile
MASK = 2**32 - 1
MULTIPLIER = 0x45D9F3B  # of a 32-bit hash by Thomas Mueller: each bit of the input flips each of the result's with 50 %


class BF16MomentsAdamW(torch.optim.AdamW):
    """``keys`` of a group: a number for each of its parameters, by which their random bits differ."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for parameter, key in zip(group["params"], group["keys"], strict=True):
                if parameter.grad is not None:
                    self._update(parameter, key, group)

    def _update(self, parameter: Tensor, key: int, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state["step"] += 1
        shards = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        rows = max(1, PIECE // max(1, math.prod(parameter.shape[1:])))
        first_row = 0
        for piece in zip(*(local(tensor).split(rows) for tensor in shards), strict=True):
            bits = hashed(places(parameter, first_row, len(piece[0])), key, state["step"])
            _update_piece(*piece, bits, state["step"], group)
            first_row += rows


def _update_piece(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, bits: Tensor, step: Tensor, group: dict[str, Any]
) -> None:
    beta1, beta2 = group["betas"]
    mean = first.float().lerp_(gradient, 1 - beta1)
    square = second.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    scale = (square / (1 - beta2**step)).sqrt_().add_(group["eps"]).mul_((1 - beta1**step) / -group["lr"])
    weight.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(mean, scale)
    first.copy_(rounded(mean, bits & 0xFFFF))
    second.copy_(rounded(square, bits >> 16))


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it: the storage itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def places(parameter: Tensor, first_row: int, num_rows: int) -> Tensor:
    """int64, of the shape of so many rows that this rank holds: the place of each number in the whole parameter,
    flattened."""
    shape, offset, size = parameter.shape, (0,) * parameter.ndim, parameter.shape
    if isinstance(parameter, DTensor):
        size, offset = compute_local_shape_and_global_offset(shape, parameter.device_mesh, parameter.placements)
    offset, size = (offset[0] + first_row, *offset[1:]), (num_rows, *size[1:])
    place = torch.zeros((), dtype=torch.int64, device=parameter.device)
    for dim, (first, length) in enumerate(zip(offset, size)):
        along = torch.arange(first, first + length, device=parameter.device) * math.prod(shape[dim + 1 :])
        place = place.unsqueeze(-1) + along
    return place


def hashed(place: Tensor, key: int, step: Tensor) -> Tensor:
    """32 random bits for each place, int64."""
    x = (place + (step.long() * 0x9E3779B1 + key)) & MASK
    for _ in range(2):
        x = ((x >> 16) ^ x) * MULTIPLIER & MASK
    return (x >> 16) ^ x


def rounded(x: Tensor, bits: Tensor) -> Tensor:
    """float32 to bf16, up or down at random. ``bits``: 0 to 2^16 - 1, equally likely."""
    cut = (x.view(torch.int32) + bits.int()) & -(2**16)
    return cut.view(torch.float32).to(torch.bfloat16)

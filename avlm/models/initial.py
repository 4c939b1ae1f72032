"""Random initial values, the same for every layout of ranks."""

import math
import zlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from avlm.models.avlm import AVLM
from avlm.models.lora import init_magnitudes

BLOCK = 2**20  # numbers that are drawn together: 4 MiB


class Drawn:
    """Random initial values of a parameter, float32 on the CPU, drawn where they are read: whole blocks of rows, of
    about BLOCK numbers, each from a generator of its own. So a rank draws about what it holds, and values do not depend
    on the sharding."""

    def __init__(self, shape: torch.Size, mean: float, std: float, name: str) -> None:
        self.shape = shape
        self.mean = mean
        self.std = std
        self.name = name
        self.rows_per_block = max(1, BLOCK // max(1, math.prod(shape[1:])))

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, region: tuple[slice, ...]) -> Tensor:
        """``region``: a slice of each dim."""
        if not self.shape:
            return self._block(0)
        start, end, _ = region[0].indices(self.shape[0])
        first = start // self.rows_per_block
        blocks = [self._block(number) for number in range(first, -(-end // self.rows_per_block))]
        skipped = first * self.rows_per_block
        return torch.cat([torch.empty(0, *self.shape[1:]), *blocks])[
            (slice(start - skipped, end - skipped), *region[1:])
        ]

    def whole(self) -> Tensor:
        return self[tuple(slice(length) for length in self.shape)]

    def _block(self, number: int) -> Tensor:
        shape = list(self.shape)
        if shape:
            shape[0] = min(self.rows_per_block, shape[0] - number * self.rows_per_block)
        name = f"{self.name} {number}" if number else self.name
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))  # it uses 32 bits
        return torch.empty(shape).normal_(self.mean, self.std, generator=generator)


def initial_values(model: AVLM, seed: int, skip: Collection[str] = ()) -> Iterator[tuple[str, Drawn]]:
    """The random initial values of every parameter, except ``skip``."""
    modules: dict[str, Any] = dict(model.named_children())
    stats = {name: module.init_stats() for name, module in modules.items()}
    for name, parameter in model.named_parameters():
        if name in skip:
            continue
        module, _, inner = name.partition(".")
        mean, std = stats[module][inner]
        yield name, Drawn(parameter.shape, mean, std, f"{seed} {name}")


@torch.no_grad()
def init(model: AVLM, seed: int = 0) -> None:
    """Random initial values for every part of an unsharded model."""
    for name, value in initial_values(model, seed):
        model.get_parameter(name).copy_(value.whole())
    init_magnitudes(model)

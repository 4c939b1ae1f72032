"""Dataclasses whose tensors are made on the host and move to a device together."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import torch


@dataclass(frozen=True)
class Movable:
    """Fields that can move do: tensors, segments, and other dataclasses of this kind."""

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        """A copy on a device. It is not waited for if the memory is pinned."""
        moved: dict[str, Any] = {}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if hasattr(value, "to"):
                moved[entry.name] = value.to(device, non_blocking=non_blocking)
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> Self:
        """A copy with its tensors in pinned memory, from which a device reads while the host goes on."""
        pinned: dict[str, Any] = {}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if hasattr(value, "pin_memory"):
                pinned[entry.name] = value.pin_memory()
        return dataclasses.replace(self, **pinned)

"""How a packed row of tokens is cut into sequences that must not see each other."""

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: the row index of a batch is made once
class Segments:
    """Boundaries of N segments (documents, images, audio clips) in a packed row of tokens.

    cu_seqlens   int32 (N + 1,): segment n holds rows cu_seqlens[n] to cu_seqlens[n + 1]; zero-length segments are legal
    max_length   the longest segment, a Python int so that no kernel launch has to ask the device
    lengths      int32 (N,) or None: the used part of each slot, for caches with spare room at the end of a slot
    """

    cu_seqlens: Tensor
    max_length: int
    lengths: Tensor | None = None

    @staticmethod
    def of(lengths: list[int], device: torch.device | str | None = None) -> "Segments":
        """Segments of these lengths, one after the other."""
        cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Segments(cu_seqlens.to(device) if device is not None else cu_seqlens, max(lengths, default=0))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Segments":
        move = lambda t: None if t is None else t.to(device, non_blocking=non_blocking)
        moved = Segments(move(self.cu_seqlens), self.max_length, move(self.lengths))
        if self.cu_seqlens.device.type == "cpu":
            moved.__dict__["spans"] = self.spans  # known here, so that nobody has to ask the device
        return moved

    def __len__(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """(first row, used length) of every segment, on the host. Waits for the device: for the reference path only."""
        starts = self.cu_seqlens.tolist()
        used = self.lengths.tolist() if self.lengths is not None else [b - a for a, b in itertools.pairwise(starts)]
        return list(zip(starts, used))

    def check(self, num_rows: int) -> None:
        """ValueError unless the boundaries cut exactly ``num_rows`` rows. Waits for the device: for debugging."""
        starts = self.cu_seqlens.tolist()
        ascending = all(a <= b for a, b in itertools.pairwise(starts))
        if self.cu_seqlens.dtype != torch.int32 or starts[:1] != [0] or starts[-1] != num_rows or not ascending:
            raise ValueError(
                f"cu_seqlens must be int32 and ascend from 0 to {num_rows}, not {self.cu_seqlens.dtype} {starts}"
            )
        slots = [b - a for a, b in itertools.pairwise(starts)]
        used = slots if self.lengths is None else self.lengths.tolist()
        if len(used) != len(slots) or any(not 0 <= n <= slot for n, slot in zip(used, slots)):
            raise ValueError(f"lengths {used} do not fit into slots of {slots} rows")

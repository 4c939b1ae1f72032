"""How a packed row of tokens is cut into segments that must not see each other."""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Intervals:
    """Masks of the form "query i sees the keys first_i to last_i of its segment": sliding windows, chunks, prefixes and
    images whose rows see each other. They replace the causal mask.

    Rows are counted from the first one of the segment, int32; 0 <= first_i, and last_i < first_i means no key. Neither
    first nor last falls from one query of a segment to the next, so that tiles of queries see ranges of keys, and the
    reverse.

    first_T, last_T               keys that each query sees
    first_query_S, last_query_S   queries that see each key
    """

    first_T: Tensor
    last_T: Tensor
    first_query_S: Tensor
    last_query_S: Tensor

    @staticmethod
    def of(first_T: Tensor, last_T: Tensor, segments: "Segments", segments_k: "Segments") -> "Intervals":
        """From what the queries see, on the host; ``first_T`` may begin before a segment. ValueError if first or last
        falls within a segment."""
        num_keys = len(first_T) if segments_k is segments else int(segments_k.cu_seqlens[-1])
        first_T = first_T.int().clamp(min=0)
        last_T = last_T.int()
        first_query_S = torch.zeros(num_keys, dtype=torch.int32)
        last_query_S = first_query_S - 1
        for (q_start, Q), (k_start, L) in zip(segments.spans, segments_k.spans, strict=True):
            first_Q = first_T[q_start : q_start + Q].contiguous()
            last_Q = last_T[q_start : q_start + Q].contiguous()
            if (first_Q.diff() < 0).any() or (last_Q.diff() < 0).any():
                raise ValueError(
                    "first_T and last_T must not fall within a segment: query tiles would see no range of keys"
                )
            key_L = torch.arange(L, dtype=torch.int32)
            first_query_S[k_start : k_start + L] = torch.searchsorted(last_Q, key_L, out_int32=True)
            last_query_S[k_start : k_start + L] = torch.searchsorted(first_Q, key_L, right=True, out_int32=True) - 1
        return Intervals(first_T, last_T, first_query_S, last_query_S)

    @staticmethod
    def sliding(segments: "Segments", window: int) -> "Intervals":
        """Causal windows: query i sees the keys i - window + 1 to i. On the host."""
        length_N = segments.cu_seqlens.diff()
        start_T = segments.cu_seqlens[:-1].repeat_interleave(length_N)
        row_T = torch.arange(len(start_T), dtype=torch.int32) - start_T
        return Intervals((row_T - window + 1).clamp(min=0), row_T, row_T.clone(), row_T + window - 1)

    def check(self, segments: "Segments", segments_k: "Segments") -> None:
        """ValueError unless they keep what is said above. Waits for the device: for debugging only."""
        first_T, last_T = self.first_T.cpu(), self.last_T.cpu()
        if (first_T < 0).any():
            raise ValueError(f"first_T must not be negative: {int(first_T.min())}")
        expected = Intervals.of(first_T, last_T, segments.to("cpu"), segments_k.to("cpu"))
        seen_S = expected.first_query_S <= expected.last_query_S
        first_query_S, last_query_S = (x.cpu()[: len(seen_S)] for x in (self.first_query_S, self.last_query_S))
        last_S = torch.zeros_like(last_query_S)
        for (_, Q), (start, L) in zip(segments.spans, segments_k.spans):
            last_S[start : start + L] = Q - 1
        same_S = (first_query_S == expected.first_query_S) & (last_query_S.minimum(last_S) == expected.last_query_S)
        none_S = first_query_S > last_query_S.minimum(last_S)
        if not torch.where(seen_S, same_S, none_S).all():
            raise ValueError("first_query_S and last_query_S are not the queries that see each key")

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Intervals":
        tensors = (self.first_T, self.last_T, self.first_query_S, self.last_query_S)
        return Intervals(*(x.to(device, non_blocking=non_blocking) for x in tensors))

    def pin_memory(self) -> "Intervals":
        tensors = (self.first_T, self.last_T, self.first_query_S, self.last_query_S)
        return Intervals(*(x.pin_memory() for x in tensors))


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, so that layers can share a cache
class Segments:
    """Boundaries of N segments (documents, images, audio clips) in a packed row of tokens.

    cu_seqlens   int32 (N + 1,): segment n is rows cu_seqlens[n] to cu_seqlens[n + 1]; it may be empty
    max_length   the longest segment, a Python int so that no kernel launch waits for the device
    lengths      int32 (N,) or None: used rows of each segment, which is then a slot with spare room at its end
    intervals    which keys each query sees, or None: all of its segment, up to its own place if attention is causal
    """

    cu_seqlens: Tensor
    max_length: int
    lengths: Tensor | None = None
    intervals: Intervals | None = None

    @staticmethod
    def of(lengths: list[int], device: torch.device | str | None = None) -> "Segments":
        """Segments of these lengths, one after the other."""
        cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        segments = Segments(cu_seqlens, max(lengths, default=0))
        return segments if device is None else segments.to(device)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Segments":
        cu_seqlens = self.cu_seqlens.to(device, non_blocking=non_blocking)
        lengths = None
        if self.lengths is not None:
            lengths = self.lengths.to(device, non_blocking=non_blocking)
        intervals = None
        if self.intervals is not None:
            intervals = self.intervals.to(device, non_blocking=non_blocking)
        moved = Segments(cu_seqlens, self.max_length, lengths, intervals)
        if self.cu_seqlens.device.type == "cpu":
            moved.__dict__.update(spans=self.spans, num_rows=self.num_rows)  # without waiting for the device
        return moved

    def within(self, window: int) -> "Segments":
        """The same segments with a sliding window, see ``Intervals.sliding``; for causal attention. On the host."""
        assert self.lengths is None and self.intervals is None
        if self.max_length <= window:  # the causal mask says it all
            return self
        return replace(self, intervals=Intervals.sliding(self, window))

    def pin_memory(self) -> Self:
        """A copy whose tensors are in pinned memory."""
        pinned: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if hasattr(value, "pin_memory"):
                pinned[entry.name] = value.pin_memory()
        return replace(self, **pinned)

    def __len__(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @cached_property
    def num_rows(self) -> int:
        """Rows up to the end of the last segment, on the host. Waits for the device, unless they come from the host."""
        return int(self.cu_seqlens[-1])

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """(first row, used length) of every segment, on the host. Waits for the device: for the reference path only."""
        starts = self.cu_seqlens[:-1].tolist()
        used = self.cu_seqlens.diff() if self.lengths is None else self.lengths
        return list(zip(starts, used.tolist()))

    def check(self, num_rows: int) -> None:
        """ValueError unless the boundaries cut exactly ``num_rows`` rows. Waits for the device: for debugging only."""
        bounds = self.cu_seqlens.tolist()
        whole = bounds == sorted(bounds) and bounds[:1] == [0] and bounds[-1:] == [num_rows]
        if self.cu_seqlens.dtype != torch.int32 or not whole:
            raise ValueError(
                f"cu_seqlens must be int32 and ascend from 0 to {num_rows}, not {self.cu_seqlens.dtype} {bounds}"
            )
        slots = self.cu_seqlens.diff().tolist()
        if max(slots, default=0) > self.max_length:  # FlashAttention would leave out what lies beyond
            raise ValueError(f"a segment has {max(slots)} rows, more than max_length={self.max_length}")
        used = slots if self.lengths is None else self.lengths.tolist()
        if len(used) != len(slots) or any(not 0 <= n <= slot for n, slot in zip(used, slots)):
            raise ValueError(f"lengths {used} do not fit into slots of {slots} rows")

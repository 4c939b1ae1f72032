"""Packed rows and heads that attention is measured on, and what they cost.

FLOPs are counted as flash attention's benchmarks count them, for segments of Q queries and L keys:

    forward = 4 Q L E H, halved when causal        backward = 2.5 forward

A backward that computes seven matrix products instead of five is credited with five all the same. Bytes are q, k, v,
out and the log-sum-exp (float32) once; the backward reads these and dout, and writes dq, dk and dv. Decoding reads each
used row of the cache once.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

TINY = 64  # without a GPU, token counts are divided by this, and head counts by 8


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Segments of a packed row, and a model's heads. With ``decode`` each segment has one query, its newest token."""

    name: str = "own shape"
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int = 0  # 0: as many as query heads
    head_dim: int
    causal: bool = False
    decode: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        if (
            not self.lengths
            or min(*self.lengths, self.heads, self.kv_heads, self.head_dim) < 1
            or self.heads % self.kv_heads
        ):
            raise ValueError(
                f"lengths, heads, kv_heads and head_dim must be positive, and kv_heads divide heads: {self}"
            )

    @property
    def x(self) -> int:
        return max(self.lengths)

    @property
    def q_lengths(self) -> tuple[int, ...]:
        return (1,) * len(self.lengths) if self.decode else self.lengths

    def flops(self, mode: str) -> float:
        num_scores = sum(Q * L for Q, L in zip(self.q_lengths, self.lengths)) * self.heads
        forward = 4 * num_scores * self.head_dim
        if self.causal:
            forward /= 2
        return 2.5 * forward if mode == "bwd" else forward

    def num_bytes(self, mode: str, dtype: torch.dtype) -> int:
        query_rows = 2 * sum(self.q_lengths) * self.heads  # q, out
        key_rows = 2 * sum(self.lengths) * self.kv_heads  # k, v
        lse = 0 if self.decode else 4 * sum(self.q_lengths) * self.heads
        if mode == "bwd":
            query_rows *= 2  # and dout, dq
            key_rows *= 2  # and dk, dv
        return (query_rows + key_rows) * self.head_dim * dtype.itemsize + lse

    def tiny(self) -> "Shape":
        lengths = tuple(max(8, length // TINY) for length in self.lengths)
        group = self.heads // self.kv_heads
        kv_heads = max(1, self.kv_heads // 8)
        return replace(self, lengths=lengths, heads=group * kv_heads, kv_heads=kv_heads)


def packed_documents(
    num_tokens: int = 16384, shortest: int = 200, longest: int = 4000, seed: int = 0
) -> tuple[int, ...]:
    """Random lengths of documents that fill a row exactly."""
    rng = random.Random(seed)
    lengths = []
    left = num_tokens
    while left > longest:
        length = rng.randint(shortest, min(longest, left - shortest))
        lengths.append(length)
        left -= length
    return (*lengths, left)


def _convention() -> Iterator[Shape]:
    """The shapes of flash attention's own benchmark: 16k tokens, model width 2048."""
    lengths = (512, 1024, 2048, 4096, 8192, 16384)
    for head_dim, causal, length in itertools.product((64, 128, 256), (False, True), lengths):
        batch = 16384 // length
        yield Shape(
            name=f"batch {batch}",
            lengths=(length,) * batch,
            heads=2048 // head_dim,
            head_dim=head_dim,
            causal=causal,
        )


def _avlm() -> Iterator[Shape]:
    """Models that this trainer trains: CLIP ViT-L/14 at 336 pixels, Whisper large, Llama-3-8B."""
    for images in (16, 64):
        yield Shape(name=f"CLIP {images} images", lengths=(577,) * images, heads=16, head_dim=64)
    for clips in (8, 32):
        yield Shape(name=f"Whisper {clips} clips", lengths=(1500,) * clips, heads=20, head_dim=64)
    for length in (2048, 4096, 8192, 16384, 32768):
        yield Shape(name="Llama-3-8B", lengths=(length,), heads=32, kv_heads=8, head_dim=128, causal=True)


def _others() -> Iterator[Shape]:
    """Heads of other models: SigLIP so400m at 384 pixels, the tower of Qwen2-VL, Qwen2.5, Gemma."""
    yield Shape(name="SigLIP 16 images", lengths=(729,) * 16, heads=16, head_dim=72)
    yield Shape(name="Qwen2-VL tower 16 images", lengths=(1024,) * 16, heads=16, head_dim=80)
    for length in (4096, 32768):
        yield Shape(name="Qwen2.5-0.5B", lengths=(length,), heads=14, kv_heads=2, head_dim=64, causal=True)
        yield Shape(name="Qwen2.5-7B", lengths=(length,), heads=28, kv_heads=4, head_dim=128, causal=True)
    yield Shape(name="Gemma-2-2B", lengths=(8192,), heads=8, kv_heads=4, head_dim=256, causal=True)


def _long() -> Iterator[Shape]:
    for length in (65536, 131072):
        yield Shape(name="Llama-3-8B", lengths=(length,), heads=32, kv_heads=8, head_dim=128, causal=True)


def _packed() -> Iterator[Shape]:
    lengths = packed_documents()
    yield Shape(name="documents 32/8 heads", lengths=lengths, heads=32, kv_heads=8, head_dim=128, causal=True)
    yield Shape(name="documents 14/2 heads", lengths=lengths, heads=14, kv_heads=2, head_dim=64, causal=True)
    yield Shape(name="documents 16 heads", lengths=lengths, heads=16, head_dim=64)


def _decode() -> Iterator[Shape]:
    for batch in (1, 2, 4, 8, 16, 32):
        for length in (8192, 16384, 32768, 65536):
            lengths = (length,) * batch
            yield Shape(name=f"batch {batch}", lengths=lengths, heads=32, kv_heads=8, head_dim=128, decode=True)


SHAPES = {
    "convention": _convention,
    "avlm": _avlm,
    "packed": _packed,
    "others": _others,
    "long": _long,
    "decode": _decode,
}

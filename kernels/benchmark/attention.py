"""Attention and its peers, on packed rows and in decoding.

FLOPs are counted as flash attention's benchmarks count them, for segments of Q queries and L keys:

    forward = 4 Q L E H, halved when causal        backward = 2.5 forward

A backward that computes seven matrix products instead of five is credited with five all the same. Decoding counts
bytes: each used row of the cache read once, queries read, outputs written.

Errors are measured on one key/value head and its query heads in the longest segment (the last one, if several are
longest), against the formula in float64. The error ratio is relative to the same formula (matmul, softmax, matmul) in
the dtype under test; SDPA's math backend would compute bf16 in float32. Each number is the worst of all gradients.

G query heads that share a key/value head   Q queries, L keys of a segment   E head dim
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.benchmark import measure
from kernels.benchmark.attention_providers import DECODE_PROVIDERS, PROVIDERS, Case, Provider
from kernels.segments import Segments

CHUNK = 1024  # queries whose scores are in memory at a time while errors are measured
TINY = 256  # without a GPU, token counts are divided by this, and head counts by 8


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Segments of a packed row, and a model's heads. With ``decode`` each segment has one query, its newest token."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool = False
    decode: bool = False

    @property
    def q_lengths(self) -> tuple[int, ...]:
        return (1,) * len(self.lengths) if self.decode else self.lengths

    def flops(self, mode: str) -> float:
        num_scores = sum(Q * L for Q, L in zip(self.q_lengths, self.lengths)) * self.heads
        forward = 4 * num_scores * self.head_dim
        if self.causal:
            forward /= 2
        return 2.5 * forward if mode == "bwd" else forward

    def num_bytes(self, dtype: torch.dtype) -> int:
        cache_rows = 2 * sum(self.lengths) * self.kv_heads
        query_rows = 2 * sum(self.q_lengths) * self.heads
        return (cache_rows + query_rows) * self.head_dim * dtype.itemsize

    def tiny(self) -> "Shape":
        lengths = tuple(max(2, length // TINY) for length in self.lengths)
        return replace(self, lengths=lengths, heads=self.heads // 8, kv_heads=self.kv_heads // 8)


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
    for head_dim, causal, length in itertools.product((64, 128), (False, True), lengths):
        heads = 2048 // head_dim
        batch = 16384 // length
        yield Shape(
            name=f"batch {batch}",
            lengths=(length,) * batch,
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            causal=causal,
        )


def _avlm() -> Iterator[Shape]:
    """Models that this trainer trains: CLIP ViT-L/14 at 336 pixels, Whisper large, Llama-3-8B."""
    for images in (16, 64):
        yield Shape(name=f"CLIP {images} images", lengths=(577,) * images, heads=16, kv_heads=16, head_dim=64)
    for clips in (8, 32):
        yield Shape(name=f"Whisper {clips} clips", lengths=(1500,) * clips, heads=20, kv_heads=20, head_dim=64)
    for length in (2048, 4096, 8192, 16384, 32768):
        yield Shape(name="Llama-3-8B", lengths=(length,), heads=32, kv_heads=8, head_dim=128, causal=True)


def _packed() -> Iterator[Shape]:
    lengths = packed_documents()
    yield Shape(name="documents 32/8 heads", lengths=lengths, heads=32, kv_heads=8, head_dim=128, causal=True)
    yield Shape(name="documents 16 heads", lengths=lengths, heads=16, kv_heads=16, head_dim=64)


def _decode() -> Iterator[Shape]:
    for batch in (1, 2, 4, 8, 16, 32):
        for length in (8192, 16384, 32768, 65536):
            lengths = (length,) * batch
            yield Shape(name=f"batch {batch}", lengths=lengths, heads=32, kv_heads=8, head_dim=128, decode=True)


SHAPES = {"convention": _convention, "avlm": _avlm, "packed": _packed, "decode": _decode}
FORWARD_ONLY = ("decode",)


def run(shapes: str, modes: tuple[str, ...], session: measure.Session) -> Iterator[list[dict]]:
    """The rows of each shape and direction in turn."""
    for shape in SHAPES[shapes]():
        if session.device != "cuda":
            shape = shape.tiny()
        case = make_case(shape, session)
        exact, baseline = _reference(case)
        for mode in modes:
            yield _rows(shape, case, mode, exact, baseline, session)


def make_case(shape: Shape, session: measure.Session) -> Case:
    """Normal random numbers: zeros would run faster and hide errors."""
    generator = torch.Generator(session.device).manual_seed(0)

    def normal(rows: int, heads: int) -> Tensor:
        size = (rows, heads, shape.head_dim)
        return torch.randn(size, generator=generator, device=session.device, dtype=session.dtype)

    T, S = sum(shape.q_lengths), sum(shape.lengths)
    segments_k = Segments.of(list(shape.lengths)).to(session.device)
    segments = segments_k
    if shape.decode:
        segments = Segments.of(list(shape.q_lengths)).to(session.device)
    return Case(
        q_THE=normal(T, shape.heads).requires_grad_(),
        k_SKE=normal(S, shape.kv_heads).requires_grad_(),
        v_SKE=normal(S, shape.kv_heads).requires_grad_(),
        grad_THE=normal(T, shape.heads),
        segments=segments,
        segments_k=segments_k,
        causal=shape.causal,
    )


def _rows(
    shape: Shape,
    case: Case,
    mode: str,
    exact: dict[str, Tensor],
    baseline: dict[str, float],
    session: measure.Session,
) -> list[dict]:
    def prepare(provider: Provider):
        call, results = _prepare_call(provider, case, mode)
        errors = {key: measure.relative_error(_sample(case, key, x), exact[key]) for key, x in results.items()}
        ratios = [error / baseline[key] for key, error in errors.items()]
        return call, {"error": measure.worst(errors.values()), "error_ratio": measure.worst(ratios)}

    common = {
        "kernel": "decode_attention" if shape.decode else "attention",
        "mode": mode,
        "shape": shape.name,
        "x": max(shape.lengths),
        "head_dim": shape.head_dim,
        "causal": shape.causal,
    }
    if shape.decode:
        amount = {"num_bytes": shape.num_bytes(session.dtype)}
        return measure.compare(DECODE_PROVIDERS, prepare, common, amount, session)
    return measure.compare(PROVIDERS, prepare, common, {"flops": shape.flops(mode)}, session)


def _prepare_call(provider: Provider, case: Case, mode: str) -> tuple[Callable, dict[str, Tensor]]:
    """The call to be timed and its results, from a first call. A backward is timed without its forward."""
    forward = provider(case, mode)
    if mode == "fwd":
        call = torch.no_grad()(lambda: forward(*case.leaves))
        return call, {"out": call()}
    out = forward(*case.leaves)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, case.leaves, case.grad_THE, retain_graph=True)

    return backward, dict(zip(("dq", "dk", "dv"), backward()))


def _reference(case: Case) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The exact values of the sample, in float64, and the errors of plain PyTorch in the dtype of the case."""
    q_GQE = _sample(case, "q", case.q_THE.detach())
    k_LE = _sample(case, "k", case.k_SKE.detach())
    v_LE = _sample(case, "v", case.v_SKE.detach())
    grad_GQE = _sample(case, "out", case.grad_THE)
    exact = formula(q_GQE, k_LE, v_LE, grad_GQE, case.causal, torch.float64)
    plain = formula(q_GQE, k_LE, v_LE, grad_GQE, case.causal, case.q_THE.dtype)
    return exact, {key: measure.relative_error(plain[key], x) for key, x in exact.items()}


def _sample(case: Case, key: str, x: Tensor) -> Tensor:
    """The part of a tensor whose error is measured: (L, E) of keys, values and their gradients, (G, Q, E) of others."""
    lengths = [length for _, length in case.segments_k.spans]
    longest = max(range(len(lengths)), key=lambda n: (lengths[n], n))
    of_keys = key in ("k", "v", "dk", "dv")
    start, length = (case.segments_k if of_keys else case.segments).spans[longest]
    rows = x[start : start + length]
    if of_keys:
        return rows[:, -1]
    G = case.q_THE.shape[1] // case.k_SKE.shape[1]
    return rows[:, -G:].transpose(0, 1)


def formula(
    q_GQE: Tensor, k_LE: Tensor, v_LE: Tensor, grad_GQE: Tensor, causal: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    """out, dq, dk, dv by matmul, softmax and matmul in ``dtype``, CHUNK queries at a time, summed in float64."""
    G, Q, E = q_GQE.shape
    L = k_LE.shape[0]
    k_LE = k_LE.to(dtype, copy=True).requires_grad_()
    v_LE = v_LE.to(dtype, copy=True).requires_grad_()
    out = torch.zeros_like(q_GQE, dtype=torch.float64)
    dq = torch.zeros_like(q_GQE, dtype=torch.float64)
    dk = torch.zeros_like(k_LE, dtype=torch.float64)
    dv = torch.zeros_like(v_LE, dtype=torch.float64)
    key_L = torch.arange(L, device=q_GQE.device)
    for g in range(G):
        for row_C in torch.arange(Q, device=q_GQE.device).split(CHUNK):
            q_CE = q_GQE[g, row_C].to(dtype).requires_grad_()
            s_CL = E**-0.5 * (q_CE @ k_LE.mT)
            if causal:
                hidden_CL = key_L > row_C[:, None] + L - Q
                s_CL = s_CL.masked_fill(hidden_CL, -torch.inf)
            out_CE = s_CL.softmax(-1) @ v_LE
            grad_CE = grad_GQE[g, row_C].to(dtype)
            dq_CE, dk_LE, dv_LE = torch.autograd.grad(out_CE, (q_CE, k_LE, v_LE), grad_CE)
            out[g, row_C] = out_CE.detach().double()
            dq[g, row_C] = dq_CE.double()
            dk += dk_LE
            dv += dv_LE
    return {"out": out, "dq": dq, "dk": dk, "dv": dv}

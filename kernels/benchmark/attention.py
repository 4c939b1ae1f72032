"""Attention against what else computes it, on packed rows and while decoding.

Arithmetic is counted as flash attention's benchmarks count it, per segment of Q queries and L keys:

    forward = 4 Q L E H, halved when causal        backward = 2.5 forward

so a backward that runs seven matrix products instead of five is charged for five all the same. Decoding is counted
in bytes: each used row of the cache read once, queries read, outputs written.

Errors are those of one key/value head and its query heads in the longest segment (the last of equals), against the
formula in float64; the ratio is to the same formula in matmul, softmax and matmul of the dtype under test. (SDPA's
math backend would compute bf16 in float32 and is not that.) Of gradients the worst counts, for each number.

G query heads that share a key/value head   Q queries, L keys of a segment   E head dim
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.benchmark import measure
from kernels.benchmark.attention_providers import DECODE_PROVIDERS, PROVIDERS, Case, Provider
from kernels.segments import Segments

CHUNK = 1024  # queries whose scores exist at a time while errors are measured
TINY = 256  # tokens become so many times fewer, and heads eight times, on a machine without a GPU


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Segments of a packed row and the heads of a model; ``decode``: one query for each segment, its newest token."""

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
        return 4 * num_scores * self.head_dim * (0.5 if self.causal else 1) * (2.5 if mode == "bwd" else 1)

    def num_bytes(self, dtype: torch.dtype) -> int:
        rows = 2 * sum(self.lengths) * self.kv_heads + 2 * sum(self.q_lengths) * self.heads
        return rows * self.head_dim * dtype.itemsize

    def tiny(self) -> "Shape":
        lengths = tuple(max(2, length // TINY) for length in self.lengths)
        return replace(self, lengths=lengths, heads=self.heads // 8, kv_heads=self.kv_heads // 8)


def packed_documents(
    num_tokens: int = 16384, shortest: int = 200, longest: int = 4000, seed: int = 0
) -> tuple[int, ...]:
    """Random lengths of documents that fill a row exactly."""
    draw, lengths, left = random.Random(seed), [], num_tokens
    while left > longest:
        lengths.append(draw.randint(shortest, min(longest, left - shortest)))
        left -= lengths[-1]
    return (*lengths, left)


def _convention() -> Iterator[Shape]:
    """Flash attention's own: 16k tokens, a model width of 2048."""
    for head_dim in (64, 128):
        for causal in (False, True):
            for length in (512, 1024, 2048, 4096, 8192, 16384):
                lengths, heads = (length,) * (16384 // length), 2048 // head_dim
                name = f"batch {len(lengths)}"
                yield Shape(name=name, lengths=lengths, heads=heads, kv_heads=heads, head_dim=head_dim, causal=causal)


def _avlm() -> Iterator[Shape]:
    """The models that this trainer trains: CLIP ViT-L/14 at 336 pixels, Whisper large, Llama-3-8B."""
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
    """The rows of one shape and direction after the other."""
    for shape in SHAPES[shapes]():
        shape = shape if session.device == "cuda" else shape.tiny()
        case = make_case(shape, session)
        exact, baseline = _reference(case)
        for mode in modes:
            yield _rows(shape, case, mode, exact, baseline, session)


def make_case(shape: Shape, session: measure.Session) -> Case:
    """Normal random numbers: zeros would run faster and hide errors."""
    generator = torch.Generator(session.device).manual_seed(0)
    T, S, E = sum(shape.q_lengths), sum(shape.lengths), shape.head_dim
    q, k, v, grad = (
        torch.randn(rows, heads, E, generator=generator, device=session.device, dtype=session.dtype)
        for rows, heads in ((T, shape.heads), (S, shape.kv_heads), (S, shape.kv_heads), (T, shape.heads))
    )
    segments_k = Segments.of(list(shape.lengths)).to(session.device)
    segments = Segments.of(list(shape.q_lengths)).to(session.device) if shape.decode else segments_k
    leaves = {"q_THE": q.requires_grad_(), "k_SKE": k.requires_grad_(), "v_SKE": v.requires_grad_()}
    return Case(**leaves, grad_THE=grad, segments=segments, segments_k=segments_k, causal=shape.causal)


def _rows(shape, case, mode, exact, baseline, session) -> list[dict]:
    """One row for each provider, with numbers or with the reason why there are none."""
    calls, errors, reasons = {}, {}, {}
    for name, provider in (DECODE_PROVIDERS if shape.decode else PROVIDERS).items():
        try:
            calls[name], results = _ready(provider, case, mode)
            each = {key: measure.relative_error(_sample(case, key, x), exact[key]) for key, x in results.items()}
            ratios = [error / baseline[key] for key, error in each.items()]
            errors[name] = {"error": _worst(each.values()), "error_ratio": _worst(ratios)}
        except Exception as error:  # one provider's failure is its row, not the end of the run
            calls.pop(name, None)
            reasons[name] = measure.reason(error)
    timings = measure.time_interleaved(calls, session)
    reasons |= {name: timing for name, timing in timings.items() if isinstance(timing, str)}
    amount = {"num_bytes": shape.num_bytes(session.dtype)} if shape.decode else {"flops": shape.flops(mode)}
    what = {
        "kernel": "decode_attention" if shape.decode else "attention",
        "mode": mode,
        "metric": "speed",
        "shape": shape.name,
        "x": max(shape.lengths),
        "dtype": str(session.dtype).removeprefix("torch."),
        "head_dim": shape.head_dim,
        "causal": shape.causal,
        **measure.environment(session),
    }
    rows = []
    for name in DECODE_PROVIDERS if shape.decode else PROVIDERS:
        row = {**what, "provider": name}
        if name in reasons:
            rows.append(row | {"reason": reasons[name]})
        else:
            rates = measure.speed(timings[name]["ms_p50"], session, **amount)
            rows.append(row | timings[name] | rates | errors[name])
    return rows


def _ready(provider: Provider, case: Case, mode: str):
    """The call to be timed, after a first run of it, and what it computed. A backward has its forward behind it."""
    forward = provider(case, mode)
    if mode == "fwd":
        call = torch.no_grad()(lambda: forward(*case.leaves))
        return call, {"out": call()}
    out = forward(*case.leaves)
    call = lambda: torch.autograd.grad(out, case.leaves, case.grad_THE, retain_graph=True)
    return call, dict(zip(("dq", "dk", "dv"), call()))


def _worst(errors) -> float:
    return torch.tensor(list(errors)).max().item()  # NaN wins, which it does not in Python's max


def _reference(case: Case) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What the sample should be, in float64, and how far plain PyTorch in the dtype of the case is from it."""
    inputs = [_sample(case, key, x.detach()) for key, x in zip("qkv", case.leaves)]
    inputs.append(_sample(case, "out", case.grad_THE))
    exact = formula(*inputs, case.causal, torch.float64)
    plain = formula(*inputs, case.causal, case.q_THE.dtype)
    return exact, {key: measure.relative_error(plain[key], x) for key, x in exact.items()}


def _sample(case: Case, key: str, x: Tensor) -> Tensor:
    """The part of a tensor whose error is measured: (L, E) of keys, values and their gradients, (G, Q, E) of others."""
    lengths = [length for _, length in case.segments_k.spans]
    longest = max(range(len(lengths)), key=lambda n: (lengths[n], n))
    if key in ("k", "v", "dk", "dv"):
        start, length = case.segments_k.spans[longest]
        return x[start : start + length, -1]
    start, length = case.segments.spans[longest]
    G = case.q_THE.shape[1] // case.k_SKE.shape[1]
    return x[start : start + length, -G:].transpose(0, 1)


def formula(q_GQE, k_LE, v_LE, grad_GQE, causal: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """out, dq, dk, dv by matmul, softmax and matmul in ``dtype``, CHUNK queries at a time; float64 holds the sums."""
    q_GQE, grad_GQE = q_GQE.to(dtype), grad_GQE.to(dtype)
    k_LE, v_LE = (x.to(dtype, copy=True).requires_grad_() for x in (k_LE, v_LE))
    (G, Q, E), L = q_GQE.shape, k_LE.shape[0]
    out, dq, dk, dv = (torch.zeros_like(x, dtype=torch.float64) for x in (q_GQE, q_GQE, k_LE, v_LE))
    key_L = torch.arange(L, device=q_GQE.device)
    for g in range(G):
        for row_C in torch.arange(Q, device=q_GQE.device).split(CHUNK):
            q_CE = q_GQE[g, row_C].requires_grad_()
            s_CL = E**-0.5 * (q_CE @ k_LE.mT)
            if causal:
                s_CL = s_CL.masked_fill(key_L > row_C[:, None] + L - Q, -torch.inf)
            out_CE = s_CL.softmax(-1) @ v_LE
            dq_CE, dk_LE, dv_LE = torch.autograd.grad(out_CE, (q_CE, k_LE, v_LE), grad_GQE[g, row_C])
            out[g, row_C], dq[g, row_C] = out_CE.detach().double(), dq_CE.double()
            dk += dk_LE
            dv += dv_LE
    return {"out": out, "dq": dq, "dk": dk, "dv": dv}

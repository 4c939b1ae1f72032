"""Attention and its peers, on packed rows and in decoding.

Errors are measured on two samples, a key/value head with its query heads in one segment: the last head in the longest
segment and the first head in one of median length. The exact values are those of the formula in float64; the error
ratio is relative to the same formula (matmul, softmax, matmul) in the dtype under test; SDPA's math backend would
compute bf16 in float32. Each number is the worst of all gradients and samples.

Peak memory is that of the timed call, on top of its inputs: for a backward, of the backward alone.

G query heads that share a key/value head   Q queries, L keys of a segment   E head dim
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from kernels.benchmark import measure, timing
from kernels.benchmark.attention_providers import DECODE_PROVIDERS, PROVIDERS, Case, Provider
from kernels.benchmark.attention_shapes import Shape
from kernels.segments import Segments

CHUNK = 1024  # queries whose scores are in memory at a time while errors are measured
Sample = tuple[int, int]  # a segment, a key/value head
Values = dict[tuple[str, Sample], Tensor]


def run(shapes: Iterable[Shape], modes: tuple[str, ...], session: measure.Session) -> Iterator[list[dict]]:
    """The rows of each shape and direction in turn. A shape that decodes has no backward."""
    for shape in shapes:
        if session.device != "cuda":
            shape = shape.tiny()
        case = make_case(shape, session)
        exact, baseline = _reference(case)
        for mode in modes:
            if not (shape.decode and mode == "bwd"):
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
    exact: Values,
    baseline: dict[tuple[str, Sample], float],
    session: measure.Session,
) -> list[dict]:
    def prepare(provider: Provider):
        call, results = _prepare_call(provider, case, mode)
        keys = [key for key in exact if key[0] in results]
        errors = [measure.relative_error(_part(case, name, results[name], at), exact[name, at]) for name, at in keys]
        columns = measure.error_columns(errors, [baseline[key] for key in keys])
        del results
        return call, {**columns, "peak_mib": timing.peak_mib(call, session.device)}

    common = {
        "kernel": "decode_attention" if shape.decode else "attention",
        "mode": mode,
        "shape": shape.name,
        "x": shape.x,
        "head_dim": shape.head_dim,
        "causal": shape.causal,
    }
    amount = {"num_bytes": shape.num_bytes(mode, session.dtype)}
    if shape.decode:
        return measure.compare(DECODE_PROVIDERS, prepare, common, amount, session)
    return measure.compare(PROVIDERS, prepare, common, amount | {"flops": shape.flops(mode)}, session)


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


def _reference(case: Case) -> tuple[Values, dict[tuple[str, Sample], float]]:
    """The exact values of the samples, in float64, and the errors of plain PyTorch in the dtype of the case."""
    exact, baseline = {}, {}
    for at in samples(case):
        q_GQE = _part(case, "q", case.q_THE.detach(), at)
        k_LE = _part(case, "k", case.k_SKE.detach(), at)
        v_LE = _part(case, "v", case.v_SKE.detach(), at)
        grad_GQE = _part(case, "out", case.grad_THE, at)
        right = formula(q_GQE, k_LE, v_LE, grad_GQE, case.causal, torch.float64)
        plain = formula(q_GQE, k_LE, v_LE, grad_GQE, case.causal, case.q_THE.dtype)
        for name, x in right.items():
            exact[name, at] = x
            baseline[name, at] = measure.relative_error(plain[name], x)
    return exact, baseline


def samples(case: Case) -> list[Sample]:
    spans = case.segments_k.spans
    by_length = sorted(range(len(spans)), key=lambda n: (spans[n][1], n))
    median = by_length[(len(by_length) - 1) // 2]
    return list(dict.fromkeys([(by_length[-1], case.k_SKE.shape[1] - 1), (median, 0)]))


def _part(case: Case, name: str, x: Tensor, at: Sample) -> Tensor:
    """The part of a tensor in a sample: (L, E) of keys, values and their gradients, (G, Q, E) of others."""
    segment, head = at
    of_keys = name in ("k", "v", "dk", "dv")
    start, length = (case.segments_k if of_keys else case.segments).spans[segment]
    rows = x[start : start + length]
    if of_keys:
        return rows[:, head]
    G = case.q_THE.shape[1] // case.k_SKE.shape[1]
    return rows[:, head * G : (head + 1) * G].transpose(0, 1)


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

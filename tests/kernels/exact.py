"""Packed attention in float64 next to two implementations in a smaller dtype, and the error of each."""

import torch
from torch import Tensor

from kernels.attention import attention_with_lse, attention_with_lse_reference
from kernels.segments import Segments

NAMES = ("out", "lse", "dq", "dk", "dv")


def slots(lengths: list[int], used: list[int] | None = None, device: str = "cpu") -> Segments:
    segments = Segments.of(lengths, device)
    if used is None:
        return segments
    return Segments(segments.cu_seqlens, segments.max_length, torch.tensor(used, dtype=torch.int32, device=device))


def random_inputs(
    segments: Segments, segments_k: Segments, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> list[Tensor]:
    """q, k, v, and the weights of out and of lse in a loss. Spare rows of slots are NaN."""
    T = int(segments.cu_seqlens[-1])
    S = int(segments_k.cu_seqlens[-1])
    device = segments.cu_seqlens.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    q = normal(T, heads, head_dim)
    k = normal(S, kv_heads, head_dim)
    v = normal(S, kv_heads, head_dim)
    dout = normal(T, heads, head_dim)
    dlse = normal(heads, T).float()
    for x, layout in ((q, segments), (dout, segments), (k, segments_k), (v, segments_k)):
        x[spare_rows(layout, len(x))] = torch.nan
    return [q, k, v, dout, dlse]


def spare_rows(segments: Segments, num_rows: int) -> Tensor:
    spare = torch.ones(num_rows, dtype=torch.bool, device=segments.cu_seqlens.device)
    for start, length in segments.spans:
        spare[start : start + length] = False
    return spare


def results(function, inputs: list[Tensor], dtype: torch.dtype, segments, segments_k, **options) -> dict[str, Tensor]:
    """out, lse and the gradients of q, k, v, all in float64."""
    *qkv, dout, dlse = (x.detach() for x in inputs)
    if dout.dtype != torch.float32:
        dout = dout.to(dtype)
    q, k, v = (x.to(dtype).requires_grad_() for x in qkv)
    out, lse = function(q, k, v, segments, segments_k=segments_k, **options)
    loss = (out.double() * dout.double()).sum()  # NaN with spare rows: only its gradients matter
    loss = loss + (lse.double().masked_fill(lse == -torch.inf, 0.0) * dlse.double()).sum()
    gradients = torch.autograd.grad(loss, (q, k, v))
    return {name: x.detach().double() for name, x in zip(NAMES, (out, lse, *gradients))}


def assert_as_exact_as_pytorch(
    inputs: list[Tensor], dtype: torch.dtype, segments: Segments, segments_k: Segments, **options
) -> None:
    """Our largest error is at most twice that of PyTorch in the same dtype, plus a few units in the last place: of the
    result, and for dq and dk of the gradients of probabilities, whose differences may cancel to nothing."""
    for_reference = {name: value for name, value in options.items() if name != "deterministic"}
    exact = results(attention_with_lse_reference, inputs, torch.float64, segments, segments_k, **for_reference)
    theirs = results(attention_with_lse_reference, inputs, dtype, segments, segments_k, **for_reference)
    ours = results(attention_with_lse, inputs, dtype, segments, segments_k, **options)
    q, _, v, dout, _ = (x.nan_to_num() for x in inputs)
    cancelled = 0.0
    if v.numel() and dout.numel():
        cancelled = (v.norm(dim=-1).max() * dout.norm(dim=-1).max()).item() * q.shape[-1] ** -0.5
    for name in NAMES:
        e, t, o = exact[name], theirs[name], ours[name]
        assert (o == -torch.inf).equal(e == -torch.inf), f"{name}: other rows are empty"
        finite = e.isfinite()
        if not finite.any():
            continue
        largest = e[finite].abs().max().item()
        terms = cancelled if name in ("dq", "dk") else 0.0
        floor = 4 * torch.finfo(dtype).eps * max(1.0, largest, terms)
        theirs_off, ours_off = ((x[finite] - e[finite]).abs().max().item() for x in (t, o))
        assert ours_off <= 2 * theirs_off + floor, f"{name}: {ours_off:.3g} off, PyTorch {theirs_off:.3g}"

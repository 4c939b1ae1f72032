"""Packed attention in float64 beside two implementations in a smaller dtype, and how far each of them is off."""

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
    """q, k, v, the weights of out and of lse in a loss. Rows that belong to no sequence are NaN."""
    T, S = (int(s.cu_seqlens[-1]) for s in (segments, segments_k))
    device = segments.cu_seqlens.device
    shapes = [(T, heads, head_dim), (S, kv_heads, head_dim), (S, kv_heads, head_dim), (T, heads, head_dim), (heads, T)]
    q, k, v, dout, dlse = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    for tensors, layout in (((q, dout), segments), ((k, v), segments_k)):
        unused = torch.ones(tensors[0].shape[0], dtype=torch.bool, device=device)
        for start, length in layout.spans:
            unused[start : start + length] = False
        for x in tensors:
            x[unused] = torch.nan
    return [q, k, v, dout, dlse.float()]


def results(function, inputs: list[Tensor], dtype: torch.dtype, segments, segments_k, **options) -> dict[str, Tensor]:
    """out, lse and the gradients of q, k, v, all in float64; what the spare rows of a slot hold counts as 0."""
    q, k, v, dout, dlse = (x.detach().to(torch.float32 if x.dtype == torch.float32 else dtype) for x in inputs)
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    out, lse = function(q, k, v, segments, segments_k=segments_k, **options)
    loss = (out.double() * dout.double()).sum()  # NaN where there are spare rows: only gradients matter
    loss = loss + (lse.double().masked_fill(lse == -torch.inf, 0.0) * dlse.double()).sum()
    gradients = torch.autograd.grad(loss, (q, k, v))
    return {name: x.detach().double() for name, x in zip(NAMES, (out, lse, *gradients))}


def assert_as_exact_as_pytorch(
    inputs: list[Tensor], dtype: torch.dtype, segments: Segments, segments_k: Segments, **options
) -> None:
    """Our largest error is at most twice that of PyTorch in the same dtype, plus a few units in the last place: of the
    result, and for dq and dk of the gradients of probabilities, whose differences may cancel to nothing."""
    exact = results(attention_with_lse_reference, inputs, torch.float64, segments, segments_k, **_of_reference(options))
    theirs = results(attention_with_lse_reference, inputs, dtype, segments, segments_k, **_of_reference(options))
    ours = results(attention_with_lse, inputs, dtype, segments, segments_k, **options)
    q, _, v, dout, _ = (x.nan_to_num() for x in inputs)
    cancelled = (
        (v.norm(dim=-1).max() * dout.norm(dim=-1).max()).item() * q.shape[-1] ** -0.5
        if v.numel() * dout.numel()
        else 0.0
    )
    for name in NAMES:
        e, t, o = exact[name], theirs[name], ours[name]
        assert (o == -torch.inf).equal(e == -torch.inf), f"{name}: other rows are empty"
        finite = e.isfinite()
        if not finite.any():
            continue
        terms = cancelled if name in ("dq", "dk") else 0.0
        floor = 4 * torch.finfo(dtype).eps * max(1.0, e[finite].abs().max().item(), terms)
        theirs_off, ours_off = ((x[finite] - e[finite]).abs().max().item() for x in (t, o))
        assert ours_off <= 2 * theirs_off + floor, f"{name}: {ours_off:.3g} off, PyTorch {theirs_off:.3g}"


def _of_reference(options: dict) -> dict:
    return {name: value for name, value in options.items() if name != "deterministic"}

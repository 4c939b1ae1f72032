"""Attention over a packed row of tokens: the one attention of decoder, vision tower and audio tower.

    s_ij = scale * q_i . k_j        p_ij = softmax over the visible j of s_ij        out_i = sum_j p_ij v_j
    lse_i = ln sum_j exp s_ij       with a soft cap c: s_ij = c tanh(scale * q_i . k_j / c)

A query sees the keys of its own segment only; with ``causal`` query i of a segment with Q queries and S keys sees
keys j <= i + S - Q (bottom-right aligned: the last query sees every key); with ``segments.intervals`` it sees keys
first_i <= j <= last_i instead, causal or not. A query without keys gives out 0, lse -inf.

T query rows   S key rows   H query heads   K key/value heads (H a multiple of K)   E head dim
N segments of one group   Q, L rows of each (queries, keys)   M = Q H / K rows of the query heads of one key head
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import attention_backward, attention_forward, attention_statistics, attention_varlen, backend, dispatch
from kernels.attention_reference import attention_reference, attention_with_lse_reference
from kernels.attention_tiles import check_softcap
from kernels.segments import Intervals, Segments


def attention_forward_op(
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    used_q: Tensor | None,
    used_k: Tensor | None,
    first_T: Tensor | None,
    last_T: Tensor | None,
    first_query_S: Tensor | None,
    last_query_S: Tensor | None,
    longest_q: int,
    longest_k: int,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """out_THE and lse_HT. Segments come as tensors and numbers, because an op takes no Python objects. Without ``cu_k``
    the keys have the segments of the queries: torch.compile (2.14) gives no tensor twice to a Function."""
    segments = _segments(cu_q, longest_q, used_q, first_T, last_T, first_query_S, last_query_S)
    segments_k = segments if cu_k is None else _segments(cu_k, longest_k, used_k)
    if _implementation(q_THE, "attention_forward", segments, softcap) == "varlen":
        return attention_varlen.forward(q_THE, k_SKE, v_SKE, segments, segments_k, causal, scale)
    return attention_forward.forward(q_THE, k_SKE, v_SKE, segments, segments_k, causal, scale, softcap=softcap)


def _fake_forward(q_THE, k_SKE, v_SKE, *_):
    T, H, _ = q_THE.shape
    return q_THE.new_empty(q_THE.shape), q_THE.new_empty((H, T), dtype=torch.float32)


def attention_backward_op(
    dout_THE: Tensor,
    dlse_HT: Tensor | None,
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    out_THE: Tensor,
    lse_HT: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    used_q: Tensor | None,
    used_k: Tensor | None,
    first_T: Tensor | None,
    last_T: Tensor | None,
    first_query_S: Tensor | None,
    last_query_S: Tensor | None,
    longest_q: int,
    longest_k: int,
    causal: bool,
    scale: float,
    softcap: float | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    segments = _segments(cu_q, longest_q, used_q, first_T, last_T, first_query_S, last_query_S)
    segments_k = segments if cu_k is None else _segments(cu_k, longest_k, used_k)
    if dlse_HT is None and _implementation(q_THE, "attention_backward", segments, softcap) == "varlen":
        return attention_varlen.backward(
            dout_THE, q_THE, k_SKE, v_SKE, out_THE, lse_HT, segments, segments_k, causal, scale, deterministic
        )
    dout_THE = dout_THE.contiguous()
    lse2_HR, delta_HR = attention_statistics.statistics(out_THE, dout_THE, lse_HT, dlse_HT)
    inputs = dout_THE, q_THE, k_SKE, v_SKE, lse2_HR, delta_HR, segments, segments_k
    return attention_backward.backward(*inputs, causal, scale, deterministic, softcap=softcap)


def _fake_backward(dout_THE, dlse_HT, q_THE, k_SKE, v_SKE, *_):
    return q_THE.new_empty(q_THE.shape), k_SKE.new_empty(k_SKE.shape), v_SKE.new_empty(v_SKE.shape)


def _segments(cu_seqlens: Tensor, longest: int, lengths: Tensor | None, *seen: Tensor | None) -> Segments:
    """``seen``: the tensors of intervals, or None for each."""
    if lengths is not None:
        lengths = lengths.contiguous()
    given = [x.contiguous() for x in seen if x is not None]
    return Segments(cu_seqlens.contiguous(), longest, lengths, Intervals(*given) if given else None)


_forward_op = backend.define_op(attention_forward_op, _fake_forward)
_backward_op = backend.define_op(attention_backward_op, _fake_backward)


class _Attention(torch.autograd.Function):
    """The two ops as one differentiable function."""

    @staticmethod
    def forward(q_THE, k_SKE, v_SKE, *arguments):
        return _forward_op(q_THE, k_SKE, v_SKE, *arguments[:-2])

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, longest_q, longest_k, causal, scale, softcap, deterministic, ctx.learns_lse = inputs
        ctx.options = longest_q, longest_k, causal, scale, softcap, deterministic
        ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_THE, dlse_HT):
        if not ctx.learns_lse:  # torch.compile gives zeros for None
            dlse_HT = None
        if dout_THE is None:  # only the log-sum-exp was used
            out_THE = ctx.saved_tensors[3]
            dout_THE = torch.zeros_like(out_THE)
        gradients = _backward_op(dout_THE, dlse_HT, *ctx.saved_tensors, *ctx.options)
        return *gradients, *[None] * 15


def attention(
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    segments: Segments,
    *,
    causal: bool,
    segments_k: Segments | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    """Attention within segments: out_THE in the dtype of q.

    q_THE, k_SKE, v_SKE share one floating dtype. ``segments`` cuts T and, unless ``segments_k`` is given, S as well.
    Its ``intervals`` replace the causal mask (those of ``segments_k`` are not read); ``causal`` then only
    decides that the tiles of late queries start first. ``scale`` is 1 / sqrt(E) by default; ``softcap`` bounds the
    scores. Rows outside the used part of a slot, or past the last segment, are 0.

    ``kernels.dispatch`` says what runs. ``deterministic`` asks for gradients that repeat bit for bit; the default is
    that of torch.use_deterministic_algorithms. ValueError for inputs that do not fit together.
    """
    segments_k = segments if segments_k is None else segments_k
    _check(q_THE, k_SKE, v_SKE, segments, segments_k, scale, softcap)
    scale = q_THE.shape[2] ** -0.5 if scale is None else scale
    rows = q_THE, k_SKE, v_SKE, segments
    operation = "attention_backward" if backend.needs_graph(q_THE, k_SKE, v_SKE) else "attention_forward"
    if _runs_in_pytorch(q_THE, k_SKE, operation, segments, segments_k, softcap):
        return attention_reference(*rows, causal=causal, segments_k=segments_k, scale=scale, softcap=softcap)
    out_THE, _ = _by_op(*rows, segments_k, causal, scale, softcap, deterministic, learns_lse=False)
    return out_THE


def attention_with_lse(
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    segments: Segments,
    *,
    causal: bool,
    segments_k: Segments | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """out_THE as ``attention`` returns it, and lse_HT in float32 (natural logarithm), -inf for a query without keys.
    Both are differentiable; where gradients are recorded, only what can differentiate lse runs."""
    segments_k = segments if segments_k is None else segments_k
    _check(q_THE, k_SKE, v_SKE, segments, segments_k, scale, softcap)
    scale = q_THE.shape[2] ** -0.5 if scale is None else scale
    rows = q_THE, k_SKE, v_SKE, segments
    operation = dispatch.LSE_GRADIENT if backend.needs_graph(q_THE, k_SKE, v_SKE) else "attention_forward"
    if _runs_in_pytorch(q_THE, k_SKE, operation, segments, segments_k, softcap):
        return attention_with_lse_reference(*rows, causal=causal, segments_k=segments_k, scale=scale, softcap=softcap)
    return _by_op(*rows, segments_k, causal, scale, softcap, deterministic, learns_lse=True)


def _runs_in_pytorch(
    q_THE: Tensor, k_SKE: Tensor, operation: str, segments: Segments, segments_k: Segments, softcap: float | None
) -> bool:
    """So it does where torch's own kernels would leave out rows. (A graph of torch.compile cannot ask.)"""
    chosen = _implementation(q_THE, operation, segments, softcap)
    if chosen == "varlen" and not torch.compiler.is_compiling():
        return not attention_varlen.covers(segments, segments_k, len(q_THE), len(k_SKE))
    return chosen == "pytorch"


def _implementation(
    q_THE: Tensor, operation: str, segments: Segments, softcap: float | None
) -> dispatch.Implementation:
    """Where a backward runs in plain PyTorch, the forward has to, as autograd connects the two. Intervals and caps,
    which torch's own kernels do not know, are an operation of their own, forward and backward."""
    if segments.intervals is not None or softcap is not None:
        operation = dispatch.MASKED_ATTENTION
    return backend.implementation(operation, q_THE, q_THE.shape[2])


def _by_op(
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    segments: Segments,
    segments_k: Segments,
    causal: bool,
    scale: float,
    softcap: float | None,
    deterministic: bool | None,
    learns_lse: bool,
) -> tuple[Tensor, Tensor]:
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if torch.compiler.is_compiling():  # a graph for each length would be too many, so these are bounds
        longest = q_THE.shape[0], k_SKE.shape[0]
    else:
        longest = segments.max_length, segments_k.max_length
    cuts = segments.cu_seqlens, segments_k.cu_seqlens, segments.lengths, segments_k.lengths
    if segments_k is segments:
        cuts = segments.cu_seqlens, None, segments.lengths, None
    seen = segments.intervals
    intervals = (None,) * 4
    if seen is not None:
        intervals = seen.first_T, seen.last_T, seen.first_query_S, seen.last_query_S
    numbers = *longest, causal, scale, softcap
    if not backend.needs_graph(q_THE, k_SKE, v_SKE):
        return _forward_op(q_THE, k_SKE, v_SKE, *cuts, *intervals, *numbers)
    # Views: torch.compile (2.11) loses a gradient of a tensor that a Function is given twice.
    k_SKE = k_SKE.view_as(k_SKE)
    v_SKE = v_SKE.view_as(v_SKE)
    return backend.apply(_Attention, q_THE, k_SKE, v_SKE, *cuts, *intervals, *numbers, deterministic, learns_lse)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    segments_k: Segments,
    scale: float | None,
    softcap: float | None,
) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 3:
        raise ValueError(f"attention takes packed rows (tokens, heads, head dim), not {shapes}")
    if k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(f"k and v must have one shape, with the head dim of q: {shapes}")
    H, E = q.shape[1:]
    K = k.shape[1]
    if 0 in (H, K, E) or H % K:
        raise ValueError(f"{H} query heads of {E} cannot share {K} key heads evenly")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must share one floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, not {q.device}, {k.device}, {v.device}")
    _check_segments(segments, q)
    _check_segments(segments_k, k)
    if len(segments) != len(segments_k):
        raise ValueError(f"there are {len(segments)} segments of queries, but {len(segments_k)} segments of keys")
    if len(segments) == 0 and len(q):
        raise ValueError(f"{len(q)} queries belong to no segment")
    if segments.intervals is not None:
        _check_intervals(segments.intervals, q, k)
        if backend.DEBUG:
            segments.intervals.check(segments, segments_k)
    check_softcap(softcap)
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, not {scale}")


def _check_segments(segments: Segments, x: Tensor) -> None:
    """``segments`` cut the rows of x. Their boundaries are read, which waits for the device, in debug mode only."""
    cu_seqlens, lengths = segments.cu_seqlens, segments.lengths
    for tensor in (cu_seqlens,) if lengths is None else (cu_seqlens, lengths):
        if tensor.dtype != torch.int32 or tensor.dim() != 1:
            raise ValueError(f"cu_seqlens and lengths must be int32 vectors, not {tensor.dtype} {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"segments must be on the device of their rows, {x.device}, not {tensor.device}")
    if len(cu_seqlens) == 0 or (lengths is not None and len(lengths) != len(segments)):
        used = "none" if lengths is None else len(lengths)
        raise ValueError(f"N segments take N + 1 cu_seqlens and N lengths, not {len(cu_seqlens)} and {used}")
    if backend.DEBUG:
        segments.check(len(x))


def _check_intervals(intervals: Intervals, q: Tensor, k: Tensor) -> None:
    """Two numbers for each query and for each key. Their values are read, which waits for the device, in debug mode
    only."""
    rows = {"first_T": q, "last_T": q, "first_query_S": k, "last_query_S": k}
    for name, x in rows.items():
        tensor = getattr(intervals, name)
        if tensor.dtype != torch.int32 or tensor.shape != x.shape[:1]:
            raise ValueError(
                f"intervals.{name} must be an int32 vector of {len(x)}, not {tensor.dtype} {tuple(tensor.shape)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"intervals must be on the device of their rows, {x.device}, not {tensor.device}")

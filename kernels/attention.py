"""Attention over a packed row of tokens: the one attention of decoder, vision tower and audio tower.

    s_ij = scale * q_i . k_j        p_ij = softmax over the visible j of s_ij        out_i = sum_j p_ij v_j
    lse_i = ln sum_j exp s_ij

A query sees the keys of its own segment only; with ``causal`` query i of a segment with Q queries and S keys sees
keys j <= i + S - Q (bottom-right aligned: the last query sees every key). A query without keys gives out 0, lse -inf.

T query rows   S key rows   H query heads   K key/value heads (H a multiple of K)   E head dim
N segments of one group   Q, L rows of each (queries, keys)   M = Q H / K rows of the query heads of one key head
"""

import math
from collections import defaultdict
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import attention_backward, attention_forward, attention_statistics, attention_varlen, backend, dispatch
from kernels.segments import Segments


@torch.compiler.disable  # groups depend on the lengths of the segments: a graph would fit one batch only
def attention_reference(q_THE, k_SKE, v_SKE, segments, *, causal, segments_k=None, scale=None) -> Tensor:
    """The specification in plain PyTorch: segments of similar lengths are gathered into one batched call."""
    T, H, E = q_THE.shape
    scale = E**-0.5 if scale is None else scale
    shared = k_SKE.shape[1] != H
    groups, source_T = group_segments(segments, segments if segments_k is None else segments_k, causal, T)
    outs = [_row_without_keys(q_THE, k_SKE, v_SKE)]
    for q_rows_NQ, k_rows_NL in groups:
        if q_rows_NQ.shape == k_rows_NL.shape:
            q_NHQE = q_THE[q_rows_NQ].transpose(1, 2)
            k_NKLE = k_SKE[k_rows_NL].transpose(1, 2)
            v_NKLE = v_SKE[k_rows_NL].transpose(1, 2)
            out_NHQE = F.scaled_dot_product_attention(
                q_NHQE, k_NKLE, v_NKLE, is_causal=causal, scale=scale, enable_gqa=shared
            )
            out_NQHE = out_NHQE.transpose(1, 2)
        else:
            out_NQHE, _ = softmax_attention(q_THE, k_SKE, v_SKE, q_rows_NQ, k_rows_NL, scale, causal)
        outs.append(out_NQHE.to(q_THE.dtype).flatten(0, 1))
    return torch.cat(outs)[source_T]


@torch.compiler.disable
def attention_with_lse_reference(
    q_THE, k_SKE, v_SKE, segments, *, causal, segments_k=None, scale=None
) -> tuple[Tensor, Tensor]:
    """The same with lse_HT in float32, by the formula itself."""
    T, H, E = q_THE.shape
    scale = E**-0.5 if scale is None else scale
    groups, source_T = group_segments(segments, segments if segments_k is None else segments_k, causal, T)
    outs = [_row_without_keys(q_THE, k_SKE, v_SKE)]
    lses = [q_THE.new_full((1, H), -torch.inf, dtype=torch.float32)]
    for q_rows_NQ, k_rows_NL in groups:
        out_NQHE, lse_NQH = softmax_attention(q_THE, k_SKE, v_SKE, q_rows_NQ, k_rows_NL, scale, causal)
        outs.append(out_NQHE.to(q_THE.dtype).flatten(0, 1))
        lses.append(lse_NQH.float().flatten(0, 1))
    return torch.cat(outs)[source_T], torch.cat(lses)[source_T].T


def _row_without_keys(q_THE: Tensor, k_SKE: Tensor, v_SKE: Tensor) -> Tensor:
    """Row 0 of the results: out of a query without keys. It keeps q, k and v in the graph, because a rank without
    images owes the other ranks zero gradients, not none."""
    empty = q_THE[:0].sum() + k_SKE[:0].sum() + v_SKE[:0].sum()
    return q_THE.new_zeros(1, *q_THE.shape[1:]) + empty


@lru_cache(maxsize=32)  # every layer asks for the same segments
def group_segments(
    segments: Segments, segments_k: Segments, causal: bool, T: int
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Segments that can share a call, as indices of rows: (q_rows_NQ, k_rows_NL). And source_T, the place of each
    query's result among the results of all groups, counted from 1; 0 for a query without keys.

    Causal self-attention may pad segments at the end, where no real query sees the padding. There, lengths are rounded
    up, and the padding repeats the last row.
    """
    padded = causal and segments is segments_k and segments.lengths is None
    members = defaultdict(list)
    for (q_start, q_length), (k_start, k_length) in zip(segments.spans, segments_k.spans, strict=True):
        if q_length and k_length:
            size = -(-q_length // 16) * 16
            sizes = (size, size) if padded else (q_length, k_length)
            members[sizes].append((q_start, k_start, q_length))
    device = segments.cu_seqlens.device
    groups = []
    source_T = torch.zeros(T, dtype=torch.int64)
    offset = 1
    for (q_size, k_size), starts in members.items():
        q_start_N1, k_start_N1, q_length_N1 = torch.tensor(starts).T.unsqueeze(-1)
        step_Q = torch.arange(q_size)
        q_rows_NQ = q_start_N1 + torch.minimum(step_Q, q_length_N1 - 1)
        k_rows_NL = q_rows_NQ if padded else k_start_N1 + torch.arange(k_size)
        real_NQ = step_Q < q_length_N1
        source_T[q_rows_NQ[real_NQ]] = offset + real_NQ.flatten().nonzero().flatten()
        offset += q_rows_NQ.numel()
        groups.append((q_rows_NQ.to(device), k_rows_NL.to(device)))
    return groups, source_T.to(device)


def softmax_attention(
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    q_rows_NQ: Tensor,
    k_rows_NL: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """The formula itself for one group, in float32 (float64 stays): out_NQHE and lse_NQH."""
    dtype = torch.promote_types(q_THE.dtype, torch.float32)
    num_queries = q_rows_NQ.shape[1]
    num_kv_heads = k_SKE.shape[1]
    q_NKME = by_key_head(q_THE, q_rows_NQ, num_kv_heads, dtype)
    k_NKLE = by_key_head(k_SKE, k_rows_NL, num_kv_heads, dtype)
    v_NKLE = by_key_head(v_SKE, k_rows_NL, num_kv_heads, dtype)
    s_NKML = masked_scores(q_NKME, k_NKLE, num_queries, scale, causal)
    lse_NKM = s_NKML.logsumexp(-1)
    p_NKML = (s_NKML - finite(lse_NKM).unsqueeze(-1)).exp_()
    return by_query(p_NKML @ v_NKLE, num_queries), by_query(lse_NKM, num_queries)


def by_key_head(x_THE: Tensor, rows_NQ: Tensor, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Rows of (T, H, E) as (N, K, M, E), or of (T, H) as (N, K, M): all queries of a key head side by side."""
    x_NQKGE = x_THE[rows_NQ].to(dtype).unflatten(2, (num_kv_heads, -1))
    return x_NQKGE.movedim(1, 3).flatten(2, 3)


def by_query(x_NKME: Tensor, num_queries: int) -> Tensor:
    """The inverse of ``by_key_head``: (N, Q, H, E) or (N, Q, H)."""
    return x_NKME.unflatten(2, (-1, num_queries)).movedim(3, 1).flatten(2, 3)


def masked_scores(q_NKME: Tensor, k_NKLE: Tensor, num_queries: int, scale: float, causal: bool) -> Tensor:
    """scale q . k, and -inf where the key is hidden; the last query sees the last key."""
    s_NKML = (q_NKME @ k_NKLE.mT).mul_(scale)
    if not causal:
        return s_NKML
    L = k_NKLE.shape[2]
    all_QL = torch.ones(num_queries, L, dtype=torch.bool, device=s_NKML.device)
    hidden_QL = all_QL.triu(L - num_queries + 1)
    group_size = q_NKME.shape[2] // num_queries
    return s_NKML.masked_fill_(hidden_QL.repeat(group_size, 1), -torch.inf)


def finite(lse: Tensor) -> Tensor:
    """0 in place of -inf, the lse of a row without keys: exp(-inf - 0) is 0, and exp(-inf - -inf) would be NaN."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def attention_forward_op(
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    used_q: Tensor | None,
    used_k: Tensor | None,
    longest_q: int,
    longest_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out_THE and lse_HT. Segments come as tensors and numbers, because an op takes no Python objects. Without ``cu_k``
    the keys have the segments of the queries: torch.compile (2.14) gives no tensor twice to a Function."""
    segments = _segments(cu_q, longest_q, used_q)
    segments_k = segments if cu_k is None else _segments(cu_k, longest_k, used_k)
    is_varlen = _implementation(q_THE, "attention_forward") == "varlen"
    run = attention_varlen.forward if is_varlen else attention_forward.forward
    return run(q_THE, k_SKE, v_SKE, segments, segments_k, causal, scale)


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
    longest_q: int,
    longest_k: int,
    causal: bool,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    segments = _segments(cu_q, longest_q, used_q)
    segments_k = segments if cu_k is None else _segments(cu_k, longest_k, used_k)
    if dlse_HT is None and _implementation(q_THE, "attention_backward") == "varlen":
        return attention_varlen.backward(
            dout_THE, q_THE, k_SKE, v_SKE, out_THE, lse_HT, segments, segments_k, causal, scale, deterministic
        )
    dout_THE = dout_THE.contiguous()
    lse2_HR, delta_HR = attention_statistics.statistics(out_THE, dout_THE, lse_HT, dlse_HT)
    return attention_backward.backward(
        dout_THE, q_THE, k_SKE, v_SKE, lse2_HR, delta_HR, segments, segments_k, causal, scale, deterministic
    )


def _fake_backward(dout_THE, dlse_HT, q_THE, k_SKE, v_SKE, *_):
    return q_THE.new_empty(q_THE.shape), k_SKE.new_empty(k_SKE.shape), v_SKE.new_empty(v_SKE.shape)


def _segments(cu_seqlens: Tensor, longest: int, lengths: Tensor | None) -> Segments:
    if lengths is not None:
        lengths = lengths.contiguous()
    return Segments(cu_seqlens.contiguous(), longest, lengths)


_forward_op = backend.define_op(attention_forward_op, _fake_forward)
_backward_op = backend.define_op(attention_backward_op, _fake_backward)


class _Attention(torch.autograd.Function):
    """The two ops as one differentiable function."""

    @staticmethod
    def forward(q_THE, k_SKE, v_SKE, *arguments):
        return _forward_op(q_THE, k_SKE, v_SKE, *arguments[:-2])

    @staticmethod
    def setup_context(ctx, inputs, output):
        q_THE, k_SKE, v_SKE, cu_q, cu_k, used_q, used_k, *ctx.options, ctx.learns_lse = inputs
        ctx.save_for_backward(q_THE, k_SKE, v_SKE, *output, cu_q, cu_k, used_q, used_k)
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
        return *gradients, *[None] * 10


def attention(
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    segments: Segments,
    *,
    causal: bool,
    segments_k: Segments | None = None,
    scale: float | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    """Attention within segments: out_THE in the dtype of q.

    q_THE, k_SKE, v_SKE share one floating dtype. ``segments`` cuts T and, unless ``segments_k`` is given, S as well.
    ``scale`` is 1 / sqrt(E) by default. Rows outside the used part of a slot are 0.

    ``kernels.dispatch`` says what runs. ``deterministic`` asks for gradients that repeat bit for bit; the default is
    that of torch.use_deterministic_algorithms. ValueError for inputs that do not fit together.
    """
    segments_k = segments if segments_k is None else segments_k
    _check(q_THE, k_SKE, v_SKE, segments, segments_k, scale)
    scale = q_THE.shape[2] ** -0.5 if scale is None else scale
    learns = backend.needs_graph(q_THE, k_SKE, v_SKE)
    if _implementation(q_THE, "attention_backward" if learns else "attention_forward") == "pytorch":
        return attention_reference(q_THE, k_SKE, v_SKE, segments, causal=causal, segments_k=segments_k, scale=scale)
    out_THE, _ = _by_op(q_THE, k_SKE, v_SKE, segments, segments_k, causal, scale, deterministic, learns_lse=False)
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
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """out_THE as ``attention`` returns it, and lse_HT in float32 (natural logarithm), -inf for a query without keys.
    Both are differentiable; what cannot differentiate lse does not run where gradients are recorded."""
    segments_k = segments if segments_k is None else segments_k
    _check(q_THE, k_SKE, v_SKE, segments, segments_k, scale)
    scale = q_THE.shape[2] ** -0.5 if scale is None else scale
    learns = backend.needs_graph(q_THE, k_SKE, v_SKE)
    if _implementation(q_THE, dispatch.LSE_GRADIENT if learns else "attention_forward") == "pytorch":
        return attention_with_lse_reference(
            q_THE, k_SKE, v_SKE, segments, causal=causal, segments_k=segments_k, scale=scale
        )
    return _by_op(q_THE, k_SKE, v_SKE, segments, segments_k, causal, scale, deterministic, learns_lse=True)


def _implementation(q_THE: Tensor, operation: str) -> dispatch.Implementation:
    """Where a backward runs in plain PyTorch, the forward has to, as autograd connects the two."""
    return backend.implementation(operation, q_THE, q_THE.shape[2])


def _by_op(
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    segments: Segments,
    segments_k: Segments,
    causal: bool,
    scale: float,
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
    if not backend.needs_graph(q_THE, k_SKE, v_SKE):
        return _forward_op(q_THE, k_SKE, v_SKE, *cuts, *longest, causal, scale)
    # Views: torch.compile (2.11) loses a gradient of a tensor that a Function is given twice.
    k_SKE = k_SKE.view_as(k_SKE)
    v_SKE = v_SKE.view_as(v_SKE)
    return _Attention.apply(q_THE, k_SKE, v_SKE, *cuts, *longest, causal, scale, deterministic, learns_lse)


def _check(q: Tensor, k: Tensor, v: Tensor, segments: Segments, segments_k: Segments, scale: float | None) -> None:
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

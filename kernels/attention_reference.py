"""Attention over a packed row of tokens in plain PyTorch: the specification, and what runs without a kernel.

Formula and letters are those of ``kernels.attention``.
"""

from collections import defaultdict
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.segments import Intervals, Segments


@torch.compiler.disable  # groups depend on the lengths of the segments: a graph would fit one batch only
def attention_reference(q_THE, k_SKE, v_SKE, segments, *, causal, segments_k=None, scale=None, softcap=None) -> Tensor:
    """Segments of similar lengths are gathered into one batched call."""
    T, _, E = q_THE.shape
    scale = E**-0.5 if scale is None else scale
    intervals = segments.intervals
    groups, source_T = group_segments(segments, segments if segments_k is None else segments_k, causal, T)
    outs = [_row_without_keys(q_THE, k_SKE, v_SKE)]
    for q_rows_NQ, k_rows_NL in groups:
        rows = q_THE, k_SKE, v_SKE, q_rows_NQ, k_rows_NL
        if softcap is None and (intervals is not None or q_rows_NQ.shape == k_rows_NL.shape):
            out_NQHE = _fused_attention(*rows, scale, causal, intervals)
        else:
            out_NQHE, _ = softmax_attention(*rows, scale, causal, intervals, softcap)
        outs.append(out_NQHE.to(q_THE.dtype).flatten(0, 1))
    return torch.cat(outs)[source_T]


@torch.compiler.disable
def attention_with_lse_reference(
    q_THE, k_SKE, v_SKE, segments, *, causal, segments_k=None, scale=None, softcap=None
) -> tuple[Tensor, Tensor]:
    """The same with lse_HT in float32, by the formula itself."""
    T, H, E = q_THE.shape
    scale = E**-0.5 if scale is None else scale
    groups, source_T = group_segments(segments, segments if segments_k is None else segments_k, causal, T)
    outs = [_row_without_keys(q_THE, k_SKE, v_SKE)]
    lses = [q_THE.new_full((1, H), -torch.inf, dtype=torch.float32)]
    for q_rows_NQ, k_rows_NL in groups:
        out_NQHE, lse_NQH = softmax_attention(
            q_THE, k_SKE, v_SKE, q_rows_NQ, k_rows_NL, scale, causal, segments.intervals, softcap
        )
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

    Masked self-attention may pad segments at the end, where no real query sees the padding. There, lengths are rounded
    up, and the padding repeats the last row.
    """
    masked = causal or segments.intervals is not None
    padded = masked and segments is segments_k and segments.lengths is None
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


def _fused_attention(
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    q_rows_NQ: Tensor,
    k_rows_NL: Tensor,
    scale: float,
    causal: bool,
    intervals: Intervals | None,
) -> Tensor:
    """out_NQHE of one group by PyTorch's own attention. Without intervals a segment has as many queries as keys."""
    q_NHQE = q_THE[q_rows_NQ].transpose(1, 2)
    k_NKLE = k_SKE[k_rows_NL].transpose(1, 2)
    v_NKLE = v_SKE[k_rows_NL].transpose(1, 2)
    options = dict(scale=scale, enable_gqa=k_SKE.shape[1] != q_THE.shape[1])
    if intervals is None:
        out_NHQE = F.scaled_dot_product_attention(q_NHQE, k_NKLE, v_NKLE, is_causal=causal, **options)
        return out_NHQE.transpose(1, 2)
    visible_NQL = visible_pairs(intervals, q_rows_NQ, k_rows_NL)
    empty_NQ1 = ~visible_NQL.any(-1, keepdim=True)
    mask_N1QL = (visible_NQL | empty_NQ1).unsqueeze(1)  # a softmax over nothing would be NaN
    out_NHQE = F.scaled_dot_product_attention(q_NHQE, k_NKLE, v_NKLE, attn_mask=mask_N1QL, **options)
    return out_NHQE.transpose(1, 2).masked_fill(empty_NQ1.unsqueeze(-1), 0.0)


def visible_pairs(intervals: Intervals, q_rows_NQ: Tensor, k_rows_NL: Tensor) -> Tensor:
    """Which keys of its segment each query of a group sees, bool (N, Q, L). Padding is seen by none."""
    key_L = torch.arange(k_rows_NL.shape[1], device=k_rows_NL.device)
    length_N1 = k_rows_NL[:, -1:] - k_rows_NL[:, :1] + 1  # padding repeats the last row
    first_NQ = intervals.first_T[q_rows_NQ]
    last_NQ = torch.minimum(intervals.last_T[q_rows_NQ], length_N1 - 1)
    return (key_L >= first_NQ.unsqueeze(-1)) & (key_L <= last_NQ.unsqueeze(-1))


def softmax_attention(
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    q_rows_NQ: Tensor,
    k_rows_NL: Tensor,
    scale: float,
    causal: bool,
    intervals: Intervals | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula itself for one group, in float32 (float64 stays): out_NQHE and lse_NQH."""
    dtype = torch.promote_types(q_THE.dtype, torch.float32)
    num_queries = q_rows_NQ.shape[1]
    num_kv_heads = k_SKE.shape[1]
    q_NKME = by_key_head(q_THE, q_rows_NQ, num_kv_heads, dtype)
    k_NKLE = by_key_head(k_SKE, k_rows_NL, num_kv_heads, dtype)
    v_NKLE = by_key_head(v_SKE, k_rows_NL, num_kv_heads, dtype)
    visible_NQL = None
    if intervals is not None:
        visible_NQL = visible_pairs(intervals, q_rows_NQ, k_rows_NL)
    s_NKML = masked_scores(q_NKME, k_NKLE, num_queries, scale, causal, visible_NQL, softcap)
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


def masked_scores(
    q_NKME: Tensor,
    k_NKLE: Tensor,
    num_queries: int,
    scale: float,
    causal: bool,
    visible_NQL: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The scores, and -inf where the key is hidden: not in ``visible_NQL`` or, without it, past the causal diagonal,
    where the last query sees the last key."""
    s_NKML = (q_NKME @ k_NKLE.mT).mul_(scale)
    if softcap is not None:
        s_NKML = softcap * torch.tanh(s_NKML / softcap)
    group_size = q_NKME.shape[2] // num_queries
    if visible_NQL is not None:
        return s_NKML.masked_fill_(~visible_NQL.repeat(1, group_size, 1).unsqueeze(1), -torch.inf)
    if not causal:
        return s_NKML
    L = k_NKLE.shape[2]
    all_QL = torch.ones(num_queries, L, dtype=torch.bool, device=s_NKML.device)
    hidden_QL = all_QL.triu(L - num_queries + 1)
    return s_NKML.masked_fill_(hidden_QL.repeat(group_size, 1), -torch.inf)


def finite(lse: Tensor) -> Tensor:
    """0 in place of -inf, the lse of a row without keys: exp(-inf - 0) is 0, and exp(-inf - -inf) would be NaN."""
    return lse.masked_fill(lse == -torch.inf, 0.0)

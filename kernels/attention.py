"""Attention over a packed row of tokens: the one attention of decoder, vision tower and audio tower.

    s_ij = scale * q_i . k_j        p_ij = softmax over the visible j of s_ij        out_i = sum_j p_ij v_j
    lse_i = ln sum_j exp s_ij

A query sees the keys of its own segment only; with ``causal`` query i of a segment with Q queries and S keys sees
keys j <= i + S - Q (bottom-right aligned: the last query sees every key). A query without keys gives out 0, lse -inf.

T query rows   S key rows   H query heads   K key/value heads (H a multiple of K)   E head dim
N segments of one group   Q, L rows of each (queries, keys)
"""

import math
from collections import defaultdict
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import attention_backward, attention_forward, backend
from kernels.segments import Segments


@torch.compiler.disable  # its groups follow from the lengths of segments: a graph of it would hold for one batch
def attention_reference(q_THE, k_SKE, v_SKE, segments, *, causal, segments_k=None, scale=None, return_lse=False):
    """The specification in plain PyTorch: segments of like length share one batched call, which gathers their rows."""
    scale = q_THE.shape[-1] ** -0.5 if scale is None else scale
    groups, source_T = group_segments(segments, segments if segments_k is None else segments_k, causal, q_THE.shape[0])
    # Row 0 is for queries without keys. It keeps q, k and v in the graph: a rank without images owes its peers zero
    # gradients, not none.
    empty = q_THE[:0].sum() + k_SKE[:0].sum() + v_SKE[:0].sum()
    outs, lses = (
        [q_THE.new_zeros(1, *q_THE.shape[1:]) + empty],
        [q_THE.new_full((1, q_THE.shape[1]), -torch.inf).float()],
    )
    for q_rows_NQ, k_rows_NL in groups:
        q, k, v = q_THE[q_rows_NQ].transpose(1, 2), k_SKE[k_rows_NL].transpose(1, 2), v_SKE[k_rows_NL].transpose(1, 2)
        if return_lse or q.shape[2] != k.shape[2]:
            out, lse = _softmax_attention(q, k, v, scale, causal)
            lses.append(lse.transpose(1, 2).flatten(0, 1))
        else:
            shared = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=shared)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    out_THE = torch.cat(outs)[source_T]
    return (out_THE, torch.cat(lses)[source_T].T) if return_lse else out_THE


@lru_cache(maxsize=32)  # every layer asks with the same segments
def group_segments(
    segments: Segments, segments_k: Segments, causal: bool, T: int
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Segments that can share a call, as rows into q and k: (q_rows_NQ, k_rows_NL); and for each query row where its
    result lies among those of all groups, from 1 (0: it has no key).

    Causal self-attention may pad segments at their end (no real query sees a later key), so lengths are rounded up.
    """
    padded = causal and segments is segments_k and segments.lengths is None
    members = defaultdict(list)
    for (q_start, q_length), (k_start, k_length) in zip(segments.spans, segments_k.spans, strict=True):
        if q_length and k_length:
            size = -(-q_length // 16) * 16
            members[(size, size) if padded else (q_length, k_length)].append((q_start, k_start, q_length))
    groups, source_T, offset = [], torch.zeros(T, dtype=torch.int64), 1
    for (q_size, k_size), starts in members.items():
        q_start_N1, k_start_N1, q_length_N1 = torch.tensor(starts).T.unsqueeze(-1)
        step_Q, step_L = torch.arange(q_size), torch.arange(k_size)
        q_rows_NQ = q_start_N1 + torch.minimum(step_Q, q_length_N1 - 1)  # what pads repeats the last row
        k_rows_NL = q_rows_NQ if padded else k_start_N1 + step_L
        real_NQ = step_Q < q_length_N1
        source_T[q_rows_NQ[real_NQ]] = offset + real_NQ.flatten().nonzero().flatten()
        offset += q_rows_NQ.numel()
        groups.append((q_rows_NQ, k_rows_NL))
    device = segments.cu_seqlens.device
    return [(q_rows.to(device), k_rows.to(device)) for q_rows, k_rows in groups], source_T.to(device)


def _softmax_attention(q_NHQE, k_NKLE, v_NKLE, scale, causal):
    """The formula itself, in float32 (float64 stays): out_NHQE and lse_NHQ."""
    dtype = torch.promote_types(q_NHQE.dtype, torch.float32)
    heads_per_key = q_NHQE.shape[1] // k_NKLE.shape[1]
    k_NHLE, v_NHLE = (x.to(dtype).repeat_interleave(heads_per_key, dim=1) for x in (k_NKLE, v_NKLE))
    s_NHQL = scale * (q_NHQE.to(dtype) @ k_NHLE.mT)
    if causal:
        Q, L = s_NHQL.shape[-2:]
        hidden_QL = torch.ones(Q, L, dtype=torch.bool, device=s_NHQL.device).triu(L - Q + 1)
        s_NHQL = s_NHQL.masked_fill(hidden_QL, -torch.inf)
    lse_NHQ = s_NHQL.logsumexp(-1)
    # A row without keys has lse -inf; exp(-inf - -inf) is NaN, so such rows are exponentiated against 0.
    p_NHQL = torch.exp(s_NHQL - lse_NHQ.masked_fill(lse_NHQ == -torch.inf, 0.0).unsqueeze(-1))
    return (p_NHQL @ v_NHLE).to(q_NHQE.dtype), lse_NHQ.float()


def attention_forward_op(
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    used_q: Tensor | None,
    used_k: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out_THE and lse_HT by the Triton kernels. Segments come as their tensors, which is all that an op may take."""
    layout = _segments(cu_q, used_q), _segments(cu_k, used_k)
    return attention_forward.forward(q_THE, k_SKE, v_SKE, *layout, causal, scale)


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
    cu_k: Tensor,
    used_q: Tensor | None,
    used_k: Tensor | None,
    causal: bool,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dout_THE = dout_THE.contiguous()
    statistics = attention_backward.statistics(out_THE, dout_THE, lse_HT, dlse_HT)
    layout = _segments(cu_q, used_q), _segments(cu_k, used_k)
    return attention_backward.backward(
        dout_THE, q_THE, k_SKE, v_SKE, *statistics, *layout, causal, scale, deterministic
    )


def _fake_backward(dout_THE, dlse_HT, q_THE, k_SKE, v_SKE, *_):
    return tuple(x.new_empty(x.shape) for x in (q_THE, k_SKE, v_SKE))


def _segments(cu_seqlens: Tensor, lengths: Tensor | None) -> Segments:
    return Segments(cu_seqlens.contiguous(), 0, None if lengths is None else lengths.contiguous())


_forward_op = backend.define_op(attention_forward_op, _fake_forward)
_backward_op = backend.define_op(attention_backward_op, _fake_backward)


class _Attention(torch.autograd.Function):
    """The two ops as one differentiable function."""

    @staticmethod
    def forward(q_THE, k_SKE, v_SKE, *arguments):
        return _forward_op(q_THE, k_SKE, v_SKE, *arguments[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        q_THE, k_SKE, v_SKE, cu_q, cu_k, used_q, used_k, *ctx.options = inputs
        ctx.save_for_backward(q_THE, k_SKE, v_SKE, *output, cu_q, cu_k, used_q, used_k)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_THE, dlse_HT):
        if dout_THE is None:  # only the log-sum-exp was used
            dout_THE = torch.zeros_like(ctx.saved_tensors[3])
        gradients = _backward_op(dout_THE, dlse_HT, *ctx.saved_tensors, *ctx.options)
        return *gradients, *[None] * 7


def attention(
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    segments: Segments,
    *,
    causal: bool,
    segments_k: Segments | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within segments.

    q_THE, k_SKE, v_SKE share one floating dtype; ``segments`` cuts T and, unless ``segments_k`` is given, S as well.
    ``scale`` is 1 / sqrt(E) by default. Returns out_THE in the dtype of q and, with ``return_lse``, lse_HT in float32
    (natural logarithm); both are differentiable. Rows outside the used part of a slot are 0 and -inf.

    Triton where ``backend.runs_triton`` says so, for head dims up to 256; the reference elsewhere. ``deterministic``
    asks for gradients that repeat bit for bit, by default as torch.use_deterministic_algorithms does.
    """
    segments_k = segments if segments_k is None else segments_k
    _check(q_THE, k_SKE, v_SKE, segments, segments_k)
    scale = q_THE.shape[2] ** -0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, not {scale}")
    if backend.DEBUG:
        segments.check(q_THE.shape[0])
        segments_k.check(k_SKE.shape[0])
    if not backend.runs_triton(q_THE):
        return attention_reference(
            q_THE, k_SKE, v_SKE, segments, causal=causal, segments_k=segments_k, scale=scale, return_lse=return_lse
        )
    if q_THE.shape[2] > backend.MAX_HEAD_DIM:
        raise ValueError(
            f"head dim {q_THE.shape[2]} is over the {backend.MAX_HEAD_DIM} that the attention kernel holds"
        )
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    layout = (segments.cu_seqlens, segments_k.cu_seqlens, segments.lengths, segments_k.lengths)
    if backend.needs_graph(q_THE, k_SKE, v_SKE):
        # Views: of a tensor that a Function gets twice, torch.compile (2.11) loses one of the gradients.
        k_SKE, v_SKE = k_SKE.view_as(k_SKE), v_SKE.view_as(v_SKE)
        out_THE, lse_HT = _Attention.apply(q_THE, k_SKE, v_SKE, *layout, causal, scale, deterministic)
    else:
        out_THE, lse_HT = _forward_op(q_THE, k_SKE, v_SKE, *layout, causal, scale)
    return (out_THE, lse_HT) if return_lse else out_THE


def _check(q: Tensor, k: Tensor, v: Tensor, segments: Segments, segments_k: Segments) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 3:
        raise ValueError(f"attention takes packed rows (tokens, heads, head dim), not {shapes}")
    if k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(f"k and v must have one shape, with the head dim of q: {shapes}")
    if 0 in (q.shape[1], k.shape[1], q.shape[2]) or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads of {q.shape[2]} cannot share {k.shape[1]} key heads evenly")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must share one floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    for x in (segments.cu_seqlens, segments.lengths, segments_k.cu_seqlens, segments_k.lengths):
        if x is not None and (x.dtype != torch.int32 or x.dim() != 1):
            raise ValueError(f"cu_seqlens and lengths must be int32 vectors, not {x.dtype} {tuple(x.shape)}")
        if x is not None and not x.device == q.device == k.device == v.device:
            raise ValueError(
                f"q, k, v and segments must share a device: {q.device}, {k.device}, {v.device}, {x.device}"
            )
    for x in (segments, segments_k):
        if x.cu_seqlens.shape[0] == 0 or (x.lengths is not None and len(x) != x.lengths.shape[0]):
            used = "none" if x.lengths is None else x.lengths.shape[0]
            raise ValueError(f"N segments take N + 1 cu_seqlens and N lengths, not {x.cu_seqlens.shape[0]} and {used}")
    if len(segments) != len(segments_k):
        raise ValueError(f"{len(segments)} segments of queries cannot meet {len(segments_k)} segments of keys")
    if len(segments) == 0 and q.shape[0]:
        raise ValueError(f"{q.shape[0]} queries belong to no segment")

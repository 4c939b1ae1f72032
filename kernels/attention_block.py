"""Attention over some of the keys at a time, for rings: blocks add up, in float32, to attention over all keys.

Forward, with a block's own (out', lse') and the results of all earlier blocks:
    lse = ln(exp lse_earlier + exp lse')        out = exp(lse_earlier - lse) out_earlier + exp(lse' - lse) out'
Backward, with lse and delta_i = do_i . out_i of the whole softmax, so that the blocks' gradients are summed:
    p_ij = exp(s_ij - lse_i)        ds_ij = p_ij (do_i . v_j - delta_i)
    dq_i = scale sum_j ds_ij k_j        dk_j = scale sum_i ds_ij q_i        dv_j = sum_i p_ij do_i
Segments and their causal mask are those of ``kernels.attention``. There are no intervals and no soft cap.

T query rows   S key rows   H query heads   K key/value heads   E head dim
N segments of one group   Q, L rows of each (queries, keys)   M = Q H / K rows of the query heads of one key head
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention_backward, attention_forward, attention_statistics, attention_varlen, backend
from kernels.attention_reference import (
    by_key_head,
    by_query,
    finite,
    group_segments,
    masked_scores,
    softmax_attention,
)
from kernels.segments import Segments

CHUNK = 16  # queries of a segment at a time in plain PyTorch: memory grows with the keys, not with their square


def forward_reference(q_THE, k_SKE, v_SKE, segments, segments_k, *, causal, scale, earlier=None):
    """The specification of ``block_forward`` in plain PyTorch."""
    T, H, _ = q_THE.shape
    dtype = torch.promote_types(q_THE.dtype, torch.float32)
    out_THE = torch.zeros_like(q_THE, dtype=dtype)
    lse_TH = q_THE.new_full((T, H), -torch.inf, dtype=dtype)
    for q_rows_NQ, k_rows_NL, real_NQ in _chunks(segments, segments_k, causal, T):
        out_NQHE, lse_NQH = softmax_attention(q_THE, k_SKE, v_SKE, q_rows_NQ, k_rows_NL, scale, causal)
        rows = q_rows_NQ[real_NQ]
        out_THE[rows] = out_NQHE[real_NQ]
        lse_TH[rows] = lse_NQH[real_NQ]
    lse_HT = lse_TH.T.contiguous()
    return (out_THE, lse_HT) if earlier is None else _merge(*earlier, out_THE, lse_HT)


def _merge(earlier_out_THE: Tensor, earlier_lse_HT: Tensor, out_THE: Tensor, lse_HT: Tensor) -> tuple[Tensor, Tensor]:
    total_HT = torch.logaddexp(earlier_lse_HT, lse_HT)
    earlier_weight_HT = torch.exp(earlier_lse_HT - finite(total_HT))
    weight_HT = torch.exp(lse_HT - finite(total_HT))
    merged_THE = out_THE * weight_HT.T[..., None]
    return merged_THE.addcmul_(earlier_out_THE, earlier_weight_HT.T[..., None]), total_HT


def backward_reference(dout_THE, q_THE, k_SKE, v_SKE, lse_HT, delta_HT, segments, segments_k, *, causal, scale):
    """The specification of ``block_backward`` in plain PyTorch."""
    dtype = lse_HT.dtype
    dq_THE = torch.zeros_like(q_THE, dtype=dtype)
    dk_SKE = torch.zeros_like(k_SKE, dtype=dtype)
    dv_SKE = torch.zeros_like(v_SKE, dtype=dtype)

    def add_chunk(q_rows_NQ: Tensor, k_rows_NL: Tensor, real_NQ: Tensor) -> None:
        Q, L, K = q_rows_NQ.shape[1], k_rows_NL.shape[1], k_SKE.shape[1]
        q_NKME = by_key_head(q_THE, q_rows_NQ, K, dtype)
        k_NKLE = by_key_head(k_SKE, k_rows_NL, K, dtype)
        v_NKLE = by_key_head(v_SKE, k_rows_NL, K, dtype)
        dout_NKME = by_key_head(dout_THE, q_rows_NQ, K, dtype)
        lse_NKM = by_key_head(lse_HT.T, q_rows_NQ, K, dtype)
        delta_NKM = by_key_head(delta_HT.T, q_rows_NQ, K, dtype)
        real_NM = real_NQ.repeat(1, q_NKME.shape[2] // Q)
        p_NKML = masked_scores(q_NKME, k_NKLE, Q, scale, causal).sub_(lse_NKM[..., None]).exp_()
        p_NKML.masked_fill_(~real_NM[:, None, :, None], 0.0)
        dp_NKML = dout_NKME @ v_NKLE.mT
        ds_NKML = dp_NKML.sub_(delta_NKM[..., None]).mul_(p_NKML).mul_(scale)
        _add_rows(dq_THE, q_rows_NQ, by_query(ds_NKML @ k_NKLE, Q))
        _add_rows(dk_SKE, k_rows_NL, by_query(ds_NKML.mT @ q_NKME, L))
        _add_rows(dv_SKE, k_rows_NL, by_query(p_NKML.mT @ dout_NKME, L))

    for chunk in _chunks(segments, segments_k, causal, q_THE.shape[0]):
        add_chunk(*chunk)
    return dq_THE, dk_SKE, dv_SKE


def _add_rows(total_SKE: Tensor, rows_NL: Tensor, x_NLKE: Tensor) -> None:
    total_SKE.index_add_(0, rows_NL.flatten(), x_NLKE.flatten(0, 1))


def _chunks(segments: Segments, segments_k: Segments, causal: bool, T: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some queries of a group at a time (q_rows_NQ), the keys up to the last that any of them sees (k_rows_NL), and
    real_NQ: False for the queries that only pad a segment, and so repeat the one before."""
    groups, _ = group_segments(segments, segments_k, causal, T)
    for q_rows_NQ, k_rows_NL in groups:
        Q, L = q_rows_NQ.shape[1], k_rows_NL.shape[1]
        real_NQ = F.pad(q_rows_NQ[:, 1:] != q_rows_NQ[:, :-1], (1, 0), value=True)
        for start in range(0, Q, CHUNK):
            end = min(start + CHUNK, Q)
            num_seen = L - Q + end if causal else L
            if num_seen > 0:
                yield q_rows_NQ[:, start:end], k_rows_NL[:, :num_seen], real_NQ[:, start:end]


def block_forward(
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    segments: Segments,
    segments_k: Segments,
    *,
    causal: bool,
    scale: float,
    earlier: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """out_THE and lse_HT over these keys and those of ``earlier``, which this function returned for the same queries.

    Both are float32 for every dtype of q (float64 stays), and have no graph; 0 and -inf for a query without keys. Where
    torch's own kernels run, the out of each block is rounded to the dtype of q before it is added. ValueError for
    segments with intervals.
    """
    if segments.intervals is not None:
        raise ValueError("attention by blocks is causal or full, and segments.intervals are neither: gather all keys")
    implementation = backend.implementation("block_forward", q_THE, q_THE.shape[2])
    if implementation == "pytorch":
        return forward_reference(q_THE, k_SKE, v_SKE, segments, segments_k, causal=causal, scale=scale, earlier=earlier)
    if implementation == "varlen":
        if not attention_varlen.covers(segments, segments_k, len(q_THE), len(k_SKE)):
            raise ValueError("attention by blocks takes segments that cut all rows of queries and of keys")
        out_THE, lse_HT = attention_varlen.forward(q_THE, k_SKE, v_SKE, segments, segments_k, causal, scale)
        out_THE = out_THE.float()
        return (out_THE, lse_HT) if earlier is None else _merge(*earlier, out_THE, lse_HT)
    if earlier is None:  # without earlier results the kernel would round to the dtype of q
        T, H, _ = q_THE.shape
        earlier_out_THE = torch.zeros_like(q_THE, dtype=torch.float32)
        earlier_lse_HT = q_THE.new_full((H, T), -torch.inf, dtype=torch.float32)
        earlier = earlier_out_THE, earlier_lse_HT
    with torch.cuda.device_of(q_THE):
        return attention_forward.forward(q_THE, k_SKE, v_SKE, segments, segments_k, causal, scale, earlier)


def statistics(out_THE: Tensor, dout_THE: Tensor, lse_HT: Tensor) -> tuple[Tensor, Tensor]:
    """What ``block_backward`` takes of the whole softmax, whose out has the dtype of q. In plain PyTorch lse and delta
    (H, T), float32 (float64 stays), 0 for a query without keys. For our kernels lse is base 2, and both have room for a
    last tile. Torch's own kernels take lse and out as they are."""
    implementation = backend.implementation("block_backward", out_THE, out_THE.shape[2])
    if implementation == "varlen":
        return lse_HT, out_THE
    if implementation == "triton":
        with torch.cuda.device_of(out_THE):
            return attention_statistics.statistics(out_THE, dout_THE, lse_HT, None)
    delta_HT = (out_THE.to(lse_HT.dtype) * dout_THE).sum(-1).T
    return finite(lse_HT), delta_HT.masked_fill(lse_HT == -torch.inf, 0.0)


def block_backward(
    dout_THE: Tensor,
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    lse_HT: Tensor,
    delta_HT: Tensor,
    segments: Segments,
    segments_k: Segments,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The shares of these keys and queries in dq_THE, dk_SKE and dv_SKE, float32 (float64 stays). ``lse_HT`` and
    ``delta_HT`` are the ``statistics`` of the softmax over all blocks; the second is its out for torch's kernels."""
    inputs = dout_THE, q_THE, k_SKE, v_SKE, lse_HT, delta_HT, segments, segments_k
    implementation = backend.implementation("block_backward", q_THE, q_THE.shape[2])
    if implementation == "pytorch":
        return backward_reference(*inputs, causal=causal, scale=scale)
    deterministic = torch.are_deterministic_algorithms_enabled()
    if implementation == "varlen":
        out_THE = delta_HT  # see ``statistics``
        dq_THE, dk_SKE, dv_SKE = attention_varlen.backward(
            dout_THE, q_THE, k_SKE, v_SKE, out_THE, lse_HT, segments, segments_k, causal, scale, deterministic
        )
        return dq_THE.float(), dk_SKE.float(), dv_SKE.float()
    with torch.cuda.device_of(q_THE):
        return attention_backward.backward(*inputs, causal, scale, deterministic, dtype=torch.float32)

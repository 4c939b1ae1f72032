"""Attention over some of the keys at a time, for rings: blocks add up, in float32, to attention over all keys.

Forward, with a block's own (out', lse') and those of all earlier blocks:
    lse = ln(exp lse_earlier + exp lse')        out = exp(lse_earlier - lse) out_earlier + exp(lse' - lse) out'
Backward, with lse and delta_i = do_i . out_i of the whole softmax, so that the shares of blocks just add:
    p_ij = exp(s_ij - lse_i)        ds_ij = p_ij (do_i . v_j - delta_i)
    dq_i = scale sum_j ds_ij k_j        dk_j = scale sum_i ds_ij q_i        dv_j = sum_i p_ij do_i
Segments and their causal mask are those of ``kernels.attention``.

T query rows   S key rows   H query heads   K key/value heads   E head dim
N segments of one group   Q, L rows of each (queries, keys)   M = Q H / K queries that share the keys of one head
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention_backward, attention_forward, backend
from kernels.attention import group_segments
from kernels.segments import Segments

CHUNK = 16  # queries of a segment that the plain path takes at a time: memory grows with the keys, not their square


def forward_reference(q_THE, k_SKE, v_SKE, segments, segments_k, *, causal, scale, earlier=None):
    """The specification of ``block_forward`` in plain PyTorch."""
    dtype, (T, H, E), num_kv_heads = torch.promote_types(q_THE.dtype, torch.float32), q_THE.shape, k_SKE.shape[1]
    groups, source_T = group_segments(segments, segments_k, causal, T)
    # Row 0 is for queries without keys.
    outs, lses = [q_THE.new_zeros(1, H, E, dtype=dtype)], [q_THE.new_full((1, H), -torch.inf, dtype=dtype)]
    for group in groups:
        chunks = []
        for q_rows_NQ, k_rows_NL, _ in _chunks(*group, causal):
            q_NKME = _queries(q_THE, q_rows_NQ, num_kv_heads, dtype)
            s_NKML = _scores(q_NKME, _keys(k_SKE, k_rows_NL, dtype), q_rows_NQ.shape[1], causal, scale)
            lse_NKM = s_NKML.logsumexp(-1)
            p_NKML = s_NKML.sub_(_finite(lse_NKM)[..., None]).exp_()
            out_NKME = p_NKML @ _keys(v_SKE, k_rows_NL, dtype)
            chunks.append([_rows(x, q_rows_NQ.shape[1]) for x in (out_NKME, lse_NKM)])
        for results, parts in zip((outs, lses), zip(*chunks)):
            results.append(torch.cat(parts, 1).flatten(0, 1))
    out_THE, lse_HT = torch.cat(outs)[source_T], torch.cat(lses)[source_T].T.contiguous()
    return (out_THE, lse_HT) if earlier is None else _merge(*earlier, out_THE, lse_HT)


def _merge(earlier_out_THE, earlier_lse_HT, out_THE, lse_HT):
    total_HT = torch.logaddexp(earlier_lse_HT, lse_HT)
    weight_TH1 = lambda part_HT: torch.exp(part_HT - _finite(total_HT)).T[..., None]
    return (out_THE * weight_TH1(lse_HT)).addcmul_(earlier_out_THE, weight_TH1(earlier_lse_HT)), total_HT


def backward_reference(dout_THE, q_THE, k_SKE, v_SKE, lse_HT, delta_HT, segments, segments_k, *, causal, scale):
    """The specification of ``block_backward`` in plain PyTorch."""
    dtype, num_kv_heads = lse_HT.dtype, k_SKE.shape[1]
    groups, _ = group_segments(segments, segments_k, causal, q_THE.shape[0])
    dq_THE, dk_SKE, dv_SKE = (torch.zeros_like(x, dtype=dtype) for x in (q_THE, k_SKE, v_SKE))

    def add(q_rows_NQ, k_rows_NL, padding_NQ):
        Q, of_queries = q_rows_NQ.shape[1], (q_THE, dout_THE, lse_HT.T, delta_HT.T)
        q_NKME, dout_NKME, lse_NKM, delta_NKM = (_queries(x, q_rows_NQ, num_kv_heads, dtype) for x in of_queries)
        k_NKLE, v_NKLE = (_keys(x, k_rows_NL, dtype) for x in (k_SKE, v_SKE))
        p_NKML = _scores(q_NKME, k_NKLE, Q, causal, scale).sub_(lse_NKM[..., None]).exp_()
        p_NKML.masked_fill_(padding_NQ.repeat(1, q_NKME.shape[2] // Q)[:, None, :, None], 0.0)
        ds_NKML = (dout_NKME @ v_NKLE.mT).sub_(delta_NKM[..., None]).mul_(p_NKML).mul_(scale)
        dq_THE.index_add_(0, q_rows_NQ.flatten(), _rows(ds_NKML @ k_NKLE, Q).flatten(0, 1))
        dk_SKE.index_add_(0, k_rows_NL.flatten(), (ds_NKML.mT @ q_NKME).transpose(1, 2).flatten(0, 1))
        dv_SKE.index_add_(0, k_rows_NL.flatten(), (p_NKML.mT @ dout_NKME).transpose(1, 2).flatten(0, 1))

    for group in groups:
        for chunk in _chunks(*group, causal):
            add(*chunk)
    return dq_THE, dk_SKE, dv_SKE


def _chunks(q_rows_NQ: Tensor, k_rows_NL: Tensor, causal: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries of a group, some at a time; the keys up to the last that any of them sees; which queries only repeat the
    one before, as those do that bring segments to one length."""
    Q, L = q_rows_NQ.shape[1], k_rows_NL.shape[1]
    padding_NQ = F.pad(q_rows_NQ[:, 1:] == q_rows_NQ[:, :-1], (1, 0))
    for start in range(0, Q, CHUNK):
        end = min(start + CHUNK, Q)
        seen = max(L - Q + end, 0) if causal else L
        yield q_rows_NQ[:, start:end], k_rows_NL[:, :seen], padding_NQ[:, start:end]


def _queries(x_THE: Tensor, q_rows_NQ: Tensor, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Rows of q, as (N, K, M, E), or of a number for each query and head, as (N, K, M)."""
    return x_THE[q_rows_NQ].to(dtype).unflatten(2, (num_kv_heads, -1)).movedim(1, 3).flatten(2, 3)


def _rows(x_NKME: Tensor, Q: int) -> Tensor:
    """The way back: (N, Q, H, E) or (N, Q, H)."""
    return x_NKME.unflatten(2, (-1, Q)).movedim(3, 1).flatten(2, 3)


def _keys(x_SKE: Tensor, k_rows_NL: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of k or v, (N, K, L, E)."""
    return x_SKE[k_rows_NL].to(dtype).transpose(1, 2)


def _scores(q_NKME: Tensor, k_NKLE: Tensor, Q: int, causal: bool, scale: float) -> Tensor:
    """scale q . k, -inf where a key is hidden. Causal: the last query sees the last key."""
    s_NKML = (q_NKME @ k_NKLE.mT).mul_(scale)
    if causal:
        L = k_NKLE.shape[2]
        hidden_QL = torch.ones(Q, L, dtype=torch.bool, device=s_NKML.device).triu(L - Q + 1)
        s_NKML.unflatten(2, (-1, Q)).masked_fill_(hidden_QL, -torch.inf)
    return s_NKML


def _finite(lse: Tensor) -> Tensor:
    """A row without keys has lse -inf; exp(-inf - -inf) is NaN, so such rows are exponentiated against 0."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


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
    """out_THE and lse_HT over these keys, and over those of ``earlier``, what this function gave for the same queries.
    Both float32, whatever q is (float64 stays), and without a graph; 0 and -inf for a query without a key."""
    if not backend.runs_triton(q_THE):
        return forward_reference(q_THE, k_SKE, v_SKE, segments, segments_k, causal=causal, scale=scale, earlier=earlier)
    if earlier is None:  # the kernel rounds to the dtype of q unless it goes on from something
        T, H, _ = q_THE.shape
        earlier = torch.zeros_like(q_THE, dtype=torch.float32), q_THE.new_full((H, T), -torch.inf, dtype=torch.float32)
    with torch.cuda.device_of(q_THE):
        return attention_forward.forward(q_THE, k_SKE, v_SKE, segments, segments_k, causal, scale, earlier)


def statistics(out_THE: Tensor, dout_THE: Tensor, lse_HT: Tensor) -> tuple[Tensor, Tensor]:
    """What ``block_backward`` takes of the whole softmax: lse and delta (H, T), float32 (float64 stays), 0 for a query
    without a key. For the kernels lse is in powers of two, with room for a last tile."""
    if backend.runs_triton(out_THE):
        with torch.cuda.device_of(out_THE):
            return attention_backward.statistics(out_THE, dout_THE, lse_HT, None)
    delta_HT = (out_THE.to(lse_HT.dtype) * dout_THE).sum(-1).T
    return _finite(lse_HT), delta_HT.masked_fill(lse_HT == -torch.inf, 0.0)


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
    ``delta_HT`` are the ``statistics`` of the softmax over all blocks."""
    if not backend.runs_triton(q_THE):
        return backward_reference(
            dout_THE, q_THE, k_SKE, v_SKE, lse_HT, delta_HT, segments, segments_k, causal=causal, scale=scale
        )
    deterministic = torch.are_deterministic_algorithms_enabled()
    layout = segments, segments_k, causal, scale, deterministic
    with torch.cuda.device_of(q_THE):
        return attention_backward.backward(
            dout_THE, q_THE, k_SKE, v_SKE, lse_HT, delta_HT, *layout, dtype=torch.float32
        )

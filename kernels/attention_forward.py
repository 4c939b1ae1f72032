"""Forward of packed attention in Triton: one pass over the keys with a running softmax (FlashAttention-2, 2307.08691).

With scores s2 = log2(e) s, their running maximum m and sum of exponentials z, for every block of keys:
    m' = max(m, max_j s2)    p_j = 2^(s2_j - m')    z' = z 2^(m - m') + sum_j p_j    o' = o 2^(m - m') + p v
and at the end out = o / z, lse = ln 2 * (m + log2 z).

T query rows   S key rows   H query heads   K key/value heads   E head dim   N segments
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_tiles import (
    NOTHING,
    bits,
    descriptor,
    forward_config,
    hide,
    load_tile,
    loadable,
    locate,
    num_tiles,
    precision,
)
from kernels.backend import LN_2, LOG2_E
from kernels.segments import Segments

_LN_2 = tl.constexpr(LN_2)


@triton.jit
def _softmax_step(s, m, z, scale_log2):
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    base = tl.where(m_new == NOTHING, 0.0, m_new)  # a row without keys so far: 2^(-inf - 0) = 0
    p = tl.exp2(s * scale_log2 - base[:, None])
    shrink = tl.exp2(m - base)
    return p, shrink, m_new, z * shrink + tl.sum(p, 1)


@triton.jit
def _walk(
    q,
    o,
    m,
    z,
    p,
    shrink,
    k_desc,
    v_desc,
    kh,
    start,
    end,
    bounds,
    scale_log2,
    HIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Process the key blocks from start to end. p is that of the previous block: its product with v is issued after the
    product of the next scores, so that the tensor cores compute p v while the other cores exponentiate those scores."""
    BLOCK_N: tl.constexpr = p.shape[1]
    k_begin, k_length, diagonal, row = bounds
    for j in tl.range(start, end, BLOCK_N):
        k = load_tile(k_desc, k_begin + j, kh, q.shape[1])
        s = tl.dot(q, k.T, input_precision=PRECISION)
        v = load_tile(v_desc, k_begin + j - BLOCK_N, kh, q.shape[1])
        o = tl.dot(p.to(q.dtype, bitcast=True), v, o * shrink[:, None], input_precision=PRECISION)
        if HIDE:
            col = j + tl.arange(0, BLOCK_N)
            s = hide(s, row[:, None], col[None, :], k_length, diagonal, CAUSAL)
        p_next, shrink, m, z = _softmax_step(s, m, z, scale_log2)
        p = bits(p_next, q.dtype)
    return o, m, z, p, shrink


@triton.jit
def _merge(lse, other):
    """The weight of the first in the sum of both, and the log-sum-exp of both. If neither has keys: 0 and -inf."""
    high = tl.maximum(lse, other)
    base = tl.where(high == NOTHING, 0.0, high)
    weight = tl.exp(lse - base)
    total = weight + tl.exp(other - base)
    share = tl.where(total == 0.0, 0.0, weight / total)
    return share, base + tl.log(total)


@triton.jit(do_not_specialize=["T", "N", "heads_per_key"])
def _forward_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_ptr,
    lse_ptr,
    earlier_out_ptr,
    earlier_lse_ptr,
    cu_q_ptr,
    cu_k_ptr,
    used_q_ptr,
    used_k_ptr,
    T,
    N,
    heads_per_key,
    scale_log2,
    H: tl.constexpr,
    E: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # One program owns BLOCK_M query rows of one head in one segment.
    tile = tl.program_id(0)
    if CAUSAL:  # tiles take longer towards the end of a segment: start with the longest
        tile = tl.num_programs(0) - 1 - tile
    h = tl.program_id(1)
    first, q_begin, slot, q_length, k_begin, k_length = locate(
        cu_q_ptr, used_q_ptr, cu_k_ptr, used_k_ptr, N, tile, BLOCK_M
    )
    if first >= slot:
        return
    diagonal = k_length - q_length
    # Keys from `end` on are hidden from every row of the tile; keys before `full` are visible to every row.
    end = k_length
    full = k_length
    if CAUSAL:
        end = tl.minimum(end, first + BLOCK_M + diagonal)
        full = tl.maximum(tl.minimum(full, first + 1 + diagonal), 0)
    full = full // BLOCK_N * BLOCK_N

    row = first + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    kh = h // heads_per_key
    q = load_tile(q_desc, q_begin + first, h, BLOCK_E)
    k = load_tile(k_desc, k_begin, kh, BLOCK_E)
    s = tl.dot(q, k.T, input_precision=PRECISION)
    s = hide(s, row[:, None], col[None, :], k_length, diagonal, CAUSAL)
    m = tl.full((BLOCK_M,), NOTHING, tl.float32)
    z = tl.zeros((BLOCK_M,), tl.float32)
    o = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    p, shrink, m, z = _softmax_step(s, m, z, scale_log2)
    p = bits(p, q.dtype)
    bounds = (k_begin, k_length, diagonal, row)
    o, m, z, p, shrink = _walk(
        q, o, m, z, p, shrink, k_desc, v_desc, kh, BLOCK_N, full, bounds, scale_log2, False, CAUSAL, PRECISION
    )
    start = tl.maximum(full, BLOCK_N)
    o, m, z, p, shrink = _walk(
        q, o, m, z, p, shrink, k_desc, v_desc, kh, start, end, bounds, scale_log2, True, CAUSAL, PRECISION
    )
    last = (tl.maximum(tl.cdiv(end, BLOCK_N), 1) - 1) * BLOCK_N
    v = load_tile(v_desc, k_begin + last, kh, BLOCK_E)
    v = tl.where((last + col < k_length)[:, None], v, 0.0)  # NaN of a neighbouring segment: 0 NaN would be NaN
    o = tl.dot(p.to(q.dtype, bitcast=True), v, o * shrink[:, None], input_precision=PRECISION)

    empty = (z == 0.0) | (row >= q_length)  # no keys, or an unused row of the slot
    z = tl.where(empty, 1.0, z)
    o = tl.where(empty[:, None], 0.0, o / z[:, None])
    lse = tl.where(empty, NOTHING, (m + tl.log2(z)) * _LN_2)
    rows = (q_begin + row).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    offset = rows[:, None] * (H * E) + h * E + e[None, :]
    inside = (row < slot)[:, None] & (e < E)[None, :]
    if earlier_out_ptr is not None:
        earlier = tl.load(earlier_lse_ptr + h * T + rows, mask=row < slot, other=NOTHING)
        keep, lse = _merge(earlier, lse)
        earlier_out = tl.load(earlier_out_ptr + offset, mask=inside, other=0.0)
        o = o * (1.0 - keep)[:, None] + earlier_out * keep[:, None]
    tl.store(out_ptr + offset, o.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + h * T + rows, lse, mask=row < slot)


def forward(
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    segments: Segments,
    segments_k: Segments,
    causal: bool,
    scale: float,
    earlier: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """out_THE in the dtype of q and lse_HT in float32, as ``kernels.attention`` defines them.

    ``earlier``: out_THE and lse_HT, in float32, of the same queries over other keys. The result is then that over all
    keys, and out is float32: ring attention continues from block to block without rounding in between.
    """
    T, H, E = q_THE.shape
    out_dtype = q_THE.dtype if earlier is None else torch.float32
    out_THE = q_THE.new_empty((T, H, E), dtype=out_dtype)
    lse_HT = q_THE.new_empty((H, T), dtype=torch.float32)
    earlier_out = earlier_lse = None
    if earlier is not None:
        earlier_out, earlier_lse = earlier[0].contiguous(), earlier[1].contiguous()
    if T == 0 or k_SKE.shape[0] == 0:
        if earlier is not None:
            return out_THE.copy_(earlier[0]), lse_HT.copy_(earlier[1])
        return out_THE.zero_(), lse_HT.fill_(-torch.inf)
    config = forward_config(E, q_THE.dtype)
    q_THE = loadable(q_THE, config["BLOCK_E"])
    k_SKE = loadable(k_SKE, config["BLOCK_E"])
    v_SKE = loadable(v_SKE, config["BLOCK_E"])
    grid = (num_tiles(T, segments, config["BLOCK_M"]), H)
    _forward_kernel[grid](
        descriptor(q_THE, config["BLOCK_M"]),
        descriptor(k_SKE, config["BLOCK_N"]),
        descriptor(v_SKE, config["BLOCK_N"]),
        out_THE,
        lse_HT,
        earlier_out,
        earlier_lse,
        segments.cu_seqlens,
        segments_k.cu_seqlens,
        segments.lengths,
        segments_k.lengths,
        T,
        len(segments),
        H // k_SKE.shape[1],
        scale * LOG2_E,
        H=H,
        E=E,
        CAUSAL=causal,
        PRECISION=precision(q_THE.dtype),
        **config,
    )
    return out_THE, lse_HT

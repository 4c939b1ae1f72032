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

from kernels.attention_configs import forward_config
from kernels.attention_tiles import (
    NOTHING,
    bits,
    capped,
    clear_past,
    descriptor,
    find_program,
    heads_in_turn,
    hide,
    load_tile,
    loadable,
    locate,
    num_tiles,
    precision,
    ranges,
    score_numbers,
)
from kernels.backend import LN_2, num_processors
from kernels.launch import launch
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
def _merge(lse, other):
    """The weight of the first in the sum of both, and the log-sum-exp of both. If neither has keys: 0 and -inf."""
    high = tl.maximum(lse, other)
    base = tl.where(high == NOTHING, 0.0, high)
    weight = tl.exp(lse - base)
    total = weight + tl.exp(other - base)
    share = tl.where(total == 0.0, 0.0, weight / total)
    return share, base + tl.log(total)


@triton.jit
def _finish(
    out_ptr, lse_ptr, earlier_out_ptr, earlier_lse_ptr, o, m, z, begin, row, used, slot, h, heads, T, E: tl.constexpr
):
    """Write out and lse of a tile, together with those of earlier keys if there are any."""
    empty = (z == 0.0) | (row >= used)  # no keys, or an unused row of the slot
    z = tl.where(empty, 1.0, z)
    o = tl.where(empty[:, None], 0.0, o / z[:, None])
    lse = tl.where(empty, NOTHING, (m + tl.log2(z)) * _LN_2)
    rows = (begin + row).to(tl.int64)
    e = tl.arange(0, o.shape[1])
    offset = (rows * heads + h)[:, None] * E + e[None, :]
    inside = (row < slot)[:, None] & (e < E)[None, :]
    lse_row = h.to(tl.int64) * T + rows
    if earlier_out_ptr is not None:
        earlier = tl.load(earlier_lse_ptr + lse_row, mask=row < slot, other=NOTHING)
        keep, lse = _merge(earlier, lse)
        earlier_out = tl.load(earlier_out_ptr + offset, mask=inside, other=0.0)
        o = o * (1.0 - keep)[:, None] + earlier_out * keep[:, None]
    tl.store(out_ptr + offset, o.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + lse_row, lse, mask=row < slot)


@triton.jit(do_not_specialize=["T", "N", "heads", "group", "section"])
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
    first_ptr,
    last_ptr,
    T,
    N,
    heads,
    group,
    section,
    scale_log2,
    cap_scale,
    softcap,
    E: tl.constexpr,
    PITCH: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    LATE_PV: tl.constexpr,
):
    # One program owns BLOCK_M query rows of one head in one segment.
    tile, h = find_program(heads, section, CAUSAL)
    first, q_begin, slot, q_length, k_begin, k_length = locate(
        cu_q_ptr, used_q_ptr, cu_k_ptr, used_k_ptr, T, N, tile, BLOCK_M
    )
    if first >= slot:
        return
    row = first + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    kh = h // group
    low, high, start, end, whole_start, whole_end = ranges(
        first_ptr, last_ptr, q_begin, first, q_length, k_length, CAUSAL, BLOCK_M, False
    )
    WITH_LOW: tl.constexpr = first_ptr is not None
    start = start // BLOCK_N * BLOCK_N
    last = start + (tl.maximum(tl.cdiv(end - start, BLOCK_N), 1) - 1) * BLOCK_N

    q = clear_past(load_tile(q_desc, q_begin + first, h, PITCH), E)
    m = tl.full((BLOCK_M,), NOTHING, tl.float32)
    z = tl.zeros((BLOCK_M,), tl.float32)
    o = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    if LATE_PV:
        # p v of a block is issued after the product of the next scores and runs while those are exponentiated.
        k = load_tile(k_desc, k_begin + start, kh, PITCH)
        s = capped(tl.dot(q, k.T, input_precision=PRECISION), cap_scale, softcap)
        s = hide(s, (start + col)[None, :], low[:, None], high[:, None], WITH_LOW)
        p, shrink, m, z = _softmax_step(s, m, z, scale_log2)
        p = bits(p, q.dtype)
        for j in tl.range(start + BLOCK_N, last + BLOCK_N, BLOCK_N):
            k = load_tile(k_desc, k_begin + j, kh, PITCH)
            s = tl.dot(q, k.T, input_precision=PRECISION)
            v = load_tile(v_desc, k_begin + j - BLOCK_N, kh, PITCH)
            o = tl.dot(p.to(q.dtype, bitcast=True), v, o * shrink[:, None], input_precision=PRECISION)
            s = capped(s, cap_scale, softcap)
            if (j + BLOCK_N > whole_end) | (j < whole_start):
                s = hide(s, (j + col)[None, :], low[:, None], high[:, None], WITH_LOW)
            p, shrink, m, z = _softmax_step(s, m, z, scale_log2)
            p = bits(p, q.dtype)
        p = p.to(q.dtype, bitcast=True)
    else:
        for j in tl.range(start, last, BLOCK_N):
            k = load_tile(k_desc, k_begin + j, kh, PITCH)
            s = capped(tl.dot(q, k.T, input_precision=PRECISION), cap_scale, softcap)
            if (j + BLOCK_N > whole_end) | (j < whole_start):
                s = hide(s, (j + col)[None, :], low[:, None], high[:, None], WITH_LOW)
            p, shrink, m, z = _softmax_step(s, m, z, scale_log2)
            v = load_tile(v_desc, k_begin + j, kh, PITCH)
            o = tl.dot(p.to(q.dtype), v, o * shrink[:, None], input_precision=PRECISION)
        k = load_tile(k_desc, k_begin + last, kh, PITCH)
        s = capped(tl.dot(q, k.T, input_precision=PRECISION), cap_scale, softcap)
        s = hide(s, (last + col)[None, :], low[:, None], high[:, None], WITH_LOW)
        p, shrink, m, z = _softmax_step(s, m, z, scale_log2)
        p = p.to(q.dtype)
    v = load_tile(v_desc, k_begin + last, kh, PITCH)
    v = tl.where((last + col < k_length)[:, None], v, 0.0)  # NaN of a neighbouring segment: 0 NaN would be NaN
    o = tl.dot(p, v, o * shrink[:, None], input_precision=PRECISION)

    _finish(out_ptr, lse_ptr, earlier_out_ptr, earlier_lse_ptr, o, m, z, q_begin, row, q_length, slot, h, heads, T, E)


def forward(
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    segments: Segments,
    segments_k: Segments,
    causal: bool,
    scale: float,
    earlier: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """out_THE in the dtype of q and lse_HT in float32, as ``kernels.attention`` defines them.

    ``earlier``: out_THE and lse_HT, in float32, of the same queries over other keys. The result is then that over all
    keys, and out is float32: ring attention continues from block to block without rounding in between.
    """
    T, H, E = q_THE.shape
    S, K, _ = k_SKE.shape
    out_dtype = q_THE.dtype if earlier is None else torch.float32
    out_THE = q_THE.new_empty((T, H, E), dtype=out_dtype)
    lse_HT = q_THE.new_empty((H, T), dtype=torch.float32)
    earlier_out = earlier_lse = None
    if earlier is not None:
        earlier_out, earlier_lse = earlier[0].contiguous(), earlier[1].contiguous()
    if T == 0 or S == 0:
        if earlier is not None:
            return out_THE.copy_(earlier[0]), lse_HT.copy_(earlier[1])
        return out_THE.zero_(), lse_HT.fill_(-torch.inf)
    tile = forward_config(E, q_THE.dtype, earlier is not None)
    block_m, block_n, block_e = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_E"]
    q_THE, k_SKE, v_SKE = loadable(q_THE, block_e), loadable(k_SKE, block_e), loadable(v_SKE, block_e)
    tiles, group = num_tiles(T, segments, block_m), H // K
    arguments = (
        descriptor(q_THE, block_m, block_e),
        descriptor(k_SKE, block_n, block_e),
        descriptor(v_SKE, block_n, block_e),
        out_THE,
        lse_HT,
        earlier_out,
        earlier_lse,
        segments.cu_seqlens,
        segments_k.cu_seqlens,
        segments.lengths,
        segments_k.lengths,
        segments.intervals and segments.intervals.first_T,
        segments.intervals and segments.intervals.last_T,
        T,
        len(segments),
        H,
        group,
        group * heads_in_turn(K, 2 * S * E * k_SKE.element_size(), tiles * group, num_processors(q_THE)),
        *score_numbers(scale, softcap),
    )
    constants = dict(E=E, PITCH=q_THE.shape[2], CAUSAL=causal, PRECISION=precision(q_THE.dtype), **tile)
    launch(_forward_kernel, tiles * H, arguments, constants)
    return out_THE, lse_HT

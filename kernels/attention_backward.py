"""Backward of packed attention in Triton (FlashAttention-2, 2307.08691, section 3.2).

With p_ij = exp(s_ij - lse_i) and delta_i = do_i . o_i - dlse_i:
    dv_j = sum_i p_ij do_i        dp_ij = do_i . v_j        ds_ij = p_ij (dp_ij - delta_i)
    dk_j = scale sum_i ds_ij q_i        dq_i = scale sum_j ds_ij k_j

One pass: a program owns a block of keys, walks the queries that see it, and adds its share of dq to memory: five
products for each pair of blocks, in an order that is not the same twice. Two passes: dk and dv as before, dq by a
second kernel that owns queries: seven products, bit for bit repeatable.

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
    hide,
    keys_config,
    load_tile,
    loadable,
    locate,
    num_tiles,
    one_pass,
    precision,
    queries_config,
    store_tile,
)
from kernels.backend import LOG2_E
from kernels.segments import Segments

_LOG2_E = tl.constexpr(LOG2_E)
_ROOM = 128  # rows that a tile may reach past the last one


@triton.jit(do_not_specialize=["T", "ROWS"])
def _statistics_kernel(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    lse2_ptr,
    delta_ptr,
    T,
    ROWS,
    H: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # One program owns 32 rows of one head: delta and log2(e) lse, both 0 for rows without keys.
    row = (tl.program_id(0) * 32 + tl.arange(0, 32)).to(tl.int64)
    h = tl.program_id(1)
    e = tl.arange(0, BLOCK_E)
    offset = row[:, None] * (H * E) + h * E + e[None, :]
    inside = (row < T)[:, None] & (e < E)[None, :]
    out = tl.load(out_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + h * T + row, mask=row < T, other=0.0)
    lse = tl.load(lse_ptr + h * T + row, mask=row < T, other=NOTHING)
    tl.store(lse2_ptr + h * ROWS + row, tl.where(lse == NOTHING, 0.0, lse * _LOG2_E), mask=row < ROWS)
    tl.store(delta_ptr + h * ROWS + row, tl.where(lse == NOTHING, 0.0, delta), mask=row < ROWS)


@triton.jit(do_not_specialize=["N", "ROWS", "heads_per_key"])
def _keys_kernel(
    q_desc,
    k_desc,
    v_desc,
    dout_desc,
    lse2_ptr,
    delta_ptr,
    dq_desc,
    dk_ptr,
    dv_ptr,
    cu_q_ptr,
    cu_k_ptr,
    used_q_ptr,
    used_k_ptr,
    N,
    ROWS,
    heads_per_key,
    scale,
    scale_log2,
    K: tl.constexpr,
    E: tl.constexpr,
    CAUSAL: tl.constexpr,
    ADD_DQ: tl.constexpr,
    LATE_DK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # One program owns BLOCK_N key rows of one key/value head in one segment, for all query heads that share it.
    kh = tl.program_id(1)
    first, k_begin, slot, k_length, q_begin, q_length = locate(
        cu_k_ptr, used_k_ptr, cu_q_ptr, used_q_ptr, N, tl.program_id(0), BLOCK_N
    )
    if first >= slot:
        return
    diagonal = k_length - q_length
    # Queries before `start` see none of these keys, from `full` on they see all of them.
    start = 0
    full = 0
    if CAUSAL:
        start = tl.maximum(first - diagonal, 0) // BLOCK_M * BLOCK_M
        full = first + BLOCK_N - 1 - diagonal
    if first + BLOCK_N > k_length:  # some of these keys are hidden from everyone
        full = q_length
    num_blocks = tl.cdiv(tl.maximum(q_length - start, 0), BLOCK_M)

    col = first + tl.arange(0, BLOCK_N)
    k = load_tile(k_desc, k_begin + first, kh, BLOCK_E)
    v = load_tile(v_desc, k_begin + first, kh, BLOCK_E)
    dk = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    # Scores are transposed, keys by queries: p and ds are then left operands straight from registers. With LATE_DK the
    # product that adds a block to dk is issued in the next round, and runs during the exponentials there.
    h = kh * heads_per_key
    i = start
    ds = tl.zeros((BLOCK_N, BLOCK_M), q_desc.dtype)
    late = bits(ds, q_desc.dtype)
    for step in tl.range(0, num_blocks * heads_per_key):
        q_before = load_tile(q_desc, q_begin + i, h, BLOCK_E) if LATE_DK else k
        h = kh * heads_per_key + step // num_blocks
        i = start + step % num_blocks * BLOCK_M
        q = load_tile(q_desc, q_begin + i, h, BLOCK_E)
        s = tl.dot(k, q.T, input_precision=PRECISION)
        if LATE_DK:
            dk = tl.dot(late.to(q.dtype, bitcast=True), q_before, dk, input_precision=PRECISION)
        row = i + tl.arange(0, BLOCK_M)
        if (i < full) | (i + BLOCK_M > q_length):
            s = hide(s, row[None, :], col[:, None], k_length, diagonal, CAUSAL)
            s = tl.where((row < q_length)[None, :], s, NOTHING)
        statistic = h.to(tl.int64) * ROWS + q_begin + row
        p = tl.exp2(s * scale_log2 - tl.load(lse2_ptr + statistic)[None, :])
        dout = load_tile(dout_desc, q_begin + i, h, BLOCK_E)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp = tl.dot(v, dout.T, input_precision=PRECISION)
        ds = (p * (dp - tl.load(delta_ptr + statistic)[None, :])).to(q.dtype)
        if LATE_DK:
            late = bits(ds, q.dtype)
        else:
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        if ADD_DQ:
            dq_desc.atomic_add([q_begin + i, h * BLOCK_E], tl.dot(ds.T, k, input_precision=PRECISION))
    if LATE_DK:
        q = load_tile(q_desc, q_begin + i, h, BLOCK_E)
        dk = tl.dot(late.to(q.dtype, bitcast=True), q, dk, input_precision=PRECISION)
    store_tile(dk_ptr, dk * scale, k_begin, col, k_length, slot, kh, K, E)
    store_tile(dv_ptr, dv, k_begin, col, k_length, slot, kh, K, E)


@triton.jit(do_not_specialize=["N", "ROWS", "heads_per_key"])
def _queries_kernel(
    q_desc,
    k_desc,
    v_desc,
    dout_desc,
    lse2_ptr,
    delta_ptr,
    dq_ptr,
    cu_q_ptr,
    cu_k_ptr,
    used_q_ptr,
    used_k_ptr,
    N,
    ROWS,
    heads_per_key,
    scale,
    scale_log2,
    H: tl.constexpr,
    E: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # One program owns BLOCK_M query rows of one head in one segment: dq of the two-pass form.
    tile = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    h = tl.program_id(1)
    first, q_begin, slot, q_length, k_begin, k_length = locate(
        cu_q_ptr, used_q_ptr, cu_k_ptr, used_k_ptr, N, tile, BLOCK_M
    )
    if first >= slot:
        return
    diagonal = k_length - q_length
    end = k_length
    full = k_length
    if CAUSAL:
        end = tl.minimum(end, first + BLOCK_M + diagonal)
        full = tl.minimum(full, first + 1 + diagonal)

    row = first + tl.arange(0, BLOCK_M)
    kh = h // heads_per_key
    q = load_tile(q_desc, q_begin + first, h, BLOCK_E)
    dout = load_tile(dout_desc, q_begin + first, h, BLOCK_E)
    statistic = h.to(tl.int64) * ROWS + q_begin + row
    lse2 = tl.load(lse2_ptr + statistic)
    delta = tl.load(delta_ptr + statistic)
    dq = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for j in tl.range(0, end, BLOCK_N):
        k = load_tile(k_desc, k_begin + j, kh, BLOCK_E)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        if j + BLOCK_N > full:
            col = j + tl.arange(0, BLOCK_N)
            s = hide(s, row[:, None], col[None, :], k_length, diagonal, CAUSAL)
        p = tl.exp2(s * scale_log2 - lse2[:, None])
        v = load_tile(v_desc, k_begin + j, kh, BLOCK_E)
        dp = tl.dot(dout, v.T, input_precision=PRECISION)
        dq = tl.dot((p * (dp - delta[:, None])).to(q.dtype), k, dq, input_precision=PRECISION)
    store_tile(dq_ptr, dq * scale, q_begin, row, q_length, slot, h, H, E)


def backward(
    dout_THE: Tensor,
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    lse2_HR: Tensor,
    delta_HR: Tensor,
    segments: Segments,
    segments_k: Segments,
    causal: bool,
    scale: float,
    deterministic: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq_THE, dk_SKE and dv_SKE in ``dtype`` (by default that of q), from the ``statistics`` of the whole softmax.

    k and v may be some of the keys that the statistics are about: such shares add up, as ring attention needs.
    A NaN in a segment can reach all gradients of segments that share its tiles: hidden pairs are 0, and 0 NaN is not.
    """
    (T, H, E), (S, K) = q_THE.shape, k_SKE.shape[:2]
    dtype = dtype or q_THE.dtype
    dq_THE, dk_SKE, dv_SKE = (x.new_empty(x.shape, dtype=dtype) for x in (q_THE, k_SKE, v_SKE))
    if T == 0 or S == 0:
        return dq_THE.zero_(), dk_SKE.zero_(), dv_SKE.zero_()
    keys, queries = keys_config(E, q_THE.dtype), queries_config(E, q_THE.dtype)
    clean = lambda x, layout: loadable(_without_spare_rows(x, layout), keys["BLOCK_E"])
    q_THE, dout_THE = (clean(x, segments) for x in (q_THE, dout_THE))
    k_SKE, v_SKE = (clean(x, segments_k) for x in (k_SKE, v_SKE))
    arguments = lambda config: (
        config
        | _arguments((q_THE, k_SKE, v_SKE, dout_THE), (lse2_HR, delta_HR), segments, segments_k, causal, scale, config)
    )
    add_dq = not deterministic and one_pass(E, q_THE.dtype)
    dq32_THE = q_THE.new_zeros(q_THE.shape, dtype=torch.float32) if add_dq else None
    outputs = dict(dk_ptr=dk_SKE, dv_ptr=dv_SKE, dq_desc=descriptor(dq32_THE, keys["BLOCK_M"]) if add_dq else None)
    grid = (num_tiles(S, segments_k, keys["BLOCK_N"]), K)
    _keys_kernel[grid](**arguments(keys), **outputs, E=E, K=K, ADD_DQ=add_dq)
    if add_dq:
        torch.mul(dq32_THE[:, :, :E], scale, out=dq_THE)
    else:
        grid = (num_tiles(T, segments, queries["BLOCK_M"]), H)
        _queries_kernel[grid](**arguments(queries), dq_ptr=dq_THE, E=E, H=H)
    return dq_THE, dk_SKE, dv_SKE


def _arguments(tensors, statistics, segments, segments_k, causal, scale, config) -> dict:
    """What both kernels take, but for their results."""
    q_THE, k_SKE, v_SKE, dout_THE = tensors
    return dict(
        q_desc=descriptor(q_THE, config["BLOCK_M"]),
        k_desc=descriptor(k_SKE, config["BLOCK_N"]),
        v_desc=descriptor(v_SKE, config["BLOCK_N"]),
        dout_desc=descriptor(dout_THE, config["BLOCK_M"]),
        lse2_ptr=statistics[0],
        delta_ptr=statistics[1],
        cu_q_ptr=segments.cu_seqlens,
        cu_k_ptr=segments_k.cu_seqlens,
        used_q_ptr=segments.lengths,
        used_k_ptr=segments_k.lengths,
        N=len(segments),
        ROWS=statistics[0].shape[1],
        heads_per_key=q_THE.shape[1] // k_SKE.shape[1],
        scale=scale,
        scale_log2=scale * LOG2_E,
        CAUSAL=causal,
        PRECISION=precision(q_THE.dtype),
    )


def statistics(out_THE: Tensor, dout_THE: Tensor, lse_HT: Tensor, dlse_HT: Tensor | None) -> tuple[Tensor, Tensor]:
    """lse2_HR = log2(e) lse and delta_HR, float32, with room for a last tile: R = T + 128, and 0 there."""
    T, H, E = out_THE.shape
    lse2_HR, delta_HR = (lse_HT.new_empty((H, T + _ROOM)) for _ in range(2))
    dlse_HT = None if dlse_HT is None else dlse_HT.contiguous()
    _statistics_kernel[(triton.cdiv(T + _ROOM, 32), H)](
        out_THE.contiguous(),
        dout_THE.contiguous(),
        lse_HT.contiguous(),
        dlse_HT,
        lse2_HR,
        delta_HR,
        T,
        T + _ROOM,
        H=H,
        E=E,
        BLOCK_E=max(16, triton.next_power_of_2(E)),
    )
    return lse2_HR, delta_HR


def _without_spare_rows(x_THE: Tensor, segments: Segments) -> Tensor:
    """x with 0 in the unused part of slots, which may hold anything: 0 times a NaN is not 0."""
    if segments.lengths is None:
        return x_THE
    row_T = torch.arange(x_THE.shape[0], device=x_THE.device, dtype=torch.int32)
    slot_T = torch.searchsorted(segments.cu_seqlens[1:], row_T, right=True)
    used_T = row_T - segments.cu_seqlens[slot_T] < segments.lengths[slot_T]
    return torch.where(used_T[:, None, None], x_THE, 0.0)

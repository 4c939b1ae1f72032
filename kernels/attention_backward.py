"""Backward of packed attention in Triton (FlashAttention-2, 2307.08691, section 3.2).

With p_ij = exp(s_ij - lse_i) and delta_i = do_i . o_i - dlse_i:
    dv_j = sum_i p_ij do_i        dp_ij = do_i . v_j        ds_ij = p_ij (dp_ij - delta_i)
    dk_j = scale sum_i ds_ij q_i        dq_i = scale sum_j ds_ij k_j

One pass: a program owns a block of keys, walks the queries that see it, and adds its share of dq to memory. That is
five products for each pair of blocks, but the order of the additions varies from run to run. Two passes: the same for
dk and dv, and a second kernel, whose programs own queries, for dq: seven products, repeatable bit for bit.

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
    padded_head_dim,
    precision,
    queries_config,
    store_tile,
)
from kernels.backend import LOG2_E
from kernels.segments import Segments

_LOG2_E = tl.constexpr(LOG2_E)
_ROOM = 128  # rows by which a tile may extend past the last one


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
    row = tl.program_id(0) * 32 + tl.arange(0, 32)
    row = row.to(tl.int64)
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
    lse2 = tl.where(lse == NOTHING, 0.0, lse * _LOG2_E)
    delta = tl.where(lse == NOTHING, 0.0, delta)
    tl.store(lse2_ptr + h * ROWS + row, lse2, mask=row < ROWS)
    tl.store(delta_ptr + h * ROWS + row, delta, mask=row < ROWS)


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
    # Queries before `start` see none of these keys; queries from `full` on see all of them.
    start = 0
    full = 0
    if CAUSAL:
        start = tl.maximum(first - diagonal, 0) // BLOCK_M * BLOCK_M
        full = first + BLOCK_N - 1 - diagonal
    if first + BLOCK_N > k_length:  # some of these keys lie past the segment
        full = q_length
    num_blocks = tl.cdiv(tl.maximum(q_length - start, 0), BLOCK_M)

    col = first + tl.arange(0, BLOCK_N)
    k = load_tile(k_desc, k_begin + first, kh, BLOCK_E)
    v = load_tile(v_desc, k_begin + first, kh, BLOCK_E)
    dk = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    # Scores are transposed, keys by queries, so that p and ds are left operands and stay in registers. With LATE_DK the
    # product that adds a block to dk is issued in the next iteration and overlaps with the exponentials there.
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
        lse2 = tl.load(lse2_ptr + statistic)
        p = tl.exp2(s * scale_log2 - lse2[None, :])
        dout = load_tile(dout_desc, q_begin + i, h, BLOCK_E)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp = tl.dot(v, dout.T, input_precision=PRECISION)
        delta = tl.load(delta_ptr + statistic)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        if LATE_DK:
            late = bits(ds, q.dtype)
        else:
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        if ADD_DQ:
            dq = tl.dot(ds.T, k, input_precision=PRECISION)
            dq_desc.atomic_add([q_begin + i, h * BLOCK_E], dq)
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
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
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

    k and v may be only some of the keys of that softmax; ring attention sums such shares. A NaN in a segment can reach
    the gradients of other segments that share its tiles: hidden pairs have p = 0, and 0 NaN is NaN.
    """
    T, H, E = q_THE.shape
    S, K, _ = k_SKE.shape
    dtype = dtype or q_THE.dtype
    dq_THE = torch.empty_like(q_THE, dtype=dtype, memory_format=torch.contiguous_format)
    dk_SKE = torch.empty_like(k_SKE, dtype=dtype, memory_format=torch.contiguous_format)
    dv_SKE = torch.empty_like(v_SKE, dtype=dtype, memory_format=torch.contiguous_format)
    if T == 0 or S == 0:
        return dq_THE.zero_(), dk_SKE.zero_(), dv_SKE.zero_()
    keys = keys_config(E, q_THE.dtype)
    queries = queries_config(E, q_THE.dtype)
    q_THE = loadable(_without_spare_rows(q_THE, segments), keys["BLOCK_E"])
    dout_THE = loadable(_without_spare_rows(dout_THE, segments), keys["BLOCK_E"])
    k_SKE = loadable(_without_spare_rows(k_SKE, segments_k), keys["BLOCK_E"])
    v_SKE = loadable(_without_spare_rows(v_SKE, segments_k), keys["BLOCK_E"])
    numbers = dict(
        lse2_ptr=lse2_HR,
        delta_ptr=delta_HR,
        cu_q_ptr=segments.cu_seqlens,
        cu_k_ptr=segments_k.cu_seqlens,
        used_q_ptr=segments.lengths,
        used_k_ptr=segments_k.lengths,
        N=len(segments),
        ROWS=lse2_HR.shape[1],
        heads_per_key=H // K,
        scale=scale,
        scale_log2=scale * LOG2_E,
        CAUSAL=causal,
        PRECISION=precision(q_THE.dtype),
    )
    dq32_THE = dq_desc = None
    if not deterministic and one_pass(E, q_THE.dtype):
        dq32_THE = q_THE.new_zeros(q_THE.shape, dtype=torch.float32)
        dq_desc = descriptor(dq32_THE, keys["BLOCK_M"])
    grid = (num_tiles(S, segments_k, keys["BLOCK_N"]), K)
    tiles = _descriptors(q_THE, k_SKE, v_SKE, dout_THE, keys)
    outputs = dict(dq_desc=dq_desc, dk_ptr=dk_SKE, dv_ptr=dv_SKE)
    _keys_kernel[grid](**tiles, **numbers, **outputs, E=E, K=K, ADD_DQ=dq32_THE is not None, **keys)
    if dq32_THE is not None:
        torch.mul(dq32_THE[:, :, :E], scale, out=dq_THE)
    else:
        grid = (num_tiles(T, segments, queries["BLOCK_M"]), H)
        tiles = _descriptors(q_THE, k_SKE, v_SKE, dout_THE, queries)
        _queries_kernel[grid](**tiles, **numbers, dq_ptr=dq_THE, E=E, H=H, **queries)
    return dq_THE, dk_SKE, dv_SKE


def _descriptors(q_THE: Tensor, k_SKE: Tensor, v_SKE: Tensor, dout_THE: Tensor, config: dict) -> dict:
    return dict(
        q_desc=descriptor(q_THE, config["BLOCK_M"]),
        k_desc=descriptor(k_SKE, config["BLOCK_N"]),
        v_desc=descriptor(v_SKE, config["BLOCK_N"]),
        dout_desc=descriptor(dout_THE, config["BLOCK_M"]),
    )


def statistics(out_THE: Tensor, dout_THE: Tensor, lse_HT: Tensor, dlse_HT: Tensor | None) -> tuple[Tensor, Tensor]:
    """lse2_HR = log2(e) lse and delta_HR, in float32. R = T + 128, 0 from row T on: room for a last tile."""
    T, H, E = out_THE.shape
    lse2_HR = lse_HT.new_empty((H, T + _ROOM))
    delta_HR = lse_HT.new_empty((H, T + _ROOM))
    if dlse_HT is not None:
        dlse_HT = dlse_HT.contiguous()
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
        BLOCK_E=padded_head_dim(E),
    )
    return lse2_HR, delta_HR


def _without_spare_rows(x_THE: Tensor, segments: Segments) -> Tensor:
    """x with 0 in the unused part of slots. That part may hold NaN, and 0 NaN is NaN."""
    if segments.lengths is None:
        return x_THE
    row_T = torch.arange(x_THE.shape[0], device=x_THE.device, dtype=torch.int32)
    slot_T = torch.searchsorted(segments.cu_seqlens[1:], row_T, right=True)
    used_T = row_T - segments.cu_seqlens[slot_T] < segments.lengths[slot_T]
    return torch.where(used_T[:, None, None], x_THE, 0.0)

"""Backward of packed attention in Triton (FlashAttention-2, 2307.08691, section 3.2).

With p_ij = exp(s_ij - lse_i) and delta_i = do_i . o_i - dlse_i:
    dv_j = sum_i p_ij do_i        dp_ij = do_i . v_j        ds_ij = p_ij (dp_ij - delta_i)
    dk_j = scale sum_i ds_ij q_i        dq_i = scale sum_j ds_ij k_j

One pass: a program owns a block of keys, walks the queries that see it, and adds its share of dq to memory. That is
five products for each pair of blocks, but the order of the additions varies from run to run. Two passes: the same for
dk and dv, and a second kernel, whose programs own queries, for dq: seven products, repeatable bit for bit.

T query rows   S key rows   H query heads   K key/value heads   E head dim   N segments
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.attention_configs import keys_config, one_pass, queries_config
from kernels.attention_tiles import (
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
    store_tile,
)
from kernels.backend import num_processors
from kernels.launch import launch
from kernels.segments import Segments


@triton.jit
def _ds(p, dp, delta, s, softcap):
    """Gradient of the scores before the cap, whose derivative is 1 - (s / softcap)^2."""
    ds = p * (dp - delta)
    if softcap is not None:
        capped_share = tl.maximum(s / softcap, -1.0)  # a hidden score is -inf, and 0 times infinity would be NaN
        ds *= 1 - capped_share * capped_share
    return ds


@triton.jit(do_not_specialize=["S", "N", "ROWS", "heads", "group", "parts", "section"])
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
    first_query_ptr,
    last_query_ptr,
    S,
    N,
    ROWS,
    heads,
    group,
    parts,
    section,
    scale,
    scale_log2,
    cap_scale,
    softcap,
    E: tl.constexpr,
    PITCH: tl.constexpr,
    CAUSAL: tl.constexpr,
    ADD_DQ: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    LATE_DK: tl.constexpr,
):
    # One program owns BLOCK_N key rows of one key/value head in one segment, for ``group`` of the query heads that
    # share it. Their gradients go to one of the ``parts`` of dk and dv.
    tile, share = find_program(heads, section, False)
    kh = share // parts
    first, k_begin, slot, k_length, q_begin, q_length = locate(
        cu_k_ptr, used_k_ptr, cu_q_ptr, used_q_ptr, S, N, tile, BLOCK_N
    )
    if first >= slot:
        return
    col = first + tl.arange(0, BLOCK_N)
    low, high, start, end, whole_start, whole_end = ranges(
        first_query_ptr, last_query_ptr, k_begin, first, k_length, q_length, CAUSAL, BLOCK_N, True
    )
    low = tl.where(col < k_length, low, q_length)  # keys past the segment are seen by no query
    if first + BLOCK_N > k_length:
        whole_start = q_length
    start = start // BLOCK_M * BLOCK_M
    num_blocks = tl.cdiv(tl.maximum(end - start, 0), BLOCK_M)

    k = clear_past(load_tile(k_desc, k_begin + first, kh, PITCH), E)
    v = clear_past(load_tile(v_desc, k_begin + first, kh, PITCH), E)
    dk = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    # Scores are transposed, keys by queries, so that p and ds are left operands and stay in registers. With LATE_DK the
    # product that adds a block to dk is issued in the next iteration and overlaps with the exponentials there.
    h = share * group
    i = start
    late = bits(tl.zeros((BLOCK_N, BLOCK_M), tl.float32), q_desc.dtype)
    for step in tl.range(0, num_blocks * group):
        q_before = load_tile(q_desc, q_begin + i, h, PITCH) if LATE_DK else k
        h = share * group + step // tl.maximum(num_blocks, 1)
        i = start + step % tl.maximum(num_blocks, 1) * BLOCK_M
        q = load_tile(q_desc, q_begin + i, h, PITCH)
        s = tl.dot(k, q.T, input_precision=PRECISION)
        if LATE_DK:
            dk = tl.dot(late.to(q.dtype, bitcast=True), q_before, dk, input_precision=PRECISION)
        s = capped(s, cap_scale, softcap)
        row = i + tl.arange(0, BLOCK_M)
        statistic = h.to(tl.int64) * ROWS + q_begin + row
        if (i < whole_start) | (i + BLOCK_M > whole_end):
            s = hide(s, row[None, :], low[:, None], high[:, None], True)
        lse2 = tl.load(lse2_ptr + statistic)
        p = tl.exp2(s * scale_log2 - lse2[None, :])
        dout = load_tile(dout_desc, q_begin + i, h, PITCH)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp = tl.dot(v, dout.T, input_precision=PRECISION)
        delta = tl.load(delta_ptr + statistic)
        ds = _ds(p, dp, delta[None, :], s, softcap).to(q.dtype)
        if LATE_DK:
            late = bits(ds, q.dtype)
        else:
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        if ADD_DQ:
            dq = tl.dot(ds.T, k, input_precision=PRECISION)
            dq_desc.atomic_add([q_begin + i, h * PITCH], dq)
    if LATE_DK:
        q = load_tile(q_desc, q_begin + i, h, PITCH)
        dk = tl.dot(late.to(q.dtype, bitcast=True), q, dk, input_precision=PRECISION)
    part = (share % parts).to(tl.int64) * S * (heads // parts) * E
    store_tile(dk_ptr + part, dk * scale, k_begin, col, k_length, slot, kh, heads // parts, E)
    store_tile(dv_ptr + part, dv, k_begin, col, k_length, slot, kh, heads // parts, E)


@triton.jit(do_not_specialize=["T", "N", "ROWS", "heads", "group", "section"])
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
    first_ptr,
    last_ptr,
    T,
    N,
    ROWS,
    heads,
    group,
    section,
    scale,
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
):
    # One program owns BLOCK_M query rows of one head in one segment: dq of the two-pass form.
    tile, h = find_program(heads, section, CAUSAL)
    first, q_begin, slot, q_length, k_begin, k_length = locate(
        cu_q_ptr, used_q_ptr, cu_k_ptr, used_k_ptr, T, N, tile, BLOCK_M
    )
    if first >= slot:
        return
    row = first + tl.arange(0, BLOCK_M)
    low, high, start, end, whole_start, whole_end = ranges(
        first_ptr, last_ptr, q_begin, first, q_length, k_length, CAUSAL, BLOCK_M, False
    )
    kh = h // group
    q = clear_past(load_tile(q_desc, q_begin + first, h, PITCH), E)
    dout = clear_past(load_tile(dout_desc, q_begin + first, h, PITCH), E)
    statistic = h.to(tl.int64) * ROWS + q_begin + row
    lse2 = tl.load(lse2_ptr + statistic)
    delta = tl.load(delta_ptr + statistic)
    dq = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for j in tl.range(start // BLOCK_N * BLOCK_N, end, BLOCK_N):
        k = load_tile(k_desc, k_begin + j, kh, PITCH)
        s = capped(tl.dot(q, k.T, input_precision=PRECISION), cap_scale, softcap)
        if (j + BLOCK_N > whole_end) | (j < whole_start):
            col = j + tl.arange(0, BLOCK_N)
            s = hide(s, col[None, :], low[:, None], high[:, None], first_ptr is not None)
        p = tl.exp2(s * scale_log2 - lse2[:, None])
        v = load_tile(v_desc, k_begin + j, kh, PITCH)
        dp = tl.dot(dout, v.T, input_precision=PRECISION)
        ds = _ds(p, dp, delta[:, None], s, softcap).to(q.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    store_tile(dq_ptr, dq * scale, q_begin, row, q_length, slot, h, heads, E)


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
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq_THE, dk_SKE and dv_SKE in ``dtype`` (by default that of q), from the ``statistics`` of the whole softmax.

    k and v may be only some of the keys of that softmax; ring attention sums such shares. A NaN in a segment, or past
    the last, can reach the gradients of segments that share its tiles: hidden pairs have p = 0, and 0 NaN is NaN.
    """
    E = q_THE.shape[2]
    dtype = dtype or q_THE.dtype
    dq_THE = q_THE.new_empty(q_THE.shape, dtype=dtype)
    if len(q_THE) == 0 or len(k_SKE) == 0:
        return dq_THE.zero_(), k_SKE.new_zeros(k_SKE.shape, dtype=dtype), v_SKE.new_zeros(v_SKE.shape, dtype=dtype)
    add_dq = not deterministic and one_pass(E, q_THE.dtype, softcap)
    tile = keys_config(E, q_THE.dtype, add_dq, softcap)
    q_THE = loadable(_without_spare_rows(q_THE, segments), tile["BLOCK_E"])
    dout_THE = loadable(_without_spare_rows(dout_THE, segments), tile["BLOCK_E"])
    k_SKE = loadable(_without_spare_rows(k_SKE, segments_k), tile["BLOCK_E"])
    v_SKE = loadable(_without_spare_rows(v_SKE, segments_k), tile["BLOCK_E"])
    tensors = q_THE, k_SKE, v_SKE, dout_THE, lse2_HR, delta_HR
    numbers = float(scale), *score_numbers(scale, softcap)  # an integer would be specialised
    constants = dict(E=E, PITCH=q_THE.shape[2], CAUSAL=causal, PRECISION=precision(q_THE.dtype))
    dq32_THE = q_THE.new_zeros(q_THE.shape, dtype=torch.float32) if add_dq else None
    dk_SKE, dv_SKE = _launch_keys(tensors, dq32_THE, dtype, segments, segments_k, numbers, constants | tile)
    if dq32_THE is not None:
        torch.mul(dq32_THE[:, :, :E], scale, out=dq_THE)
    else:
        tile = queries_config(E, q_THE.dtype)
        _launch_queries(tensors, dq_THE, segments, segments_k, numbers, constants | tile)
    return dq_THE, dk_SKE, dv_SKE


def _launch_keys(
    tensors: tuple[Tensor, ...],
    dq32_THE: Tensor | None,
    dtype: torch.dtype,
    segments: Segments,
    segments_k: Segments,
    numbers: tuple,
    constants: dict,
) -> tuple[Tensor, Tensor]:
    """dk and dv; adds to dq32, unless that is None."""
    q_THE, k_SKE, _, _, lse2_HR, delta_HR = tensors
    T, H, _ = q_THE.shape
    S, K, _ = k_SKE.shape
    E, block_m, block_e = constants["E"], constants["BLOCK_M"], constants["BLOCK_E"]
    tiles = num_tiles(S, segments_k, constants["BLOCK_N"])
    processors = num_processors(q_THE)
    parts = num_parts(tiles * K, H // K, processors)
    group = H // K // parts
    part_dtype = dtype if parts == 1 else torch.float32
    dk_PSKE = k_SKE.new_empty((parts, S, K, E), dtype=part_dtype)
    dv_PSKE = k_SKE.new_empty((parts, S, K, E), dtype=part_dtype)
    arguments = (
        *_descriptors(tensors, constants),
        lse2_HR,
        delta_HR,
        None if dq32_THE is None else descriptor(dq32_THE, block_m, block_e),
        dk_PSKE,
        dv_PSKE,
        segments.cu_seqlens,
        segments_k.cu_seqlens,
        segments.lengths,
        segments_k.lengths,
        segments.intervals and segments.intervals.first_query_S,
        segments.intervals and segments.intervals.last_query_S,
        S,
        len(segments),
        lse2_HR.shape[1],
        K * parts,
        group,
        parts,
        heads_in_turn(K * parts, 2 * T * E * group * q_THE.element_size(), tiles, processors),
        *numbers,
    )
    launch(_keys_kernel, tiles * K * parts, arguments, constants | dict(ADD_DQ=dq32_THE is not None))
    if parts == 1:
        return dk_PSKE[0], dv_PSKE[0]
    return dk_PSKE.sum(0).to(dtype), dv_PSKE.sum(0).to(dtype)


def _launch_queries(
    tensors: tuple[Tensor, ...],
    dq_THE: Tensor,
    segments: Segments,
    segments_k: Segments,
    numbers: tuple,
    constants: dict,
) -> None:
    q_THE, k_SKE, _, _, lse2_HR, delta_HR = tensors
    T, H, _ = q_THE.shape
    S, K, _ = k_SKE.shape
    E, group = constants["E"], H // K
    tiles = num_tiles(T, segments, constants["BLOCK_M"])
    arguments = (
        *_descriptors(tensors, constants),
        lse2_HR,
        delta_HR,
        dq_THE,
        segments.cu_seqlens,
        segments_k.cu_seqlens,
        segments.lengths,
        segments_k.lengths,
        segments.intervals and segments.intervals.first_T,
        segments.intervals and segments.intervals.last_T,
        T,
        len(segments),
        lse2_HR.shape[1],
        H,
        group,
        group * heads_in_turn(K, 2 * S * E * q_THE.element_size(), tiles * group, num_processors(q_THE)),
        *numbers,
    )
    launch(_queries_kernel, tiles * H, arguments, constants)


@lru_cache(maxsize=1024)
def num_parts(programs: int, group: int, processors: int) -> int:
    """Parts of dk and dv, which are summed in the end: as many as give each processor five programs, if the ``group``
    of query heads that share a key head can be divided so."""
    divisors = [parts for parts in range(1, group + 1) if group % parts == 0]
    return next((parts for parts in divisors if programs * parts >= 5 * processors), group)


def _descriptors(tensors: tuple[Tensor, ...], tile: dict) -> list[TensorDescriptor]:
    """Of q, k, v and dout."""
    m, n, e = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_E"]
    return [descriptor(x, rows, e) for x, rows in zip(tensors, (m, n, n, m))]


def _without_spare_rows(x_THE: Tensor, segments: Segments) -> Tensor:
    """x with 0 in the unused part of slots. That part may hold NaN, and 0 NaN is NaN."""
    if segments.lengths is None:
        return x_THE
    row_T = torch.arange(x_THE.shape[0], device=x_THE.device, dtype=torch.int32)
    slot_T = torch.searchsorted(segments.cu_seqlens[1:], row_T, right=True)
    slot_T = slot_T.clamp(max=len(segments) - 1)  # rows past the last slot are spare rows of it
    used_T = row_T - segments.cu_seqlens[slot_T] < segments.lengths[slot_T]
    return torch.where(used_T[:, None, None], x_THE, 0.0)

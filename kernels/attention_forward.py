"""Forward of packed attention in Triton: one pass over the keys with a running softmax (FlashAttention-2, 2307.08691).

With scores s2 = s * log2(e), their running maximum m and sum of exponentials l, for every block of keys:
    m' = max(m, max_j s2)    p_j = 2^(s2_j - m')    l' = l 2^(m - m') + sum_j p_j    o' = o 2^(m - m') + p v
and at the end out = o / l, lse = ln 2 * (m + log2 l).

T query rows   S key rows   H query heads   K key/value heads   E head dim   N segments
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.backend import INTERPRETED, LN_2, LOG2_E
from kernels.segments import Segments

_LN_2 = tl.constexpr(LN_2)
_INTERPRETED = tl.constexpr(INTERPRETED)
_NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def find_tile(cu_ptr, N, tile, BLOCK: tl.constexpr):
    """Segment of a tile, the segment's first row, and the tile's first row in the segment.

    Segment n owns the tiles from cu[n] // BLOCK + n on. That is at least as many as it needs and grows with n, so a
    program finds its segment by counting, and the grid follows from T and N alone: nobody asks the device.
    """
    lane = tl.arange(0, 128)
    before = 0
    for start in range(0, N, 128):
        n = start + lane
        first_tile = tl.load(cu_ptr + n, mask=n < N, other=0) // BLOCK + n
        before += tl.sum(((n < N) & (first_tile <= tile)).to(tl.int32), 0)
    n = before - 1
    begin = tl.load(cu_ptr + n)
    return n, begin, (tile - begin // BLOCK - n) * BLOCK


@triton.jit
def used_length(cu_ptr, used_ptr, n, begin):
    """Rows of segment n that count: the used part of its slot, or all of it."""
    if used_ptr is None:
        length = tl.load(cu_ptr + n + 1) - begin
    else:
        length = tl.load(used_ptr + n)
    return length


@triton.jit
def load_tile(desc, row, head, BLOCK_E: tl.constexpr):
    """Rows from ``row`` on of one head. Rows past the segment are whatever lies there."""
    return desc.load([row, head * BLOCK_E])


@triton.jit
def hide(s, row, col, k_length, diagonal, CAUSAL: tl.constexpr):
    visible = col < k_length
    if CAUSAL:
        visible = visible & (col <= row + diagonal)
    return tl.where(visible, s, _NOTHING)


@triton.jit
def _softmax_step(s, m, l, scale_log2):
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    base = tl.where(m_new == _NOTHING, 0.0, m_new)  # a row without keys so far: 2^(-inf - 0) = 0
    p = tl.exp2(s * scale_log2 - base[:, None])
    shrink = tl.exp2(m - base)
    return p, shrink, m_new, l * shrink + tl.sum(p, 1)


@triton.jit
def _bits(p, DTYPE: tl.constexpr):
    """p in the operands' dtype, as integers. An operand that a loop hands to its next round goes through shared memory,
    one that is made in the round stays in registers; turning bits back into numbers makes it and costs nothing."""
    return p.to(DTYPE).to(tl.int32 if DTYPE == tl.float32 else tl.int16, bitcast=True)


@triton.jit
def _walk(
    q,
    o,
    m,
    l,
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
    """Take up the key blocks from start to end. p, of the block before, meets its values after the next scores are
    asked for, so that the tensor cores work on p v while the other cores exponentiate those scores."""
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
        p_next, shrink, m, l = _softmax_step(s, m, l, scale_log2)
        p = _bits(p_next, q.dtype)
    return o, m, l, p, shrink


@triton.jit
def _merge(lse, other):
    """Share of the first among both, and the log-sum-exp of both; two rows without keys make one without keys."""
    high = tl.maximum(lse, other)
    base = tl.where(high == _NOTHING, 0.0, high)
    weight = tl.exp(lse - base)
    total = weight + tl.exp(other - base)
    return tl.where(total == 0.0, 0.0, weight / total), base + tl.log(total)


@triton.jit
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
    # Causal tiles grow along a segment: the longest start first, so that no long one is left at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    h = tl.program_id(1)
    n, q_begin, first = find_tile(cu_q_ptr, N, tile, BLOCK_M)
    slot = tl.load(cu_q_ptr + n + 1) - q_begin
    if first >= slot:
        return
    q_length = used_length(cu_q_ptr, used_q_ptr, n, q_begin)
    k_begin = tl.load(cu_k_ptr + n)
    k_length = used_length(cu_k_ptr, used_k_ptr, n, k_begin)
    diagonal = k_length - q_length
    # Keys from `end` on are hidden from the whole tile, keys before `full` are seen by all of it.
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
    s = hide(tl.dot(q, k.T, input_precision=PRECISION), row[:, None], col[None, :], k_length, diagonal, CAUSAL)
    m = tl.full((BLOCK_M,), _NOTHING, tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    o = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    p, shrink, m, l = _softmax_step(s, m, l, scale_log2)
    p = _bits(p, q.dtype)
    bounds = (k_begin, k_length, diagonal, row)
    o, m, l, p, shrink = _walk(q, o, m, l, p, shrink, k_desc, v_desc, kh, BLOCK_N, full, bounds, scale_log2, False, CAUSAL, PRECISION)
    start = tl.maximum(full, BLOCK_N)
    o, m, l, p, shrink = _walk(q, o, m, l, p, shrink, k_desc, v_desc, kh, start, end, bounds, scale_log2, True, CAUSAL, PRECISION)
    last = (tl.maximum(tl.cdiv(end, BLOCK_N), 1) - 1) * BLOCK_N
    v = load_tile(v_desc, k_begin + last, kh, BLOCK_E)
    v = tl.where((last + col < k_length)[:, None], v, 0.0)  # a neighbour's NaN times 0 would be NaN
    o = tl.dot(p.to(q.dtype, bitcast=True), v, o * shrink[:, None], input_precision=PRECISION)

    blank = (l == 0.0) | (row >= q_length)
    l = tl.where(blank, 1.0, l)
    o = tl.where(blank[:, None], 0.0, o / l[:, None])
    lse = tl.where(blank, _NOTHING, (m + tl.log2(l)) * _LN_2)
    rows = (q_begin + row).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    offset = rows[:, None] * (H * E) + h * E + e[None, :]
    inside = (row < slot)[:, None] & (e < E)[None, :]
    if earlier_out_ptr is not None:
        earlier = tl.load(earlier_lse_ptr + h * T + rows, mask=row < slot, other=_NOTHING)
        keep, lse = _merge(earlier, lse)
        o = o * (1.0 - keep)[:, None] + tl.load(earlier_out_ptr + offset, mask=inside, other=0.0) * keep[:, None]
    tl.store(out_ptr + offset, o.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + h * T + rows, lse, mask=row < slot)


def forward_config(E: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and launch options. What the compiler makes of each is held by tests/kernels/test_compiled.py."""
    block_e = max(16, triton.next_power_of_2(E))
    if dtype == torch.float32:  # products in full float32 run on the ordinary cores and need small tiles
        m, n = (32, 32) if block_e <= 64 else (16, 16)
        return dict(BLOCK_M=m, BLOCK_N=n, BLOCK_E=block_e, num_warps=8, num_stages=1)
    if block_e <= 64:  # two programs on a multiprocessor: the exponentials of one hide behind the products of the other
        return dict(BLOCK_M=128, BLOCK_N=64, BLOCK_E=block_e, num_warps=8, num_stages=2, maxnreg=128)
    return dict(BLOCK_M=128, BLOCK_N=128 if block_e == 128 else 64, BLOCK_E=block_e, num_warps=8, num_stages=2)


def precision(dtype: torch.dtype) -> str:
    """Of tl.dot: float32 operands are not to be rounded to tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def descriptor(x_THE: Tensor, rows: int) -> TensorDescriptor:
    """How the copy engine finds ``rows`` rows of one head of x."""
    T, H, E = x_THE.shape
    return TensorDescriptor(x_THE, [T, H * E], [x_THE.stride(0), 1], [rows, E])


def loadable(x_THE: Tensor, block_e: int) -> Tensor:
    """x itself where the copy engine can read it: a head dim of ``block_e``, one head after the other, rows at multiples
    of 16 bytes. Otherwise a copy, filled up with zeros."""
    E = x_THE.shape[2]
    if block_e > E:
        return F.pad(x_THE, (0, block_e - E))
    aligned = (x_THE.stride(0) * x_THE.element_size()) % 16 == 0 and x_THE.data_ptr() % 16 == 0
    return x_THE if aligned and x_THE.stride()[1:] == (E, 1) else x_THE.clone(memory_format=torch.contiguous_format)


def num_tiles(rows: int, segments: Segments, block: int) -> int:
    """Tiles that ``find_tile`` hands out."""
    return rows // block + len(segments)


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
    """out_THE in the dtype of q and lse_HT in float32; see ``kernels.attention`` for what they are.

    With ``earlier`` (out_THE and lse_HT in float32 of the same queries over other keys), the result is that over both
    and out is float32: ring attention goes on from key block to key block without rounding in between.
    """
    T, H, E = q_THE.shape
    out_THE = torch.empty((T, H, E), dtype=q_THE.dtype if earlier is None else torch.float32, device=q_THE.device)
    lse_HT = torch.empty((H, T), dtype=torch.float32, device=q_THE.device)
    if T == 0 or k_SKE.shape[0] == 0:
        return (out_THE.zero_(), lse_HT.fill_(-torch.inf)) if earlier is None else earlier
    config = forward_config(E, q_THE.dtype)
    q_THE, k_SKE, v_SKE = (loadable(x, config["BLOCK_E"]) for x in (q_THE, k_SKE, v_SKE))
    earlier_out, earlier_lse = (None, None) if earlier is None else (x.contiguous() for x in earlier)
    _forward_kernel[(num_tiles(T, segments, config["BLOCK_M"]), H)](
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

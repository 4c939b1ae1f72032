"""Attention on Hopper with specialised warps, forward only: the second tier of kernels/attention.py, in Triton's Gluon.

    s_ij = scale * q_i . k_j        lse_i = ln sum_j exp s_ij        out_i = sum_j exp(s_ij - lse_i) v_j

``kernels.attention.attention_with_lse_reference`` is the specification. Until a GPU has measured this file, only the
benchmark and the tests call it. A program owns a tile of queries and divides the work among its warps:

    loader       one warp; lets TMA copy Q, then the blocks of K and V, into rings of STAGES slots
    consumers    four warps with ROWS queries each; in its turn a consumer issues QK(i) and PV(i - 1), passes the turn
                 on, and exponentiates QK(i) while the tensor cores compute PV(i - 1) and the other consumer's products

They synchronise by mbarriers, which count completed phases. A wait names the parity of the phase that it needs, and
returns at once for odd parity before the first phase. Every slot has two barriers: full (its bytes have arrived) and
free (every consumer has read it). Block i is the (i // STAGES)-th use of slot i % STAGES, which gives the parity.

TMA clips at the end of a tensor only, but a segment ends earlier. Two more dimensions move the end to any row, as in
triton/tools/ragged_tma.py. With row stride s, dimensions of strides 2**34 - s, s, s put the coordinates

    (2**30, end, 2**30 - length + row)    at    2**64 + (end - length + row) s    elements: addresses wrap there,

and the third coordinate leaves its 2**30 rows exactly when row reaches length. So rows past a segment load as zeros,
whatever the next segment holds, and are not stored.

T query rows   S key rows   H query heads   K key/value heads (H a multiple of K)   E head dim   N segments
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels import backend
from kernels.segments import Segments

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)
REGISTERS = 168  # per thread at launch, for 12 warps (the loader's group counts as four); they then redistribute them
CONSUMERS = gl.constexpr(2)  # three (for head dim 64) spill or lose the overlap (ptxas 12.8)
ROWS = gl.constexpr(64)  # queries of a consumer: the height of a warpgroup's product
BLOCK_M = gl.constexpr(128)  # queries of a program
BLOCK_N = gl.constexpr(128)  # keys of a block
STAGES = gl.constexpr(2)  # blocks of K, and of V, in flight
FAR = gl.constexpr(2**30)
LN_2 = gl.constexpr(backend.LN_2)
TILE_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=5)
S_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))
ROW_LAYOUT = gl.constexpr(gl.SliceLayout(1, S_LAYOUT.value))
COLUMN_LAYOUT = gl.constexpr(gl.SliceLayout(0, S_LAYOUT.value))


@gluon.jit(do_not_specialize=["N", "T", "GROUP"])
def forward_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    lse_ptr,
    cu_q_ptr,
    cu_k_ptr,
    N,
    T,
    GROUP,
    scale_log2,
    CAUSAL: gl.constexpr,
):
    """One program owns BLOCK_M queries of one segment and one head.

    Segment n owns the tiles from cu[n] // BLOCK_M + n on, at least as many as it needs. Tiles without rows return.
    """
    tile = gl.program_id(0)
    if CAUSAL:
        tile = gl.num_programs(0) - 1 - tile  # start with the longest
    h = gl.program_id(1)
    n = _find_segment(cu_q_ptr, N, tile)
    q_begin = gl.load(cu_q_ptr + n)
    q_length = gl.load(cu_q_ptr + n + 1) - q_begin
    first = (tile - q_begin // BLOCK_M - n) * BLOCK_M
    if first >= q_length:
        return
    k_begin = gl.load(cu_k_ptr + n)
    k_length = gl.load(cu_k_ptr + n + 1) - k_begin
    reach = k_length + 1  # the query at ``row`` sees the first min(row + reach, k_length) keys
    if CAUSAL:
        reach -= q_length
    num_blocks = _num_blocks(first + BLOCK_M - 1, reach, k_length)
    queries = (q_begin, q_length, first, h)
    keys = (k_begin, k_length, h // GROUP)
    q = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS] + q_desc.block_type.shape, q_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(turn.index(c), count=1)
    shared = (q, q_full, _ring(k_desc), _ring(v_desc))
    hopper.fence_async_shared()  # TMA completes these barriers and must see them initialised
    out = (out_desc, lse_ptr + h * T)
    gl.warp_specialize(
        [
            (_consume, (out, shared, turn, queries, k_length, reach, num_blocks, scale_log2, 0)),
            (_consume, (out, shared, turn, queries, k_length, reach, num_blocks, scale_log2, 1)),
            (_load, (q_desc, k_desc, v_desc, shared, queries, keys, num_blocks)),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[240, 24],
    )


@gluon.jit
def _find_segment(cu_ptr, N, tile):
    """The last segment whose first tile is not past ``tile``. Every warp counts all segments, 128 at a time."""
    n = gl.arange(0, 128, layout=gl.BlockedLayout([4], [32], [4], [0]))
    count = 0
    for start in range(0, N, 128):
        exists = start + n < N
        begin = gl.load(cu_ptr + start + n, mask=exists, other=0)
        first_tile = begin // BLOCK_M + start + n
        starts_before = exists & (first_tile <= tile)
        count += gl.sum(starts_before.to(gl.int32), 0)
    return count - 1


@gluon.jit
def _num_blocks(row, reach, k_length):
    """Blocks up to the last key that the query at ``row`` sees; at least one (fully masked), so no case is empty."""
    num_keys = gl.minimum(row + reach, k_length)
    return gl.maximum(gl.cdiv(num_keys, BLOCK_N), 1)


@gluon.jit
def _ring(desc):
    """STAGES slots of shared memory for blocks of K or V, and their barriers."""
    slots = gl.allocate_shared_memory(desc.dtype, [STAGES] + desc.block_type.shape, desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for b in gl.static_range(STAGES):
        mbarrier.init(full.index(b), count=1)
        mbarrier.init(free.index(b), count=CONSUMERS)
    return slots, full, free


@gluon.jit
def _slot(ring, i):
    """The slot of block i, its barriers, and the parity of their phase for it."""
    slots, full, free = ring
    b = i % STAGES
    return slots.index(b), full.index(b), free.index(b), (i // STAGES) & 1


@gluon.jit
def _load(q_desc, k_desc, v_desc, shared, queries, keys, num_blocks):
    """The loader: queries of each consumer, then all blocks."""
    q, q_full, k_ring, v_ring = shared
    q_begin, q_length, first, h = queries
    k_begin, k_length, kv_head = keys
    for c in gl.static_range(CONSUMERS):
        place = [FAR, q_begin + q_length, FAR - q_length + first + c * ROWS, h, 0]
        mbarrier.expect(q_full.index(c), q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, place, q_full.index(c), q.index(c))
    for i in range(num_blocks):
        place = [FAR, k_begin + k_length, FAR - k_length + i * BLOCK_N, kv_head, 0]
        _fill(k_desc, place, k_ring, i)
        _fill(v_desc, place, v_ring, i)


@gluon.jit
def _fill(desc, place, ring, i):
    """Load block i into its slot once the consumers have read the previous block there."""
    slot, full, free, parity = _slot(ring, i)
    mbarrier.wait(free, parity ^ 1)
    mbarrier.expect(full, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, place, full, slot)


@gluon.jit
def _consume(out, shared, turn, queries, k_length, reach, num_blocks, scale_log2, c: gl.constexpr):
    """Consumer c: ROWS queries and the blocks that any of them sees, then out and lse."""
    out_desc, lse_ptr = out
    q_tile, q_full, k_ring, v_ring = shared
    q_begin, q_length, first, h = queries
    E: gl.constexpr = out_desc.block_type.shape[4]
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, E, 16])
    top = first + c * ROWS
    row = top + gl.arange(0, ROWS, layout=ROW_LAYOUT)
    limit = gl.minimum(row + reach, k_length)
    num_own = _num_blocks(top + ROWS - 1, reach, k_length)
    if top >= q_length:
        num_own = 1  # none of these rows exists
    seen_by_all = gl.minimum(top + reach, k_length)
    num_unmasked = gl.minimum(seen_by_all // BLOCK_N, num_own)

    mbarrier.wait(q_full.index(c), 0)
    q = q_tile.index(c).reshape([ROWS, E])
    k, k_full, k_free, parity = _slot(k_ring, 0)
    mbarrier.wait(k_full, parity)
    s = warpgroup_mma_wait(0, deps=(_scores(q, k),))
    mbarrier.arrive(k_free)
    m = gl.full([ROWS], float("-inf"), gl.float32, ROW_LAYOUT)
    p, _, m, z = _softmax(s, m, gl.zeros_like(m), 0, limit, scale_log2, MASKED=True)
    p = gl.convert_layout(p.to(out_desc.dtype), gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2))
    acc = gl.zeros([ROWS, E], gl.float32, O_LAYOUT)
    for i in range(1, num_unmasked):
        p, m, z, acc = _step(q, p, m, z, acc, k_ring, v_ring, turn, i, limit, scale_log2, c, MASKED=False)
    for i in range(gl.maximum(num_unmasked, 1), num_own):
        p, m, z, acc = _step(q, p, m, z, acc, k_ring, v_ring, turn, i, limit, scale_log2, c, MASKED=True)
    v, v_full, v_free, parity = _slot(v_ring, num_own - 1)
    mbarrier.wait(v_full, parity)
    acc = warpgroup_mma(p, v.reshape([BLOCK_N, E]), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    mbarrier.arrive(v_free)
    for i in range(num_own, num_blocks):
        _pass(k_ring, v_ring, turn, i, c)

    keyless = z == 0.0
    z = gl.where(keyless, 1.0, z)
    lse = gl.where(keyless, float("-inf"), (m + gl.log2(z)) * LN_2)
    gl.store(lse_ptr + q_begin + row, lse, mask=row < q_length)
    z = gl.convert_layout(z, gl.SliceLayout(1, O_LAYOUT))
    acc *= (1.0 / z)[:, None]
    q.store(acc.to(out_desc.dtype))  # overwrites Q, which has been read
    hopper.fence_async_shared()
    place = [FAR, q_begin + q_length, FAR - q_length + top, h, 0]
    tma.async_copy_shared_to_global(out_desc, place, q_tile.index(c))
    tma.store_wait(0)


@gluon.jit
def _step(q, p, m, z, acc, k_ring, v_ring, turn, i, limit, scale_log2, c: gl.constexpr, MASKED: gl.constexpr):
    """Issue QK(i) and PV(i - 1) in this consumer's turn; compute the probabilities of block i while PV(i - 1) runs."""
    k, k_full, k_free, k_parity = _slot(k_ring, i)
    v, v_full, v_free, v_parity = _slot(v_ring, i - 1)
    mbarrier.wait(k_full, k_parity)
    _wait_for_turn(turn, i, c)
    s = _scores(q, k)
    mbarrier.wait(v_full, v_parity)
    acc = warpgroup_mma(p, v.reshape([BLOCK_N, q.shape[1]]), acc, is_async=True)
    mbarrier.arrive(turn.index(1 - c))
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_free)
    p_next, alpha, m, z = _softmax(s, m, z, i, limit, scale_log2, MASKED)
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))  # PV reads p from registers until here
    mbarrier.arrive(v_free)
    alpha = gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))
    acc *= alpha[:, None]
    return gl.convert_layout(p_next.to(p.dtype), p.type.layout), m, z, acc


@gluon.jit
def _scores(q, k):
    """q . k of a block: an asynchronous product."""
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    k = k.reshape([BLOCK_N, q.shape[1]]).permute((1, 0))
    return warpgroup_mma(q, k, zero, use_acc=False, is_async=True)


@gluon.jit
def _softmax(s, m, z, i, limit, scale_log2, MASKED: gl.constexpr):
    """exp(s - m) of block i, the factor alpha for all earlier blocks, the running maximum m and the running sum z."""
    if MASKED:
        column = i * BLOCK_N + gl.arange(0, BLOCK_N, layout=COLUMN_LAYOUT)
        s = gl.where(column[None, :] < limit[:, None], s, float("-inf"))
    m_next = gl.maximum(m, gl.max(s, 1) * scale_log2)
    base = m_next
    if MASKED:  # a row that has seen no key yet: exp2(-inf - 0) is 0, exp2(-inf - -inf) is NaN
        base = gl.where(m_next == float("-inf"), 0.0, m_next)
    p = gl.exp2(s * scale_log2 - base[:, None])
    alpha = gl.exp2(m - base)
    z = z * alpha + gl.sum(p, 1)
    # By itself ptxas moves every exponential below the wait for PV, and nothing overlaps. A warp barrier that takes
    # their sum keeps them above the wait; the tests inspect the SASS.
    z = gl.inline_asm_elementwise(
        "{ bar.warp.sync 0xffffffff; mov.b32 $0, $1; }", "=r,r", [z], dtype=gl.float32, is_pure=False, pack=1
    )
    return p, alpha, m_next, z


@gluon.jit
def _wait_for_turn(turn, i, c: gl.constexpr):
    """Turns begin with block 1. Consumer 0 has the first one without an arrival: it waits for odd parity before the
    first phase. Every other turn is an arrival of the other consumer."""
    mbarrier.wait(turn.index(c), (i + c) & 1)


@gluon.jit
def _pass(k_ring, v_ring, turn, i, c: gl.constexpr):
    """Block i, of which only the other consumer sees keys: pass the turn on, and free the slots once they are full."""
    _, k_full, k_free, parity = _slot(k_ring, i)
    _, v_full, v_free, parity = _slot(v_ring, i)
    _wait_for_turn(turn, i, c)
    mbarrier.arrive(turn.index(1 - c))
    mbarrier.wait(k_full, parity)
    mbarrier.arrive(k_free)
    mbarrier.wait(v_full, parity)
    mbarrier.arrive(v_free)


def forward(
    q_THE: Tensor,
    k_SKE: Tensor,
    v_SKE: Tensor,
    segments: Segments,
    segments_k: Segments,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out_THE in the dtype of q and lse_HT in float32 (natural logarithm), without gradients.

    q, k, v: bfloat16 or float16 on a Hopper GPU, E 64 or 128, rows and heads at multiples of 16 bytes; else ValueError.
    ``segments`` covers all of T, ``segments_k`` all of S. ``scale`` is positive.
    """
    _check(q_THE, k_SKE, v_SKE, segments, segments_k)
    T, H, _ = q_THE.shape
    out_THE = torch.empty_like(q_THE, memory_format=torch.contiguous_format)
    lse_HT = q_THE.new_empty((H, T), dtype=torch.float32)
    if T == 0 or k_SKE.shape[0] == 0:  # TMA takes no empty tensors
        return out_THE.zero_(), lse_HT.fill_(-torch.inf)
    grid = (triton.cdiv(T, BLOCK_M.value) + len(segments), H)
    forward_kernel[grid](
        _descriptor(q_THE, ROWS.value),
        _descriptor(k_SKE, BLOCK_N.value),
        _descriptor(v_SKE, BLOCK_N.value),
        _descriptor(out_THE, ROWS.value),
        lse_HT,
        segments.cu_seqlens,
        segments_k.cu_seqlens,
        len(segments),
        T,
        H // k_SKE.shape[1],
        scale_log2=scale * backend.LOG2_E,
        CAUSAL=causal,
        num_warps=4,
        maxnreg=REGISTERS,
    )
    return out_THE, lse_HT


def _check(q: Tensor, k: Tensor, v: Tensor, segments: Segments, segments_k: Segments) -> None:
    if q.dtype not in DTYPES:
        raise ValueError(f"attention on Hopper takes bfloat16 and float16, not {q.dtype}")
    if q.shape[2] not in HEAD_DIMS:
        raise ValueError(f"attention on Hopper takes head dims 64 and 128, not {q.shape[2]}")
    if segments.lengths is not None or segments_k.lengths is not None:
        raise ValueError("attention on Hopper takes packed segments, not slots with spare room (Segments.lengths)")
    for x in (q, k, v):
        row, head, element = x.stride()
        if element != 1 or row % 8 or head % 8 or x.data_ptr() % 16:
            strides = x.stride()
            raise ValueError(
                f"attention on Hopper takes rows and heads at multiples of 16 bytes, not strides {strides}"
            )


def _descriptor(x: Tensor, num_rows: int) -> TensorDescriptor:
    """Blocks of ``num_rows`` rows of one head, which end with a segment (the arithmetic is explained above)."""
    row = x.stride(0)
    _, num_heads, head_dim = x.shape
    shape = [0x7FFF0000, 0x7FFF0000, FAR.value, num_heads, head_dim]
    strides = [2**34 - row, row, *x.stride()]
    return TensorDescriptor(x, shape, strides, [1, 1, num_rows, 1, head_dim], TILE_LAYOUT)

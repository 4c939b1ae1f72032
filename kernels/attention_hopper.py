"""Attention on Hopper by specialised warps, forward only: the second tier of kernels/attention.py, in Triton's Gluon.

    s_ij = scale * q_i . k_j        lse_i = ln sum_j exp s_ij        out_i = sum_j exp(s_ij - lse_i) v_j

``kernels.attention.attention_reference`` is the specification. A program owns a tile of queries and splits its warps:

    loader      one warp. It has TMA copy Q once and the blocks of K and V into rings of STAGES slots.
    consumers   four warps and ROWS queries each. Consumer c issues QK(i) and PV(i - 1) in its turn, hands the turn to
                consumer c + 1, and exponentiates QK(i) while the tensor cores work on PV(i - 1) and on its peers.

mbarriers carry all of it. A barrier counts completed phases; a wait names the parity of the phase that it needs, and
the phase before the first counts as complete with parity 1. Slots: full (the loader's bytes have landed), free (every
consumer has read). Block i uses slot i % STAGES for the (i // STAGES)-th time, which gives the parity.

TMA clips a copy at the end of its tensor, and a segment has to end before that. Two further dimensions move the end to
any row (triton/tools/ragged_tma.py): with row stride s and dimensions of strides 2**34 - s, s, s

    (2**30, end, 2**30 - length + row)  ->  2**64 - 2**30 s + end s + 2**30 s - length s + row s = (end - length + row) s

where addresses wrap at 2**64, and where the third coordinate leaves its 2**30 rows exactly at row = length. So rows past
a segment arrive as zeros, whatever the next segment holds, and are not written.

T query rows   S key rows   H query heads   K key/value heads   E head dim   N segments
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels import backend
from kernels.segments import Segments

DTYPES = (torch.bfloat16, torch.float16)
CONSUMERS_OF = {64: 3, 128: 2}  # head dim -> consumers, as FlashAttention-3 has them: registers allow no more
REGISTERS_OF = {3: 128, 2: 168}  # consumers -> registers per thread at launch, which the warps then share out anew
ROWS = gl.constexpr(64)  # queries of a consumer: the height of a warpgroup's product
BLOCK_N = gl.constexpr(128)  # keys of a block
STAGES = gl.constexpr(2)  # blocks of K, and of V, in flight
FAR = gl.constexpr(2**30)
LN_2 = gl.constexpr(backend.LN_2)
SHARED_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=5)
S_LAYOUT = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N.value, 16])
)
ROW_LAYOUT = gl.constexpr(gl.SliceLayout(1, S_LAYOUT.value))


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
    CONSUMERS: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """One program owns CONSUMERS * ROWS queries of one segment and head. Segment n has the tiles from cu[n] // BLOCK_M + n
    on: enough for its rows whatever their alignment. Tiles that find no row leave."""
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    tile = gl.program_id(0)
    if CAUSAL:
        tile = gl.num_programs(0) - 1 - tile  # those with the most keys first
    h = gl.program_id(1)
    n = _find_segment(cu_q_ptr, N, tile, BLOCK_M)
    q_begin = gl.load(cu_q_ptr + n)
    q_length = gl.load(cu_q_ptr + n + 1) - q_begin
    first = (tile - q_begin // BLOCK_M - n) * BLOCK_M
    if first >= q_length:
        return
    k_begin = gl.load(cu_k_ptr + n)
    k_length = gl.load(cu_k_ptr + n + 1) - k_begin
    # The query at ``row`` sees the keys before min(row + reach, k_length).
    reach = k_length + 1
    if CAUSAL:
        reach -= q_length
    queries = (q_begin, q_length, first, h)
    keys = (k_begin, k_length, h // GROUP, reach, _num_blocks(first + BLOCK_M - 1, reach, k_length))
    q = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS] + q_desc.block_type.shape, q_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(turn.index(c), count=1)
    shared = (q, q_full, turn, _ring(k_desc, CONSUMERS), _ring(v_desc, CONSUMERS))
    fence_async_shared()  # TMA has to see the barriers initialised
    lse_ptr += h * T
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (out_desc, lse_ptr, shared, queries, keys, scale_log2, CONSUMERS, 0)),
                (_consume, (out_desc, lse_ptr, shared, queries, keys, scale_log2, CONSUMERS, 1)),
                (_load, (q_desc, k_desc, v_desc, shared, queries, keys, CONSUMERS)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (out_desc, lse_ptr, shared, queries, keys, scale_log2, CONSUMERS, 0)),
                (_consume, (out_desc, lse_ptr, shared, queries, keys, scale_log2, CONSUMERS, 1)),
                (_consume, (out_desc, lse_ptr, shared, queries, keys, scale_log2, CONSUMERS, 2)),
                (_load, (q_desc, k_desc, v_desc, shared, queries, keys, CONSUMERS)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )


@gluon.jit
def _find_segment(cu_ptr, N, tile, BLOCK_M: gl.constexpr):
    """The last segment whose first tile is not behind ``tile``; every warp counts all segments, 128 at a time."""
    n = gl.arange(0, 128, layout=gl.BlockedLayout([4], [32], [4], [0]))
    count = 0
    for start in range(0, N, 128):
        exists = start + n < N
        first_tile = gl.load(cu_ptr + start + n, mask=exists, other=0) // BLOCK_M + start + n
        count += gl.sum((exists & (first_tile <= tile)).to(gl.int32), 0)
    return count - 1


@gluon.jit
def _num_blocks(row, reach, k_length):
    """Blocks with a key that the query at ``row`` sees, and one (all masked) if there is none: nobody skips the protocol."""
    return gl.maximum(gl.cdiv(gl.minimum(row + reach, k_length), BLOCK_N), 1)


@gluon.jit
def _ring(desc, CONSUMERS: gl.constexpr):
    """Slots for blocks of K or V, with their barriers."""
    memory = gl.allocate_shared_memory(desc.dtype, [STAGES] + desc.block_type.shape, desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for b in gl.static_range(STAGES):
        mbarrier.init(full.index(b), count=1)
        mbarrier.init(free.index(b), count=CONSUMERS)
    return memory, full, free


@gluon.jit
def _slot(ring, i):
    """Memory, full and free barrier of block i, and the parity of the phase in which it uses them."""
    memory, full, free = ring
    matrix = memory.index(i % STAGES)
    return matrix, full.index(i % STAGES), free.index(i % STAGES), (i // STAGES) & 1


@gluon.jit
def _load(q_desc, k_desc, v_desc, shared, queries, keys, CONSUMERS: gl.constexpr):
    """The loader's warp: Q of every consumer, then all blocks of K and V."""
    q, q_full, turn, k_ring, v_ring = shared
    q_begin, q_length, first, h = queries
    k_begin, k_length, kv_head, reach, num_blocks = keys
    for c in gl.static_range(CONSUMERS):
        row = FAR - q_length + first + c * ROWS
        mbarrier.expect(q_full.index(c), q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            q_desc, [FAR, q_begin + q_length, row, h, 0], q_full.index(c), q.index(c)
        )
    for i in range(num_blocks):
        coordinates = [FAR, k_begin + k_length, FAR - k_length + i * BLOCK_N, kv_head, 0]
        _fill(k_desc, k_ring, i, coordinates)
        _fill(v_desc, v_ring, i, coordinates)


@gluon.jit
def _fill(desc, ring, i, coordinates):
    memory, full, free, parity = _slot(ring, i)
    mbarrier.wait(free, parity ^ 1)  # consumers are done with the block before; a slot's first block waits for nobody
    mbarrier.expect(full, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, coordinates, full, memory)


@gluon.jit
def _consume(out_desc, lse_ptr, shared, queries, keys, scale_log2, CONSUMERS: gl.constexpr, c: gl.constexpr):
    """Consumer c: ROWS queries against the blocks that one of them sees, then out and lse."""
    E: gl.constexpr = out_desc.block_type.shape[4]
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, E, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    q_shared, q_full, turn, k_ring, v_ring = shared
    q_begin, q_length, first, h = queries
    k_begin, k_length, kv_head, reach, num_blocks = keys
    top = first + c * ROWS
    row = top + gl.arange(0, ROWS, layout=ROW_LAYOUT)
    limit = gl.minimum(row + reach, k_length)
    num_own = _num_blocks(top + ROWS - 1, reach, k_length)
    if top >= q_length:
        num_own = 1  # none of these rows exists
    num_unmasked = gl.minimum(gl.minimum(top + reach, k_length) // BLOCK_N, num_own)

    mbarrier.wait(q_full.index(c), 0)
    q = q_shared.index(c).reshape([ROWS, E])
    k, k_full, k_free, parity = _slot(k_ring, 0)
    mbarrier.wait(k_full, parity)
    s = warpgroup_mma(q, k.reshape([BLOCK_N, E]).permute((1, 0)), gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT), use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_free)
    m = gl.full([ROWS], float("-inf"), gl.float32, ROW_LAYOUT)
    l = gl.zeros([ROWS], gl.float32, ROW_LAYOUT)
    acc = gl.zeros([ROWS, E], gl.float32, O_LAYOUT)
    p, alpha, m, l = _softmax(s, m, l, 0, limit, scale_log2, MASKED=True)
    p = gl.convert_layout(p.to(out_desc.dtype), P_LAYOUT)
    for i in range(1, num_unmasked):
        p, m, l, acc = _step(q, p, m, l, acc, k_ring, v_ring, turn, i, limit, scale_log2, CONSUMERS, c, MASKED=False)
    for i in range(gl.maximum(num_unmasked, 1), num_own):
        p, m, l, acc = _step(q, p, m, l, acc, k_ring, v_ring, turn, i, limit, scale_log2, CONSUMERS, c, MASKED=True)
    v, v_full, v_free, parity = _slot(v_ring, num_own - 1)
    mbarrier.wait(v_full, parity)
    acc = warpgroup_mma(p, v.reshape([BLOCK_N, E]), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    mbarrier.arrive(v_free)
    for i in range(num_own, num_blocks):
        _pass(k_ring, v_ring, turn, i, CONSUMERS, c)

    keyless = l == 0.0
    l = gl.where(keyless, 1.0, l)
    lse = gl.where(keyless, float("-inf"), (m + gl.log2(l)) * LN_2)
    gl.store(lse_ptr + q_begin + row, lse, mask=row < q_length)
    out = acc * (1.0 / gl.convert_layout(l, gl.SliceLayout(1, O_LAYOUT)))[:, None]
    q.store(out.to(out_desc.dtype))  # Q has been read
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [FAR, q_begin + q_length, FAR - q_length + top, h, 0], q_shared.index(c))
    tma.store_wait(0)


@gluon.jit
def _step(
    q, p, m, l, acc, k_ring, v_ring, turn, i, limit, scale_log2, CONSUMERS: gl.constexpr, c: gl.constexpr, MASKED: gl.constexpr
):
    """QK(i) and PV(i - 1) issued in this consumer's turn; probabilities of block i while PV(i - 1) runs."""
    k, k_full, k_free, k_parity = _slot(k_ring, i)
    v, v_full, v_free, v_parity = _slot(v_ring, i - 1)
    mbarrier.wait(k_full, k_parity)
    _wait_for_turn(turn, i, c)
    s = warpgroup_mma(q, k.reshape([BLOCK_N, q.shape[1]]).permute((1, 0)), gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT), use_acc=False, is_async=True)
    mbarrier.wait(v_full, v_parity)
    acc = warpgroup_mma(p, v.reshape([BLOCK_N, q.shape[1]]), acc, is_async=True)
    mbarrier.arrive(turn.index((c + 1) % CONSUMERS))
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_free)
    p_next, alpha, m, l = _softmax(s, m, l, i, limit, scale_log2, MASKED)
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))  # the product reads p from its registers until here
    mbarrier.arrive(v_free)
    acc *= gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    return gl.convert_layout(p_next.to(p.dtype), p.type.layout), m, l, acc


@gluon.jit
def _softmax(s, m, l, i, limit, scale_log2, MASKED: gl.constexpr):
    """exp(s - m) of block i with the maximum m and the sum l brought up to date, and the factor alpha for what came before."""
    if MASKED:
        col = i * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, S_LAYOUT))
        s = gl.where(col[None, :] < limit[:, None], s, float("-inf"))
    m_next = gl.maximum(m, gl.max(s, 1) * scale_log2)
    base = m_next
    if MASKED:  # a row without keys so far: exp2(-inf - 0) is 0, exp2(-inf - -inf) is NaN
        base = gl.where(m_next == float("-inf"), 0.0, m_next)
    p = gl.exp2(s * scale_log2 - base[:, None])
    alpha = gl.exp2(m - base)
    l = l * alpha + gl.sum(p, 1)
    # Left alone, ptxas sinks every exponential below the wait for PV, which undoes the overlap. It moves nothing across
    # a barrier of the warp that the sum passes through.
    l = gl.inline_asm_elementwise(
        "{ bar.warp.sync 0xffffffff; mov.b32 $0, $1; }", "=r,r", [l], dtype=gl.float32, is_pure=False, pack=1
    )
    return p, alpha, m_next, l


@gluon.jit
def _wait_for_turn(turn, i, c: gl.constexpr):
    """The first turns are for block 1. Consumer 0's first counts as given (parity 1), its peers' come from before them."""
    LATE: gl.constexpr = 1 if c > 0 else 0
    mbarrier.wait(turn.index(c), (i + LATE) & 1)


@gluon.jit
def _pass(k_ring, v_ring, turn, i, CONSUMERS: gl.constexpr, c: gl.constexpr):
    """A block that only peers see: hand on the turn and free the slots. Not before they are full: the loader would take
    an early arrival for one that it still lacks for the block before."""
    k, k_full, k_free, parity = _slot(k_ring, i)
    v, v_full, v_free, parity = _slot(v_ring, i)
    _wait_for_turn(turn, i, c)
    mbarrier.arrive(turn.index((c + 1) % CONSUMERS))
    mbarrier.wait(k_full, parity)
    mbarrier.arrive(k_free)
    mbarrier.wait(v_full, parity)
    mbarrier.arrive(v_free)


def supports(q_THE: Tensor, segments: Segments, segments_k: Segments | None = None) -> bool:
    """Whether this device and ``forward`` take such queries and segments; keys and values have to be alike."""
    return q_THE.is_cuda and torch.cuda.get_device_capability(q_THE.device)[0] == 9 and not _objections(q_THE, segments, segments_k)


def forward(q_THE, k_SKE, v_SKE, segments, segments_k, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """out_THE in the dtype of q and lse_HT (float32, natural logarithm), of segments that cover all rows."""

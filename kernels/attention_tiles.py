"""Tiles of packed rows for the Triton attention kernels: which segment a tile belongs to, how it is loaded, its size.

T query rows   S key rows   H heads   E head dim   N segments
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.backend import INTERPRETED
from kernels.segments import Segments

NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def find_tile(cu_ptr, N, tile, BLOCK: tl.constexpr):
    """Segment of a tile, the segment's first row, and the tile's first row in the segment.

    Segment n owns the tiles from cu[n] // BLOCK + n on. These are at least as many as it needs, and the number grows
    with n. So a program finds its segment by counting, and the grid follows from T and N without asking the device.
    """
    lane = tl.arange(0, 128)
    before = 0
    for start in range(0, N, 128):
        n = start + lane
        first_tile = tl.load(cu_ptr + n, mask=n < N, other=0) // BLOCK + n
        starts_before = (n < N) & (first_tile <= tile)
        before += tl.sum(starts_before.to(tl.int32), 0)
    n = before - 1
    begin = tl.load(cu_ptr + n)
    return n, begin, (tile - begin // BLOCK - n) * BLOCK


@triton.jit
def used_length(cu_ptr, used_ptr, n, begin):
    """Used rows of segment n: ``lengths`` of a slot, or the whole segment."""
    if used_ptr is None:
        length = tl.load(cu_ptr + n + 1) - begin
    else:
        length = tl.load(used_ptr + n)
    return length


@triton.jit
def locate(cu_ptr, used_ptr, other_cu_ptr, other_used_ptr, N, tile, BLOCK: tl.constexpr):
    """first: the tile's first row within its segment; begin, slot, length: first row, all rows and used rows of this
    segment; other_begin, other_length: the same of its segment on the other side (keys for queries, queries for keys).
    A tile with first >= slot has nothing to do."""
    n, begin, first = find_tile(cu_ptr, N, tile, BLOCK)
    slot = tl.load(cu_ptr + n + 1) - begin
    length = used_length(cu_ptr, used_ptr, n, begin)
    other_begin = tl.load(other_cu_ptr + n)
    other_length = used_length(other_cu_ptr, other_used_ptr, n, other_begin)
    return first, begin, slot, length, other_begin, other_length


@triton.jit
def load_tile(desc, row, head, BLOCK_E: tl.constexpr):
    """Rows of one head, starting at ``row``. Rows past the segment hold whatever follows in memory."""
    return desc.load([row, head * BLOCK_E])


@triton.jit
def store_tile(ptr, x, begin, row, used, slot, head, HEADS: tl.constexpr, E: tl.constexpr):
    """Write x to one head of a contiguous (rows, HEADS, E): 0 in the unused part of the slot, nothing past the slot."""
    e = tl.arange(0, x.shape[1])
    rows = (begin + row).to(tl.int64)
    offset = rows[:, None] * (HEADS * E) + head * E + e[None, :]
    x = tl.where((row < used)[:, None], x, 0.0)
    inside = (row < slot)[:, None] & (e < E)[None, :]
    tl.store(ptr + offset, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def hide(s, row, col, k_length, diagonal, CAUSAL: tl.constexpr):
    """Scores, -inf for keys past the segment and, if CAUSAL, for future keys."""
    visible = col < k_length
    if CAUSAL:
        visible = visible & (col <= row + diagonal)
    return tl.where(visible, s, NOTHING)


@triton.jit
def bits(p, DTYPE: tl.constexpr):
    """p in the operands' dtype, its bits as integers.

    A product's operand that is carried from one iteration to the next goes through shared memory; one computed in the
    same iteration stays in registers. We carry integers and cast them back, which is free and counts as computing."""
    INTEGER: tl.constexpr = tl.int32 if tl.float32 == DTYPE else tl.int16
    return p.to(DTYPE).to(INTEGER, bitcast=True)


def precision(dtype: torch.dtype) -> str:
    """input_precision of tl.dot: float32 operands must not be rounded to tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def descriptor(x_THE: Tensor, rows: int) -> TensorDescriptor:
    """Lets the copy engine load ``rows`` rows of one head of x."""
    T, H, E = x_THE.shape
    return TensorDescriptor(x_THE, [T, H * E], [x_THE.stride(0), 1], [rows, E])


def loadable(x_THE: Tensor, block_e: int) -> Tensor:
    """x itself if the copy engine can read it: contiguous heads of ``block_e``, rows at multiples of 16 bytes.
    Otherwise a copy, padded with zeros."""
    _, H, E = x_THE.shape
    if block_e > E:
        return F.pad(x_THE, (0, block_e - E))
    row, *inner = x_THE.stride()
    contiguous = inner == [E, 1] and row >= H * E  # an expanded gradient has row stride 0
    aligned = row * x_THE.element_size() % 16 == 0 and x_THE.data_ptr() % 16 == 0
    return x_THE if contiguous and aligned else x_THE.clone(memory_format=torch.contiguous_format)


def num_tiles(rows: int, segments: Segments, block: int) -> int:
    """Tiles that ``find_tile`` distributes."""
    return rows // block + len(segments)


def padded_head_dim(E: int) -> int:
    """BLOCK_E: the next power of two, at least the 16 that tl.dot needs."""
    return max(16, triton.next_power_of_2(E))


def forward_config(E: int, dtype: torch.dtype) -> dict:
    """Tile sizes and launch options of the forward. tests/kernels/test_compiled.py checks what they compile to."""
    block_e = padded_head_dim(E)
    if dtype == torch.float32:  # full float32 products do not run on the tensor cores and need small tiles
        size = 32 if block_e <= 64 else 16
        return dict(BLOCK_M=size, BLOCK_N=size, BLOCK_E=block_e, num_warps=8, num_stages=1)
    if block_e <= 64:  # two programs share a multiprocessor: exponentials of one overlap with products of the other
        return dict(BLOCK_M=128, BLOCK_N=64, BLOCK_E=block_e, num_warps=8, num_stages=2, maxnreg=128)
    block_n = 128 if block_e == 128 else 64
    return dict(BLOCK_M=128, BLOCK_N=block_n, BLOCK_E=block_e, num_warps=8, num_stages=2)


def one_pass(E: int, dtype: torch.dtype) -> bool:
    """Whether the keys kernel also sums dq when gradients need not repeat bit for bit: for the shapes at which it then
    compiles without spills. The interpreter cannot add through descriptors."""
    return E <= 64 and dtype != torch.float32 and not INTERPRETED


def keys_config(E: int, dtype: torch.dtype) -> dict:
    """Tile sizes and launch options of dk and dv."""
    block_e = padded_head_dim(E)
    if dtype == torch.float32:
        block_n = 32 if block_e <= 64 else 16
        return dict(BLOCK_M=16, BLOCK_N=block_n, BLOCK_E=block_e, LATE_DK=False, num_warps=8, num_stages=1)
    if block_e == 256:
        return dict(BLOCK_M=32, BLOCK_N=64, BLOCK_E=block_e, LATE_DK=False, num_warps=8, num_stages=1)
    late_dk = block_e <= 64  # at larger head dims no registers are left for it
    return dict(BLOCK_M=64, BLOCK_N=128, BLOCK_E=block_e, LATE_DK=late_dk, num_warps=8, num_stages=2)


def queries_config(E: int, dtype: torch.dtype) -> dict:
    """Tile sizes and launch options of dq in the two-pass form."""
    block_e = padded_head_dim(E)
    if dtype == torch.float32:
        block_m = 32 if block_e <= 64 else 16
        return dict(BLOCK_M=block_m, BLOCK_N=16, BLOCK_E=block_e, num_warps=8, num_stages=1)
    if block_e == 256:
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_E=block_e, num_warps=8, num_stages=1)
    return dict(BLOCK_M=128, BLOCK_N=64, BLOCK_E=block_e, num_warps=8, num_stages=2)

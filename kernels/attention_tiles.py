"""How attention in Triton cuts packed rows into tiles: which tile is whose, how it is loaded, how large it is.

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
def locate(cu_ptr, used_ptr, other_cu_ptr, other_used_ptr, N, tile, BLOCK: tl.constexpr):
    """Where a tile lies and what it meets: its first row in its segment; the segment's first row, room and used rows;
    first row and used rows of the other side's segment. A tile with nothing to do starts at or past the room."""
    n, begin, first = find_tile(cu_ptr, N, tile, BLOCK)
    room = tl.load(cu_ptr + n + 1) - begin
    length = used_length(cu_ptr, used_ptr, n, begin)
    other_begin = tl.load(other_cu_ptr + n)
    return first, begin, room, length, other_begin, used_length(other_cu_ptr, other_used_ptr, n, other_begin)


@triton.jit
def load_tile(desc, row, head, BLOCK_E: tl.constexpr):
    """Rows from ``row`` on of one head. Rows past the segment are whatever lies there."""
    return desc.load([row, head * BLOCK_E])


@triton.jit
def store_tile(ptr, x, begin, row, used, slot, head, HEADS: tl.constexpr, E: tl.constexpr):
    """Rows of one head of a contiguous (rows, HEADS, E): x, 0 in the unused part of the slot, nothing past the slot."""
    e = tl.arange(0, x.shape[1])
    offset = (begin + row).to(tl.int64)[:, None] * (HEADS * E) + head * E + e[None, :]
    x = tl.where((row < used)[:, None], x, 0.0).to(ptr.dtype.element_ty)
    tl.store(ptr + offset, x, mask=(row < slot)[:, None] & (e < E)[None, :])


@triton.jit
def hide(s, row, col, k_length, diagonal, CAUSAL: tl.constexpr):
    visible = col < k_length
    if CAUSAL:
        visible = visible & (col <= row + diagonal)
    return tl.where(visible, s, NOTHING)


@triton.jit
def bits(p, DTYPE: tl.constexpr):
    """p in the operands' dtype, as integers. An operand that a loop hands to its next round goes through shared memory,
    one that is made in the round stays in registers; turning bits back into numbers makes it and costs nothing."""
    return p.to(DTYPE).to(tl.int32 if tl.float32 == DTYPE else tl.int16, bitcast=True)


def precision(dtype: torch.dtype) -> str:
    """Of tl.dot: float32 operands are not to be rounded to tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def descriptor(x_THE: Tensor, rows: int) -> TensorDescriptor:
    """How the copy engine finds ``rows`` rows of one head of x."""
    T, H, E = x_THE.shape
    return TensorDescriptor(x_THE, [T, H * E], [x_THE.stride(0), 1], [rows, E])


def loadable(x_THE: Tensor, block_e: int) -> Tensor:
    """x itself where the copy engine can read it: heads of ``block_e`` end to end, rows at multiples of 16 bytes.
    Otherwise a copy, filled up with zeros."""
    E = x_THE.shape[2]
    if block_e > E:
        return F.pad(x_THE, (0, block_e - E))
    row = x_THE.stride(0)  # 0 in an expanded gradient
    aligned = row >= x_THE.shape[1] * E and (row * x_THE.element_size()) % 16 == 0 and x_THE.data_ptr() % 16 == 0
    return x_THE if aligned and x_THE.stride()[1:] == (E, 1) else x_THE.clone(memory_format=torch.contiguous_format)


def num_tiles(rows: int, segments: Segments, block: int) -> int:
    """Tiles that ``find_tile`` hands out."""
    return rows // block + len(segments)


def forward_config(E: int, dtype: torch.dtype) -> dict:
    """Tile sizes and launch options. What the compiler makes of each is held by tests/kernels/test_compiled.py."""
    block_e = max(16, triton.next_power_of_2(E))
    if dtype == torch.float32:  # products in full float32 run on the ordinary cores and need small tiles
        m, n = (32, 32) if block_e <= 64 else (16, 16)
        return dict(BLOCK_M=m, BLOCK_N=n, BLOCK_E=block_e, num_warps=8, num_stages=1)
    if block_e <= 64:  # two programs on a multiprocessor: the exponentials of one hide behind the products of the other
        return dict(BLOCK_M=128, BLOCK_N=64, BLOCK_E=block_e, num_warps=8, num_stages=2, maxnreg=128)
    return dict(BLOCK_M=128, BLOCK_N=128 if block_e == 128 else 64, BLOCK_E=block_e, num_warps=8, num_stages=2)


def one_pass(E: int, dtype: torch.dtype) -> bool:
    """Whether dq is added up by the keys' kernel when nobody asks for repeatable bits: where that form compiles without
    spills. The interpreter has no addition through descriptors."""
    return E <= 64 and dtype != torch.float32 and not INTERPRETED


def keys_config(E: int, dtype: torch.dtype) -> dict:
    """Tile sizes and launch options of dk and dv; held by tests/kernels/test_compiled.py, like those below."""
    block_e = max(16, triton.next_power_of_2(E))
    late = block_e <= 64 and dtype != torch.float32  # a larger head dim has no registers left for it
    config = dict(BLOCK_M=64, BLOCK_N=128, BLOCK_E=block_e, LATE_DK=late, num_warps=8, num_stages=2)
    if dtype == torch.float32:
        return config | dict(BLOCK_M=16, BLOCK_N=32 if block_e <= 64 else 16, num_stages=1)
    return config | dict(BLOCK_M=32, BLOCK_N=64, num_stages=1) if block_e == 256 else config


def queries_config(E: int, dtype: torch.dtype) -> dict:
    """Tile sizes and launch options of dq in the two-pass form."""
    block_e = max(16, triton.next_power_of_2(E))
    if dtype == torch.float32:
        return dict(BLOCK_M=32 if block_e <= 64 else 16, BLOCK_N=16, BLOCK_E=block_e, num_warps=8, num_stages=1)
    if block_e == 256:
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_E=block_e, num_warps=8, num_stages=1)
    return dict(BLOCK_M=128, BLOCK_N=64, BLOCK_E=block_e, num_warps=8, num_stages=2)

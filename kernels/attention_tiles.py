"""Tiles of packed rows for the Triton attention kernels: which rows a program owns, what they see, how they are loaded.

T query rows   S key rows   H heads   E head dim   N segments
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import launch
from kernels.backend import LOG2_E
from kernels.segments import Segments

MAX_SOFTCAP = 1000.0  # a capped score errs by 1e-7 of the cap
NOTHING = tl.constexpr(float("-inf"))
SHARED_CACHE = 32 * 2**20  # bytes of the L2 cache that rows of other heads may take: the half that an H100 has near


@triton.jit
def find_program(heads, section, FROM_THE_END: tl.constexpr):
    """Tile and head of this program. ``section`` heads take turns, so that the longest tiles of all of them come first;
    what they share stays in the L2 cache. FROM_THE_END: tiles take longer towards the end of a segment."""
    program = tl.program_id(0)
    tiles = tl.num_programs(0) // heads
    place = program % (tiles * section)
    tile = place // section
    if FROM_THE_END:
        tile = tiles - 1 - tile
    return tile, program // (tiles * section) * section + place % section


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
def locate(cu_ptr, used_ptr, other_cu_ptr, other_used_ptr, num_rows, N, tile, BLOCK: tl.constexpr):
    """first: the tile's first row within its segment; begin, slot, length: first row, all rows and used rows of this
    segment; other_begin, other_length: the same of its segment on the other side (keys for queries, queries for keys).
    The rows past the last segment count as spare rows of it. A tile with first >= slot has nothing to do."""
    n, begin, first = find_tile(cu_ptr, N, tile, BLOCK)
    slot = tl.where(n == N - 1, num_rows, tl.load(cu_ptr + n + 1)) - begin
    length = used_length(cu_ptr, used_ptr, n, begin)
    other_begin = tl.load(other_cu_ptr + n)
    other_length = used_length(other_cu_ptr, other_used_ptr, n, other_begin)
    return first, begin, slot, length, other_begin, other_length


@triton.jit
def _seen(first_ptr, last_ptr, begin, row, length, other_length, CAUSAL: tl.constexpr, OF_KEYS: tl.constexpr):
    """low, high: a query at ``row`` of its segment (a number or a vector) sees the keys low <= j < high. OF_KEYS: a key
    there is seen by the queries low <= i < high."""
    if first_ptr is not None:
        known = begin + tl.maximum(tl.minimum(row, length - 1), 0)
        low = tl.maximum(tl.load(first_ptr + known), 0)
        high = tl.minimum(tl.load(last_ptr + known) + 1, other_length)
    else:
        low = row * 0
        high = low + other_length
        if CAUSAL and OF_KEYS:
            low = tl.maximum(row + other_length - length, 0)
        elif CAUSAL:
            high = tl.minimum(high, row + 1 + other_length - length)
    return low, high


@triton.jit
def ranges(
    first_ptr,
    last_ptr,
    begin,
    first,
    length,
    other_length,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
    OF_KEYS: tl.constexpr,
):
    """What the BLOCK rows of a tile see on the other side: low and high of each row; start and end, what any of them
    sees; whole_start and whole_end, what all of them see. OF_KEYS: rows are keys, and queries see them.

    What a row sees begins and ends no earlier than what the row before it sees. So the first and the last row tell."""
    row = first + tl.arange(0, BLOCK)
    last_row = tl.minimum(first + BLOCK, length) - 1
    low, high = _seen(first_ptr, last_ptr, begin, row, length, other_length, CAUSAL, OF_KEYS)
    start, whole_end = _seen(first_ptr, last_ptr, begin, first, length, other_length, CAUSAL, OF_KEYS)
    whole_start, end = _seen(first_ptr, last_ptr, begin, last_row, length, other_length, CAUSAL, OF_KEYS)
    return low, high, start, end, whole_start, whole_end


@triton.jit
def load_tile(desc, row, head, PITCH: tl.constexpr):
    """Rows of one head, starting at ``row``. Rows past the segment hold whatever follows in memory, columns past the
    head dim the next head."""
    return desc.load([row, head * PITCH])


@triton.jit
def clear_past(x, E: tl.constexpr):
    """x with 0 in the columns past the head dim: whatever the other operand of a product holds there then counts
    nothing."""
    if x.shape[1] > E:
        e = tl.arange(0, x.shape[1])
        x = tl.where((e < E)[None, :], x, 0.0)
    return x


@triton.jit
def store_tile(ptr, x, begin, row, used, slot, head, heads, E: tl.constexpr):
    """Write x to one head of a contiguous (rows, heads, E): 0 in the unused part of the slot, nothing past the slot."""
    e = tl.arange(0, x.shape[1])
    rows = (begin + row).to(tl.int64)
    offset = (rows * heads + head)[:, None] * E + e[None, :]
    x = tl.where((row < used)[:, None], x, 0.0)
    inside = (row < slot)[:, None] & (e < E)[None, :]
    tl.store(ptr + offset, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def capped(s, cap_scale, softcap):
    """softcap * tanh(scale * s / softcap), if there is a cap; cap_scale is 2 log2(e) scale / softcap."""
    if softcap is not None:
        s = softcap - 2 * softcap / (tl.exp2(s * cap_scale) + 1)
    return s


@triton.jit
def hide(s, other, low, high, WITH_LOW: tl.constexpr):
    """Scores, -inf where a row does not see the row ``other`` of the other side: unless low <= other < high."""
    visible = other < high
    if WITH_LOW:
        visible = visible & (other >= low)
    return tl.where(visible, s, NOTHING)


@triton.jit
def bits(p, DTYPE: tl.constexpr):
    """p in the operands' dtype, its bits as integers.

    A product's operand that is carried from one iteration to the next goes through shared memory; one computed in the
    same iteration stays in registers. We carry integers and cast them back, which is free and counts as computing."""
    INTEGER: tl.constexpr = tl.int32 if tl.float32 == DTYPE else tl.int16
    return p.to(DTYPE).to(INTEGER, bitcast=True)


def check_softcap(softcap: float | None) -> None:
    """ValueError unless it is a number that the kernels can compute with."""
    if softcap is not None and not 0 < softcap <= MAX_SOFTCAP:
        raise ValueError(f"softcap must be above 0 and at most {MAX_SOFTCAP:.0f}, not {softcap}")


def score_numbers(scale: float, softcap: float | None) -> tuple[float, float | None, float | None]:
    """scale_log2, cap_scale and softcap of the kernels: exp(score) = exp2(scale_log2 * capped(q . k))."""
    if softcap is None:
        return scale * LOG2_E, None, None
    return LOG2_E, 2 * LOG2_E * scale / softcap, float(softcap)


def precision(dtype: torch.dtype) -> str:
    """input_precision of tl.dot: float32 operands must not be rounded to tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def descriptor(x_THE: Tensor, rows: int, block_e: int) -> TensorDescriptor:
    """Lets the copy engine load ``rows`` rows and ``block_e`` columns of x, from a head's first column on."""
    T, H, E = x_THE.shape
    return launch.descriptor(x_THE, [T, H * E], [x_THE.stride(0), 1], [rows, block_e])


def loadable(x_THE: Tensor, block_e: int) -> Tensor:
    """x itself if the copy engine can read it: heads side by side, rows at multiples of 16 bytes. Otherwise a copy; if
    heads are no multiples of 16 bytes, one that is padded to ``block_e``."""
    _, H, E = x_THE.shape
    if E * x_THE.element_size() % 16:
        return F.pad(x_THE, (0, block_e - E))
    row, *inner = x_THE.stride()
    contiguous = inner == [E, 1] and row >= H * E  # an expanded gradient has row stride 0
    aligned = row * x_THE.element_size() % 16 == 0 and x_THE.data_ptr() % 16 == 0
    return x_THE if contiguous and aligned else x_THE.clone(memory_format=torch.contiguous_format)


def num_tiles(rows: int, segments: Segments, block: int) -> int:
    """Tiles that ``find_tile`` distributes."""
    return rows // block + len(segments)


@lru_cache(maxsize=1024)
def heads_in_turn(heads: int, bytes_of_a_head: int, tiles: int, processors: int) -> int:
    """``section`` of ``find_program``: the largest divisor of ``heads`` whose rows fit into the cache together, or all
    heads if there are few programs: then it counts more that the longest come first."""
    if tiles * heads < 16 * processors:
        return heads
    most = max(1, SHARED_CACHE // max(1, bytes_of_a_head))
    return max(divisor for divisor in range(1, heads + 1) if heads % divisor == 0 and divisor <= most)


def padded_head_dim(E: int) -> int:
    """BLOCK_E: the next power of two, at least the 16 that tl.dot needs."""
    return max(16, triton.next_power_of_2(E))

"""The matrix products of the projector in Triton, with the operations around them fused: a tile stays in registers.

    up      z = x[source] @ w1.T + b1    h = gelu(z)       gathers rows of x while it loads tiles
    down    into[rows] = h @ w2.T + b2                     scatters rows of the result while it stores tiles
    dgelu   dz = (dy @ w2) * gelu'(z)    db1 = sum_r dz    recomputes h = gelu(z), for dw2 = dy.T @ h

    gelu(z) = z cdf(z)    gelu'(z) = cdf(z) + z exp(-z^2 / 2) / sqrt(2 pi)    cdf(z) = (1 + erf(z / sqrt 2)) / 2

P tower rows   C tower width   S tower rows side by side in one input row   R input rows   D decoder width
F hidden; activations pad it with zeros to a multiple of 8   T token rows   K inner size
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import backend
from kernels.projector_rows import check_indices

GROUP = tl.constexpr(8)  # rows of tiles that run at the same time, so that they share weights in the L2 cache
SQRT_HALF = tl.constexpr(0.7071067811865476)
INNER = {torch.float32: 16, torch.float16: 64, torch.bfloat16: 64}  # columns of a tile of an operand
DENSITY = tl.constexpr(0.3989422804014327)  # of the normal distribution at 0: 1 / sqrt(2 pi)


@triton.jit
def _cdf(z):
    return 0.5 + 0.5 * tl.erf(z * SQRT_HALF)


@triton.jit
def _find_tile(tile, R, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and first column of a tile of an (R, N) result."""
    tiles_per_group = GROUP * tl.cdiv(N, BLOCK_N)
    group = tile // tiles_per_group
    place = tile - group * tiles_per_group
    height = tl.minimum(tl.cdiv(R, BLOCK_M) - group * GROUP, GROUP)
    row = (group * GROUP + place % height) * BLOCK_M
    col = place // height * BLOCK_N
    return row, col


@triton.jit
def _product(total, a_desc, b_desc, row, col, K: tl.constexpr, B_IS_KN: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of a @ b.T, or of a @ b where b is (K, N), added to ``total``."""
    for k in tl.range(0, K, a_desc.block_shape[1]):
        a = a_desc.load([row, k])
        if B_IS_KN:
            b = b_desc.load([k, col])
        else:
            b = b_desc.load([col, k]).T
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def _gathered_product(
    total, x_ptr, source_ptr, b_desc, row, col, R, P, C: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr
):
    """A tile of x[source] @ b.T; b has W columns for each of the S tower rows. A source that is not a row of x reads
    zeros."""
    BLOCK_K: tl.constexpr = b_desc.block_shape[1]
    W: tl.constexpr = (C + 7) // 8 * 8
    r = row + tl.arange(0, total.shape[0])
    c = tl.arange(0, BLOCK_K)
    for s in tl.range(0, S):
        source = tl.load(source_ptr + r.to(tl.int64) * S + s, mask=r < R, other=-1)
        known = ((source >= 0) & (source < P))[:, None]
        for k in tl.range(0, C, BLOCK_K):
            offset = source[:, None] * C + (k + c)[None, :]
            a = tl.load(x_ptr + offset, mask=known & (k + c < C)[None, :], other=0.0)
            b = b_desc.load([col, s * W + k])
            total = tl.dot(a, b.T, total, input_precision=PRECISION)
    return total


@triton.jit
def _halves(x):
    """Left and right columns of a tile. Results are processed by halves, so that registers suffice."""
    halves = x.reshape(x.shape[0], 2, x.shape[1] // 2)
    return halves.permute(0, 2, 1).split()


@triton.jit
def _write_h(z, b1_ptr, z_desc, h_desc, row, col, F: tl.constexpr):
    n = col + tl.arange(0, z.shape[1])
    b1 = tl.load(b1_ptr + n, mask=n < F, other=0.0)
    z += b1.to(tl.float32)[None, :]
    if z_desc is not None:
        z_desc.store([row, col], z.to(z_desc.dtype))
    h_desc.store([row, col], (z * _cdf(z)).to(h_desc.dtype))


@triton.jit(do_not_specialize=["R", "P"])
def _up_kernel(
    x,
    source_ptr,
    w1_desc,
    b1_ptr,
    z_desc,
    h_desc,
    R,
    P,
    C: tl.constexpr,
    S: tl.constexpr,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # A program processes tiles of BLOCK_M rows and BLOCK_N hidden columns in turn.
    # x is a pointer if there is a source, else a descriptor.
    program = tl.program_id(0)
    num_tiles = tl.cdiv(R, BLOCK_M) * tl.cdiv(F, BLOCK_N)
    for tile in tl.range(program, num_tiles, tl.num_programs(0), flatten=True):
        row, col = _find_tile(tile, R, F, BLOCK_M, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if source_ptr is None:
            z = _product(total, x, w1_desc, row, col, C, False, PRECISION)
        else:
            z = _gathered_product(total, x, source_ptr, w1_desc, row, col, R, P, C, S, PRECISION)
        left, right = _halves(z)
        _write_h(left, b1_ptr, z_desc, h_desc, row, col, F)
        _write_h(right, b1_ptr, z_desc, h_desc, row, col + BLOCK_N // 2, F)


@triton.jit(do_not_specialize=["R", "T"])
def _down_kernel(
    h_desc,
    w2_desc,
    b2_ptr,
    rows_ptr,
    into_ptr,
    into_stride,
    R,
    T,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # A program processes tiles of BLOCK_M rows and BLOCK_N decoder columns in turn.
    # Row r is written to row rows[r] of into, or to row r without rows_ptr.
    program = tl.program_id(0)
    num_tiles = tl.cdiv(R, BLOCK_M) * tl.cdiv(D, BLOCK_N)
    for tile in tl.range(program, num_tiles, tl.num_programs(0), flatten=True):
        row, col = _find_tile(tile, R, D, BLOCK_M, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        y = _product(total, h_desc, w2_desc, row, col, F, False, PRECISION)
        r = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        n = col + tl.arange(0, BLOCK_N)
        b2 = tl.load(b2_ptr + n, mask=n < D, other=0.0)
        y += b2.to(tl.float32)[None, :]
        t = r
        if rows_ptr is not None:
            t = tl.load(rows_ptr + r, mask=r < R, other=-1)
        known = (r < R) & (t >= 0) & (t < T)
        inside = known[:, None] & (n < D)[None, :]
        offset = t[:, None] * into_stride + n[None, :]
        tl.store(into_ptr + offset, y.to(into_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _write_dz(dh, z_desc, dz_desc, h_desc, db1_ptr, row, col, R, F: tl.constexpr):
    # The condition always holds. It keeps z in the register layout of dh; two layouts would compute erf twice.
    z = z_desc.load([row, col])
    z = tl.where(R > 0, z.to(tl.float32), dh)
    cdf = _cdf(z)
    if h_desc is not None:
        h_desc.store([row, col], (z * cdf).to(h_desc.dtype))
    dz = dh * (cdf + z * tl.exp(-0.5 * z * z) * DENSITY)
    dz_desc.store([row, col], dz.to(dz_desc.dtype))
    n = col + tl.arange(0, dh.shape[1])
    tl.store(db1_ptr + n, tl.sum(dz, 0), mask=n < F)  # past the last row dy is zero, and so is dz


@triton.jit(do_not_specialize=["R"])
def _dgelu_kernel(
    dy_desc,
    w2_desc,
    z_desc,
    dz_desc,
    h_desc,
    db1_ptr,
    R,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # A program processes tiles of BLOCK_M rows and BLOCK_N hidden columns in turn, and sums each over its rows.
    program = tl.program_id(0)
    num_tiles = tl.cdiv(R, BLOCK_M) * tl.cdiv(F, BLOCK_N)
    for tile in tl.range(program, num_tiles, tl.num_programs(0), flatten=True):
        row, col = _find_tile(tile, R, F, BLOCK_M, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        dh = _product(total, dy_desc, w2_desc, row, col, D, True, PRECISION)
        sums_ptr = db1_ptr + (row // BLOCK_M).to(tl.int64) * F
        left, right = _halves(dh)
        _write_dz(left, z_desc, dz_desc, h_desc, sums_ptr, row, col, R, F)
        _write_dz(right, z_desc, dz_desc, h_desc, sums_ptr, row, col + BLOCK_N // 2, R, F)


def config(dtype: torch.dtype, reads_z: bool = False) -> dict:
    """Tile sizes and launch options. tests/kernels/test_compiled_elsewhere.py checks what they compile to.

    128 x 256 is the largest tile in half precision whose sums fit into registers; smaller tiles would need more
    bandwidth than the L2 cache has while the tensor cores are busy. float32 is meant to be exact, not fast.
    """
    if dtype == torch.float32:
        return dict(BLOCK_M=64, BLOCK_N=64, PRECISION="ieee", num_warps=8, num_stages=2)
    columns = 128 if reads_z and backend.COMPILER >= (3, 8) else 256  # with 256, Triton 3.8 spills 104 bytes
    # As many stages as fit into shared memory, where a tile is written while the next one loads.
    stages = 3 if reads_z and columns == 256 else 4
    return dict(BLOCK_M=128, BLOCK_N=columns, PRECISION="tf32", num_warps=8, num_stages=stages)


def _aligned(x: Tensor) -> Tensor:
    """x itself if the copy engine can read it: rows at multiples of 16 bytes. Otherwise a copy with longer rows."""
    per_16_bytes = 16 // x.element_size()
    width = x.shape[1]
    row, column = x.stride()
    readable = column == 1 and row >= width and row % per_16_bytes == 0
    if readable and x.data_ptr() % 16 == 0:
        return x
    padded = F.pad(x, (0, -width % per_16_bytes))
    return padded.clone(memory_format=torch.contiguous_format)


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Lets the copy engine access tiles of x; past the edges of x it reads zeros and writes nothing."""
    aligned = _aligned(x)
    return TensorDescriptor(aligned, list(x.shape), [aligned.stride(0), 1], [rows, columns])


def _grid(x: Tensor, N: int, tile: dict) -> tuple[int]:
    """One program for each that fits on the device: a program continues with its next tile without a pause."""
    num_tiles = triton.cdiv(x.shape[0], tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"])
    num_programs = 3  # in the interpreter
    if x.is_cuda:
        num_programs = torch.cuda.get_device_properties(x.device).multi_processor_count
        if x.dtype == torch.float32:
            num_programs *= 2
    return (min(num_tiles, num_programs),)


def _activations(x: Tensor, R: int, hidden: int) -> Tensor:
    return x.new_empty((R, (hidden + 7) // 8 * 8))


def projector_up_op(
    x_PC: Tensor, source_RS: Tensor | None, w1_FK: Tensor, b1_F: Tensor, save_z: bool
) -> tuple[Tensor, Tensor]:
    """h_RF and z_RF; z has no rows without ``save_z``."""
    P, C = x_PC.shape
    h_RF, z_RF = _fake_up(x_PC, source_RS, w1_FK, b1_F, save_z)
    R, hidden = h_RF.shape
    tile, inner = config(x_PC.dtype), INNER[x_PC.dtype]
    rows, columns = tile["BLOCK_M"], tile["BLOCK_N"]
    if backend.DEBUG and source_RS is not None:
        check_indices("source", source_RS, P, padding=True)
    if R == 0:
        return h_RF, z_RF
    if source_RS is None:
        S = 1
        x = _descriptor(x_PC, rows, inner)
    else:
        S = source_RS.shape[1]
        x = x_PC.contiguous()
        source_RS = source_RS.contiguous()
    if C % 8:
        w1_FK = _spread(w1_FK, S)
    _up_kernel[_grid(h_RF, hidden, tile)](
        x,
        source_RS,
        _descriptor(w1_FK, columns, inner),
        F.pad(b1_F, (0, hidden - b1_F.shape[0])).contiguous(),
        _descriptor(z_RF, rows, columns // 2) if save_z else None,
        _descriptor(h_RF, rows, columns // 2),
        R,
        P,
        C=C,
        S=S,
        F=hidden,
        **tile,
    )
    return h_RF, z_RF


def _spread(w1_FK: Tensor, S: int) -> Tensor:
    """w1 with the columns for each of the S tower rows padded, so that they start at a multiple of 16 bytes."""
    w1_FSC = w1_FK.unflatten(1, (S, -1))
    return F.pad(w1_FSC, (0, -w1_FSC.shape[2] % 8)).flatten(1)


def _fake_up(x_PC, source_RS, w1_FK, b1_F, save_z):
    R = x_PC.shape[0] if source_RS is None else source_RS.shape[0]
    h_RF = _activations(x_PC, R, w1_FK.shape[0])
    z_RF = _activations(x_PC, R if save_z else 0, w1_FK.shape[0])
    return h_RF, z_RF


def projector_down_op(into_TD: Tensor, rows_R: Tensor | None, h_RF: Tensor, w2_DF: Tensor, b2_D: Tensor) -> None:
    """Write row i of the result to row rows_R[i] of ``into``, or to row i without ``rows_R``."""
    R, hidden = h_RF.shape
    T, D = into_TD.shape
    if backend.DEBUG and rows_R is not None:
        check_indices("rows", rows_R, T, distinct=True)
    if R == 0:
        return
    tile, inner = config(h_RF.dtype), INNER[h_RF.dtype]
    _down_kernel[_grid(h_RF, D, tile)](
        _descriptor(h_RF, tile["BLOCK_M"], inner),
        _descriptor(w2_DF, tile["BLOCK_N"], inner),
        b2_D.contiguous(),
        None if rows_R is None else rows_R.contiguous(),
        into_TD,
        into_TD.stride(0),
        R,
        T,
        F=hidden,
        D=D,
        **tile,
    )


def projector_dgelu_op(dy_RD: Tensor, w2_DF: Tensor, z_RF: Tensor, want_h: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dz_RF, h_RF (no rows without ``want_h``) and db1_F in float32."""
    R, hidden = z_RF.shape
    dz_RF, h_RF, db1_F = _fake_dgelu(dy_RD, w2_DF, z_RF, want_h)
    if R == 0:
        return dz_RF, h_RF, db1_F.zero_()
    tile, inner = config(z_RF.dtype, reads_z=True), INNER[z_RF.dtype]
    rows, half = tile["BLOCK_M"], tile["BLOCK_N"] // 2
    db1_MF = db1_F.new_empty((triton.cdiv(R, rows), hidden))  # sums over the rows of each tile
    _dgelu_kernel[_grid(z_RF, hidden, tile)](
        _descriptor(dy_RD, rows, inner),
        _descriptor(w2_DF, inner, tile["BLOCK_N"]),
        _descriptor(z_RF, rows, half),
        _descriptor(dz_RF, rows, half),
        _descriptor(h_RF, rows, half) if want_h else None,
        db1_MF,
        R,
        F=hidden,
        D=dy_RD.shape[1],
        **tile,
    )
    return dz_RF, h_RF, db1_MF.sum(0)


def _fake_dgelu(dy_RD, w2_DF, z_RF, want_h):
    R, hidden = z_RF.shape
    dz_RF = z_RF.new_empty((R, hidden))
    h_RF = z_RF.new_empty((R if want_h else 0, hidden))
    return dz_RF, h_RF, z_RF.new_empty(hidden, dtype=torch.float32)


def _fake_down(*_):
    return None


up = backend.define_op(projector_up_op, _fake_up)
down = backend.define_op(projector_down_op, _fake_down, mutates=("into_TD",))
dgelu = backend.define_op(projector_dgelu_op, _fake_dgelu)

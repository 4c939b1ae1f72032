"""Gather and scatter of rows in Triton, which the projector's backward needs besides its matrix products.

    gather     out[i] = x[index[i]], or 0 if index[i] is not a row of x       and sum_i out[i]
    scatter    out[index[i]] = x[i], or 0 without x; indices that are not rows of out are skipped

P rows that are indexed   R indices   W width
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import backend

TILE = dict(BLOCK_R=16, BLOCK_W=512, num_warps=4)  # 64 elements per thread, in rows of 1 KB or more


@triton.jit
def _locate(index_ptr, R, P, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """Positions r and columns w of a program's tile, the rows that are indexed there, and which of them exist."""
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    w = tl.arange(0, BLOCK_W) + tl.program_id(1) * BLOCK_W
    index = tl.load(index_ptr + r, mask=r < R, other=-1)
    known = (index >= 0) & (index < P)
    return r, w, index, known


@triton.jit(do_not_specialize=["R", "P"])
def _gather_kernel(
    x_ptr,
    index_ptr,
    out_ptr,
    sum_ptr,
    R,
    P,
    W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    # One program owns BLOCK_R rows of BLOCK_W columns, and their sum.
    r, w, index, known = _locate(index_ptr, R, P, BLOCK_R, BLOCK_W)
    x_offset = index[:, None] * W + w[None, :]
    x = tl.load(x_ptr + x_offset, mask=known[:, None] & (w < W)[None, :], other=0.0)
    out_offset = r[:, None] * W + w[None, :]
    out = x.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_offset, out, mask=(r < R)[:, None] & (w < W)[None, :])
    if sum_ptr is not None:
        sum_offset = tl.program_id(0).to(tl.int64) * W + w
        sums = tl.sum(x.to(tl.float32), 0)
        tl.store(sum_ptr + sum_offset, sums, mask=w < W)


@triton.jit(do_not_specialize=["R", "P"])
def _scatter_kernel(
    x_ptr,
    index_ptr,
    out_ptr,
    out_stride,
    R,
    P,
    W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    # One program owns BLOCK_R indices and BLOCK_W columns.
    r, w, index, known = _locate(index_ptr, R, P, BLOCK_R, BLOCK_W)
    inside = known[:, None] & (w < W)[None, :]
    if x_ptr is None:
        x = tl.zeros((BLOCK_R, BLOCK_W), out_ptr.dtype.element_ty)
    else:
        x_offset = r[:, None] * W + w[None, :]
        x = tl.load(x_ptr + x_offset, mask=inside, other=0.0)
    out = x.to(out_ptr.dtype.element_ty)
    out_offset = index[:, None] * out_stride + w[None, :]
    tl.store(out_ptr + out_offset, out, mask=inside)


def _grid(R: int, W: int) -> tuple[int, int]:
    return triton.cdiv(R, TILE["BLOCK_R"]), triton.cdiv(W, TILE["BLOCK_W"])


def gather_rows_op(x_PW: Tensor, index_R: Tensor, dtype: torch.dtype, want_sum: bool) -> tuple[Tensor, Tensor]:
    """The rows in ``dtype``, and their sum (W,) in float32, or an empty tensor without ``want_sum``."""
    P, W = x_PW.shape
    R = index_R.shape[0]
    out_RW, sum_W = _fake_gather(x_PW, index_R, dtype, want_sum)
    grid = _grid(R, W)
    sum_NW = sum_W.new_empty((grid[0], W)) if want_sum else None
    if R:
        _gather_kernel[grid](x_PW.contiguous(), index_R.contiguous(), out_RW, sum_NW, R, P, W=W, **TILE)
    if sum_NW is not None:
        sum_W = sum_NW.sum(0)
    return out_RW, sum_W


def _fake_gather(x_PW, index_R, dtype, want_sum):
    W = x_PW.shape[1]
    out_RW = x_PW.new_empty((index_R.shape[0], W), dtype=dtype)
    sum_W = x_PW.new_empty(W if want_sum else 0, dtype=torch.float32)
    return out_RW, sum_W


def scatter_rows_op(out_PW: Tensor, index_R: Tensor, x_RW: Tensor | None) -> None:
    """Write to ``out``, whose last dim is contiguous. No row of it may be indexed twice."""
    P, W = out_PW.shape
    R = index_R.shape[0]
    if backend.DEBUG:
        check_indices("rows to write", index_R, P, padding=True, distinct=True)
    if x_RW is not None:
        x_RW = x_RW.contiguous()
    if R:
        _scatter_kernel[_grid(R, W)](x_RW, index_R.contiguous(), out_PW, out_PW.stride(0), R, P, W=W, **TILE)


def check_indices(name: str, index: Tensor, size: int, *, padding: bool = False, distinct: bool = False) -> None:
    """ValueError unless all lie in [0, size), or are -1 if ``padding`` allows that. Waits for the device."""
    used = index.flatten()
    if padding:
        used = used[used != -1]
    if used.numel() and not 0 <= used.min() <= used.max() < size:
        raise ValueError(f"{name} must lie in [0, {size}), not between {used.min()} and {used.max()}")
    num_distinct = used.unique().numel()
    if distinct and num_distinct < used.numel():
        raise ValueError(f"{name} must be distinct: of {used.numel()} only {num_distinct} are")


def _fake_scatter(*_):
    return None


gather_rows = backend.define_op(gather_rows_op, _fake_gather)
scatter_rows = backend.define_op(scatter_rows_op, _fake_scatter, mutates=("out_PW",))

"""Rows of a matrix taken and put by index, in Triton: what the projector's backward needs besides its products.

    gather     out[i] = x[index[i]], or 0 where index[i] is no row of x       and sum_i out[i]
    scatter    out[index[i]] = x[i], or 0 without x; an index that is no row of out is passed over

P rows that an index chooses from   R indices   W width
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import backend

TILE = dict(BLOCK_R=16, BLOCK_W=512, num_warps=4)  # 64 elements per thread, in rows of 1 KB or more


@triton.jit(do_not_specialize=["R", "P"])
def _gather_kernel(
    x_ptr, index_ptr, out_ptr, sum_ptr, R, P, W: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr
):
    # One program owns BLOCK_R rows of BLOCK_W columns, and the sums of these rows.
    r, w = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64), tl.arange(0, BLOCK_W)
    w += tl.program_id(1) * BLOCK_W
    index = tl.load(index_ptr + r, mask=r < R, other=-1)
    known = (index >= 0) & (index < P)
    x = tl.load(x_ptr + index[:, None] * W + w[None, :], mask=known[:, None] & (w < W)[None, :], other=0.0)
    tl.store(
        out_ptr + r[:, None] * W + w[None, :],
        x.to(out_ptr.dtype.element_ty),
        mask=(r < R)[:, None] & (w < W)[None, :],
    )
    if sum_ptr is not None:
        tl.store(sum_ptr + tl.program_id(0).to(tl.int64) * W + w, tl.sum(x.to(tl.float32), 0), mask=w < W)


@triton.jit(do_not_specialize=["R", "P"])
def _scatter_kernel(
    x_ptr, index_ptr, out_ptr, out_stride, R, P, W: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr
):
    # One program owns BLOCK_R indices and BLOCK_W columns.
    r, w = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64), tl.arange(0, BLOCK_W)
    w += tl.program_id(1) * BLOCK_W
    index = tl.load(index_ptr + r, mask=r < R, other=-1)
    inside = ((index >= 0) & (index < P))[:, None] & (w < W)[None, :]
    if x_ptr is None:
        x = tl.zeros((BLOCK_R, BLOCK_W), out_ptr.dtype.element_ty)
    else:
        x = tl.load(x_ptr + r[:, None] * W + w[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + index[:, None] * out_stride + w[None, :], x.to(out_ptr.dtype.element_ty), mask=inside)


def _grid(R: int, W: int) -> tuple[int, int]:
    return triton.cdiv(R, TILE["BLOCK_R"]), triton.cdiv(W, TILE["BLOCK_W"])


def gather_rows_op(x_PW: Tensor, index_R: Tensor, dtype: torch.dtype, want_sum: bool) -> tuple[Tensor, Tensor]:
    """The rows in ``dtype``, and their sum (W,) in float32, which is empty unless wanted."""
    (P, W), R = x_PW.shape, index_R.shape[0]
    out_RW, sum_W = _fake_gather(x_PW, index_R, dtype, want_sum)
    grid = _grid(R, W)
    sum_NW = sum_W.new_empty((grid[0], W)) if want_sum else None
    if R:
        _gather_kernel[grid](x_PW.contiguous(), index_R.contiguous(), out_RW, sum_NW, R, P, W=W, **TILE)
    return out_RW, sum_NW.sum(0) if want_sum else sum_W


def _fake_gather(x_PW, index_R, dtype, want_sum):
    W = x_PW.shape[1]
    return x_PW.new_empty((index_R.shape[0], W), dtype=dtype), x_PW.new_empty(W if want_sum else 0, dtype=torch.float32)


def scatter_rows_op(out_PW: Tensor, index_R: Tensor, x_RW: Tensor | None) -> None:
    """Writes to ``out``, whose last dim is contiguous. Indices are distinct, but for those that are no row of it."""
    (P, W), R = out_PW.shape, index_R.shape[0]
    if backend.DEBUG:
        check_indices("rows to write", index_R, P, padding=True, distinct=True)
    if R:
        x_RW = None if x_RW is None else x_RW.contiguous()
        _scatter_kernel[_grid(R, W)](x_RW, index_R.contiguous(), out_PW, out_PW.stride(0), R, P, W=W, **TILE)


def check_indices(name: str, index: Tensor, size: int, *, padding: bool = False, distinct: bool = False) -> None:
    """ValueError unless all lie in [0, size), or are -1 where that is ``padding``. Waits for the device."""
    used = index.flatten()
    used = used[used != -1] if padding else used
    if used.numel() and not 0 <= used.min() <= used.max() < size:
        raise ValueError(f"{name} must lie in [0, {size}), not between {used.min()} and {used.max()}")
    if distinct and used.unique().numel() < used.numel():
        raise ValueError(f"{name} must be distinct: of {used.numel()} only {used.unique().numel()} are")


gather_rows = backend.define_op(gather_rows_op, _fake_gather)
scatter_rows = backend.define_op(scatter_rows_op, lambda *_: None, mutates=("out_PW",))

"""Losses of a chunk of logits, and the gradient of their sum, which is written over the logits.

    z = c tanh(x / c) of a logit x with a soft cap c, z = x without one

    loss = lse - z_target        lse = ln sum_v exp z_v
    dz_v = exp(z_v - lse) - [v = target]        dx_v = dz_v (1 - (z_v / c)^2)

A row whose target is IGNORED has loss 0 and gradient 0. A target outside the vocabulary is never used as an index: its
loss is NaN, so that somebody notices, and its gradient is 0.

The logits may be one shard of the vocabulary. The losses then take two reductions over the shards: the largest z, and
three sums for each row: of exp(z - largest), of z_target (0 on the other shards) and of the shards' sizes.

C rows   V vocabulary, or this shard of it
"""

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import backend

IGNORED = -100  # as in PyTorch
BLOCK = 8192  # logits that a program holds at a time

Reduce = Callable[[Tensor, str], object]  # reduces a tensor over the shards in place, by "max" or "sum"


def losses(
    logits_CV: Tensor,
    target_C: Tensor,
    softcap: float | None,
    gradient: bool,
    first: int = 0,
    reduce: Reduce | None = None,
) -> Tensor:
    """loss_C in float32 (float64 for float64 logits). The logits are overwritten: with dx if ``gradient`` is set.

    Rows of logits start at multiples of 16 elements; the padding between them is overwritten too. ``first`` is the
    vocabulary index of the shard's first column.
    """
    in_pytorch = backend.implementation("cross_entropy", logits_CV) == "pytorch"
    run = losses_reference if in_pytorch else _losses_triton
    return run(logits_CV, target_C, softcap, gradient, first, reduce)


def losses_reference(
    logits_CV: Tensor,
    target_C: Tensor,
    softcap: float | None,
    gradient: bool,
    first: int,
    reduce: Reduce | None,
) -> Tensor:
    """The specification, and what runs on the CPU. In place, so that a float32 chunk is not copied."""
    V = logits_CV.shape[1]
    z_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    slope_CV = None
    if softcap is not None:
        z_CV = (z_CV / softcap).tanh_()
        if gradient:
            slope_CV = 1 - z_CV.square()
        z_CV *= softcap
    inside_C = (target_C >= first) & (target_C < first + V)
    column_C1 = (target_C - first).clamp(0, V - 1)[:, None]
    target_z_C = z_CV.gather(1, column_C1)[:, 0].masked_fill(~inside_C, 0.0)
    max_C = z_CV.amax(1)
    if reduce is not None:
        reduce(max_C, "max")
    z_CV -= max_C[:, None]
    p_CV = z_CV.exp_()
    sums_C3 = torch.stack([p_CV.sum(1), target_z_C, torch.full_like(max_C, V)], dim=1)
    if reduce is not None:
        reduce(sums_C3, "sum")
    total_C, target_z_C, size_C = sums_C3.unbind(1)

    known_C = (target_C >= 0) & (target_C < size_C)
    loss_C = total_C.log() - (target_z_C - max_C)
    if gradient:
        p_CV *= torch.where(known_C, 1 / total_C, 0.0)[:, None]
        p_CV.scatter_add_(1, column_C1, -inside_C.to(p_CV.dtype)[:, None])
        if slope_CV is not None:
            p_CV *= slope_CV
        if p_CV is not logits_CV:
            logits_CV.copy_(p_CV)
    unknown_C = torch.where(target_C == IGNORED, 0.0, math.nan)
    return torch.where(known_C, loss_C, unknown_C)


@triton.jit
def _capped(x, softcap):
    """z = softcap tanh(x / softcap) and dz / dx; x and 1 without a cap."""
    z = x
    slope = 1.0
    if softcap is not None:
        y = x / softcap
        e = tl.exp(-2 * tl.abs(y))
        slope = 4 * e / ((1 + e) * (1 + e))
        tanh = tl.where(y < 0, e - 1, 1 - e) / (1 + e)
        # For a small y, 1 - e loses digits. There we use tanh's series, whose next term is below float32's precision.
        s = y * y
        tail = 2 / 15 + s * (-17 / 315 + s * (62 / 2835))
        series = y * (1 + s * (-1 / 3 + s * tail))
        z = softcap * tl.where(s < 0.09, series, tanh)
    return z, slope


@triton.jit
def _load(row_ptr, v, V, width, softcap):
    """z and dz / dx of columns v; z is -inf past the vocabulary. Reads up to ``width``, so that vectors stay whole."""
    x = tl.load(row_ptr + v, mask=v < width, other=0.0)
    z, slope = _capped(x.to(tl.float32), softcap)
    return tl.where(v < V, z, float("-inf")), slope


@triton.jit(do_not_specialize=["first"])
def _losses_kernel(
    logits_ptr,
    target_ptr,
    max_ptr,
    sums_ptr,
    loss_ptr,
    V,
    width,
    first,
    softcap,
    READ: tl.constexpr,
    FINISH: tl.constexpr,
    GRADIENT: tl.constexpr,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program owns one row. READ computes its statistics, FINISH the loss from them, GRADIENT writes dx. A shard
    # needs two launches, and the statistics pass from one to the other through max and sums.
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * width
    v = tl.arange(0, BLOCK)
    target = tl.load(target_ptr + row)
    inside = (target >= first) & (target < first + V)
    column = tl.where(inside, target - first, -1).to(tl.int32)
    if READ:
        # Before the sums: their barriers separate this load from the dx that the first warp writes.
        x = tl.load(row_ptr + column, mask=inside, other=0.0)
        target_z = _capped(x.to(tl.float32), softcap)[0]
        size = V
        m = float("-inf")
        total = 0.0
        for start in range(0, V, BLOCK):
            z = _load(row_ptr, start + v, V, width, softcap)[0]
            m_next = tl.maximum(m, tl.max(z, 0))
            total = total * tl.exp(m - m_next) + tl.sum(tl.exp(z - m_next), 0)
            m = m_next
        if not FINISH:
            tl.store(max_ptr + row, m)
            tl.store(sums_ptr + 3 * row, total)
            tl.store(sums_ptr + 3 * row + 1, target_z)
            tl.store(sums_ptr + 3 * row + 2, V)
    else:
        m = tl.load(max_ptr + row)
        total = tl.load(sums_ptr + 3 * row)
        target_z = tl.load(sums_ptr + 3 * row + 1)
        size = tl.load(sums_ptr + 3 * row + 2).to(tl.int32)
    if FINISH:
        known = (target >= 0) & (target < size)
        loss = tl.log(total) - (target_z - m)
        unknown = tl.where(target == IGNORED, 0.0, float("nan"))
        tl.store(loss_ptr + row, tl.where(known, loss, unknown))
        if GRADIENT:
            scale = tl.where(known, 1 / total, 0.0)
            num_blocks = tl.cdiv(V, BLOCK)
            for i in range(num_blocks):  # backwards: the last block that was read is still in the cache
                columns = (num_blocks - 1 - i) * BLOCK + v
                z, slope = _load(row_ptr, columns, V, width, softcap)
                dz = tl.exp(z - m) * scale - tl.where(columns == column, 1.0, 0.0)
                dx = (dz * slope).to(logits_ptr.dtype.element_ty)
                tl.store(row_ptr + columns, dx, mask=columns < width)


def _losses_triton(
    logits_CV: Tensor,
    target_C: Tensor,
    softcap: float | None,
    gradient: bool,
    first: int,
    reduce: Reduce | None,
) -> Tensor:
    C, V = logits_CV.shape
    softcap = None if softcap is None else float(softcap)  # an integer would become a kernel of its own
    loss_C = logits_CV.new_empty(C, dtype=torch.float32)

    def launch(max_C: Tensor | None, sums_C3: Tensor | None, read: bool, finish: bool) -> None:
        tensors = (logits_CV, target_C, max_C, sums_C3, loss_C)
        numbers = (V, logits_CV.stride(0), first, softcap)
        phases = {"READ": read, "FINISH": finish, "GRADIENT": gradient}
        _losses_kernel[(C,)](*tensors, *numbers, **phases, IGNORED=IGNORED, **_config(V))

    if reduce is None:
        launch(None, None, read=True, finish=True)
        return loss_C
    max_C = loss_C.new_empty(C)
    sums_C3 = loss_C.new_empty((C, 3))
    launch(max_C, sums_C3, read=True, finish=False)
    own_max_C = max_C.clone()
    reduce(max_C, "max")
    sums_C3[:, 0] *= (own_max_C - max_C).exp()
    reduce(sums_C3, "sum")
    launch(max_C, sums_C3, read=False, finish=True)
    return loss_C


def _config(V: int) -> dict[str, int]:
    block = min(BLOCK, triton.next_power_of_2(V))
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 256))}

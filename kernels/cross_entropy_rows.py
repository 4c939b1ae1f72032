"""Losses of a chunk of rows of logits, and the gradient of their sum written over the logits.

    z = c tanh(x / c) of a logit x with a soft cap c, else x        lse = ln sum_v exp z_v

    loss = lse - (1 - e) z_target - e mean_v z_v + w lse^2          e label smoothing, w z-loss
    dz_v = (1 + 2 w lse) exp(z_v - lse) - (1 - e) [v = target] - e / V
    dx_v = dz_v (1 - (z_v / c)^2)

Of a row whose target is IGNORED, loss and gradient are 0. A target outside the vocabulary is never used as an index:
its loss is NaN, to be seen, and its gradient 0, to do no harm.

The logits may be a shard of the vocabulary. Then the losses take two reductions over the shards: the largest z, and
sums of exp(z - largest), z_target, z - largest and the shards' sizes.

C rows   V vocabulary, or this shard of it
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import backend

IGNORED = -100  # as in PyTorch
BLOCK = 8192  # logits that a program holds at a time


class Options(NamedTuple):
    label_smoothing: float
    z_loss: float
    softcap: float | None
    first: int = 0  # of the vocabulary's rows in this shard
    reduce: Callable[[Tensor, str], object] | None = None  # over the shards, in place; by "max" or "sum"


def losses(logits_CV: Tensor, target_C: Tensor, options: Options, gradient: bool) -> Tensor:
    """loss_C, float32 (float64 of float64). With ``gradient``, dx takes the place of the logits; else they are spent.

    The rows of logits are a multiple of 16 apart; what lies between them is spent too.
    """
    run = _losses_triton if backend.runs_triton(logits_CV) else losses_reference
    return run(logits_CV, target_C, options, gradient)


def losses_reference(logits_CV: Tensor, target_C: Tensor, options: Options, gradient: bool) -> Tensor:
    """The specification, and the path of the CPU: in place, so that a float32 chunk has no copy."""
    smoothing, z_loss, softcap, first, reduce = options
    V = logits_CV.shape[1]
    z_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    if softcap is not None:
        z_CV = (z_CV / softcap).tanh_()
        slope_CV = 1 - z_CV.square() if gradient else None
        z_CV *= softcap
    inside_C = (target_C >= first) & (target_C < first + V)
    column_C1 = (target_C - first).clamp(0, V - 1)[:, None]
    peak_C = z_CV.gather(1, column_C1)[:, 0].masked_fill(~inside_C, 0.0)
    max_C = z_CV.amax(1)
    if reduce is not None:
        reduce(max_C, "max")
    z_CV -= max_C[:, None]
    spread_C = z_CV.sum(1) if smoothing else torch.zeros_like(max_C)
    p_CV = z_CV.exp_()
    sums_C4 = torch.stack([p_CV.sum(1), peak_C, spread_C, torch.full_like(max_C, V)], dim=1)
    if reduce is not None:
        reduce(sums_C4, "sum")
    total_C, peak_C, spread_C, count_C = sums_C4.unbind(1)

    known_C = (target_C >= 0) & (target_C < count_C)
    lse_C = max_C + total_C.log()
    loss_C = total_C.log() - (1 - smoothing) * (peak_C - max_C) - smoothing * spread_C / count_C + z_loss * lse_C**2
    if gradient:
        p_CV *= torch.where(known_C, (1 + 2 * z_loss * lse_C) / total_C, 0.0)[:, None]
        if smoothing:
            p_CV -= torch.where(known_C, smoothing / count_C, 0.0)[:, None]
        p_CV.scatter_add_(1, column_C1, (smoothing - 1) * inside_C.to(p_CV.dtype)[:, None])
        if softcap is not None:
            p_CV *= slope_CV
        if p_CV is not logits_CV:
            logits_CV.copy_(p_CV)
    return torch.where(known_C, loss_C, torch.where(target_C == IGNORED, 0.0, math.nan))


@triton.jit
def _capped(x, softcap):
    """z = softcap tanh(x / softcap) and dz / dx; x and 1 where there is no cap."""
    z, slope = x, 1.0
    if softcap is not None:
        y = x / softcap
        e = tl.exp(-2 * tl.abs(y))
        slope = 4 * e / ((1 + e) * (1 + e))
        # Of a small y, 1 - e has few digits: there tanh's series, whose next term is below float32's precision.
        s = y * y
        series = y * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
        z = softcap * tl.where(s < 0.09, series, tl.where(y < 0, e - 1, 1 - e) / (1 + e))
    return z, slope


@triton.jit
def _load(row_ptr, v, V, width, softcap):
    """z and dz / dx of columns v; z is -inf past the vocabulary. Read as far as ``width``, to keep vectors whole."""
    x = tl.load(row_ptr + v, mask=v < width, other=0.0).to(tl.float32)
    z, slope = _capped(x, softcap)
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
    smoothing,
    z_loss,
    softcap,
    READ: tl.constexpr,
    FINISH: tl.constexpr,
    GRADIENT: tl.constexpr,
    SMOOTH: tl.constexpr,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program owns one row: READ takes its statistics, FINISH makes the loss of them, GRADIENT writes dx. A shard
    # does so in two launches; between them the statistics are in max and sums.
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * width
    v = tl.arange(0, BLOCK)
    target = tl.load(target_ptr + row)
    inside = (target >= first) & (target < first + V)
    column = tl.where(inside, target - first, -1).to(tl.int32)
    if READ:
        # Before the sums, whose barriers part it from the first warp's dx.
        peak = _capped(tl.load(row_ptr + column, mask=inside, other=0.0).to(tl.float32), softcap)[0]
        count = V
        m = float("-inf")
        total = 0.0
        spread = 0.0  # sum of z - m
        for start in range(0, V, BLOCK):
            z = _load(row_ptr, start + v, V, width, softcap)[0]
            m_next = tl.maximum(m, tl.max(z, 0))
            total = total * tl.exp(m - m_next) + tl.sum(tl.exp(z - m_next), 0)
            if SMOOTH:
                if start > 0:
                    spread += start * (m - m_next)
                spread += tl.sum(tl.where(start + v < V, z - m_next, 0.0), 0)
            m = m_next
        if not FINISH:
            tl.store(max_ptr + row, m)
            tl.store(sums_ptr + 4 * row, total)
            tl.store(sums_ptr + 4 * row + 1, peak)
            tl.store(sums_ptr + 4 * row + 2, spread)
            tl.store(sums_ptr + 4 * row + 3, V)
    else:
        m = tl.load(max_ptr + row)
        total = tl.load(sums_ptr + 4 * row)
        peak = tl.load(sums_ptr + 4 * row + 1)
        spread = tl.load(sums_ptr + 4 * row + 2)
        count = tl.load(sums_ptr + 4 * row + 3).to(tl.int32)
    if FINISH:
        known = (target >= 0) & (target < count)
        lse = m + tl.log(total)
        loss = tl.log(total) - (1 - smoothing) * (peak - m) - smoothing * spread / count + z_loss * lse * lse
        tl.store(loss_ptr + row, tl.where(known, loss, tl.where(target == IGNORED, 0.0, float("nan"))))
        if GRADIENT:
            scale = tl.where(known, (1 + 2 * z_loss * lse) / total, 0.0)
            smooth = tl.where(known, smoothing / count, 0.0)
            num_blocks = tl.cdiv(V, BLOCK)
            for i in range(num_blocks):  # backwards: what was read last is still in the cache
                columns = (num_blocks - 1 - i) * BLOCK + v
                z, slope = _load(row_ptr, columns, V, width, softcap)
                dz = tl.exp(z - m) * scale - smooth - tl.where(columns == column, 1 - smoothing, 0.0)
                tl.store(row_ptr + columns, (dz * slope).to(logits_ptr.dtype.element_ty), mask=columns < width)


def _losses_triton(logits_CV: Tensor, target_C: Tensor, options: Options, gradient: bool) -> Tensor:
    smoothing, z_loss, softcap, first, reduce = options
    C, V = logits_CV.shape
    loss_C = logits_CV.new_empty(C, dtype=torch.float32)
    max_C = sums_C4 = None
    if reduce is not None:
        max_C, sums_C4 = loss_C.new_empty(C), loss_C.new_empty((C, 4))
    numbers = (float(smoothing), float(z_loss), None if softcap is None else float(softcap))
    arguments = (logits_CV, target_C, max_C, sums_C4, loss_C, V, logits_CV.stride(0), first, *numbers)
    constants = {"GRADIENT": gradient, "SMOOTH": smoothing > 0, "IGNORED": IGNORED, **_config(V)}
    if reduce is None:
        _losses_kernel[(C,)](*arguments, READ=True, FINISH=True, **constants)
        return loss_C
    _losses_kernel[(C,)](*arguments, READ=True, FINISH=False, **constants)
    own_max_C = max_C.clone()
    reduce(max_C, "max")
    below_C = own_max_C - max_C
    sums_C4[:, 0] *= below_C.exp()
    sums_C4[:, 2] += V * below_C
    reduce(sums_C4, "sum")
    _losses_kernel[(C,)](*arguments, READ=False, FINISH=True, **constants)
    return loss_C


def _config(V: int) -> dict[str, int]:
    block = min(BLOCK, triton.next_power_of_2(V))
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 256))}

"""What the backward of attention needs of each query besides q and dout: log-sum-exp and delta_i = do_i . o_i - dlse_i.

T query rows   R = T + 128 rows of the results   H query heads   E head dim
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_tiles import NOTHING, padded_head_dim
from kernels.backend import LOG2_E
from kernels.launch import launch

_LOG2_E = tl.constexpr(LOG2_E)
_ROWS = tl.constexpr(32)
_ROOM = 128  # rows by which a tile may extend past the last one


@triton.jit(do_not_specialize=["T", "R", "heads"])
def _statistics_kernel(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    lse2_ptr,
    delta_ptr,
    T,
    R,
    heads,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # One program owns _ROWS rows of one head: delta and log2(e) lse, both 0 for rows without keys.
    h = (tl.program_id(0) % heads).to(tl.int64)
    row = (tl.program_id(0) // heads).to(tl.int64) * _ROWS + tl.arange(0, _ROWS)
    e = tl.arange(0, BLOCK_E)
    offset = (row * heads + h)[:, None] * E + e[None, :]
    inside = (row < T)[:, None] & (e < E)[None, :]
    out = tl.load(out_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + h * T + row, mask=row < T, other=0.0)
    lse = tl.load(lse_ptr + h * T + row, mask=row < T, other=NOTHING)
    lse2 = tl.where(lse == NOTHING, 0.0, lse * _LOG2_E)
    delta = tl.where(lse == NOTHING, 0.0, delta)
    tl.store(lse2_ptr + h * R + row, lse2, mask=row < R)
    tl.store(delta_ptr + h * R + row, delta, mask=row < R)


def statistics(out_THE: Tensor, dout_THE: Tensor, lse_HT: Tensor, dlse_HT: Tensor | None) -> tuple[Tensor, Tensor]:
    """lse2_HR = log2(e) lse and delta_HR, in float32. R = T + 128, 0 from row T on: room for a last tile."""
    T, H, E = out_THE.shape
    lse2_HR = lse_HT.new_empty((H, T + _ROOM))
    delta_HR = lse_HT.new_empty((H, T + _ROOM))
    if dlse_HT is not None:
        dlse_HT = dlse_HT.contiguous()
    arguments = (
        out_THE.contiguous(),
        dout_THE.contiguous(),
        lse_HT.contiguous(),
        dlse_HT,
        lse2_HR,
        delta_HR,
        T,
        T + _ROOM,
        H,
    )
    programs = triton.cdiv(T + _ROOM, _ROWS.value) * H
    launch(_statistics_kernel, programs, arguments, dict(E=E, BLOCK_E=padded_head_dim(E)))
    return lse2_HR, delta_HR

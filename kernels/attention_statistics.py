"""What the backward of attention needs of each query besides q and dout: log-sum-exp and delta_i = do_i . o_i - dlse_i.

T query rows   R = T + 128 rows of the results   H query heads   E head dim
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_tiles import NOTHING, padded_head_dim
from kernels.backend import LOG2_E

_LOG2_E = tl.constexpr(LOG2_E)
_ROOM = 128  # rows by which a tile may extend past the last one


@triton.jit(do_not_specialize=["T", "ROWS"])
def _statistics_kernel(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    lse2_ptr,
    delta_ptr,
    T,
    ROWS,
    H: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # One program owns 32 rows of one head: delta and log2(e) lse, both 0 for rows without keys.
    row = tl.program_id(0) * 32 + tl.arange(0, 32)
    row = row.to(tl.int64)
    h = tl.program_id(1)
    e = tl.arange(0, BLOCK_E)
    offset = row[:, None] * (H * E) + h * E + e[None, :]
    inside = (row < T)[:, None] & (e < E)[None, :]
    out = tl.load(out_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + h.to(tl.int64) * T + row, mask=row < T, other=0.0)
    lse = tl.load(lse_ptr + h.to(tl.int64) * T + row, mask=row < T, other=NOTHING)
    lse2 = tl.where(lse == NOTHING, 0.0, lse * _LOG2_E)
    delta = tl.where(lse == NOTHING, 0.0, delta)
    tl.store(lse2_ptr + h.to(tl.int64) * ROWS + row, lse2, mask=row < ROWS)
    tl.store(delta_ptr + h.to(tl.int64) * ROWS + row, delta, mask=row < ROWS)


def statistics(out_THE: Tensor, dout_THE: Tensor, lse_HT: Tensor, dlse_HT: Tensor | None) -> tuple[Tensor, Tensor]:
    """lse2_HR = log2(e) lse and delta_HR, in float32. R = T + 128, 0 from row T on: room for a last tile."""
    T, H, E = out_THE.shape
    lse2_HR = lse_HT.new_empty((H, T + _ROOM))
    delta_HR = lse_HT.new_empty((H, T + _ROOM))
    if dlse_HT is not None:
        dlse_HT = dlse_HT.contiguous()
    _statistics_kernel[(triton.cdiv(T + _ROOM, 32), H)](
        out_THE.contiguous(),
        dout_THE.contiguous(),
        lse_HT.contiguous(),
        dlse_HT,
        lse2_HR,
        delta_HR,
        T,
        T + _ROOM,
        H=H,
        E=E,
        BLOCK_E=padded_head_dim(E),
    )
    return lse2_HR, delta_HR

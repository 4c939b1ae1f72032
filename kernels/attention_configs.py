"""Tile sizes and launch options of the attention kernels: tables, one line a shape, each with its reason.

Keys: architecture, head dim padded to a power of two (16 and 32 use the line of 64), and whether operands have 16 bits.
``kernels.dispatch`` sends attention to these kernels on Hopper only. tests/kernels/test_compiled.py holds what every
line has to compile to: no spilled registers, no operand that is overwritten while a product reads it, and tiles that
are asked for two rounds ahead.

What a thread has: 255 registers, or 128 if two programs of 8 warps share a multiprocessor, which has 227 KB.
"""

from functools import cache

import torch

from kernels.attention_tiles import padded_head_dim
from kernels.backend import COMPILER, INTERPRETED

HOPPER = 90

# Products whose left operand waits in registers over the end of an iteration. Triton before 3.8 overwrites it while the
# product reads it (its issue 9433): a wrong result without an error.
KEEPS_LATE_OPERANDS = COMPILER >= (3, 8)


def _tile(m: int, n: int, stages: int, **options) -> dict:
    """m query rows, n key rows; ``stages`` tiles of each operand in shared memory, one less on their way."""
    return dict(BLOCK_M=m, BLOCK_N=n, num_warps=8, num_stages=stages) | options


FORWARD = {
    # Two programs share a multiprocessor: exponentials of one run during products of the other. 64 KB each.
    (HOPPER, 64, True): _tile(128, 64, 3, LATE_PV=False, maxnreg=128),
    # One program (128 KB), which has to overlap by itself: with 128 keys a block, three stages would take 256 KB.
    (HOPPER, 128, True): _tile(128, 64, 3, LATE_PV=KEEPS_LATE_OPERANDS),
    # With 64 keys a block only two stages fit, which leaves no copy in flight during a round.
    (HOPPER, 256, True): _tile(128, 32, 3, LATE_PV=KEEPS_LATE_OPERANDS),
    # Full float32 products do not run on the tensor cores: operands lie in registers, and tiles must be small.
    (HOPPER, 64, False): _tile(32, 32, 1, LATE_PV=False),
    (HOPPER, 128, False): _tile(16, 16, 1, LATE_PV=False),
    (HOPPER, 256, False): _tile(16, 16, 1, LATE_PV=False),  # spills some 250 bytes: it is there to be exact
}

FORWARD_FROM_EARLIER = {
    # The epilogue holds the float32 results of earlier keys next to its own: half the rows, or 500 bytes spill.
    (HOPPER, 256, True): _tile(64, 32, 3, LATE_PV=False),
}

DK_DV = {
    (HOPPER, 64, True): _tile(64, 128, 3, LATE_DK=False),
    # With 64 queries a block, 16 bytes spill (Triton 3.6; 24 with 3.8).
    (HOPPER, 128, True): _tile(32, 128, 3, LATE_DK=False),
    # Nothing prefetches without spills at 256, and Triton 3.8 spills this too: ``dispatch`` sends it to FA2.
    (HOPPER, 256, True): _tile(32, 64, 1, LATE_DK=False),
    (HOPPER, 64, False): _tile(16, 16, 1, LATE_DK=False),  # with 32 keys 8 bytes spill (Triton 3.8)
    (HOPPER, 128, False): _tile(16, 16, 1, LATE_DK=False),
    (HOPPER, 256, False): _tile(16, 16, 1, LATE_DK=False),  # spills some 500 bytes
}

DK_DV_AND_DQ = {
    # The product that adds to dk is issued an iteration late and overlaps with the exponentials there. No registers are
    # left for it in the two-pass form, whose tiles of dq are not in shared memory.
    (HOPPER, 64, True): _tile(64, 128, 3, LATE_DK=True),
}

DK_DV_CAPPED = {
    # The scores have to stay for the derivative of the cap: with 128 keys 8 bytes spill (Triton 3.8).
    (HOPPER, 128, True): _tile(32, 64, 3, LATE_DK=False),
}

DQ = {
    (HOPPER, 64, True): _tile(128, 64, 3),
    (HOPPER, 128, True): _tile(128, 64, 3),
    (HOPPER, 256, True): _tile(64, 32, 3),
    (HOPPER, 64, False): _tile(32, 16, 1),
    (HOPPER, 128, False): _tile(16, 16, 1),
    (HOPPER, 256, False): _tile(16, 16, 1),
}


def _look_up(E: int, dtype: torch.dtype, *tables: dict) -> dict:
    """The line of the first table that has one."""
    block_e = padded_head_dim(E)
    key = HOPPER, max(64, block_e), dtype != torch.float32
    tile = next(table[key] for table in tables if key in table)
    return tile | dict(BLOCK_E=block_e)


@cache
def forward_config(E: int, dtype: torch.dtype, earlier: bool) -> dict:
    """``earlier``: with results of earlier keys, which the kernel continues from."""
    return _look_up(E, dtype, *[FORWARD_FROM_EARLIER] * earlier, FORWARD)


def one_pass(E: int, dtype: torch.dtype, softcap: float | None) -> bool:
    """Whether the keys kernel also sums dq when gradients need not repeat bit for bit: for the shapes at which it then
    compiles without spills. The interpreter cannot add through descriptors."""
    return E <= 64 and dtype != torch.float32 and softcap is None and not INTERPRETED


@cache
def keys_config(E: int, dtype: torch.dtype, add_dq: bool, softcap: float | None) -> dict:
    """Of dk and dv; ``add_dq``: and dq, in one pass."""
    return _look_up(E, dtype, *[DK_DV_AND_DQ] * add_dq, *[DK_DV_CAPPED] * (softcap is not None), DK_DV)


@cache
def queries_config(E: int, dtype: torch.dtype) -> dict:
    """Of dq in the two-pass form."""
    return _look_up(E, dtype, DQ)

"""What runs where: a table of implementation by operation, architecture, dtype and head dim. The first row that fits
decides, and every row has its reason. ``python -m kernels.backend`` prints what follows from it.

    triton    the kernels of this folder
    varlen    torch's own attention over packed rows: FlashAttention-2, or 3 or 4 if activated (``attention_varlen``)
    pytorch   plain PyTorch, the specification

An architecture is a compute capability times ten. Spilled registers (bytes a thread) and shared memory (of a program)
are those of bfloat16, read from code that Triton 3.6 compiled ahead of time. No row rests on a measured time yet.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

Implementation = Literal["triton", "varlen", "pytorch"]
Kernel = tuple[str, Implementation, torch.dtype, int | None]  # operation, implementation, dtype, head dim
ATTENTION = ("attention_forward", "attention_backward", "block_forward", "block_backward")
LSE_GRADIENT = "lse_gradient"  # backward of attention whose log-sum-exp is differentiated, too
MASKED_ATTENTION = "masked_attention"  # with intervals or a soft cap: forward, backward and gradient of lse
OPERATIONS = (*ATTENTION, LSE_GRADIENT, MASKED_ATTENTION, "decode", "cross_entropy", "projector")

CPU = 0
INTERPRETER = 1  # TRITON_INTERPRET=1: kernels run on CPU tensors
ARCHITECTURES = {
    80: "A100",
    86: "RTX 3090",
    89: "RTX 4090, L40S",
    90: "H100, H200",
    100: "B200",
    103: "B300",
    120: "RTX 5090",
    INTERPRETER: "interpreter",
    CPU: "CPU",
}
AMPERE_AND_LATER = range(80, 130)
HOPPER = range(90, 91)
EVERYWHERE = range(1000)

FLASH_ATTENTION = {"FA3": HOPPER, "FA4": range(90, 110)}  # where torch's registry lets them run

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)
ALL_FLOATS = (*FLOATS, torch.float64)
MAX_HEAD_DIM = 256  # of every kernel for attention and decoding
UP_TO_256 = range(1, MAX_HEAD_DIM + 1)
MULTIPLES_OF_8 = range(8, MAX_HEAD_DIM + 1, 8)  # what FlashAttention-2 takes
ANY = range(2**31)


@dataclass(frozen=True)
class Row:
    implementation: Implementation
    operations: tuple[str, ...]
    architectures: range
    dtypes: tuple[torch.dtype, ...]
    head_dims: Container[int]
    reason: str
    flash: tuple[str, ...] = ()  # the row counts only while one of these is active in torch's registry

    def fits(
        self, operation: str, architecture: int, dtype: torch.dtype, head_dim: int | None, flash: str | None
    ) -> bool:
        """``head_dim`` is None for an operation without heads."""
        return (
            operation in self.operations
            and architecture in self.architectures
            and dtype in self.dtypes
            and (head_dim is None or head_dim in self.head_dims)
            and (not self.flash or flash in self.flash)
        )


ROWS = (
    Row(
        "triton",
        OPERATIONS,
        range(INTERPRETER, INTERPRETER + 1),
        (torch.float16, torch.float32),
        UP_TO_256,
        "how the kernels are tested without a GPU; the interpreter's products of bfloat16 are wrong (Triton 3.6)",
    ),
    # Hopper.
    Row(
        "varlen",
        ATTENTION,
        HOPPER,
        HALF,
        (64, 128),
        "FlashAttention-3 reaches 650 TFLOP/s at 128 (2407.08608), which ours hardly will",
        flash=("FA3", "FA4"),
    ),
    Row(
        "varlen",
        ("attention_backward", "block_backward"),
        HOPPER,
        HALF,
        (128, 256),
        "takes our (out, lse): five products for a pair of tiles; ours has seven, and spills at 256 (Triton 3.8)",
    ),
    Row(
        "triton",
        ATTENTION,
        HOPPER,
        HALF,
        (64, 128, 256),
        "no spills; warpgroup products and the copy engine, which FA2 does not use",
    ),
    Row(
        "varlen",
        ATTENTION,
        HOPPER,
        HALF,
        MULTIPLES_OF_8,
        "FA2 has tiles for 32, 96 and 192; ours would multiply the padding up to the next power of two",
    ),
    Row(
        "triton",
        ATTENTION,
        HOPPER,
        HALF,
        UP_TO_256,
        "FA2 takes multiples of 8 only; ours compiles without spills",
    ),
    Row(
        "triton",
        ATTENTION,
        HOPPER,
        (torch.float32,),
        UP_TO_256,
        "FA2 takes no float32; ours is exact, not fast (some 500 bytes spilled at 256)",
    ),
    Row(
        "triton",
        (LSE_GRADIENT,),
        HOPPER,
        FLOATS,
        UP_TO_256,
        "FA2's backward takes no gradient of lse; ours does",
    ),
    Row(
        "triton",
        (MASKED_ATTENTION,),
        HOPPER,
        FLOATS,
        UP_TO_256,
        "of intervals torch's FA2 knows windows, which we do not ask it for, and it has no cap; ours has both",
    ),
    Row(
        "triton",
        ("projector",),
        HOPPER,
        FLOATS,
        ANY,
        "no spills, and half of the memory that eager PyTorch keeps",
    ),
    # The other GPUs.
    Row(
        "pytorch",
        ATTENTION,
        range(86, 90),
        HALF,
        range(193, 225),
        "FA2 has no backward for these head dims in 99 KB of shared memory",
    ),
    Row(
        "pytorch",
        ATTENTION,
        range(120, 130),
        HALF,
        range(193, 225),
        "FA2 has no backward for these head dims in 99 KB of shared memory",
    ),
    Row(
        "varlen",
        ATTENTION,
        range(80, 90),
        HALF,
        MULTIPLES_OF_8,
        "FA2 was written for these; ours spills up to 7,816 bytes (3090, 4090: 1,968, or does not fit in 99 KB)",
    ),
    Row(
        "varlen",
        ATTENTION,
        range(100, 120),
        HALF,
        MULTIPLES_OF_8,
        "ours compiles (dk and dv of 64 spill 32 bytes) but was not laid out for tcgen05; FA4 if activated",
    ),
    Row(
        "varlen",
        ATTENTION,
        range(120, 130),
        HALF,
        MULTIPLES_OF_8,
        "ours spills up to 2,576 bytes, and its backward of 128 needs more than 99 KB of shared memory",
    ),
    Row(
        "pytorch",
        (*ATTENTION, LSE_GRADIENT, MASKED_ATTENTION),
        AMPERE_AND_LATER,
        FLOATS,
        ANY,
        "FA2 takes halves, multiples of 8, no gradient of lse, no intervals, no cap; ours would spill or not fit",
    ),
    Row(
        "pytorch",
        ("projector",),
        AMPERE_AND_LATER,
        FLOATS,
        ANY,
        "ours spills up to 1,968 bytes or does not fit; cuBLAS does not (on B200 24 bytes, and no tcgen05 layout)",
    ),
    # Every GPU from the A100 on.
    Row(
        "triton",
        ("cross_entropy",),
        AMPERE_AND_LATER,
        FLOATS,
        ANY,
        "no spills, 0.1 KB of shared memory, one pass over the logits in place",
    ),
    Row(
        "triton",
        ("decode",),
        AMPERE_AND_LATER,
        FLOATS,
        UP_TO_256,
        "70 to 81 KB of shared memory, no spills (float32: 8 bytes), and each key and value is read once",
    ),
    Row(
        "pytorch",
        OPERATIONS,
        EVERYWHERE,
        ALL_FLOATS,
        ANY,
        "no kernel for this device, dtype or head dim",
    ),
)


def choose(
    operation: str,
    architecture: int,
    dtype: torch.dtype,
    head_dim: int | None = None,
    *,
    flash: str | None = None,
    distrusted: Mapping[Kernel, str] | None = None,
) -> Row:
    """The first row that fits. ``flash`` is what is active in torch's registry of flash attentions: None, FA3 or FA4.

    ``distrusted`` says what is wrong with a kernel; such rows are passed over, and the reason of the row that is
    returned says so.
    """
    assert operation in OPERATIONS, operation
    passed_over: list[str] = []
    for row in ROWS:
        if not row.fits(operation, architecture, dtype, head_dim, flash):
            continue
        wrong = (distrusted or {}).get((operation, row.implementation, dtype, head_dim))
        if wrong is None or row.implementation == "pytorch":
            return replace(row, reason="; ".join([*passed_over, row.reason]))
        if wrong not in passed_over:
            passed_over.append(wrong)
    raise ValueError(f"{operation} in {dtype} runs nowhere: a floating dtype is needed")

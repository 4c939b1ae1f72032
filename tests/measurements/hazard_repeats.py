"""Attention's forward launched again and again: does every launch give the same bits, and are they the right ones?

    python -m tests.measurements.hazard_repeats [--repeats 1000] [--tiny]

A kernel that overwrites registers while a product (wgmma) still reads them, or reads shared memory before a copy has
arrived, goes wrong now and then, depending on the time that neighbours take. So each case is launched many times: one
launch after the other, with the L2 cache flushed between them, and beside matrix products on another stream. No launch
may differ from the first in a single bit, and the first may err at most twice as much as plain PyTorch in the same
dtype, against float64. Each case is a line, written as soon as it is known. Status 1 if one is wrong.

Without a GPU, --tiny runs the Triton kernel in the interpreter (TRITON_INTERPRET=1): that tests this script.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels import attention_forward, attention_hopper
from kernels.attention import attention_reference
from kernels.backend import INTERPRETED
from kernels.segments import Segments

DOCUMENTS = (1900, 577, 1, 40, 3000, 130, 129, 2400)  # tiles of every kind: whole, masked, cut short, nearly empty
FLUSH_BYTES = 256 * 2**20  # more than any L2 cache
MAX_RATIO = 2
LUCK = 2 * torch.finfo(torch.float32).eps  # an error of PyTorch's below this is luck


@dataclass(frozen=True, kw_only=True)
class Case:
    kernel: str
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        heads = f"{self.heads}/{self.kv_heads} heads of {self.head_dim}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kernel:7} {dtype:8} {heads:19} {sum(self.lengths):6} rows in {len(self.lengths):3} {mask:6}"


KERNELS = {"triton": attention_forward.forward, "gluon": attention_hopper.forward}


def cases(tiny: bool) -> Iterator[Case]:
    """The likeliest first. Large grids, of several programs for each multiprocessor, so that two share one where
    registers allow it (head dim 64), and long rows, whose programs walk many blocks."""
    if tiny:
        yield Case(kernel="triton", lengths=(40, 3), heads=2, kv_heads=1, head_dim=16, causal=True, dtype=torch.float16)
        return
    rows = {"packed": DOCUMENTS, "long": (8192,), "images": (577,) * 32}
    for dtype, name, head_dim, kernel in itertools.product((torch.bfloat16, torch.float16), rows, (128, 64), KERNELS):
        causal = name != "images"
        yield Case(
            kernel=kernel,
            lengths=rows[name],
            heads=16,
            kv_heads=4,
            head_dim=head_dim,
            causal=causal,
            dtype=dtype,
        )


def disturbances(device: str) -> dict[str, Callable[[], object]]:
    """What happens between two launches, by name."""
    if device == "cpu":
        return {"alone": lambda: None}
    flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    a = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)
    other = torch.cuda.Stream()

    def beside() -> None:
        with torch.cuda.stream(other):
            torch.mm(a, a)

    return {"alone": lambda: None, "flushed": flushed.zero_, "beside products": beside}


def run(case: Case, repeats: int, device: str) -> tuple[str, bool]:
    """What was found, and whether it is right."""
    generator = torch.Generator(device).manual_seed(0)
    segments = Segments.of(list(case.lengths), device)
    T, E = sum(case.lengths), case.head_dim

    def normal(heads: int) -> Tensor:
        return torch.randn(T, heads, E, generator=generator, device=device).to(case.dtype)

    q, k, v = normal(case.heads), normal(case.kv_heads), normal(case.kv_heads)
    launch = partial(KERNELS[case.kernel], q, k, v, segments, segments, case.causal, E**-0.5)
    first_out, first_lse = launch()
    ratio = error_ratio(first_out, q, k, v, segments, case.causal)
    found, is_right = [], ratio <= MAX_RATIO
    for name, disturb in disturbances(device).items():
        differing = torch.zeros((), dtype=torch.int64, device=device)
        farthest = torch.zeros((), device=device)
        for _ in range(repeats):
            disturb()
            out, lse = launch()
            is_other = (out != first_out).any() | (lse != first_lse).any()
            differing += is_other
            farthest = torch.maximum(farthest, (out - first_out).abs().max().float())
        found.append(f"{name}: {int(differing)} of {repeats} differ, by up to {float(farthest):.2g}")
        is_right &= int(differing) == 0
    return f"error {ratio:.2f} times PyTorch's; {'; '.join(found)}", is_right


def error_ratio(out: Tensor, q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> float:
    """Of the last key head and its query heads, the largest difference from float64, over that of PyTorch's formula."""
    G = q.shape[1] // k.shape[1]
    part = q[:, -G:], k[:, -1:], v[:, -1:]
    exact = attention_reference(*(x.double() for x in part), segments, causal=causal)
    plain = attention_reference(*part, segments, causal=causal).double()
    ours_off, theirs_off = ((x.double() - exact).abs().max().item() for x in (out[:, -G:], plain))
    return ours_off / max(theirs_off, LUCK)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000, help="of each case and disturbance: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="one small case, for the interpreter")
    options = parser.parse_args()
    device = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
    if device == "cpu" and not (INTERPRETED and options.tiny):
        parser.error("needs a GPU, or TRITON_INTERPRET=1 and --tiny")
    num_wrong = 0
    for case in cases(options.tiny):
        try:
            found, is_right = run(case, options.repeats, device)
        except Exception as error:  # a kernel that does not run here is a line, and the others go on
            found, is_right = f"{type(error).__name__}: {str(error).splitlines()[0]}", False
        num_wrong += not is_right
        print(f"{'right' if is_right else 'WRONG'}  {case}  {found}", flush=True)
    print(f"{num_wrong} cases are wrong" if num_wrong else "all cases are right")
    sys.exit(num_wrong > 0)


if __name__ == "__main__":
    main()

"""Every operation of this machine against plain PyTorch: results, gradients, and whether they repeat bit for bit.

    python -m kernels.check [--quick] [--flash-attention FA3|FA4]

An error may be twice that of plain PyTorch in the same dtype, plus a few units in the last place. A kernel that errs
more, raises or does not repeat is distrusted: the next row of the table takes its place, and is compared in turn. The
first time most of the time goes into compiling the kernels.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels import backend
from kernels.check_cases import Case, Sizes, cases
from kernels.dispatch import FLASH_ATTENTION, Implementation, Kernel

QUICK = Sizes(lengths=(300, 1, 0, 577), repeats=3)
FULL = Sizes(lengths=(2500, 1, 0, 577, 1018), repeats=100)
SMALL = Sizes(lengths=(20, 1, 0, 9), repeats=2)  # for the interpreter
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 72, 128, 256)
ULPS = 4  # of the largest value


@dataclass(frozen=True)
class Finding:
    """What is wrong with a kernel."""

    kernel: Kernel
    case: str
    wrong: str
    instead: str = ""  # what runs in its place

    @property
    def operation(self) -> str:
        return self.kernel[0]

    @property
    def implementation(self) -> str:
        return self.kernel[1]

    def __str__(self) -> str:
        place = f"; {self.instead} runs in its place" if self.instead else ""
        return f"{self.operation} by {self.implementation} is wrong for {self.case}: {self.wrong}{place}"

    def distrust(self) -> None:
        backend.distrust(self.kernel, f"disagreed with PyTorch: {self.wrong}")


def run(chosen: Iterator[Case], repeats: int, say: Callable[[str], object] = lambda line: None) -> list[Finding]:
    """Compare, distrust what disagrees, and compare again what runs in its place. Returns all that was wrong."""
    found = []
    for case in chosen:
        while finding := compare(case, repeats):
            finding.distrust()
            found.append(replace(finding, instead=_implementation(case, finding.operation)))
            say(f"WRONG: {found[-1]}")
        implementations = {operation: _implementation(case, operation) for operation in case.operations.values()}
        names = ", ".join(f"{operation} {by}" for operation, by in implementations.items())
        say(f"{case.name}: {names}: {'as PyTorch' if _is_ours(case) else 'nothing to compare'}")
    return found


def compare(case: Case, repeats: int) -> Finding | None:
    """The first thing that is wrong with a case, in the order of its results."""
    if not _is_ours(case):
        return None
    exact = case.reference(torch.float64)
    theirs = case.reference(case.dtype)
    runs = []
    for deterministic in [False] + [True] * repeats:
        runs.append({})
        try:
            for results in case.ours(deterministic):
                runs[-1] |= results
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a compiler, a launch, or torch's own checks
            failed = next(operation for name, operation in case.operations.items() if name not in runs[-1])
            if _implementation(case, failed) == "pytorch":
                raise
            return _finding(case, failed, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    for name, operation in case.operations.items():
        if _implementation(case, operation) == "pytorch":
            continue
        for ours in runs[:2]:
            terms = case.cancelled if name in ("dq", "dk") else 0.0
            wrong = _excess(ours[name], theirs[name], exact[name], case.dtype, terms)
            if wrong:
                return _finding(case, operation, f"{name} {wrong}")
        if not all(_same_bits(again[name], runs[1][name]) for again in runs[2:]):
            return _finding(case, operation, f"{name} differs between calls with the same inputs")
    return None


def _implementation(case: Case, operation: str) -> Implementation:
    return backend.implementation(operation, case.like, case.head_dim)


def _is_ours(case: Case) -> bool:
    return any(_implementation(case, operation) != "pytorch" for operation in case.operations.values())


def _finding(case: Case, operation: str, wrong: str) -> Finding:
    kernel = operation, _implementation(case, operation), case.dtype, case.head_dim
    return Finding(kernel, case.name, wrong)


def _excess(ours: Tensor, theirs: Tensor, exact: Tensor, dtype: torch.dtype, terms: float) -> str:
    """By how much our error exceeds what is allowed, in words; empty if it does not. ``terms`` of this size may have
    cancelled in the result."""
    known = exact.isfinite()
    if not (ours == -torch.inf).equal(exact == -torch.inf):
        return "is -inf in other places than that of PyTorch"
    if not known.any():
        return ""
    ours_off, theirs_off = ((x.double()[known] - exact[known]).abs().max().item() for x in (ours, theirs))
    largest = max(1.0, exact[known].abs().max().item(), terms)
    allowed = 2 * theirs_off + ULPS * torch.finfo(dtype).eps * largest
    if ours_off <= allowed:  # false for NaN
        return ""
    return f"is off by {ours_off:.3g}, where PyTorch is by {theirs_off:.3g} and {allowed:.3g} is allowed"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.equal(b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.check", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="bfloat16, head dims 64 and 128: seconds")
    parser.add_argument("--flash-attention", choices=list(FLASH_ATTENTION), help="activate it; its package is needed")
    arguments = parser.parse_args()
    if not (torch.cuda.is_available() or backend.INTERPRETED):
        print("without a GPU or TRITON_INTERPRET=1 only plain PyTorch runs here: there is nothing to compare")
        return
    device = torch.device("cpu" if backend.INTERPRETED else "cuda:0")
    if arguments.flash_attention:
        backend.activate_flash_attention(arguments.flash_attention, backend.architecture(device.index))
    sizes = QUICK if arguments.quick else FULL
    dtypes, head_dims = DTYPES, HEAD_DIMS
    if arguments.quick:
        dtypes, head_dims = (torch.bfloat16,), (64, 128)
    if backend.INTERPRETED:
        sizes, dtypes, head_dims = SMALL, (torch.float16, torch.float32), (16,)
    found = run(cases(device, dtypes, head_dims, sizes), sizes.repeats, say=lambda line: print(line, flush=True))
    if found:
        sys.exit(f"{len(found)} of these kernels disagree with PyTorch")


if __name__ == "__main__":
    main()

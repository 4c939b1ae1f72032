"""What every suite shares: the session, errors against float64, the roofline and the rows of a comparison.

    bound = max(FLOPs / peak FLOP/s, bytes / peak bytes/s)        % of bound = bound / time

Bytes are those that have to move: each input read once, each result written once. The peaks are those of the data sheet
(``cards.py``, half precision), or else the matrix product and the copy that the session has measured.

Without a GPU everything shrinks and runs on the host's clock: that tests a command and measures nothing.
"""

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

import torch
import triton
from torch import Tensor

from kernels.backend import INTERPRETED
from kernels.benchmark import timing
from kernels.benchmark.cards import CARDS, Card
from kernels.benchmark.peers import reason

NVIDIA_SMI = {"driver": "driver_version", "power_limit_w": "power.limit", "sm_clock_mhz": "clocks.sm"}
GEMM_SIZE, COPY_ELEMENTS = 8192, 2**30
TINY_GEMM_SIZE, TINY_COPY_ELEMENTS = 256, 2**20
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAX_RATIO = 2  # of an error to that of plain PyTorch in the same dtype
LUCK = 4 * torch.finfo(torch.float32).eps  # an error of plain PyTorch's below this is luck
Provider = TypeVar("Provider")


@dataclass(frozen=True, kw_only=True)
class Session:
    """One run of the command: where, what and how long it measures, and the ceilings that it compares with."""

    device: str
    label: str  # of the device, in every row
    dtype: torch.dtype
    seconds: float  # for one provider, shape and direction, all rounds together
    wanted: tuple[str, ...]  # what the names of the providers begin with
    gpu: str
    gemm_tflops: float  # a square matrix product in dtype
    copy_gb_per_s: float  # a copy within the device's memory, bytes read plus bytes written

    @property
    def card(self) -> Card | None:
        """None for a device or dtype whose peak we did not look up."""
        return None if self.dtype == torch.float32 else CARDS.get(self.gpu)

    @property
    def roof(self) -> tuple[float, float]:
        """TFLOP/s and GB/s of the roofline."""
        if self.card is None:
            return self.gemm_tflops, self.copy_gb_per_s
        return self.card.tflops, self.card.gb_per_s

    def chosen(self, providers: dict[str, Provider]) -> dict[str, Provider]:
        return {name: provider for name, provider in providers.items() if name.startswith(self.wanted)}

    def own_stream(self) -> contextlib.AbstractContextManager:
        """A stream that CUDA graphs can be captured on, which the default stream is not."""
        return torch.cuda.stream(torch.cuda.Stream()) if self.device == "cuda" else contextlib.nullcontext()


def start_session(seconds: float, dtype: torch.dtype | None = None, wanted: tuple[str, ...] = ("",)) -> Session:
    """Inspect the machine and measure its ceilings. This is the first call that touches the GPU.

    ``dtype`` is bf16 by default, float32 without a GPU.
    """
    on_gpu = torch.cuda.is_available() and not INTERPRETED
    if on_gpu:
        device, label = "cuda", "cuda"
        gemm_size, copy_elements = GEMM_SIZE, COPY_ELEMENTS
    else:
        device = "cpu"
        kind = "interpreter" if INTERPRETED else "reference"
        label = f"cpu ({kind}, tiny shapes: a try of the command, not a measurement)"
        gemm_size, copy_elements = TINY_GEMM_SIZE, TINY_COPY_ELEMENTS
    if dtype is None:
        dtype = torch.bfloat16 if on_gpu else torch.float32
    a = torch.randn(gemm_size, gemm_size, device=device, dtype=dtype)
    b = torch.randn(gemm_size, gemm_size, device=device, dtype=dtype)
    gemm_ms = timing.median(timing.times_ms(lambda: a @ b, seconds, device))
    source = torch.randn(copy_elements, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy_ms = timing.median(timing.times_ms(lambda: target.copy_(source), seconds, device))
    return Session(
        device=device,
        label=label,
        dtype=dtype,
        seconds=seconds,
        wanted=wanted,
        gpu=torch.cuda.get_device_name() if on_gpu else "",
        gemm_tflops=2 * gemm_size**3 / gemm_ms / 1e9,
        copy_gb_per_s=2 * source.nbytes / copy_ms / 1e6,
    )


def compare(
    providers: dict[str, Provider],
    prepare: Callable[[Provider], tuple[Callable[[], object], dict]],
    common: dict,
    amount: dict,
    session: Session,
) -> list[dict]:
    """One row for each provider that is wanted, with numbers or with the reason why there are none.

    ``prepare`` makes of a provider the call to be timed and columns of its own (``error_ratio`` among them), or raises.
    ``common`` are the columns that describe the case; ``amount`` is what ``speed`` counts.
    """
    calls, columns, reasons = {}, {}, {}
    providers = session.chosen(providers)
    for name, provider in providers.items():
        try:
            calls[name], columns[name] = prepare(provider)
        except Exception as error:  # a provider that fails is a row with a reason; the run continues
            reasons[name] = reason(error)
    timings, failures = timing.time_interleaved(calls, session.seconds, session.device)
    reasons |= failures
    if session.device == "cuda":  # after all others, because a capture that fails may leave its mark
        for name in timings:
            columns[name] |= timing.time_graph(calls[name], session.seconds / 2)
    dtype = str(session.dtype).removeprefix("torch.")
    common = {**common, "metric": "speed", "dtype": dtype, **environment(session)}
    rows = []
    for name in providers:
        row = {**common, "provider": name}
        if name in reasons:
            row["reason"] = reasons[name]
        else:
            row |= timings[name] | columns[name]
            row |= speed(row["ms_p50"], session, **amount)
            row["verdict"] = "ok" if row["error_ratio"] <= MAX_RATIO else "wrong"  # NaN is wrong
        rows.append(row)
    return rows


def speed(ms: float, session: Session, *, flops: float = 0, num_bytes: float) -> dict:
    """The rate columns of a row: FLOP/s, or traffic where no FLOPs are counted, and the distance to the roofline."""
    if flops:
        tflops = flops / ms / 1e9
        columns = {"tflops": tflops, "percent_of_gemm": 100 * tflops / session.gemm_tflops}
        if session.card is not None:
            columns["percent_of_datasheet"] = 100 * tflops / session.card.tflops
    else:
        gb_per_s = num_bytes / ms / 1e6
        columns = {"gb_per_s": gb_per_s, "percent_of_copy": 100 * gb_per_s / session.copy_gb_per_s}
        if session.card is not None:
            columns["percent_of_datasheet"] = 100 * gb_per_s / session.card.gb_per_s
    peak_tflops, peak_gb_per_s = session.roof
    arithmetic_ms = flops / peak_tflops / 1e9
    memory_ms = num_bytes / peak_gb_per_s / 1e6
    bound_ms = max(arithmetic_ms, memory_ms)
    columns |= {"flop_per_byte": flops / num_bytes, "bound_ms": bound_ms, "percent_of_bound": 100 * bound_ms / ms}
    return {**columns, "bound_by": "arithmetic" if arithmetic_ms > memory_ms else "memory"}


def environment(session: Session) -> dict[str, str]:
    """The columns of a row that say where and when it was measured; the SM clock is read right after the work."""
    gpu = _nvidia_smi() if session.device == "cuda" else {}
    return {
        "device": session.label,
        "gpu": session.gpu,
        **gpu,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _nvidia_smi() -> dict[str, str]:
    """Empty if there is no nvidia-smi or it fails."""
    if shutil.which("nvidia-smi") is None:
        return {}
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    query = f"--query-gpu={','.join(NVIDIA_SMI.values())}"
    command = ["nvidia-smi", f"--id=GPU-{uuid}", query, "--format=csv,noheader,nounits"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        return {}
    return dict(zip(NVIDIA_SMI, result.stdout.strip().split(", ")))


def relative_error(x: Tensor, exact: Tensor) -> float:
    """||x - exact|| / ||exact||, Frobenius norms in float64; NaN if there is a NaN anywhere."""
    exact = exact.double()
    difference = x.double() - exact
    return (difference.norm() / exact.norm()).item()


def error_columns(errors: list[float], baseline: list[float]) -> dict[str, float]:
    """The worst error, and the worst ratio to the error of plain PyTorch, which counts as LUCK at least."""
    ratios = [x / max(y, LUCK) for x, y in zip(errors, baseline, strict=True)]
    return {"error": worst(errors), "error_ratio": worst(ratios)}


def worst(errors: Iterable[float]) -> float:
    return torch.tensor(list(errors)).max().item()  # NaN wins, unlike in Python's max

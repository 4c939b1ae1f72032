"""Measurements for every suite: interleaved timing, errors against float64, and the ceilings of the machine.

On a GPU, times are those of ``triton.testing.do_bench``: device events around the call, with the L2 cache flushed
before it. The host enqueues the call during the flush; if that takes it longer (some 0.1 ms), we measure host time.
Providers take turns, ROUNDS times, so that a drifting clock affects all of them; quantiles are over all rounds.

Without a GPU everything shrinks and runs on the host's clock: that tests a command and measures nothing.
"""

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate, chain
from typing import TypeVar

import torch
import triton
import triton.testing
from torch import Tensor

from kernels.backend import INTERPRETED

ROUNDS = 2
QUANTILES = {"ms_p50": 0.5, "ms_p20": 0.2, "ms_p80": 0.8}
SXM_TFLOPS = 989.0  # NVIDIA's datasheets of H100 and H200 SXM: bf16, dense
NVIDIA_SMI = {"driver": "driver_version", "power_limit_w": "power.limit", "sm_clock_mhz": "clocks.sm"}
GEMM_SIZE, COPY_ELEMENTS = 8192, 2**30
TINY_GEMM_SIZE, TINY_COPY_ELEMENTS = 256, 2**20
Provider = TypeVar("Provider")


class Unavailable(Exception):
    """A provider is not installed or does not support a shape. The message is the reason shown in its row."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """One run of the command: where and how long it measures, and the ceilings that it compares with."""

    device: str
    label: str  # of the device, in every row
    dtype: torch.dtype
    seconds: float  # for one provider, shape and direction, all rounds together
    gpu: str
    gemm_tflops: float  # a square matrix product in dtype
    copy_gb_per_s: float  # a copy within the device's memory, bytes read plus bytes written

    @property
    def datasheet_tflops(self) -> float | None:
        """None for a device whose peak we did not look up. The peaks of PCIe and NVL cards differ from SXM's."""
        is_sxm = re.search("H[12]00", self.gpu) and not re.search("PCIe|NVL", self.gpu)
        return SXM_TFLOPS if is_sxm else None


def start_session(seconds: float) -> Session:
    """Inspect the machine and measure its ceilings. This is the first call that touches the GPU."""
    on_gpu = torch.cuda.is_available() and not INTERPRETED
    if on_gpu:
        device, dtype, label = "cuda", torch.bfloat16, "cuda"
        gemm_size, copy_elements = GEMM_SIZE, COPY_ELEMENTS
    else:
        device, dtype = "cpu", torch.float32  # interpreted products of bfloat16 are wrong
        kind = "interpreter" if INTERPRETED else "reference"
        label = f"cpu ({kind}, tiny shapes: a try of the command, not a measurement)"
        gemm_size, copy_elements = TINY_GEMM_SIZE, TINY_COPY_ELEMENTS
    a = torch.randn(gemm_size, gemm_size, device=device, dtype=dtype)
    b = torch.randn(gemm_size, gemm_size, device=device, dtype=dtype)
    gemm_ms = _median(times_ms(lambda: a @ b, seconds, device))
    source = torch.randn(copy_elements, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy_ms = _median(times_ms(lambda: target.copy_(source), seconds, device))
    return Session(
        device=device,
        label=label,
        dtype=dtype,
        seconds=seconds,
        gpu=torch.cuda.get_device_name() if on_gpu else "",
        gemm_tflops=2 * gemm_size**3 / gemm_ms / 1e9,
        copy_gb_per_s=2 * source.nbytes / copy_ms / 1e6,
    )


def times_ms(function: Callable[[], object], seconds: float, device: str) -> list[float]:
    """Milliseconds of single calls, repeated for about ``seconds``; on a GPU after a warm-up of at most 25 ms."""
    if device == "cuda":
        warmup_ms = min(25, 250 * seconds)
        return triton.testing.do_bench(function, warmup=warmup_ms, rep=1000 * seconds, return_mode="all")
    times = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return times


def time_interleaved(
    functions: dict[str, Callable[[], object]], session: Session
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Quantiles over all rounds and the spread between rounds of every function; and a reason for each that fails."""
    rounds: dict[str, list[list[float]]] = {name: [] for name in functions}
    reasons: dict[str, str] = {}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            if name in reasons:
                continue
            try:
                rounds[name].append(times_ms(function, session.seconds / ROUNDS, session.device))
            except Exception as error:  # a provider that fails is a row with a reason; the run continues
                reasons[name] = reason(error)
    timings = {name: _quantiles(rounds[name]) for name in functions if name not in reasons}
    return timings, reasons


def _quantiles(rounds: list[list[float]]) -> dict[str, float]:
    times = torch.tensor(list(chain(*rounds)), dtype=torch.float64)
    medians = [_median(ms) for ms in rounds]
    columns = {column: times.quantile(q).item() for column, q in QUANTILES.items()}
    return {**columns, "spread_percent": 100 * (max(medians) / min(medians) - 1)}


def speed(ms: float, session: Session, *, flops: float | None = None, num_bytes: float | None = None) -> dict:
    """The rate columns of a row: FLOPs relative to datasheet and matrix product, or traffic relative to a copy."""
    columns = {}
    if flops is not None:
        tflops = flops / ms / 1e9
        columns |= {"tflops": tflops, "percent_of_gemm": 100 * tflops / session.gemm_tflops}
        if session.datasheet_tflops is not None:
            columns["percent_of_datasheet"] = 100 * tflops / session.datasheet_tflops
    if num_bytes is not None:
        gb_per_s = num_bytes / ms / 1e6
        columns |= {"gb_per_s": gb_per_s, "percent_of_copy": 100 * gb_per_s / session.copy_gb_per_s}
    return columns


def compare(
    providers: dict[str, Provider],
    prepare: Callable[[Provider], tuple[Callable[[], object], dict]],
    common: dict,
    amount: dict,
    session: Session,
) -> list[dict]:
    """One row for each provider, with numbers or with the reason why there are none.

    ``prepare`` makes of a provider the call to be timed and columns of its own, or raises. ``common`` are the columns
    that describe the case; ``amount`` is what ``speed`` counts.
    """
    calls, columns, reasons = {}, {}, {}
    for name, provider in providers.items():
        try:
            calls[name], columns[name] = prepare(provider)
        except Exception as error:  # a provider that fails is a row with a reason; the run continues
            reasons[name] = reason(error)
    timings, failures = time_interleaved(calls, session)
    reasons |= failures
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
        rows.append(row)
    return rows


def peak_mib(function: Callable[[], object], device: str) -> float:
    """Peak memory of a call, its results included, above what was allocated before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    allocated = accumulate(event.nbytes() for event in events)
    return max(allocated, default=0) / 2**20


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


def worst(errors: Iterable[float]) -> float:
    return torch.tensor(list(errors)).max().item()  # NaN wins, unlike in Python's max


def reason(error: Exception) -> str:
    """One line for the row of a provider that failed."""
    message = str(error).strip() or "no message"
    first_line = message.splitlines()[0]
    if isinstance(error, Unavailable | ImportError):
        return first_line
    return f"{type(error).__name__}: {first_line}"


def _median(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(0.5).item()

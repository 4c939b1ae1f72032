"""What every suite measures with: interleaved timing, errors against float64, and what the machine reaches at best.

On a GPU a time is one of ``triton.testing.do_bench``: device events around the call, L2 flushed before it. The host
enqueues while the flush runs, so calls whose launch takes the host longer than that (some 0.1 ms) show host time.
Providers take turns, ROUNDS times over, so that a drifting clock meets all of them; quantiles are over all rounds.

On a machine without a GPU everything shrinks and runs on the host's clock, to try a command and not to measure.
"""

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate

import torch
import triton
import triton.testing
from torch import Tensor

ROUNDS = 2
QUANTILES = {"ms_p50": 0.5, "ms_p20": 0.2, "ms_p80": 0.8}
SXM_TFLOPS = 989.0  # NVIDIA's datasheets of H100 and H200 SXM: bf16, dense
NVIDIA_SMI = {"driver": "driver_version", "power_limit_w": "power.limit", "sm_clock_mhz": "clocks.sm"}
GEMM_SIZE, COPY_ELEMENTS = 8192, 2**30
TINY_GEMM_SIZE, TINY_COPY_ELEMENTS = 256, 2**20


class Unavailable(Exception):
    """A provider that is not installed or does not take a shape. The message is the reason that its row shows."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """One run of the command: where and how long it measures, and the ceilings that it compares with."""

    device: str
    label: str  # what every row says of its device
    dtype: torch.dtype
    seconds: float  # of one provider, shape and direction, all rounds together
    gpu: str
    gemm_tflops: float  # a square matrix product in dtype
    copy_gb_per_s: float  # a copy within the device's memory, bytes read plus bytes written

    @property
    def datasheet_tflops(self) -> float | None:
        """None for a device whose peak we did not look up; PCIe and NVL cards have other peaks than SXM."""
        return SXM_TFLOPS if re.search("H[12]00", self.gpu) and not re.search("PCIe|NVL", self.gpu) else None


def start_session(seconds: float) -> Session:
    """Look at the machine and measure its ceilings. This is the first call that touches the GPU."""
    interpreted = triton.knobs.runtime.interpret
    on_gpu = torch.cuda.is_available() and not interpreted
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)  # interpreted bf16 dots are wrong
    kind = "interpreter" if interpreted else "reference"
    label = "cuda" if on_gpu else f"cpu ({kind}, tiny shapes: a try of the command, not a measurement)"
    n = GEMM_SIZE if on_gpu else TINY_GEMM_SIZE
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    gemm_ms = _median(times_ms(lambda: a @ b, seconds, device))
    source = torch.randn(COPY_ELEMENTS if on_gpu else TINY_COPY_ELEMENTS, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy_ms = _median(times_ms(lambda: target.copy_(source), seconds, device))
    return Session(
        device=device,
        label=label,
        dtype=dtype,
        seconds=seconds,
        gpu=torch.cuda.get_device_name() if on_gpu else "",
        gemm_tflops=2 * n**3 / gemm_ms / 1e9,
        copy_gb_per_s=2 * source.nbytes / copy_ms / 1e6,
    )


def times_ms(function: Callable[[], object], seconds: float, device: str) -> list[float]:
    """Milliseconds of single calls, made for about ``seconds``; on a GPU after a warm-up of at most 25 ms."""
    if device == "cuda":
        return triton.testing.do_bench(function, warmup=min(25, 250 * seconds), rep=1000 * seconds, return_mode="all")
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return times


def time_interleaved(functions: dict[str, Callable[[], object]], session: Session) -> dict[str, dict[str, float] | str]:
    """Quantiles over all rounds and the spread between rounds of every function, or the reason why it has none."""
    rounds: dict[str, list[list[float]]] = {name: [] for name in functions}
    timings: dict[str, dict[str, float] | str] = {}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            if name not in timings:
                try:
                    rounds[name].append(times_ms(function, session.seconds / ROUNDS, session.device))
                except Exception as error:  # one provider's failure is its row, not the end of the run
                    timings[name] = reason(error)
    for name in functions.keys() - timings.keys():
        medians = [_median(times) for times in rounds[name]]
        times = torch.tensor([ms for some in rounds[name] for ms in some], dtype=torch.float64)
        timings[name] = {column: times.quantile(q).item() for column, q in QUANTILES.items()}
        timings[name]["spread_percent"] = 100 * (max(medians) / min(medians) - 1)
    return timings


def speed(ms: float, session: Session, *, flops: float | None = None, num_bytes: float | None = None) -> dict:
    """The rate columns of a row: arithmetic against datasheet and matrix product, or traffic against the copy."""
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


def compare(prepared: dict[str, Callable[[], tuple]], what: dict, amount: dict, session: Session) -> list[dict]:
    """One row for each provider, with numbers or with the reason why there are none.

    A provider of ``prepared`` gives the call to be timed and columns of its own, or raises; ``what`` are the columns
    that all share and ``amount`` is what ``speed`` counts.
    """
    calls, columns, reasons = {}, {}, {}
    for name, prepare in prepared.items():
        try:
            calls[name], columns[name] = prepare()
        except Exception as error:  # one provider's failure is its row, not the end of the run
            reasons[name] = reason(error)
    timings = time_interleaved(calls, session)
    reasons |= {name: timing for name, timing in timings.items() if isinstance(timing, str)}
    rows = []
    for name in prepared:
        row = {**what, "provider": name}
        if name in reasons:
            rows.append(row | {"reason": reasons[name]})
        else:
            rows.append(row | timings[name] | speed(timings[name]["ms_p50"], session, **amount) | columns[name])
    return rows


def peak_mib(function: Callable[[], object], device: str) -> float:
    """The most memory that a call holds at a time, its results included, above what was held before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
        function()
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    held = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0) / 2**20


def environment(session: Session) -> dict[str, str]:
    """The columns of a row that say where and when it was measured; the clock is the one just after the work."""
    return {
        "device": session.label,
        "gpu": session.gpu,
        **(_nvidia_smi() if session.device == "cuda" else {}),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _nvidia_smi() -> dict[str, str]:
    """Nothing where there is no nvidia-smi or it does not answer."""
    if shutil.which("nvidia-smi") is None:
        return {}
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    query = f"--query-gpu={','.join(NVIDIA_SMI.values())}"
    command = ["nvidia-smi", f"--id=GPU-{uuid}", query, "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return dict(zip(NVIDIA_SMI, answer.stdout.strip().split(", "))) if answer.returncode == 0 else {}


def relative_error(x: Tensor, exact: Tensor) -> float:
    """||x - exact|| / ||exact||, Frobenius, in float64. NaN anywhere stays NaN."""
    exact = exact.double()
    return ((x.double() - exact).norm() / exact.norm()).item()


def reason(error: Exception) -> str:
    """One line for the row of a provider that failed."""
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return first_line if isinstance(error, Unavailable | ImportError) else f"{type(error).__name__}: {first_line}"


def _median(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(0.5).item()

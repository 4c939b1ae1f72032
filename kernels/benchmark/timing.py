"""How long a call takes, and how much memory.

On a GPU, times are those of ``triton.testing.do_bench``: device events around the call, with the L2 cache flushed
before it. The host enqueues the call during the flush. If that takes it longer (some 0.1 ms), eager times are host
time; the time of the same call replayed from a CUDA graph is the device's alone.

Providers take turns, ROUNDS times, so that a drifting clock affects all of them; quantiles are over all rounds. Without
a GPU, times are those of the host's clock.
"""

import time
from collections.abc import Callable
from itertools import accumulate, chain

import torch
import triton.testing

from kernels.benchmark.peers import reason

ROUNDS = 2
QUANTILES = {"ms_p50": 0.5, "ms_p20": 0.2, "ms_p80": 0.8}
Call = Callable[[], object]


def times_ms(function: Call, seconds: float, device: str) -> list[float]:
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
    functions: dict[str, Call], seconds: float, device: str
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Quantiles over all rounds and the spread between rounds of every function; and a reason for each that fails."""
    rounds: dict[str, list[list[float]]] = {name: [] for name in functions}
    reasons: dict[str, str] = {}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            if name in reasons:
                continue
            try:
                rounds[name].append(times_ms(function, seconds / ROUNDS, device))
            except Exception as error:  # a provider that fails is a row with a reason; the run continues
                reasons[name] = reason(error)
    timings = {name: _quantiles(rounds[name]) for name in functions if name not in reasons}
    return timings, reasons


def _quantiles(rounds: list[list[float]]) -> dict[str, float]:
    times = torch.tensor(list(chain(*rounds)), dtype=torch.float64)
    medians = [median(ms) for ms in rounds]
    columns = {column: times.quantile(q).item() for column, q in QUANTILES.items()}
    return {**columns, "spread_percent": 100 * (max(medians) / min(medians) - 1)}


def time_graph(function: Call, seconds: float) -> dict[str, float | str]:
    """``graph_ms``: the median of a call replayed from a CUDA graph; or ``graph_reason``, why it cannot be captured.

    Captured on the current stream, which must not be the default one: a backward runs on the stream of its forward.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            function()
        return {"graph_ms": median(times_ms(graph.replay, seconds, "cuda"))}
    except Exception as error:  # waiting for the device in a capture, for example
        torch.cuda.synchronize()
        return {"graph_reason": reason(error)}


def peak_mib(function: Call, device: str) -> float:
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


def median(values: list[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(0.5).item()

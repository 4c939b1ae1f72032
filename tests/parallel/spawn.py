"""Runs a function on several gloo ranks of this machine and returns the result of each."""

import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as multiprocessing


def run_ranks(
    function: Callable, world_size: int, *args: Any, timeout: float = 300, method: str = "forkserver"
) -> list[Any]:
    """``function(*args)`` in ``world_size`` processes with torchrun's environment; plain data back, in rank order.

    Fails as soon as a rank fails or dies, and after ``timeout`` seconds: ranks that wait for each other never end.
    Ranks are forks of one process that has made the usual imports; with ``method`` "spawn" each is a fresh process with
    a hash seed of its own, as under torchrun.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["pytest", "hypothesis", "tests.measurements.equivalence"])
    answers = context.Queue()
    processes = [
        context.Process(target=_rank, args=(answers, function, rank, world_size, port, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results, end = {}, time.monotonic() + timeout
    try:
        while len(results) < world_size:
            try:
                rank, error, value = answers.get(timeout=1)
            except queue.Empty:
                dead = [rank for rank, p in enumerate(processes) if p.exitcode is not None and rank not in results]
                assert not dead or not answers.empty(), f"ranks {dead} ended without an answer"
                assert time.monotonic() < end, f"only ranks {sorted(results)} answered within {timeout} s"
                continue
            assert not error, f"rank {rank}:\n{error}"
            results[rank] = value
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()
    return [results[rank] for rank in range(world_size)]


def _rank(answers, function, rank, world_size, port, args):
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    torch.set_num_threads(1)
    try:
        answers.put((rank, "", function(*args)))
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))

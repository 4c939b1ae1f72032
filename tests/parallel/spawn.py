"""Runs a function on several gloo ranks of this machine and returns what each gave back."""

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as multiprocessing


def run_ranks(function: Callable, world_size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """``function(*args)`` in ``world_size`` processes with torchrun's environment; plain data back, in rank order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(queue, function, rank, world_size, port, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results = {}
    try:
        for _ in processes:
            rank, error, value = queue.get()
            assert not error, f"rank {rank}:\n{error}"
            results[rank] = value
    finally:
        for process in processes:
            process.join(timeout if len(results) == world_size else 1)
            process.kill()
    return [results[rank] for rank in range(world_size)]


def _rank(queue, function, rank, world_size, port, args):
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
        queue.put((rank, "", function(*args)))
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))

"""Processes: who this rank is, the named mesh of all ranks, and sums over them."""

import ctypes
import os
import signal
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from avlm.config import Config, ParallelConfig

PR_SET_PDEATHSIG = 1  # linux/prctl.h: a signal for this process when its parent dies


@dataclass(frozen=True)
class World:
    """This process among all. ``mesh`` has the axes replicate and shard; the loader's data ranks are their product."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sum over the data ranks, on the host: nothing waits for a device."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The plain data that each rank gives, on every rank."""
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        self.sum([0.0])


def ranks() -> tuple[int, int]:
    """(rank, world size) that the launcher gave this process; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def sizes(parallel: ParallelConfig, world_size: int) -> tuple[int, int]:
    """(replicate, shard) for a world; raises ValueError when they do not multiply to it."""
    shard = world_size // parallel.replicate if parallel.shard == -1 else parallel.shard
    if parallel.replicate * shard != world_size:
        raise ValueError(
            f"parallel.replicate={parallel.replicate} x parallel.shard={parallel.shard} does not make "
            f"{world_size} ranks: start torchrun with another --nproc-per-node, or set parallel.shard=-1"
        )
    return parallel.replicate, shard


def choose_device(config: Config) -> torch.device:
    """The device of this rank; raises ValueError when the machine does not have it."""
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    kind = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_size > count:
        raise ValueError(
            f"{local_size} ranks on this machine, but {count} GPUs: lower --nproc-per-node or set device=cpu"
        )
    return torch.device("cuda", local_rank)


def start(config: Config, device: torch.device) -> World:
    """Join the process group (gloo for host tensors, NCCL for a GPU's) and lay out the mesh."""
    rank, size = ranks()
    shape = sizes(config.parallel, size)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's workers outlive a launcher that was killed, unless told not to
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = None if size > 1 else dist.HashStore()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size
    )
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    return World(rank, size, device, mesh)


def stop() -> None:
    """Leave the group, all ranks together."""
    dist.barrier()
    dist.destroy_process_group()

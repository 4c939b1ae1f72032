"""Processes: who this rank is, the named mesh of all ranks, and sums over them."""

import ctypes
import math
import signal
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from avlm.config.parallel import ParallelConfig
from avlm.parallel.watch import Watch
from avlm.process.launch import local_ranks, raise_file_limit, ranks, started_by_torchrun

PR_SET_PDEATHSIG = 1  # linux/prctl.h: a signal for this process when its parent dies
MEDIA_RANKS = 64  # that share media with each other, at most: all of them exchange messages for each modality


@dataclass(frozen=True)
class World:
    """This process among all ranks, which lie in row-major order on the axes replicate x shard x context x tensor. The
    ranks that work on the same row of tokens (context x tensor) are one "row".

    shape         length of each axis, by its name
    context_mode  parallel.context_mode, which says how a row is cut
    decoder_mesh  replicate, shard_context, tensor: for the decoder's weights
    tower_mesh    replicate, shard_context_tensor: for the weights of towers, projectors and experts
    expert_mesh   replicate, shard_of_expert, expert: for the weights of experts that ranks share out, else None
    row_group     the ranks of a row, on the host; None if a row has one rank
    media_group   the ranks that share the encoding of media: those of a row or, balanced, of up to MEDIA_RANKS ranks;
                  None if they are one
    media_host_group  the same ranks, on the host. Rows are under way in it and in row_group while a step runs
    watch         ends a run in which a rank hangs
    """

    rank: int
    size: int
    device: torch.device
    shape: dict[str, int]
    context_mode: str
    decoder_mesh: DeviceMesh
    tower_mesh: DeviceMesh
    expert_mesh: DeviceMesh | None
    row_group: dist.ProcessGroup | None
    media_group: dist.ProcessGroup | None
    media_host_group: dist.ProcessGroup | None
    watch: Watch = field(default_factory=Watch)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def row_size(self) -> int:
        """How many ranks work on the same row."""
        return self.shape["context"] * self.shape["tensor"]

    @property
    def leads_row(self) -> bool:
        """Whether this rank loads the row for the others that work on it."""
        return self.rank % self.row_size == 0

    @property
    def data_rank(self) -> int:
        return self.rank // self.row_size

    @property
    def data_size(self) -> int:
        return self.size // self.row_size

    @property
    def shard_of_data(self) -> dict[str, int]:
        """Which of the data ranks this rank loads for."""
        return {"rank": self.data_rank, "world": self.data_size}

    @property
    def shares_rows(self) -> bool:
        """Whether anything of this rank's rows is on its way between ranks before a step."""
        return self.media_host_group is not None

    @property
    def counts_losses(self) -> bool:
        """One rank of a tensor axis counts its losses; the others hold the same ones."""
        return self.rank % self.shape["tensor"] == 0

    def axis(self, name: str) -> tuple[int, int]:
        """(own index, length) of an axis."""
        names = list(self.shape)
        ranks_per_index = math.prod(self.shape[after] for after in names[names.index(name) + 1 :])
        return self.rank // ranks_per_index % self.shape[name], self.shape[name]

    def new_group(self, axis: str, neighbours: int | None = None, across: bool = False) -> dist.ProcessGroup:
        """A communicator of its own for the ranks of an axis, for so many ``neighbours`` along it, or ``across`` these,
        for the ranks that have the same place among theirs. All ranks of the world call this together."""
        ranks = torch.arange(self.size).view(*self.shape.values())
        lines = ranks.movedim(list(self.shape).index(axis), -1).unflatten(-1, (-1, neighbours or self.shape[axis]))
        return _group((lines.mT if across else lines).flatten(0, -2))

    def sum(self, values: list[float]) -> list[float]:
        """Sum over all ranks, on the host: nothing waits for a device."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def sum_by_name(self, values: dict[str, float]) -> dict[str, float]:
        """Sum over all ranks, which pass the same names in the same order."""
        totals = self.sum(list(values.values()))
        return dict(zip(values, totals))

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """Plain data of every rank, on every rank, in rank order. ``group``: another group of all ranks."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=group)
        return values

    def group_of(self, size: int) -> dist.ProcessGroup:
        """A communicator of its own for so many ranks that follow each other. All ranks of the world call this
        together."""
        return _group(torch.arange(self.size).view(-1, size))

    def thread(self, name: str) -> ThreadPoolExecutor:
        """A thread that uses this rank's device. Any other begins with the first GPU, even for pinned memory."""
        initializer = torch.cuda.set_device if self.device.type == "cuda" else None
        return ThreadPoolExecutor(1, name, initializer, (self.device,) if initializer else ())

    def barrier(self) -> None:
        self.sum([0.0])


def sizes(parallel: ParallelConfig, world_size: int) -> tuple[int, int, int, int]:
    """(replicate, shard, context, tensor) for a world; raises ValueError when they do not multiply to it."""
    others = parallel.replicate * parallel.context * parallel.tensor
    shard = parallel.shard
    if shard == -1:
        if world_size % others:
            raise ValueError(
                f"parallel.replicate={parallel.replicate} x context={parallel.context} x tensor={parallel.tensor} does "
                f"not divide {world_size} ranks: start torchrun with another --nproc-per-node, or change parallel.*"
            )
        shard = max(world_size // others, 1)  # a world of 0 is refused below
    if others * shard != world_size:
        raise ValueError(
            f"parallel.replicate={parallel.replicate} x shard={shard} x context={parallel.context} x "
            f"tensor={parallel.tensor} does not make {world_size} ranks: start torchrun with another "
            "--nproc-per-node, or change parallel.* (shard=-1 takes all ranks that are left)"
        )
    return parallel.replicate, shard, parallel.context, parallel.tensor


def choose_device(kind: str) -> torch.device:
    """The device of this rank: auto, cpu or cuda. Raises ValueError when the machine does not have it."""
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    local_rank, local_size = local_ranks()
    count = torch.cuda.device_count()
    if local_size > count:
        raise ValueError(
            f"{local_size} ranks on this machine, but {count} GPUs: lower --nproc-per-node or set device=cpu"
        )
    return torch.device("cuda", local_rank)


def start(parallel: ParallelConfig, device: torch.device, run: Path | None = None) -> World:
    """Join the process group (gloo for host tensors, NCCL for a GPU's) and lay out the mesh. ``run``: the folder of a
    training run, which is watched from here on."""
    rank, size = ranks()
    shape = sizes(parallel, size)
    raise_file_limit()
    if started_by_torchrun():  # torchrun's workers outlive a launcher that was killed, unless told not to
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    seconds = parallel.timeouts.start
    store = store_of_this_start(rank, size, seconds) if size > 1 else dist.HashStore()
    # Without device_id: with it torch 2.11 splits NCCL's communicator for every new group, on the ranks that are no
    # members also for a group of gloo alone, whose members do not: they would wait for ever.
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    world = lay_out(shape, device, parallel.balance_media, parallel.context_mode, parallel.expert)
    if run is not None and size > 1:
        world.watch.begin(rank, size, store, parallel.timeouts, run)
    return world


def store_of_this_start(rank: int, size: int, seconds: float) -> dist.Store:
    """The launcher's store, under a prefix that only the ranks of this start know.

    torchrun keeps one store over its restarts (pytorch/pytorch#135712). After a restart a fast rank can read an address
    that a slow rank published before the restart, and hang for 30 minutes. So rank 0 picks a fresh prefix for this
    start and hands it out on request. Each request carries a nonce, so a request from the previous start is answered
    but not counted. Rank 0 stops when every rank has acknowledged the prefix. TimeoutError, which names the others, if
    that takes more than ``seconds``.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=seconds)))
    if rank > 0:
        nonce = uuid.uuid4().hex
        store.queue_push("avlm/to_first", f"request {nonce}")
        try:
            prefix = store.get(f"avlm/to_{nonce}").decode()
        except dist.DistStoreError:
            raise TimeoutError(f"rank 0 did not join within parallel.timeouts.start={seconds:g} s") from None
        store.queue_push("avlm/to_first", f"acknowledge {prefix} {rank}")
        return dist.PrefixStore(prefix, store)
    prefix = uuid.uuid4().hex
    waiting = set(range(1, size))
    while waiting:
        try:
            verb, word, *of_rank = store.queue_pop("avlm/to_first").decode().split()
        except dist.DistStoreError:
            missing = ", ".join(map(str, sorted(waiting)))
            raise TimeoutError(f"rank {missing} did not join within parallel.timeouts.start={seconds:g} s") from None
        if verb == "request":
            store.set(f"avlm/to_{word}", prefix)
        elif word == prefix:
            waiting -= set(map(int, of_rank))
    return dist.PrefixStore(prefix, store)


def lay_out(
    shape: tuple[int, int, int, int],
    device: torch.device,
    balance_media: bool = False,
    context_mode: str = "auto",
    expert: int = 1,
) -> World:
    """The meshes of a running process group: one order of ranks, seen as different axes.

    Communicators cost memory and sockets, so those of the two meshes are one where their ranks are the same. What may
    be under way at the same time has one of its own: rows, media, and keys and values (``new_group``).
    """
    replicate, shard, context, tensor = shape
    size = math.prod(shape)
    made: dict[tuple, dist.ProcessGroup] = {}

    def view(**axes: int) -> DeviceMesh:
        ranks = torch.arange(size).view(*axes.values())
        groups = []
        for dim in range(ranks.ndim):
            of_groups = ranks.movedim(dim, -1).flatten(0, -2)
            key = tuple(of_groups.flatten().tolist()), of_groups.shape
            if key not in made:
                made[key] = _group(of_groups)
            groups.append(made[key])
        return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=tuple(axes))

    row_size = context * tensor
    num_rows = rows_that_share(replicate * shard, row_size) if balance_media else 1
    rows, homes = torch.arange(size).view(-1, row_size), torch.arange(size).view(-1, num_rows * row_size)
    row_group = _group(rows, "gloo") if row_size > 1 else None
    media_group = _group(homes) if homes.shape[1] > 1 else None
    media_host_group = row_group if num_rows == 1 else _group(homes, "gloo")
    return World(
        rank=dist.get_rank(),
        size=size,
        device=device,
        shape=dict(zip(("replicate", "shard", "context", "tensor"), shape)),
        context_mode=context_mode,
        decoder_mesh=view(replicate=replicate, shard_context=shard * context, tensor=tensor),
        tower_mesh=view(replicate=replicate, shard_context_tensor=shard * row_size),
        expert_mesh=view(replicate=replicate, shard_of_expert=shard * row_size // expert, expert=expert)
        if expert > 1
        else None,
        row_group=row_group,
        media_group=media_group,
        media_host_group=media_host_group,
    )


def rows_that_share(num_rows: int, ranks_per_row: int) -> int:
    """How many rows share their media: as many as divide all rows evenly and have at most MEDIA_RANKS ranks."""
    return max(n for n in range(1, num_rows + 1) if num_rows % n == 0 and (n == 1 or n * ranks_per_row <= MEDIA_RANKS))


def _group(ranks: torch.Tensor, backend: str | None = None) -> dist.ProcessGroup:
    """A communicator for each line of ``ranks``, (groups, ranks): this rank's. All ranks of the world call this."""
    own, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), backend=backend)
    return own


def stop() -> None:
    """Leave the group, all ranks together."""
    dist.barrier()
    dist.destroy_process_group()

"""How the ranks of a run are laid out, from its config alone."""

import math
from dataclasses import dataclass

import torch

from avlm.config.run import Config, TrainConfig
from avlm.parallel import mesh
from avlm.parallel.apply import compute_dtype
from avlm.parallel.context_attention import mode_of
from avlm.parallel.experts import expert_mode, shard_dim
from avlm.parallel.tensor import tensor_share
from kernels import backend, dispatch


@dataclass(frozen=True)
class Layout:
    """Ranks on each axis, the dtype of compute, and the architecture of the device as ``kernels.dispatch`` counts."""

    replicate: int
    shard: int
    context: int
    tensor: int
    expert: int
    context_mode: str
    expert_mode: str
    dtype: torch.dtype
    architecture: int

    @property
    def on_gpu(self) -> bool:
        return self.architecture not in (dispatch.CPU, dispatch.INTERPRETER)

    @property
    def data_ranks(self) -> int:
        """Ranks, or groups of them that share a row, which read rows of their own."""
        return self.replicate * self.shard

    def rows_per_step(self, train: TrainConfig) -> int:
        return self.data_ranks * train.micro_batches(self.data_ranks)

    @property
    def row_ranks(self) -> int:
        """Ranks that share a row and its media."""
        return self.context * self.tensor

    def shards_of(self, name: str) -> int:
        """Ranks over which FSDP shards a parameter, or a module."""
        sharers = self.shard * self.context
        if ".experts." in name:
            return sharers * self.tensor // self.expert
        return sharers if name.startswith(("decoder", "cross")) else sharers * self.tensor

    def gathered(self, name: str) -> int:
        """Bytes per number of a gathered parameter, or module: the all-gather buffer and the unsharded copy."""
        copies = 2 if self.shards_of(name) > 1 else 1
        return copies * self.dtype.itemsize

    def share(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what a rank computes with."""
        return tensor_share(name, shape, self.tensor, self.expert)

    def largest_shard(self, name: str, shape: tuple[int, ...]) -> int:
        """Numbers that a rank holds, at most."""
        share = self.share(name, shape)
        ranks = self.shards_of(name)
        dim = shard_dim(share[0], share[1], ranks) if ".experts." in name else 0
        return math.ceil(share[dim] / ranks) * math.prod(share) // share[dim]


def layout_of(config: Config, world_size: int) -> Layout:
    """``device: auto`` counts as a GPU, as the machine that estimates is often not the one that trains: as this
    machine's, or as an A100 if it has none."""
    sizes = mesh.sizes(config.parallel, world_size)
    parallel = config.parallel
    mode, _ = mode_of(config.model.decoder, parallel.context_mode, parallel.context, parallel.tensor)
    device = torch.device("cpu" if config.device == "cpu" else "cuda")
    architecture = dispatch.AMPERE_AND_LATER.start
    if device.type == "cpu":
        architecture = backend.architecture(None)
    elif torch.cuda.is_available():
        architecture = backend.architecture(torch.cuda.current_device())
    experts = expert_mode(config.model.decoder, parallel)
    return Layout(*sizes, parallel.expert, mode, experts, compute_dtype(config.train.precision, device), architecture)

"""How the ranks of a run lie, as its config alone says."""

from dataclasses import dataclass

import torch

from avlm.config.run import Config
from avlm.parallel import mesh
from avlm.parallel.apply import compute_dtype
from avlm.parallel.context_attention import choose_mode


@dataclass(frozen=True)
class Layout:
    """How the ranks lie, and bytes of a number in compute."""

    replicate: int
    shard: int
    context: int
    tensor: int
    context_mode: str
    dtype: torch.dtype

    @property
    def row_ranks(self) -> int:
        """Ranks that share a row and its media."""
        return self.context * self.tensor

    def shards_of(self, part: str) -> int:
        return self.shard * self.context * (1 if part == "decoder" else self.tensor)

    def gathered(self, part: str) -> int:
        """Bytes for each number of a unit of this part of the model while it is gathered."""
        return self.dtype.itemsize * (2 if self.shards_of(part) > 1 else 1)


def layout_of(config: Config, world_size: int) -> Layout:
    """device=auto is taken for a GPU: the machine that estimates is often not the one that trains."""
    sizes = mesh.sizes(config.parallel, world_size)
    kv_heads = config.model.decoder.num_kv_heads // config.parallel.tensor
    mode = choose_mode(config.parallel.context_mode, kv_heads, config.parallel.context)
    device = torch.device("cpu" if config.device == "cpu" else "cuda")
    return Layout(*sizes, mode, compute_dtype(config, device))

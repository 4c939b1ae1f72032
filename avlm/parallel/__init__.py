"""What is distributed about the model; the model itself knows nothing of it."""

import torch

from avlm.config import Config
from avlm.data.packing import empty_batch
from avlm.models.avlm import AVLM
from avlm.parallel.fsdp import apply_fsdp
from avlm.parallel.mesh import World


def apply(model: AVLM, world: World, config: Config) -> None:
    """Shard a model on the meta device, then give it memory (not values) on the rank's device."""
    apply_fsdp(model, world.mesh, compute_dtype(config, world.device))
    model.to_empty(device=world.device)


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


@torch.no_grad()
def warm_up(model: AVLM, config: Config, world: World) -> None:
    """One forward over nothing while all parameters require a gradient.

    FSDP2 notes dtypes at a unit's first forward: one that is frozen then and trained later would fail in bf16.
    """
    model.requires_grad_(True)
    model(empty_batch(16, config.model).to(world.device))
    model.reshard()

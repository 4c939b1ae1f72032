"""FSDP2: which parts of the model are gathered together, and how gradients are summed."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from avlm.models.avlm import AVLM


def apply_fsdp(model: AVLM, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shard every decoder block and every tower as a unit; embedding, projectors, norm and head are the root's.

    Weights, gradients and their sums are float32; compute is in ``dtype``. A gradient is a plain sum over all ranks:
    the loss is divided by the global number of targets where it is made.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    sharded = mesh["shard"] if mesh["replicate"].size() == 1 else mesh
    for unit in (*model.decoder.blocks, model.vision, model.audio, model):
        if unit is not None:
            fully_shard(unit, mesh=sharded, mp_policy=policy)
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(
            True
        )  # gloo has no premultiplied sum, which a factor of 1 would ask for


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]

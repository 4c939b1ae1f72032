"""FSDP2: which parts of the model are gathered together, over which ranks, and how gradients are summed.

The decoder, with its layers of cross-attention, is sharded over shard x context. Towers, projectors and experts are
sharded over shard x context x tensor: each of those ranks encodes media of its own and holds tokens of its own, so
every gradient is a plain sum over all of them. Experts that ranks share out (``experts.py``) are sharded over the ranks
that hold the same ones.
"""

import functools
import itertools
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from avlm.config.parallel import ParallelConfig
from avlm.models.avlm import AVLM, trains
from avlm.models.moe import MixtureOfExperts
from avlm.parallel.experts import shard_of_experts
from avlm.parallel.mesh import World


def apply_fsdp(model: AVLM, world: World, config: ParallelConfig, dtype: torch.dtype) -> None:
    """Shard every block of the decoder and of cross-attention, the embedding, norm with head, every tower, resampler
    and projector as a unit of its own.

    Weights, gradients and their sums are float32; compute is in ``dtype``. The loss is divided by the global number of
    targets where it is made, so gradients are summed and never divided.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = OffloadPolicy()
    if config.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    shared = {"mp_policy": policy, "offload_policy": offload}
    decoder_mesh = _sharding(world.decoder_mesh, "shard_context")
    tower_mesh = _sharding(world.tower_mesh, "shard_context_tensor")
    kept: set[nn.Parameter] = set()  # whole on every rank
    for _, tower, projector in model.modalities:
        if config.tower_sharding == "replicate":
            tower.to(dtype)  # frozen, so float32 would gain nothing
            kept |= set(tower.parameters())
        else:
            if config.tower_sharding == "block":
                for block in tower.blocks:
                    fully_shard(block, mesh=tower_mesh, reshard_after_forward=config.reshard, **shared)
            fully_shard(tower, mesh=tower_mesh, reshard_after_forward=config.reshard, **shared)
        if projector.resampler is not None:
            fully_shard(projector.resampler, mesh=tower_mesh, reshard_after_forward=config.reshard, **shared)
        fully_shard(projector, mesh=tower_mesh, reshard_after_forward=False, **shared)
    if model.contrastive is not None:
        _shard_contrastive(model, config, {"mesh": tower_mesh, **shared})
    decoder = model.decoder
    expert_mesh = tower_mesh if world.expert_mesh is None else _sharding(world.expert_mesh, "shard_of_expert")
    for block in decoder.blocks:
        if isinstance(block.ffn, MixtureOfExperts):
            along = functools.partial(shard_of_experts, expert_mesh.size(-1))
            options = {"reshard_after_forward": config.reshard, "shard_placement_fn": along, **shared}
            fully_shard(block.ffn.experts, mesh=expert_mesh, **options)
        fully_shard(block, mesh=decoder_mesh, reshard_after_forward=config.reshard, **shared)
    for block in model.cross.blocks if model.cross is not None else ():
        fully_shard(block, mesh=decoder_mesh, reshard_after_forward=config.reshard, **shared)
    if not decoder.config.tie_embedding:  # as units of their own a tied embedding and head would stop being tied
        fully_shard(decoder.embedding, mesh=decoder_mesh, reshard_after_forward=config.reshard, **shared)
        fully_shard([decoder.norm, decoder.head], mesh=decoder_mesh, reshard_after_forward=False, **shared)
    fully_shard(model, mesh=decoder_mesh, ignored_params=kept, **shared)
    _gather_in_backward_what_is_needed(model)
    # The next block is gathered while one computes: forward, and from the last to the first in the backward.
    for before, after in itertools.pairwise(decoder.blocks):
        before.set_modules_to_forward_prefetch(fsdp_modules(after))
        after.set_modules_to_backward_prefetch(fsdp_modules(before))
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        # A factor alone would ask for a premultiplied sum, which gloo does not have.
        module.set_force_sum_reduction_for_comms(True)


def _shard_contrastive(model: AVLM, config: ParallelConfig, shared: dict[str, Any]) -> None:
    """The text tower, each head, and the scale and bias of logits, which compute in float32."""
    for unit in (*(model.text.blocks if config.tower_sharding == "block" else ()), model.text):
        fully_shard(unit, reshard_after_forward=config.reshard, **shared)
    for head in model.contrastive.heads:
        fully_shard(head, reshard_after_forward=False, **shared)
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(model.contrastive, reshard_after_forward=False, **shared | {"mp_policy": exact})


def _gather_in_backward_what_is_needed(model: AVLM) -> None:
    """Not the embedding, nor a tower that does not train: no gradient passes through them. FSDP2 would gather them as
    the units that were run before."""

    def note(units: list[FSDPModule], tower: nn.Module, inputs: tuple) -> None:
        is_needed = trains(tower)
        for unit in units:
            unit.set_unshard_in_backward(is_needed)

    towers = [tower for _, tower, _ in model.modalities]
    if model.text is not None:
        towers.append(model.text)
    for tower in towers:
        tower.register_forward_pre_hook(functools.partial(note, fsdp_modules(tower)))
    if not model.config.decoder.tie_embedding:
        model.decoder.embedding.set_unshard_in_backward(False)


def _sharding(mesh: DeviceMesh, axis: str) -> DeviceMesh:
    """Shards of one copy, or, with more copies than one, copies of shards (HSDP)."""
    return mesh[axis] if mesh["replicate"].size() == 1 else mesh["replicate", axis]


def reshard(model: nn.Module) -> None:
    """Back to shards after a forward without grad, which leaves some units of FSDP2 unsharded. Until they are
    resharded, ``model.parameters()`` are not the sharded parameters that the optimizer and the checkpoint hold. The
    order in which units ran is forgotten, or the next backward would gather by it."""
    for module in fsdp_modules(model):
        module.reshard()
        state = module._get_fsdp_state()
        state._comm_ctx.post_forward_order.clear()
        if state._fsdp_param_group is not None:  # the root holds no parameters but with a tied head
            state._fsdp_param_group._post_forward_indices.clear()


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]

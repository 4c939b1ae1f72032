"""Everything that is distributed about the model, which itself knows nothing of it."""

import torch

from avlm.config.model import ModelConfig
from avlm.config.run import Config
from avlm.models.avlm import AVLM
from avlm.models.batch import Batch, empty_batch
from avlm.models.lora import frozen_base
from avlm.parallel.context import cut
from avlm.parallel.context_attention import apply_context, choose_mode
from avlm.parallel.exchange import apply_media
from avlm.parallel.fsdp import apply_fsdp, reshard
from avlm.parallel.media import split
from avlm.parallel.mesh import World
from avlm.parallel.recompute import apply_compile, apply_recompute
from avlm.parallel.tensor import apply_tensor


def apply_parallel(model: AVLM, world: World, config: Config) -> None:
    """Lay out a model on the meta device, then give it memory (not values) on the rank's device."""
    layout = config.parallel
    if config.model.lora and config.model.lora.base == "bf16":
        hold_base_in_bf16(model)
    if layout.tensor > 1:
        apply_tensor(model.decoder, world.decoder_mesh["tensor"])
    if layout.context > 1:
        num_kv_heads = config.model.decoder.num_kv_heads // layout.tensor
        mode = choose_mode(layout.context_mode, num_kv_heads, layout.context)
        # Gradients of keys and values travel while the next keys and values do: each has a communicator of its own.
        apply_context(model, world.mesh.get_group("context"), world.new_group("context"), mode)
    apply_media(model)
    apply_recompute(model, config.train)
    if config.train.compile:
        apply_compile(model)
    apply_fsdp(model, world, layout, compute_dtype(config, world.device))
    model.to_empty(device="cpu" if layout.cpu_offload else world.device)
    if layout.tower_sharding == "replicate":
        for modality in model.modalities:
            modality.tower.to_empty(device=world.device)  # no unit of FSDP brings it there


def own_part(batch: Batch, config: Config, world: World) -> Batch:
    """This rank's part of a row that several ranks share: tokens, and media to encode. On the CPU."""
    batch, place_T = cut(batch, *world.axis("context"))
    part = split(batch, place_T, config.model, world, balance=config.parallel.balance_media)
    return part.pin_memory() if world.device.type == "cuda" else part  # the parts are new tensors


def prompt_part(batch: Batch, model: ModelConfig, world: World) -> Batch:
    """Packed prompts that the ranks of a tensor axis share. Context ranks have prompts of their own."""
    place_T = torch.arange(len(batch.token_T))
    return split(batch, place_T, model, world, group=world.mesh.get_group("tensor"))


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def hold_base_in_bf16(model: AVLM) -> None:
    """Cast the base weights of adapted modules to bf16; these then train adapters only. In place, to keep tied weights
    tied."""
    held = frozen_base(name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        if name in held:
            parameter.data = parameter.data.to(torch.bfloat16)


@torch.no_grad()
def warm_up(model: AVLM, config: Config, world: World) -> None:
    """One forward over an empty row while all parameters that may ever train require a gradient.

    FSDP2 notes dtypes at a unit's first forward: a unit that is frozen then and trained later would fail in bf16. It
    wants the parameters of a unit that train to have one dtype; a base that is held in bf16 never trains.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dtype == torch.float32)
    num_rows = 16 * config.parallel.context * config.parallel.tensor
    with torch.compiler.set_stance("force_eager"):  # a graph for no media and so few rows would be useless
        model(own_part(empty_batch(num_rows, config.model), config, world).to(world.device))
    reshard(model)

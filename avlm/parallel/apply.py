"""Everything that is distributed about the model, which itself knows nothing of it."""

import torch

from avlm.config.model import ModelConfig
from avlm.config.parallel import ParallelConfig
from avlm.config.run import TrainConfig
from avlm.models.avlm import AVLM
from avlm.models.batch import Batch, empty_batch, empty_pairs
from avlm.models.lora import frozen_base
from avlm.models.moe import clear_seen
from avlm.parallel.context import cut
from avlm.parallel.context_attention import apply_context, mode_of
from avlm.parallel.cross import apply_cross
from avlm.parallel.exchange import apply_media
from avlm.parallel.experts import apply_experts, expert_mode, sum_over_rows
from avlm.parallel.float8 import apply_float8
from avlm.parallel.fsdp import apply_fsdp, reshard
from avlm.parallel.media import Share, split
from avlm.parallel.mesh import World
from avlm.parallel.pairs import apply_pairs
from avlm.parallel.recompute import apply_recompute
from avlm.parallel.ring import connect
from avlm.parallel.tensor import apply_cross_tensor, apply_tensor


def apply_parallel(model: AVLM, world: World, parallel: ParallelConfig, train: TrainConfig) -> None:
    """Lay out a model on the meta device, then give it memory (not values) on the rank's device."""
    lora = model.config.lora
    if lora and lora.base == "bf16":
        hold_base_in_bf16(model)
    if train.float8:
        apply_float8(model.decoder, world.device)
    if parallel.tensor > 1:
        apply_tensor(model.decoder, world.decoder_mesh["tensor"])
        if model.cross is not None:
            apply_cross_tensor(model.cross, world.decoder_mesh["tensor"])
    if parallel.context > 1:
        mode, together = _context_mode(model.config, world)
        group = ring_groups = None
        if mode != "ring":
            group = world.new_group("context", together if together > 1 else None)
        if mode in ("ring", "ulysses_ring"):
            # Gradients of keys and values travel while the next keys and values do: each has a communicator of its own.
            ring_groups = tuple(world.new_group("context", together, across=True) for _ in range(2))
            for ring_group in ring_groups:
                connect(ring_group, world.device)
        apply_context(model, mode, group, ring_groups)
    decoder = model.config.decoder
    if world.expert_mesh is not None:
        group = world.group_of(parallel.expert)
        apply_experts(model, world.expert_mesh["expert"], group, expert_mode(decoder, parallel))
    if train.balance_loss and world.row_size > 1:
        sum_over_rows(model, world.group_of(world.row_size))
    apply_media(model)
    if model.cross is not None and world.row_size > 1:
        apply_cross(model, world.group_of(world.row_size))
    apply_pairs(model, world)
    apply_recompute(model, train)
    apply_fsdp(model, world, parallel, compute_dtype(train.precision, world.device))
    model.to_empty(device="cpu" if parallel.cpu_offload else world.device)
    clear_seen(model, world.device)
    if parallel.tower_sharding == "replicate":
        for modality in model.modalities:
            modality.tower.to_empty(device=world.device)  # outside all units of FSDP, so nothing else moves it there


def _context_mode(model: ModelConfig, world: World) -> tuple[str, int]:
    return mode_of(model.decoder, world.context_mode, world.shape["context"], world.shape["tensor"])


def own_part(batch: Batch, model: ModelConfig, world: World) -> Batch:
    """This rank's part of a row that several ranks share: tokens, and media to encode. On the CPU. All ranks that share
    media call this together."""
    _, together = _context_mode(model, world)
    part, place_T = cut(batch, *world.axis("context"), together)
    if world.media_group is not None:
        part = split(part, place_T, model, Share.of_rows(world, len(place_T)))
    if world.device.type == "cuda":
        return part.pin_memory()  # the loader pinned the whole row, but a part is made of new tensors
    return part


def prompt_part(batch: Batch, model: ModelConfig, world: World) -> Batch:
    """Packed prompts that the ranks of a tensor axis share. Context ranks have prompts of their own."""
    place_T = torch.arange(len(batch.token_T))
    return split(batch, place_T, model, Share.of_prompts(world.decoder_mesh.get_group("tensor"), len(place_T)))


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of compute for a ``train.precision``: auto is bf16 on GPUs and float32 on CPUs."""
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
def warm_up(model: AVLM, world: World) -> None:
    """One forward over an empty row while all parameters that may ever train require a gradient.

    FSDP2 notes dtypes at a unit's first forward: a unit that is frozen then and trained later would fail in bf16. It
    needs the trained parameters of a unit to have one dtype; a base that is held in bf16 never trains.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dtype == torch.float32)
    num_tokens = 16 * world.row_size
    row = own_part(empty_batch(num_tokens, model.config), model.config, world)
    with torch.compiler.set_stance("force_eager"):  # a graph for no media and so few tokens would be useless
        model(row.to(world.device))
        if model.contrastive is not None:
            model(empty_pairs(model.config, world.size).to(world.device))
    reshard(model)

"""AdamW over what a stage trains, its schedule, and gradient clipping."""

import math
import zlib
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from avlm.config.run import OptimizerConfig
from avlm.models.avlm import AVLM
from avlm.models.lora import is_adapter
from avlm.training.bf16_moments import BF16MomentsAdamW


def build(model: AVLM, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters, one group per module and kind of weight. ``schedule`` sets the rates.

    Its state is allocated here, because a checkpoint can only be loaded into state that exists.
    """
    groups = defaultdict(dict)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(("position", "class_token"))
            part = "lora" if is_adapter(name) and "lora" in config.lr_scale else name.split(".")[0]
            groups[part, decays][name] = parameter
    is_bf16 = config.moments == "bf16"
    Optimizer = BF16MomentsAdamW if is_bf16 else torch.optim.AdamW
    optimizer = Optimizer(
        [
            {
                "params": list(parameters.values()),
                "keys": [zlib.crc32(name.encode()) for name in parameters],
                "weight_decay": config.weight_decay * decays,
                "scale": config.lr_scale.get(part, 1.0),
            }
            for (part, decays), parameters in groups.items()
        ],
        lr=config.lr,
        betas=tuple(config.betas),
        eps=config.eps,
        fused=not is_bf16,  # one call for all tensors, not hundreds of DTensor calls a step
    )
    contrastive = model.config.contrastive
    if contrastive and contrastive.max_scale:
        optimizer.register_step_post_hook(lambda *_: limit_scale(model, contrastive.max_scale))
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, dtype=dtype),
                "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype),
            }
    return optimizer


@torch.no_grad()
def limit_scale(model: AVLM, most: float) -> None:
    """The scale of contrastive logits to ``most`` at most, as CLIP was trained (Radford et al. 2021, section 2.5)."""
    scale = model.contrastive.logit_scale
    own = scale.to_local() if isinstance(scale, DTensor) else scale
    own.clamp_(max=math.log(most))


def schedule(optimizer: torch.optim.AdamW, config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Set the learning rates for ``step`` (from 0) of a stage. Returns the rate before ``lr_scale``.

    Linear warmup, then a cosine from ``lr`` to ``min_lr`` that ends with the stage.
    """
    min_lr = config.lr / 10 if config.min_lr is None else config.min_lr
    warmup = min(warmup_steps(config, num_steps), num_steps)
    if step < warmup:
        lr = config.lr * (step + 1) / warmup
    else:
        progress = (step - warmup) / max(num_steps - warmup, 1)
        lr = min_lr + (config.lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    return lr


def warmup_steps(config: OptimizerConfig, num_steps: int) -> int:
    return min(150, num_steps // 10) if config.warmup_steps is None else config.warmup_steps


@torch.no_grad()
def clip_gradients(model: AVLM, max_norm: float | None) -> Tensor:
    """Scale all gradients to a global norm of at most ``max_norm`` (None: leave them). Returns the norm before, as a
    scalar on their device.

    Parameters may live on different meshes, so the squares are summed over all ranks once; those of a gradient that
    several ranks hold are first divided by the number of copies.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    shards = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    norms = defaultdict(list)  # by the number of copies, a Python int: a tensor of them would wait for the device
    for gradient, norm in zip(gradients, torch._foreach_norm(shards)):
        norms[_num_copies(gradient)].append(norm.float())
    squares = [torch.stack(same).square().sum() / copies for copies, same in norms.items()]
    total = torch.stack(squares).sum()
    if any(isinstance(g, DTensor) for g in gradients):
        dist.all_reduce(total)
    norm = total.sqrt()
    if max_norm is not None:
        torch._foreach_mul_(shards, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _num_copies(gradient: Tensor) -> int:
    if not isinstance(gradient, DTensor):
        return 1
    mesh = gradient.device_mesh
    return math.prod(mesh.size(i) for i, placement in enumerate(gradient.placements) if placement.is_replicate())

"""What transformer blocks keep for the backward, and torch.compile: both replace the forward of single blocks.

none        everything that autograd saves
selective   attention and every second matrix product; the rest, cheap or the other half, is computed again
full        the input of a block; with offload_activations it waits in host memory
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from avlm.config.model import LoraConfig
from avlm.config.run import Recompute, TrainConfig
from avlm.models.avlm import AVLM
from kernels.segments import Segments

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
ATTENTION = ("attention_forward", "_scaled_dot_product")  # name prefixes of our attention op and of PyTorch's


def keeps_product(number: int) -> bool:
    """Whether selective recomputation keeps the result of a block's product, counted from 0 in the order they run."""
    return number % 2 == 0


def apply_recompute(model: AVLM, config: TrainConfig) -> None:
    for name in ("decoder", *model.config.modalities.values()):
        mode: Recompute = getattr(config.recompute, name)
        if mode == "none":
            continue
        for block in getattr(model, name).blocks:
            block.forward = _recomputed(block.forward, mode, config.offload_activations, model.config.lora)


def apply_compile(model: AVLM) -> None:
    """Compile each block on its own: equal blocks share a graph, and weights are gathered between blocks, outside it.

    The decoder sees the same number of tokens in every step, so its graphs have static shapes, but for the number of
    documents; media vary, so towers have dynamic shapes. Generation is not compiled.
    """
    for block in model.decoder.blocks:
        block.forward = _compiled_unless_cached(block.forward)
    for modality in model.modalities:
        for block in modality.tower.blocks:
            block.forward = torch.compile(block.forward)


def _compiled_unless_cached(forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(forward, dynamic=False)

    def run(x_TD: Tensor, rope: tuple[Tensor, Tensor], segments: Any, cache: Any = None) -> Tensor:
        if cache is not None:
            return forward(x_TD, rope, segments, cache)
        if isinstance(segments, Segments):  # else a ContextPlan, which no graph reads
            torch._dynamo.maybe_mark_dynamic(segments.cu_seqlens, 0)  # one graph for any number of documents
        return compiled(x_TD, rope, segments, None)

    return functools.wraps(forward)(run)


def _recomputed(
    forward: Callable[..., Any], mode: Recompute, offload: bool, lora: LoraConfig | None
) -> Callable[..., Any]:
    is_random = lora is not None and lora.dropout > 0  # there is no other dropout in a block
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": is_random}
    if mode == "selective":
        rank = lora.rank if lora else 0
        options["context_fn"] = lambda: create_selective_checkpoint_contexts(_every_second_product(rank))

    def recomputed(*inputs: Any) -> Any:
        kept = contextlib.nullcontext()
        if offload:
            kept = torch.autograd.graph.save_on_cpu(pin_memory=inputs[0].is_cuda)
        with kept:
            return checkpoint(forward, *inputs, **options)

    return functools.wraps(forward)(recomputed)


def _every_second_product(rank: int) -> Callable[..., CheckpointPolicy]:
    """Products of adapters, which have a side of ``rank`` or less, are cheap and not counted."""
    counts: Counter[bool] = Counter()  # apart for the forward and its recomputation, so that both decide alike

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if getattr(op, "__name__", "").startswith(ATTENTION):
            return CheckpointPolicy.MUST_SAVE
        if op in PRODUCTS and min(args[-1].shape) > rank:
            number = counts[context.is_recompute]
            counts[context.is_recompute] += 1
            if keeps_product(number):
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy

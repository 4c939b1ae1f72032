"""What transformer blocks keep for the backward, and torch.compile: both replace the forward of single blocks.

none        everything that autograd saves
selective   attention, every second matrix product but the last and, over the tensor axis, the sum behind attention; the
            rest, cheap or the other half, is computed again
full        the input of a block; with offload_activations it waits in host memory
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from avlm.config.model import LoraConfig
from avlm.config.run import Recompute, TrainConfig
from avlm.models.attention import AttentionCore
from avlm.models.avlm import AVLM
from avlm.models.costs import block_products
from avlm.models.rope import Rope
from avlm.parallel.experts import shares_experts
from avlm.parallel.ring import RingAttention
from kernels import grouped
from kernels.segments import Segments

# Products of two matrices, and which of their inputs is the second one.
PRODUCTS = {
    torch.ops.aten.mm.default: 1,
    torch.ops.aten.addmm.default: 2,
    torch.ops.aten._scaled_mm.default: 1,
    grouped.PRODUCT: 1,
}
SUM = torch.ops._c10d_functional.reduce_scatter_tensor.default  # of products that the ranks of the tensor axis share
# Graphs of one block's code, which both towers share: with and without gradients, for each set of modules that a stage
# trains. Past torch's own limit of 8 a block would run uncompiled for the rest of the run.
GRAPHS = 64
ATTENTION = ("attention_forward", "_scaled_dot_product")  # name prefixes of our attention op and of PyTorch's


def keeps_product(number: int, num_products: int) -> bool:
    """Whether selective recomputation keeps the result of one of a block's products, counted from 0 in the order they
    run. That of the last is added to the residual: no backward needs it, and recomputation ends before it, but for
    DoRA, layer scales and a norm behind it, which make it again."""
    return number % 2 == 0 and number < num_products - 1


def apply_recompute(model: AVLM, config: TrainConfig) -> None:
    """Replace the forward of each block by one that recomputes and, with ``config.compile``, is compiled.

    Each block is compiled on its own: equal blocks share a graph, and weights are gathered between blocks, outside it.
    ``full`` goes around the graph. ``selective`` has to be part of it, which attention over context and experts that
    ranks share out are not: such a block runs uncompiled. So do layers of cross-attention, whose mode is the decoder's.
    """
    if config.compile:
        torch._dynamo.config.recompile_limit = GRAPHS
    for name in ("decoder", *model.config.modalities.values(), *(["text"] if model.config.text else [])):
        mode: Recompute = getattr(config.recompute, name)
        compiled = _compiled_decoder_block if name == "decoder" else _compiled_tower_block
        for i, block in enumerate(getattr(model, name).blocks):
            in_one_graph = isinstance(block.attention.core, AttentionCore) and not shares_experts(block)
            if config.compile and mode != "selective":
                block.forward = compiled(block.forward)
            if mode != "none":
                ring = next((module for module in block.modules() if isinstance(module, RingAttention)), None)
                num_products = len(block_products(f"{name}.blocks.{i}", model.config))
                block.forward = _recomputed(
                    block.forward, mode, config.offload_activations, model.config.lora, ring, num_products
                )
            if config.compile and mode == "selective" and in_one_graph:
                block.forward = compiled(block.forward)

    for i, block in enumerate(model.cross.blocks if model.cross is not None else ()):
        mode = config.recompute.decoder
        if mode != "none":
            num_products = len(block_products(f"cross.blocks.{i}", model.config))
            options = config.offload_activations, model.config.lora, None, num_products
            block.forward = _recomputed(block.forward, mode, *options)


def _compiled_decoder_block(forward: Callable[..., Any]) -> Callable[..., Any]:
    """One graph for any number of documents; the number of tokens is that of every row. Generation is not compiled."""
    compiled = torch.compile(forward)

    def run(x_TD: Tensor, rope: Rope, segments: Any, cache: Any = None, real_T: Tensor | None = None) -> Tensor:
        if cache is not None:
            return forward(x_TD, rope, segments, cache, real_T)
        if isinstance(segments, Segments):  # else a ContextPlan, which no graph reads
            torch._dynamo.maybe_mark_dynamic(segments.cu_seqlens, 0)
        return compiled(x_TD, rope, segments, None, real_T)

    return functools.wraps(forward)(run)


def _compiled_tower_block(forward: Callable[..., Any]) -> Callable[..., Any]:
    """One graph for any number of items and rows, except none: to the compiler, a size of 0 is another graph."""
    compiled = torch.compile(forward)

    def run(x_TD: Tensor, segments: Segments, rope: tuple[Tensor, Tensor] | Tensor | None = None) -> Tensor:
        if len(x_TD) == 0:
            return forward(x_TD, segments, rope)
        positions = (rope,) if isinstance(rope, Tensor) else rope or ()
        for changes in (x_TD, segments.cu_seqlens, *positions):
            torch._dynamo.maybe_mark_dynamic(changes, 0)
        return compiled(x_TD, segments, rope)

    return functools.wraps(forward)(run)


def _recomputed(
    forward: Callable[..., Any],
    mode: Recompute,
    offload: bool,
    lora: LoraConfig | None,
    ring: RingAttention | None,
    num_products: int,
) -> Callable[..., Any]:
    is_random = lora is not None and lora.dropout > 0  # there is no other dropout in a block
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": is_random}
    if mode == "selective":
        rank = lora.rank if lora else 0
        options["context_fn"] = lambda: _keeping(rank, ring, num_products)

    def recomputed(*inputs: Any) -> Any:
        kept = contextlib.nullcontext()
        if offload:
            kept = torch.autograd.graph.save_on_cpu(pin_memory=inputs[0].is_cuda)
        with kept:
            return checkpoint(forward, *inputs, **options)

    return functools.wraps(forward)(recomputed)


def _keeping(rank: int, ring: RingAttention | None, num_products: int) -> tuple[Any, ...]:
    """Contexts of a forward and of its recomputation. torch keeps results of ops; a ring is none, as an op takes no
    plan, and keeps its own."""
    contexts = create_selective_checkpoint_contexts(_choose(rank, num_products))
    if ring is None:
        return contexts
    kept: list[tuple[Tensor, Tensor]] = []
    return tuple(_with_ring(context, ring, kept) for context in contexts)


@contextlib.contextmanager
def _with_ring(context: Any, ring: RingAttention, kept: list[tuple[Tensor, Tensor]]) -> Generator[None]:
    with context, ring.keeping(kept):
        yield


def _choose(rank: int, num_products: int) -> Callable[..., CheckpointPolicy]:
    """Products of adapters, which have a side of ``rank`` or less, are cheap and not counted. Of the two sums of a
    block over the tensor axis the second is its result, which no backward needs but that of a norm behind it."""
    counts: Counter[tuple[Any, bool]] = Counter()  # apart for the forward and its recomputation: both decide alike

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if getattr(op, "__name__", "").startswith(ATTENTION):
            return CheckpointPolicy.MUST_SAVE
        if op == SUM:
            counts[op, context.is_recompute] += 1
            if counts[op, context.is_recompute] == 1:
                return CheckpointPolicy.MUST_SAVE
        if op in PRODUCTS and min(args[PRODUCTS[op]].shape[-2:]) > rank:
            number = counts["product", context.is_recompute]
            counts["product", context.is_recompute] += 1
            if keeps_product(number, num_products):
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy

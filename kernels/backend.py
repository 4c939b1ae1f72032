"""The one place that decides between Triton and plain PyTorch.

Triton reads its environment variables when it is imported, and so do we, here: through ``triton.knobs``."""

from collections.abc import Callable
from functools import cache

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on CPU tensors, slowly
DEBUG = triton.knobs.runtime.debug  # TRITON_DEBUG=1: indices are checked, which waits for the device

MIN_SHARED_MEMORY = 160 * 1024  # bytes that the tiles of one program need: A100, H100, B200, but not smaller cards
MAX_HEAD_DIM = 256  # of attention and decoding

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E)
LN_2 = 0.6931471805599453


def runs_triton(x: Tensor) -> bool:
    """True for float16, bfloat16 and float32 on a large CUDA device, and on the CPU in Triton's interpreter.

    float64 always runs in PyTorch. So does bfloat16 in the interpreter, whose bfloat16 products are wrong (Triton 3.6).
    """
    if INTERPRETED:
        return x.dtype in (torch.float16, torch.float32)
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16, torch.float32) and _is_large(x.device.index)


def needs_graph(*tensors: Tensor) -> bool:
    """Whether autograd records a function of these tensors. If not, call the op and not its autograd.Function:
    torch.compile (2.11) cannot trace a Function whose forward takes no ctx when no input needs a gradient."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


@torch.compiler.assume_constant_result
@cache
def _is_large(device: int) -> bool:
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin >= MIN_SHARED_MEMORY  # pyrefly: ignore[missing-attribute]


def define_op(implementation: Callable, fake: Callable, mutates: tuple[str, ...] = ()) -> Callable:
    """Register ``name_op``, a function of tensors and numbers, as the op ``avlm::name``, which is opaque to
    torch.compile, torch.func and checkpointing. ``fake`` returns empty results of the right shapes and dtypes. Results
    must be new and contiguous; ``mutates`` names the arguments that are written to.

    The op has no derivative; wrap it in an autograd.Function. (torch.library.custom_op of torch 2.11 adds an autograd
    layer of its own, which torch.func refuses.)
    """
    name = implementation.__name__.removesuffix("_op")

    def on_its_device(first: Tensor, *arguments):
        with torch.cuda.device_of(first):
            return implementation(first, *arguments)

    torch.library.define(f"avlm::{name}", torch.library.infer_schema(implementation, mutates_args=mutates))
    torch.library.impl(f"avlm::{name}", ("CPU", "CUDA"), on_its_device)
    torch.library.register_fake(f"avlm::{name}", fake)
    return getattr(torch.ops.avlm, name).default

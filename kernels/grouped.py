"""A linear for each group of rows: y_a = x_a @ weight_n.T for the rows a of group n.

It is torch's own grouped product, which reads the ends of the groups where they are (``waits_for_device``). It is an op
of ours because that of torch 2.11 cannot be compiled in float32, and so that recomputation can tell it from others.
Rows behind the last group are not computed: what stands there may be anything, in the output and in the gradient of x.

A rows   N groups   I inputs   O outputs
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import backend


def grouped_product_op(x_AI: Tensor, weight_NOI: Tensor, end_N: Tensor, transposed: bool) -> Tensor:
    """``transposed``: x_a @ weight_n, of x (A, O)."""
    return F.grouped_mm(x_AI, weight_NOI if transposed else weight_NOI.mT, offs=end_N)


def _fake_product(x_AI, weight_NOI, end_N, transposed):
    return x_AI.new_empty(x_AI.shape[0], weight_NOI.shape[2 if transposed else 1])


def grouped_outer_op(dy_AO: Tensor, x_AI: Tensor, end_N: Tensor) -> Tensor:
    """The sum of dy_a x_a over the rows of each group, (N, O, I)."""
    return F.grouped_mm(dy_AO.mT, x_AI, offs=end_N)


def _fake_outer(dy_AO, x_AI, end_N):
    return x_AI.new_empty(end_N.shape[0], dy_AO.shape[1], x_AI.shape[1])


PRODUCT = backend.define_op(grouped_product_op, _fake_product)
_outer = backend.define_op(grouped_outer_op, _fake_outer)


def grouped_linear(x_AI: Tensor, weight_NOI: Tensor, end_N: Tensor) -> Tensor:
    """y_AO. ``end_N``: int32, ascending, where the rows of each group end; a group may be empty. float32, bf16 or
    float16; on a GPU rows of x and weight must be multiples of 16 bytes."""
    return backend.apply(_GroupedLinear, x_AI, weight_NOI, end_N)


def grouped_linear_reference(x_AI: Tensor, weight_NOI: Tensor, end_N: Tensor) -> Tensor:
    """The rows of all groups, one group after the other."""
    ends = [0, *end_N.tolist()]
    return torch.cat([x_AI[start:end] @ weight_NOI[n].T for n, (start, end) in enumerate(itertools.pairwise(ends))])


def waits_for_device(x: Tensor) -> bool:
    """Whether torch reads the ends of groups on the host, and computes one group after the other: everywhere but in
    bf16 on Hopper and on Blackwell of data centres (torch 2.11, GroupedMMUtils.h)."""
    return not (x.is_cuda and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device)[0] in (9, 10))


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(x_AI, weight_NOI, end_N):
        return PRODUCT(x_AI, weight_NOI, end_N, False)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x_AI, weight_NOI, end_N = inputs
        needs_dx, needs_dweight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x_AI if needs_dweight else None, weight_NOI if needs_dx else None, end_N)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_AO):
        x_AI, weight_NOI, end_N = ctx.saved_tensors
        dy_AO = dy_AO.contiguous()
        dx_AI = PRODUCT(dy_AO, weight_NOI, end_N, True) if ctx.needs_input_grad[0] else None
        dweight_NOI = _outer(dy_AO, x_AI, end_N) if ctx.needs_input_grad[1] else None
        return dx_AI, dweight_NOI, None

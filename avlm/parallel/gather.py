"""Rows of all ranks of a group, which have as many each, and sums of them: collectives with a gradient."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def gathered(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks of a group, which have as many, rank after rank."""
    of_all = own.new_empty(own.shape[0] * group.size(), *own.shape[1:])
    dist.all_gather_into_tensor(of_all, own.contiguous(), group=group)
    return of_all


def scattered(of_all: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sums over the ranks of a group of this rank's share of the rows."""
    own = of_all.new_empty(of_all.shape[0] // group.size(), *of_all.shape[1:])
    dist.reduce_scatter_tensor(own, of_all.contiguous(), group=group)
    return own


class Gather(torch.autograd.Function):
    """The rows of all ranks of a group, rank after rank; the gradients of this rank's rows, summed over all."""

    @staticmethod
    def forward(ctx, own, group):
        ctx.group = group
        return gathered(own, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, dof_all):
        return scattered(dof_all, ctx.group), None


class Scatter(torch.autograd.Function):
    """The transpose of ``Gather``: the sums over all ranks of this rank's rows."""

    @staticmethod
    def forward(ctx, x_G, group):
        ctx.group = group
        return scattered(x_G, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_T):
        return gathered(dx_T, ctx.group), None

"""Ring attention (Liu et al., 2310.01889): queries of this rank's tokens against keys that arrive, one block at a time,
from the ranks that hold other parts of the same documents.

Ring and block are those of the plan (``ContextPlan.ring``): each document that is cut has a ring of its own, and what
nobody else sees does not travel. Keys and values come from the rank that holds them, while the block before is used;
memory is O(L). The gradients of a block go back to that rank while the next block is computed.

L tokens of this rank   M of them in documents that other ranks hold parts of   S keys that arrive
H query heads   K key/value heads   E head dim   2 keys and values
"""

import contextlib
from collections.abc import Generator, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from avlm.parallel.context_plan import ContextPlan, Message, RingStep
from kernels.attention_block import block_backward, block_forward, statistics


def connect(group: ProcessGroup, device: torch.device) -> None:
    """All ranks of the group together, once: NCCL sets up a communicator with all of its ranks, while many a step of a
    ring is for a few of them."""
    dist.all_reduce(torch.zeros(1, device=device), group=group)


class RingAttention(nn.Module):
    """``gradient_group`` has the ranks of ``group`` and a communicator of its own, so that gradients of keys and values
    need not wait for keys and values that are under way. Both are connected.

    ``kept``: while it is a list, out and lse of a first forward are kept there, and a second one takes them instead of
    sending and computing again (recompute.py). ``scale``: of the scores, None: 1 / sqrt(E).
    """

    def __init__(self, group: ProcessGroup, gradient_group: ProcessGroup, scale: float | None = None):
        super().__init__()
        self.scale = scale
        self.group = group
        self.gradient_group = gradient_group
        self.kept: list[tuple[Tensor, Tensor]] | None = None

    @contextlib.contextmanager
    def keeping(self, kept: list[tuple[Tensor, Tensor]]) -> Generator[None]:
        self.kept = kept
        try:
            yield
        finally:
            self.kept = None

    @torch.compiler.disable
    def forward(self, q_LHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, segments: ContextPlan) -> Tensor:
        assert isinstance(segments, ContextPlan), "choose_mode refuses a ring with masks that are not causal"
        scale = q_LHE.shape[2] ** -0.5 if self.scale is None else self.scale
        return _Ring.apply(q_LHE, k_LKE, v_LKE, segments, self.group, self.gradient_group, self.kept, scale)


class _Ring(torch.autograd.Function):
    """Blocks are added up in float32 and rounded once. Kept for the backward: this rank's q, k and v, out and lse."""

    @staticmethod
    def forward(ctx, q_LHE, k_LKE, v_LKE, plan, group, gradient_group, kept, scale):
        ctx.plan = plan
        ctx.group = group
        ctx.gradient_group = gradient_group
        ctx.scale = scale
        if kept:
            out_LHE, lse_HL = kept[0]
        else:
            out_LHE, lse_HL = _attend(q_LHE, k_LKE, v_LKE, plan, group, ctx.scale)
        if kept == []:
            kept.append((out_LHE, lse_HL))
        out_LHE = out_LHE.detach()  # what is kept must not hold the graph of the result
        ctx.save_for_backward(q_LHE, k_LKE, v_LKE, out_LHE, lse_HL)
        return out_LHE

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_LHE):
        q_LHE, k_LKE, v_LKE, out_LHE, lse_HL = ctx.saved_tensors
        dout_LHE = dout_LHE.contiguous()
        of_softmax = statistics(out_LHE, dout_LHE, lse_HL)
        num_rows = len(q_LHE)  # that the statistics are of
        blocks = _circulate(k_LKE, v_LKE, ctx.plan, ctx.group)
        own = ctx.plan.own
        _, block = next(blocks)
        dq_LHE, dk, dv = block_backward(dout_LHE, q_LHE, *block, *of_softmax, own, own, causal=True, scale=ctx.scale)
        dkv_L2KE = torch.stack((dk, dv), 1)
        del dk, dv
        on_its_way = None
        for step, block in blocks:
            n = step.num_queries
            if n < num_rows:
                num_rows = n
                of_softmax = statistics(out_LHE[:n], dout_LHE[:n], lse_HL[:, :n])
            queries = dout_LHE[:n], q_LHE[:n]
            dq, dk, dv = block_backward(
                *queries, *block, *of_softmax, step.queries, step.keys, causal=False, scale=ctx.scale
            )
            dq_LHE[:n] += dq
            _add(dkv_L2KE, on_its_way)
            on_its_way = _send_home(torch.stack((dk, dv), 1), step, ctx.gradient_group)
            del dq, dk, dv  # before those of the next block are made
        _add(dkv_L2KE, on_its_way)
        dk_LKE, dv_LKE = dkv_L2KE.to(k_LKE.dtype).unbind(1)
        return dq_LHE.to(q_LHE.dtype), dk_LKE, dv_LKE, None, None, None, None, None


def _attend(
    q_LHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, plan: ContextPlan, group: ProcessGroup, scale: float
) -> tuple[Tensor, Tensor]:
    """out_LHE in the dtype of q, and lse_HL."""
    blocks = _circulate(k_LKE, v_LKE, plan, group)
    _, block = next(blocks)
    out_LHE, lse_HL = block_forward(q_LHE, *block, plan.own, plan.own, causal=True, scale=scale)
    for step, block in blocks:
        n = step.num_queries
        earlier = out_LHE[:n], lse_HL[:, :n]
        merged = block_forward(q_LHE[:n], *block, step.queries, step.keys, causal=False, scale=scale, earlier=earlier)
        if n == len(q_LHE):
            out_LHE, lse_HL = merged
        else:
            out_LHE[:n], lse_HL[:, :n] = merged
    return out_LHE.to(q_LHE.dtype), lse_HL


def _circulate(
    k_LKE: Tensor, v_LKE: Tensor, plan: ContextPlan, group: ProcessGroup
) -> Iterator[tuple[RingStep | None, tuple[Tensor, Tensor]]]:
    """(step, keys and values): None and the own block, then each step with what arrives in it. While the caller
    computes with one, the next is under way."""
    num_shared = plan.num_shared
    kv_M2KE = torch.stack((k_LKE[:num_shared], v_LKE[:num_shared]), 1)
    step, block = None, (k_LKE, v_LKE)
    for following in plan.ring:
        arriving_S2KE = kv_M2KE.new_empty(following.num_keys, *kv_M2KE.shape[1:])
        works = _exchange(kv_M2KE, following.sends, arriving_S2KE, following.receives, group)
        yield step, block
        _wait(works)
        k_SKE, v_SKE = arriving_S2KE.unbind(1)
        step, block = following, (k_SKE, v_SKE)
    yield step, block


def _send_home(dkv_S2KE: Tensor, step: RingStep, group: ProcessGroup) -> tuple:
    """Start to send the gradients of a block to the ranks that hold it, and to receive those of the rows that were sent
    in this step; for ``_add``."""
    returns = step.returns
    num_rows = returns[-1][2] if returns else 0
    returned_2KE = dkv_S2KE.new_empty(num_rows, *dkv_S2KE.shape[1:])
    works = _exchange(dkv_S2KE, step.receives, returned_2KE, returns, group)
    return works, step, returned_2KE, dkv_S2KE  # the last is kept until it has arrived


def _add(dkv_L2KE: Tensor, on_its_way: tuple | None) -> None:
    """Wait for gradients of own rows, and add them."""
    if on_its_way is None:
        return
    works, step, returned_2KE, _ = on_its_way
    _wait(works)
    for (_, first, last), (_, start, end) in zip(step.sends, step.returns):
        dkv_L2KE[first:last] += returned_2KE[start:end]


def _exchange(
    rows: Tensor, sends: tuple[Message, ...], arriving: Tensor, receives: tuple[Message, ...], group: ProcessGroup
) -> list[dist.Work]:
    """Start to send and to receive rows; between two ranks in the order of the documents, on both sides."""
    operations = []
    for rank, first, last in sends:
        operations.append(dist.P2POp(dist.isend, rows[first:last], group=group, group_peer=rank))
    for rank, first, last in receives:
        operations.append(dist.P2POp(dist.irecv, arriving[first:last], group=group, group_peer=rank))
    return dist.batch_isend_irecv(operations) if operations else []


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()

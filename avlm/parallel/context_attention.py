"""Context parallelism, the attention: queries of this rank's rows against the keys of all ranks that share the row.

ring       keys and values travel from rank to rank, each while the ones before are computed with; memory O(T / C)
allgather  keys and values of all ranks are gathered: fewer, larger kernels and messages, memory O(T) of K heads
ulysses    rows are exchanged for heads: each rank computes whole documents for H / C heads; needs C to divide K

Rows lie as ``context.cut`` says and ``segments`` is its ContextPlan. All three are causal, as the decoder is.

T tokens of the row   C ranks   L = T / C rows of a rank   H query heads   K key/value heads   E head dim
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from avlm.models.avlm import AVLM
from avlm.parallel.context import ContextPlan
from kernels.attention import attention
from kernels.attention_block import block_backward, block_forward, statistics


class RingAttention(nn.Module):
    """Ring attention (Liu et al., 2310.01889). ``gradient_group`` has the ranks of ``group`` and a communicator of its
    own, so that gradients of keys and values do not queue behind keys and values."""

    def __init__(self, group: ProcessGroup, gradient_group: ProcessGroup):
        super().__init__()
        self.group, self.gradient_group = group, gradient_group

    @torch.compiler.disable
    def forward(self, q_LHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, segments: ContextPlan) -> Tensor:
        return _Ring.apply(q_LHE, k_LKE, v_LKE, segments, self.group, self.gradient_group)


class _Ring(torch.autograd.Function):
    """Blocks are added up in float32 and rounded once. The backward keeps what this rank was given, out and lse."""

    @staticmethod
    def forward(ctx, q_LHE, k_LKE, v_LKE, plan, group, gradient_group):
        kv_2LKE, so_far = torch.stack((k_LKE, v_LKE)), None
        for step, block_2LKE in _circulate(kv_2LKE, group):
            options = dict(causal=step == 0, scale=q_LHE.shape[2] ** -0.5, earlier=so_far)
            so_far = block_forward(q_LHE, *block_2LKE, *plan.ring[step], **options)
        out_LHE, lse_HL = so_far[0].to(q_LHE.dtype), so_far[1]
        ctx.save_for_backward(q_LHE, kv_2LKE, out_LHE, lse_HL)
        ctx.plan, ctx.group, ctx.gradient_group = plan, group, gradient_group
        return out_LHE

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_LHE):
        q_LHE, kv_2LKE, out_LHE, lse_HL = ctx.saved_tensors
        dout_LHE = dout_LHE.contiguous()
        of_softmax = statistics(out_LHE, dout_LHE, lse_HL)
        dq_LHE = torch.zeros_like(q_LHE, dtype=lse_HL.dtype)
        dkv_2LKE = torch.zeros_like(kv_2LKE, dtype=lse_HL.dtype)
        works = []
        # The gradient of a block travels with it, one step behind, and after the last step home to the block's rank.
        for step, block_2LKE in _circulate(kv_2LKE, ctx.group):
            options = dict(causal=step == 0, scale=q_LHE.shape[2] ** -0.5)
            dq, dk, dv = block_backward(dout_LHE, q_LHE, *block_2LKE, *of_softmax, *ctx.plan.ring[step], **options)
            _wait(works)
            for total, share in ((dq_LHE, dq), (dkv_2LKE[0], dk), (dkv_2LKE[1], dv)):
                total += share
            del dq, dk, dv, share  # before those of the next block are made
            sent_2LKE = dkv_2LKE  # kept until it has arrived
            dkv_2LKE, works = _pass_on(sent_2LKE, ctx.gradient_group)
        _wait(works)
        return dq_LHE.to(q_LHE.dtype), *dkv_2LKE.to(kv_2LKE.dtype), None, None, None


def _circulate(block: Tensor, group: ProcessGroup) -> Iterator[tuple[int, Tensor]]:
    """(step, block): the own block, then those of the ranks before, one at a time. While the caller computes with one,
    the next is under way."""
    for step in range(group.size()):
        last = step == group.size() - 1
        arriving, works = (None, []) if last else _pass_on(block, group)
        yield step, block
        _wait(works)
        block = arriving


def _pass_on(block: Tensor, group: ProcessGroup) -> tuple[Tensor, list[dist.Work]]:
    """Start to send a block to the next rank; what the rank before sends is complete when the works are."""
    arriving, rank, size = torch.empty_like(block), group.rank(), group.size()
    send = dist.P2POp(dist.isend, block, group=group, group_peer=(rank + 1) % size)
    receive = dist.P2POp(dist.irecv, arriving, group=group, group_peer=(rank - 1) % size)
    return arriving, dist.batch_isend_irecv([send, receive])


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


class AllGatherAttention(nn.Module):
    """Local queries against all keys, which are brought into the order of documents. The early and the late part of a
    document see different keys of it, so they take two calls; each gives 0 to the other's queries."""

    def __init__(self, group: ProcessGroup):
        super().__init__()
        self.group = group

    @torch.compiler.disable
    def forward(self, q_LHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, segments: ContextPlan) -> Tensor:
        kv_T2KE = _GatherRows.apply(torch.stack((k_LKE, v_LKE), 1), segments, self.group)
        k_TKE, v_TKE = kv_T2KE.unbind(1)
        q_segments = segments.queries
        early_LHE = attention(q_LHE, k_TKE, v_TKE, q_segments, segments_k=segments.early, causal=True)
        late_LHE = attention(q_LHE, k_TKE, v_TKE, q_segments, segments_k=segments.late, causal=True)
        return early_LHE + late_LHE


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks, in the order of the whole row. Backward: the sum over ranks, in float32, of the gradients of
    the own rows."""

    @staticmethod
    def forward(ctx, x_L2KE, plan, group):
        ctx.plan, ctx.group = plan, group
        gathered = x_L2KE.new_empty(x_L2KE.shape[0] * group.size(), *x_L2KE.shape[1:])
        dist.all_gather_into_tensor(gathered, x_L2KE.contiguous(), group=group)
        return gathered[plan.place_T]

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_T2KE):
        of_ranks = dx_T2KE[ctx.plan.rows_T].to(torch.promote_types(dx_T2KE.dtype, torch.float32))
        summed = of_ranks.new_empty(of_ranks.shape[0] // ctx.group.size(), *of_ranks.shape[1:])
        dist.reduce_scatter_tensor(summed, of_ranks, group=ctx.group)
        return summed.to(dx_T2KE.dtype), None, None


class UlyssesAttention(nn.Module):
    """DeepSpeed-Ulysses (Jacobs et al., 2309.14509): all rows of H / C heads in place of L rows of all heads, plain
    attention over whole documents, and back."""

    def __init__(self, group: ProcessGroup):
        super().__init__()
        self.group = group

    @torch.compiler.disable
    def forward(self, q_LHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, segments: ContextPlan) -> Tensor:
        C, H, K = self.group.size(), q_LHE.shape[1], k_LKE.shape[1]
        # One message for q, k and v: (L, C, (H + 2 K) / C, E), by the rank that gets the heads.
        heads = torch.cat([x.unflatten(1, (C, -1)) for x in (q_LHE, k_LKE, v_LKE)], 2)
        of_ranks = _Exchange.apply(heads.transpose(0, 1), self.group)
        q, k, v = of_ranks.flatten(0, 1)[segments.place_T].split((H // C, K // C, K // C), dim=1)
        out = attention(q, k, v, segments.whole, causal=True)
        of_heads = _Exchange.apply(out[segments.rows_T].unflatten(0, (C, -1)), self.group)
        return of_heads.transpose(0, 1).flatten(1, 2)


class _Exchange(torch.autograd.Function):
    """x[c] goes to rank c; the result's [c] came from rank c. Its own transpose, and so its own backward."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        received = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dist.all_to_all_single(received, x.contiguous(), group=group)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        return _Exchange.apply(dx, ctx.group), None


def choose_mode(mode: str, num_kv_heads: int, context: int) -> str:
    """ring, allgather or ulysses, for a rank with this many key/value heads (its share under tensor parallelism).
    auto is ulysses where the heads can be shared, else ring. Raises ValueError for ulysses where they cannot."""
    fits = num_kv_heads % context == 0
    if mode == "auto":
        return "ulysses" if fits else "ring"
    if mode == "ulysses" and not fits:
        raise ValueError(
            f"parallel.context_mode=ulysses cannot share {num_kv_heads} key/value heads of a rank among "
            f"parallel.context={context} ranks: set parallel.context_mode=ring, or a context that divides the heads"
        )
    return mode


def apply_context(model: AVLM, group: ProcessGroup, gradient_group: ProcessGroup, mode: str) -> None:
    """Give the decoder's blocks, and nobody else, the core of a mode that ``choose_mode`` returned. ``group`` are the
    ranks that share a row."""
    for block in model.decoder.blocks:
        if mode == "ring":
            block.attention.core = RingAttention(group, gradient_group)
        else:
            block.attention.core = {"allgather": AllGatherAttention, "ulysses": UlyssesAttention}[mode](group)

"""Context parallelism, the attention: queries of this rank's tokens against the keys of all ranks that share the row.

ring       keys and values travel from rank to rank, each block while the one before is used; memory O(T / C)
allgather  keys and values of all ranks are gathered: fewer, larger kernels and messages, memory O(T) of K heads
ulysses    tokens are exchanged for heads: each rank computes whole documents for H / C heads; needs C to divide K

Tokens lie as ``context.cut`` says and ``segments`` is its ContextPlan. All three are causal, as the decoder is. Layers
with a sliding window get its WindowPlan. A ring has none: its steps are whole blocks of keys, causal or not.

T tokens of the row   C ranks   L = T / C tokens of a rank   H query heads   K key/value heads   E head dim
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from avlm.models.avlm import AVLM
from avlm.parallel.context import ContextPlan, WindowPlan
from kernels.attention import attention
from kernels.attention_block import block_backward, block_forward, statistics


class RingAttention(nn.Module):
    """Ring attention (Liu et al., 2310.01889). ``gradient_group`` has the ranks of ``group`` and a communicator of its
    own, so that gradients of keys and values need not wait for keys and values that are under way."""

    def __init__(self, group: ProcessGroup, gradient_group: ProcessGroup):
        super().__init__()
        self.group = group
        self.gradient_group = gradient_group

    @torch.compiler.disable
    def forward(self, q_LHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, segments: ContextPlan) -> Tensor:
        assert isinstance(segments, ContextPlan), "choose_mode refuses a ring with a sliding window"
        return _Ring.apply(q_LHE, k_LKE, v_LKE, segments, self.group, self.gradient_group)


class _Ring(torch.autograd.Function):
    """Blocks are added up in float32 and rounded once. Kept for the backward: this rank's q, k and v, out and lse."""

    @staticmethod
    def forward(ctx, q_LHE, k_LKE, v_LKE, plan, group, gradient_group):
        ctx.plan = plan
        ctx.group = group
        ctx.gradient_group = gradient_group
        ctx.scale = q_LHE.shape[2] ** -0.5
        kv_2LKE = torch.stack((k_LKE, v_LKE))
        so_far = None
        for step, block_2LKE in _circulate(kv_2LKE, group):
            so_far = block_forward(
                q_LHE, *block_2LKE, *plan.ring[step], causal=step == 0, scale=ctx.scale, earlier=so_far
            )
        out_LHE, lse_HL = so_far
        out_LHE = out_LHE.to(q_LHE.dtype)
        ctx.save_for_backward(q_LHE, kv_2LKE, out_LHE, lse_HL)
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
        # The gradient of a block follows it one step later, and after the last step goes home to the block's rank.
        for step, block_2LKE in _circulate(kv_2LKE, ctx.group):
            dq, dk, dv = block_backward(
                dout_LHE, q_LHE, *block_2LKE, *of_softmax, *ctx.plan.ring[step], causal=step == 0, scale=ctx.scale
            )
            _wait(works)
            dq_LHE += dq
            dkv_2LKE[0] += dk
            dkv_2LKE[1] += dv
            del dq, dk, dv  # before those of the next block are made
            sent_2LKE = dkv_2LKE  # kept until it has arrived
            dkv_2LKE, works = _pass_on(sent_2LKE, ctx.gradient_group)
        _wait(works)
        return dq_LHE.to(q_LHE.dtype), *dkv_2LKE.to(kv_2LKE.dtype), None, None, None


def _circulate(block: Tensor, group: ProcessGroup) -> Iterator[tuple[int, Tensor]]:
    """(step, block): the own block, then those of the ranks before, one at a time. While the caller computes with one,
    the next is under way."""
    last = group.size() - 1
    for step in range(last):
        arriving, works = _pass_on(block, group)
        yield step, block
        _wait(works)
        block = arriving
    yield last, block


def _pass_on(block: Tensor, group: ProcessGroup) -> tuple[Tensor, list[dist.Work]]:
    """Start to send a block to the next rank and to receive the block of the rank before, here when the works are
    done."""
    arriving = torch.empty_like(block)
    rank = group.rank()
    size = group.size()
    send = dist.P2POp(dist.isend, block, group=group, group_peer=(rank + 1) % size)
    receive = dist.P2POp(dist.irecv, arriving, group=group, group_peer=(rank - 1) % size)
    return arriving, dist.batch_isend_irecv([send, receive])


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


class AllGatherAttention(nn.Module):
    """Local queries against all keys, which are brought into the order of documents. The early and the late part of a
    document see different keys of it, so they take two calls; each gives 0 to the other's queries. Intervals of keys
    say what either part sees, in one call."""

    def __init__(self, group: ProcessGroup):
        super().__init__()
        self.group = group

    @torch.compiler.disable
    def forward(self, q_LHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, segments: ContextPlan | WindowPlan) -> Tensor:
        kv_T2KE = _GatherRows.apply(torch.stack((k_LKE, v_LKE), 1), segments, self.group)
        k_TKE, v_TKE = kv_T2KE.unbind(1)
        if isinstance(segments, WindowPlan):
            return attention(q_LHE, k_TKE, v_TKE, segments.own, segments_k=segments.whole, causal=True)
        q_segments = segments.queries
        early_LHE = attention(q_LHE, k_TKE, v_TKE, q_segments, segments_k=segments.early, causal=True)
        late_LHE = attention(q_LHE, k_TKE, v_TKE, q_segments, segments_k=segments.late, causal=True)
        return early_LHE + late_LHE


class _GatherRows(torch.autograd.Function):
    """Keys and values of all ranks, in the order of the whole row. Backward: the gradients of this rank's own ones,
    summed over ranks in float32."""

    @staticmethod
    def forward(ctx, x_L2KE, plan, group):
        ctx.plan = plan
        ctx.group = group
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
    """DeepSpeed-Ulysses (Jacobs et al., 2309.14509): all tokens of H / C heads in place of L tokens of all heads, plain
    attention over whole documents, and back."""

    def __init__(self, group: ProcessGroup):
        super().__init__()
        self.group = group

    @torch.compiler.disable
    def forward(self, q_LHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, segments: ContextPlan | WindowPlan) -> Tensor:
        C = self.group.size()
        # One message for q, k and v: (L, C, (H + 2 K) / C, E), by the rank that gets the heads.
        by_rank = [x.unflatten(1, (C, -1)) for x in (q_LHE, k_LKE, v_LKE)]
        counts = [x.shape[2] for x in by_rank]
        sent = torch.cat(by_rank, 2).transpose(0, 1)
        arrived = _Exchange.apply(sent, self.group).flatten(0, 1)
        q, k, v = arrived[segments.place_T].split(counts, dim=1)
        out = attention(q, k, v, segments.whole, causal=True)
        sent = out[segments.rows_T].unflatten(0, (C, -1))
        return _Exchange.apply(sent, self.group).transpose(0, 1).flatten(1, 2)


class _Exchange(torch.autograd.Function):
    """x[c] goes to rank c; the result's [c] came from rank c. Its own transpose, and so its own backward."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        return _Exchange.apply(dx, ctx.group), None


def choose_mode(mode: str, num_kv_heads: int, context: int, has_window: bool = False) -> str:
    """ring, allgather or ulysses, for a rank with this many key/value heads (its share under tensor parallelism).
    auto is ulysses where the heads can be shared, else ring, or allgather for a model with a sliding window. Raises
    ValueError for ulysses where heads cannot be shared, and for a ring with a window."""
    fits = num_kv_heads % context == 0
    otherwise = "allgather" if has_window else "ring"
    if mode == "auto":
        return "ulysses" if fits else otherwise
    if mode == "ulysses" and not fits:
        raise ValueError(
            f"parallel.context_mode=ulysses cannot share {num_kv_heads} key/value heads of a rank among "
            f"parallel.context={context} ranks: set parallel.context_mode={otherwise}, or a context that divides the "
            "heads"
        )
    if mode == "ring" and has_window and context > 1:
        raise ValueError(
            "parallel.context_mode=ring has no masks for model.decoder.sliding_window: set "
            f"parallel.context_mode=allgather{' or ulysses' if fits else ''}"
        )
    return mode


def apply_context(model: AVLM, group: ProcessGroup, gradient_group: ProcessGroup, mode: str) -> None:
    """Replace the attention core of the decoder's blocks, and of no tower's, by that of a mode that ``choose_mode``
    returned. ``group`` holds the ranks that share a row."""
    for block in model.decoder.blocks:
        if mode == "ring":
            block.attention.core = RingAttention(group, gradient_group)
        elif mode == "allgather":
            block.attention.core = AllGatherAttention(group)
        else:
            block.attention.core = UlyssesAttention(group)

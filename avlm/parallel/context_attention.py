"""Context parallelism, the attention: queries of this rank's tokens against the keys of all ranks that share the row.

ring       keys and values of documents that are cut go to the ranks that need them, see ring.py; memory O(T / C)
allgather  keys and values of all ranks are gathered: fewer, larger kernels and messages, memory O(T) of K heads
ulysses    tokens are exchanged for heads: each rank computes whole documents for H / C heads; needs C to divide K
ulysses_ring  U neighbours exchange tokens for heads, and C / U such groups are a ring (USP, Fang and Zhao, 2405.07719).
           A ring step has U times the tokens and 1 / U of the heads, so there are U times fewer of them between
           machines, and a document of up to U T / C tokens stays in one group

Tokens lie as ``context.cut`` says and ``segments`` is its ContextPlan. All are causal, as the decoder is. Layers with
another mask, such as a sliding window, get its IntervalPlan. A ring has none: its steps are whole blocks of keys,
causal or not.

T tokens of the row   C ranks   L = T / C tokens of a rank   H query heads   K key/value heads   E head dim
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from avlm.config.decoder import DecoderConfig
from avlm.models.attention import Scores
from avlm.models.avlm import AVLM
from avlm.parallel.context_plan import ContextPlan, IntervalPlan
from avlm.parallel.gather import gathered, scattered
from avlm.parallel.ring import RingAttention
from kernels.attention import attention

MACHINE = 8  # ranks of a machine: neighbours, among which an exchange of heads is fast


class AllGatherAttention(nn.Module):
    """Local queries against all keys, which are brought into the order of documents. The early and the late part of a
    document see different keys of it, so they take two calls; each gives 0 to the other's queries. Intervals of keys
    say what either part sees, in one call."""

    def __init__(self, group: ProcessGroup, scores: Scores = Scores()):
        super().__init__()
        self.group = group
        self.scores = scores

    @torch.compiler.disable
    def forward(self, q_LHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, segments: ContextPlan | IntervalPlan) -> Tensor:
        kv_T2KE = _GatherRows.apply(torch.stack((k_LKE, v_LKE), 1), segments, self.group)
        k_TKE, v_TKE = kv_T2KE.unbind(1)
        inputs = q_LHE, k_TKE, v_TKE
        scores = self.scores._asdict()
        if isinstance(segments, IntervalPlan):
            return attention(*inputs, segments.own, segments_k=segments.whole, causal=True, **scores)
        early_LHE = attention(*inputs, segments.queries, segments_k=segments.early, causal=True, **scores)
        late_LHE = attention(*inputs, segments.queries, segments_k=segments.late, causal=True, **scores)
        return early_LHE + late_LHE


class _GatherRows(torch.autograd.Function):
    """Keys and values of all ranks, in the order of the whole row. Backward: the gradients of this rank's own ones,
    summed over ranks in float32."""

    @staticmethod
    def forward(ctx, x_L2KE, plan, group):
        ctx.plan = plan
        ctx.group = group
        return gathered(x_L2KE, group)[plan.place_T]

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_T2KE):
        of_ranks = dx_T2KE[ctx.plan.rows_T].to(torch.promote_types(dx_T2KE.dtype, torch.float32))
        return scattered(of_ranks, ctx.group).to(dx_T2KE.dtype), None, None


class UlyssesAttention(nn.Module):
    """DeepSpeed-Ulysses (Jacobs et al., 2309.14509): all tokens of the group for H / U heads in place of L tokens for
    all heads, attention over them, and back. With a ``ring`` there are more groups, whose tokens that brings."""

    def __init__(self, group: ProcessGroup, ring: RingAttention | None = None, scores: Scores = Scores()):
        super().__init__()
        self.group = group
        self.ring = ring
        self.scores = scores

    @torch.compiler.disable
    def forward(self, q_LHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, segments: ContextPlan | IntervalPlan) -> Tensor:
        U = self.group.size()
        # One message for q, k and v: (L, U, (H + 2 K) / U, E), by the rank that gets the heads.
        by_rank = [x.unflatten(1, (U, -1)) for x in (q_LHE, k_LKE, v_LKE)]
        counts = [x.shape[2] for x in by_rank]
        sent = torch.cat(by_rank, 2).transpose(0, 1)
        arrived = _Exchange.apply(sent, self.group).flatten(0, 1)
        q, k, v = arrived.split(counts, dim=1)
        if self.ring is None:
            out = attention(q, k, v, segments.whole, causal=True, **self.scores._asdict())
        else:
            out = self.ring(q, k, v, segments)
        sent = out.unflatten(0, (U, -1))
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


def mode_of(decoder: DecoderConfig, mode: str, context: int, tensor: int) -> tuple[str, int]:
    """What ``parallel.context_mode`` comes to for a decoder, and how many neighbours of the context axis exchange heads
    in it."""
    num_kv_heads = decoder.num_kv_heads // tensor
    mode = choose_mode(mode, num_kv_heads, context, outside_a_ring(decoder), tensor)
    return mode, heads_together(mode, num_kv_heads, context, tensor)


def outside_a_ring(decoder: DecoderConfig) -> str | None:
    """What a ring cannot compute: the first field of the decoder that has its own masks or bounds its scores."""
    if decoder.sliding_window is not None:
        return "no masks for model.decoder.sliding_window"
    if decoder.bidirectional != "none":
        return f"no masks for model.decoder.bidirectional={decoder.bidirectional}"
    if decoder.attention_softcap is not None:
        return f"no model.decoder.attention_softcap={decoder.attention_softcap:g}"
    return None


def choose_mode(mode: str, num_kv_heads: int, context: int, obstacle: str | None = None, tensor: int = 1) -> str:
    """ring, allgather, ulysses or ulysses_ring, for a rank with this many key/value heads (its share under tensor
    parallelism over ``tensor`` ranks). auto is ulysses where the ranks can share the heads and are of one machine,
    ulysses_ring where some of them can and are, else ring. For a model with an obstacle to rings (``outside_a_ring``)
    it is ulysses where the ranks can share the heads, else allgather. Raises ValueError for ulysses where heads cannot
    be shared, and for a ring with an obstacle."""
    num_sharers = heads_together("ulysses_ring", num_kv_heads, context, tensor)
    fits = num_kv_heads % context == 0
    with_ring = "ulysses_ring" if num_sharers > 1 else "ring"
    otherwise = "allgather" if obstacle else with_ring
    if mode == "auto":
        return "ulysses" if fits and (obstacle or num_sharers == context) else otherwise
    if (mode == "ulysses" and not fits) or (mode == "ulysses_ring" and num_sharers == 1 < context):
        raise ValueError(
            f"parallel.context_mode={mode} cannot share {num_kv_heads} key/value heads of a rank among "
            f"parallel.context={context} ranks: set parallel.context_mode={otherwise}, or a context that divides the "
            "heads"
        )
    if mode == "ulysses_ring" and num_sharers == context:
        return "ulysses"  # all ranks are one group
    if mode in ("ring", "ulysses_ring") and obstacle and context > 1:
        raise ValueError(
            f"parallel.context_mode={mode} has {obstacle}: set "
            f"parallel.context_mode=allgather{' or ulysses' if fits else ''}"
        )
    return mode


def heads_together(mode: str, num_kv_heads: int, context: int, tensor: int) -> int:
    """How many neighbours of the context axis exchange heads for tokens in a mode that ``choose_mode`` returned: in
    ulysses_ring as many of a machine as can share the key/value heads."""
    if mode == "ulysses_ring":
        shared = math.gcd(num_kv_heads, context)
        return max(n for n in range(1, shared + 1) if shared % n == 0 and (n == 1 or n * tensor <= MACHINE))
    return context if mode == "ulysses" else 1


def apply_context(
    model: AVLM, mode: str, group: ProcessGroup | None, ring_groups: tuple[ProcessGroup, ProcessGroup] | None
) -> None:
    """Replace the attention core of the decoder's blocks, and of no tower's, by that of a mode that ``choose_mode``
    returned. ``group``: the ranks that exchange heads or gather keys. ``ring_groups``: those of a ring, for keys and
    values and for their gradients."""
    for block in model.decoder.blocks:
        scores = block.attention.core.scores
        ring = RingAttention(*ring_groups, scores.scale) if ring_groups else None
        if mode == "ring":
            block.attention.core = ring
        elif mode == "allgather":
            block.attention.core = AllGatherAttention(group, scores)
        else:
            block.attention.core = UlyssesAttention(group, ring, scores)

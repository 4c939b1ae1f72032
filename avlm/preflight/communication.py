"""What a rank waits for in a step because it is sent, estimated: bytes of ``avlm.preflight.wire`` over the links of
``avlm.preflight.rates``, less the computation that they hide under.

C, t ranks of context, tensor   U of C that exchange heads
"""

import math
from collections import Counter
from typing import NamedTuple

from avlm.config.model import TOWERS
from avlm.parallel.context_plan import ContextPlan, context_plan
from avlm.parallel.shares import share
from avlm.preflight import rates, wire
from avlm.preflight.described_step import Both, Step
from avlm.preflight.rates import NODE, Gpu
from kernels.segments import Segments


class Context(NamedTuple):
    """Attention over the context axis: the share of a row's pairs that the slowest rank computes, with its share of the
    heads; what it waits for in all layers; bytes that it sends."""

    pairs: float
    exposed: float
    sent: float


def _collective(gpu: Gpu, sent: float, ranks: int, stride: int) -> float:
    """Seconds of a gather, a scatter or a sum in which each of these ranks sends so many bytes around a ring; they lie
    ``stride`` ranks apart. A byte enters a machine once, over the network of all ranks of the group that are there."""
    if ranks == 1:
        return 0.0
    per_node = max(1, min(ranks, NODE // stride))
    nodes = math.ceil(ranks / per_node)
    rate = rates.LINK * gpu.nvlink
    if nodes == 1:
        return sent / rate + ranks * rates.HOP_INSIDE
    rate = min(rate, rates.NETWORK * gpu.nic * per_node)
    return sent / rate + (ranks - nodes) * rates.HOP_INSIDE + nodes * rates.HOP_BETWEEN


def _all_to_all(gpu: Gpu, sent: float, ranks: int, stride: int) -> float:
    """Seconds of an exchange in which a rank sends so many bytes in equal parts to each of the others."""
    if ranks == 1:
        return 0.0
    per_node = max(1, min(ranks, NODE // stride))
    between = sent * (ranks - per_node) / (ranks - 1)
    inside = sent - between
    hop = rates.HOP_BETWEEN if between else rates.HOP_INSIDE
    return max(inside / (rates.LINK * gpu.nvlink), between / (rates.NETWORK * gpu.nic)) + hop


def tensor(step: Step) -> tuple[Both, float]:
    """(seconds, bytes sent) of a micro-batch. Recomputation gathers again what the forward has gathered, half of all;
    full recomputation also sums again behind attention, a quarter of all."""
    layout = step.case.layout
    t = layout.tensor
    if t == 1:
        return Both(), 0.0
    decoder = step.case.model.decoder
    targets = step.row.targets // layout.context
    found = wire.tensor_bytes(step.case.model, t, step.tokens, targets, step.case.itemsize)
    mode = step.case.recompute("decoder")
    again = {"all-gather": (mode != "none") / 2, "reduce-scatter": (mode == "full") / 4, "all-reduce": 0}
    sent = sum((1 + again[kind]) * count for kind, count in found.items())
    hops = 8 * decoder.num_layers * t * rates.HOP_INSIDE
    forward = _collective(step.gpu, sum(found.values()) / 2, t, 1) + hops / 2
    backward = _collective(step.gpu, sent - sum(found.values()) / 2, t, 1) + hops / 2
    return Both(forward, backward), sent


def experts(step: Step) -> tuple[float, float]:
    """(seconds, bytes sent) of a micro-batch, if experts are equally busy. Nothing hides them. Recomputation repeats
    the forward, half of all."""
    layout = step.case.layout
    decoder = step.case.model.decoder
    e = layout.expert
    own = step.tokens // layout.tensor
    passes = 1 if step.case.recompute("decoder") == "none" else 1.5
    if layout.expert_mode == "gather":
        sent = passes * sum(wire.gathered_experts_bytes(decoder, e, own, step.case.itemsize).values())
        seconds = _collective(step.gpu, sent, e, 1)
    elif layout.expert_mode == "exchange" and decoder.experts is not None:
        crossing = 2 * wire.num_mixtures(decoder) * wire.ring(e, own * decoder.experts.per_token)
        sent = passes * wire.exchanged_experts_bytes(decoder, e, crossing, step.case.itemsize)
        seconds = _all_to_all(step.gpu, sent, e, 1)
    else:
        return 0.0, 0.0
    return seconds + 4 * passes * wire.num_mixtures(decoder) * rates.HOP_INSIDE, sent


class Traffic(NamedTuple):
    """Seconds of a unit of FSDP: a gather, one for the backward, the sum of gradients over its ranks and then over
    copies of the model, and the computation of its modules."""

    gather: float
    again: float
    sum: float
    copies: float
    work: Both


def weights(step: Step, work: dict[str, dict[str, Both]], tensor: Both) -> tuple[float, float, float]:
    """Of a step: (seconds of copies, seconds of communication that nothing hides, bytes sent)."""
    case = step.case
    layout = case.layout
    micro_batches = step.micro_batches
    is_local = case.config.train.accumulate_mode == "local"
    num_sums = 1 if is_local else micro_batches
    sharers = layout.shard * layout.context
    of_row = sharers * layout.tensor
    axes = {"shard_context": (sharers, layout.tensor), "shard_context_tensor": (of_row, 1)}
    axes["shard_of_expert"] = of_row // layout.expert, layout.expert
    copied = sent = 0.0
    units = []
    found = wire.units(case.config, case.trained)
    num_units = Counter(unit.module for unit in found)
    for unit in found:
        n, stride = axes[unit.axis]
        numbers, trained = (
            wire.padded_numbers(shapes, unit.prefixes, layout) for shapes in (case.shapes, case.trained)
        )
        gathered, summed = wire.ring(n, case.itemsize * numbers), wire.ring(n, 4 * trained)
        copies = wire.ring(layout.replicate, 2 * 4 * trained / n)
        num_gathers = micro_batches * unit.num_gathers
        sent += num_gathers * gathered + num_sums * summed + copies
        if n > 1:
            copied += num_gathers * rates.COPIED_IN * numbers + num_sums * rates.COPIED_OUT * trained
        gather = _collective(step.gpu, gathered, n, stride)
        reduction = over_copies = 0.0
        if trained:
            reduction = _collective(step.gpu, summed, n, stride)
            over_copies = _collective(step.gpu, copies, layout.replicate, layout.shard * layout.row_ranks)
        kinds = [kind.get(unit.module, Both()) for kind in work.values()] + [tensor] * (unit.module == "decoder")
        own = Both(*(sum(seconds) / num_units[unit.module] for seconds in zip(*kinds)))
        units.append(Traffic(gather, gather * (unit.num_gathers - 1), reduction, over_copies, own))
    first = _waited(units, with_sums=not is_local, with_copies=False)
    last = _waited(units, with_sums=True, with_copies=True)
    return copied / step.memory_rate, (micro_batches - 1) * first + last, sent


def _waited(units: list[Traffic], with_sums: bool, with_copies: bool) -> float:
    """Seconds of a micro-batch. A unit is gathered while the one before it computes. In the backward its gradients are
    summed, and the next unit gathered, while a unit computes. The first gather and the last sum hide under nothing."""
    waited = last_sum = 0.0
    under = Both()
    for unit in units:
        sums = with_sums * unit.sum + with_copies * unit.copies
        waited += max(0.0, unit.gather - under.forward)
        waited += max(0.0, unit.again + sums - unit.work.backward)
        last_sum = last_sum or sums  # of the first unit that trains
        under = unit.work
    return waited + last_sum


def media(step: Step) -> tuple[float, float]:
    """(seconds, bytes sent) of a micro-batch: rows of a tower to the ranks of their tokens, and gradients of rows back
    if it trains; features that all ranks read. Nothing hides them."""
    layout = step.case.layout
    ranks = layout.row_ranks
    seconds = sent = 0.0
    for modality, number in step.row.items.items():
        name = TOWERS[modality]
        if ranks == 1 or not number:
            continue
        tower, projector = getattr(step.case.model, name), getattr(step.case.model, f"{name}_projector")
        of_item = projector.outputs_of(tower.outputs_of(step.item_size(modality)))
        rows = step.share_of_items(modality) * number * of_item
        count = wire.ring(ranks, step.case.itemsize * rows * projector.input_width(tower))
        resampled = f"{name}_projector.resampler."
        passes = 1 + (step.case.trained_numbers(f"{name}.") + step.case.trained_numbers(resampled) > 0)
        seconds += passes * _all_to_all(step.gpu, count, ranks, 1)
        sent += passes * count
    if step.case.model.cross is not None:
        D = step.case.model.decoder.hidden_size
        count = 2 * wire.features_bytes(step.counts["features"], ranks, D, step.case.itemsize)
        seconds += _collective(step.gpu, count, ranks, 1)
        sent += count
    return seconds, sent


def context(step: Step) -> Context:
    case = step.case
    layout = case.layout
    t, C, U = layout.tensor, layout.context, step.num_together
    if C == 1:
        return Context(1 / t, 0.0, 0.0)
    decoder = case.model.decoder
    mode = case.recompute("decoder")
    exposed = sent = 0.0
    if layout.context_mode == "allgather":
        found = wire.gathered_bytes(decoder, t, C, step.tokens, case.itemsize)
        gathers = 1 + (mode != "none")
        sent = gathers * found["all-gather"] + found["reduce-scatter"]
        exposed = _collective(step.gpu, sent, C, t)
    elif U > 1:
        both = wire.exchanged_bytes(decoder, t, U, step.tokens, case.itemsize)
        sent = both * (1 if mode == "none" else 1.5)  # the forward's exchange again
        exposed = _all_to_all(step.gpu, sent, U, t)
    shares = share(list(step.row.documents), C // U)
    held = shares.count_NC2.sum(2) * (shares.length_N + 1)[:, None] / 2
    pairs = float(held.sum(0).max()) / step.counts["token_pairs"] / (U * t)
    if layout.context_mode in ("ring", "ulysses_ring"):
        rings = [_ring(step, context_plan(shares, place), place) for place in range(C // U)]
        slowest = max(rings, key=lambda ring: ring.seconds)
        pairs = slowest.pairs / step.counts["token_pairs"] / (U * t)
        exposed += decoder.num_layers * slowest.exposed
        sent += decoder.num_layers * slowest.sent
    return Context(pairs, exposed, sent)


class Ring(NamedTuple):
    """A layer on one rank: pairs of all its steps, seconds of all, seconds in which it waits, bytes that it sends."""

    pairs: float
    seconds: float
    exposed: float
    sent: float


def _ring(step: Step, plan: ContextPlan, place: int) -> Ring:
    """What a step of the ring sends hides under the attention of the step before."""
    case = step.case
    t, U = case.layout.tensor, step.num_together
    forward, backward, _ = step.costs["decoder", "token_pairs"]
    heads = case.model.decoder.num_layers * t * U
    of_pair = Both(
        forward / heads / step.peak(rates.ATTENTION_FORWARD), backward / heads / step.peak(rates.ATTENTION_BACKWARD)
    )
    passes = (2 if case.recompute("decoder") == "full" else 1), 1  # forward and backward
    numbers = wire.key_numbers(case.model.decoder, t, U)
    before = sum(length * (length + 1) / 2 for length in _lengths(plan.own))
    pairs = before
    exposed = sent = 0.0
    for ring_step in plan.ring:
        out = _by_link([(rank, last - first) for rank, first, last in ring_step.sends], place, t * U)
        into = _by_link([(rank, last - first) for rank, first, last in ring_step.receives], place, t * U)
        hop = rates.HOP_BETWEEN if out[1] + into[1] else rates.HOP_INSIDE
        links = rates.LINK * step.gpu.nvlink, rates.NETWORK * step.gpu.nic
        for i in range(2):
            sent += passes[i] * wire.ring_bytes(numbers, sum(out), sum(into), case.itemsize)[i]
            seconds = 0.0
            for rate, leaving, arriving in zip(links, out, into):
                for rows in ((leaving, arriving), (arriving, leaving)):  # a link sends and receives at the same time
                    seconds = max(seconds, wire.ring_bytes(numbers, *rows, case.itemsize)[i] / rate)
            exposed += passes[i] * max(0.0, seconds + hop - before * of_pair[i])
        before = sum(q * k for q, k in zip(_lengths(ring_step.queries), _lengths(ring_step.keys)))
        pairs += before
    return Ring(pairs, sum(pairs * of_pair[i] * passes[i] for i in range(2)) + exposed, exposed, sent)


def _lengths(segments: Segments) -> list[int]:
    return segments.cu_seqlens.diff().tolist()


def _by_link(rows: list[tuple[int, int]], place: int, stride: int) -> tuple[int, int]:
    """(inside the machine, between machines) of rows to or from places of the ring, ``stride`` ranks apart."""
    between = sum(count for other, count in rows if other * stride // NODE != place * stride // NODE)
    return sum(count for _, count in rows) - between, between

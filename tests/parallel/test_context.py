"""Ranks that share a row share it evenly, and their attention is that of one process."""

import dataclasses
import random
import time
from typing import Any

import pytest
import torch
from torch import nn

from avlm.config.decoder import DecoderConfig
from avlm.config.model import ModelConfig
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample
from avlm.models.attention import AttentionCore
from avlm.models.avlm import AVLM
from avlm.models.batch import Batch
from avlm.parallel.context import cut
from avlm.parallel.context_attention import (
    AllGatherAttention,
    UlyssesAttention,
    apply_context,
    choose_mode,
    heads_together,
    mode_of,
)
from avlm.parallel.mesh import lay_out
from avlm.parallel.ring import RingAttention
from avlm.parallel.shares import share
from kernels.attention import attention
from kernels.segments import Segments
from tests.parallel.live_bytes import LiveBytes
from tests.parallel.spawn import run_ranks

MODEL = ModelConfig(
    decoder=DecoderConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=8, num_kv_heads=4, score_size=9.0
    )
)
# name: (lengths of documents, 96 tokens in all; query heads, key/value heads)
PACKINGS = {
    "one document": ([96], 4, 4),
    "several, of odd lengths": ([41, 1, 25, 6, 23], 8, 4),
    "tiny ones, some shorter than the number of ranks": ([1, 2, 3] * 16, 4, 4),
    "a tiny one between large ones": ([47, 2, 47], 16, 4),
    "a document of more than a chunk of queries": ([3, 91, 2], 8, 8),
    "documents that fit nowhere": ([30, 30, 36], 4, 4),
    "long ones of odd lengths next to each other": ([53, 1, 37, 5], 4, 4),
    "a long one whose members have whole ones too": ([9, 8, 27, 7, 31, 2, 12], 8, 4),
    "a cut between two tokens": ([23, 23, 25, 25], 4, 4),
}
MODES = {"ring": 1, "allgather": 1, "ulysses": 4, "ulysses_ring": 2}  # ranks that exchange heads, of four
WINDOW = 9
WINDOWED = ("allgather", "ulysses")


def random_packing(num_tokens: int, generator: random.Random) -> list[int]:
    """One document, or documents of up to 8 tokens, an eighth of the row, or the whole row."""
    longest = generator.choice([None, 8, max(1, num_tokens // 8), num_tokens])
    if longest is None:
        return [num_tokens]
    lengths = []
    room = num_tokens
    while room:
        length = min(room, generator.randint(1, longest))
        lengths.append(length)
        room -= length
    return lengths


def test_a_thousand_packings_are_shared_with_few_cuts():
    """Tokens evenly; pairs of a query and a key as evenly as documents that stay whole allow."""
    generator = random.Random(0)
    for _ in range(1000):
        context = generator.choice([2, 3, 4, 8])
        num_held = generator.choice([1, 64, 250, 513])
        lengths = random_packing(context * num_held, generator)
        rows_CL = share(lengths, context).rows_CL
        assert rows_CL.shape == (context, num_held)
        assert rows_CL.flatten().sort().values.equal(torch.arange(context * num_held))
        length_N = torch.tensor(lengths)
        document_T = torch.arange(len(lengths)).repeat_interleave(length_N)
        holds_CN = torch.zeros(context, len(lengths)).scatter_(1, document_T[rows_CL], 1.0)
        is_cut_N = holds_CN.sum(0) > 1
        assert is_cut_N[length_N > num_held].all()
        assert is_cut_N[length_N <= num_held].sum() < context, f"{lengths}: {is_cut_N}"
        keys_T = torch.cat([torch.arange(1, length + 1) for length in lengths])  # that each token sees
        pairs_C = keys_T[rows_CL].sum(1).double()
        longest_whole = max([length for length in lengths if length <= num_held], default=0)
        slack = longest_whole * (longest_whole + 1) / 2
        if max(lengths) > num_held:
            slack += 0.5 * pairs_C.mean()
        if num_held > 1:
            assert pairs_C.max() <= pairs_C.mean() + slack, f"{lengths}: {pairs_C}"


def test_documents_that_the_ranks_hold_whole_need_no_exchange():
    lengths = [12, 6, 2, 12, 5, 3, 12, 4, 3, 1]
    for rank in range(3):
        plan = cut(make_batch([*lengths, 0]), rank, 3)[0].segments
        assert not plan.ring and plan.num_shared == 0
        assert len(plan.own.cu_seqlens) < len(lengths), "documents of other ranks are no part of it"


def test_a_ring_is_no_longer_than_its_document():
    """Of 8 ranks, each with 12 tokens, three share the long document; only what is seen travels."""
    plans = [cut(make_batch([31, 12, 12, 12, 12, 12, 2, 2, 1, 0]), rank, 8)[0].segments for rank in range(8)]
    assert sorted(len(plan.ring) for plan in plans) == [0] * 5 + [2] * 3
    sent = sum(last - first for plan in plans for step in plan.ring for _, first, last in step.sends)
    assert sent == 2 * 5 + (5 + 10) + 2 * 11, "of 5 + 5, 5 + 5 and 5 + 6 tokens, early and late"


def test_five_thousand_documents_are_shared_among_64_ranks_at_once():
    lengths = [100 + n % 219 for n in range(5000)]
    lengths.append(2**20 - sum(lengths))
    started = time.perf_counter()
    share(lengths, 64)
    assert time.perf_counter() - started < 1, "0.04 s; it was 3.6 s"


def make_batch(lengths: list[int]) -> Batch:
    """Documents in which each token is its place in the row; two of three have a target, but for the last document,
    which fills the row."""
    samples = []
    first = 0
    for length in lengths[:-1]:
        token_T = torch.arange(first, first + length)
        target_T = torch.where(token_T % 3 == 0, -100, token_T + 1)
        target_T[-1:] = -100
        kind = "mixed" if length % 2 else "text"
        samples.append(EncodedSample(str(first), kind, token_T, target_T))
        first += length
    return pack(samples, sum(lengths), MODEL)


@pytest.mark.parametrize("context", [1, 2, 4])
def test_targets_follow_their_tokens(context):
    whole = make_batch([41, 1, 0, 25, 6, 23])
    cuts = [cut(whole, rank, context) for rank in range(context)]
    parts, places = zip(*cuts)
    for part in parts:
        assert part.token_T.shape == part.position_T.shape == (96 // context,)
        assert part.target_R.equal(part.token_T[part.target_rows_R] + 1)
        assert (part.target_rows_R.diff() > 0).all()
        assert part.image is whole.image and part.audio is whole.audio
    for place_T in places:
        assert torch.cat([part.token_T for part in parts])[place_T].equal(whole.token_T)
        assert torch.cat([part.position_T for part in parts])[place_T].equal(whole.position_T)
    target_R, order_R = torch.cat([part.target_R for part in parts]).sort()
    assert target_R.equal(whole.target_R)  # they ascend
    assert torch.cat([part.kind_R for part in parts])[order_R].equal(whole.kind_R)


def test_a_row_that_the_ranks_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"parallel\.context=4 does not divide a row of 98 tokens"):
        cut(make_batch([90, 8]), 0, 4)


@pytest.mark.parametrize(
    ("context", "mode", "together"),
    [(2, "ulysses", 2), (3, "ring", 1), (8, "ulysses", 8), (16, "ulysses_ring", 8), (12, "ulysses_ring", 4)],
)
def test_auto_is_ulysses_for_as_many_ranks_as_share_the_heads(context, mode, together):
    assert choose_mode("auto", 8, context) == mode
    assert heads_together(mode, 8, context, tensor=1) == together


@pytest.mark.parametrize(
    ("context", "tensor", "mode", "together"),
    [(16, 1, "ulysses_ring", 8), (32, 4, "ulysses_ring", 2), (4, 2, "ulysses", 4), (16, 8, "ring", 1)],
)
def test_auto_exchanges_heads_within_a_machine_of_eight(context, tensor, mode, together):
    """A rank has 32 key/value heads, enough for any of these."""
    assert choose_mode("auto", 32, context, tensor=tensor) == mode
    assert heads_together(mode, 32, context, tensor) == together
    assert choose_mode("ulysses", 32, context, tensor=tensor) == "ulysses"


def test_a_mode_that_is_named_is_taken_or_refused():
    assert choose_mode("ring", 8, 2) == "ring"
    assert choose_mode("allgather", 1, 2) == "allgather"
    assert choose_mode("ulysses_ring", 8, 4) == "ulysses"  # one group has no ring
    with pytest.raises(ValueError, match=r"ulysses_ring cannot share 3 key/value heads .* set .*context_mode=ring, "):
        choose_mode("ulysses_ring", 3, 4)
    with pytest.raises(ValueError, match=r"cannot share 2 key/value heads .*context=4 ranks") as error:
        choose_mode("ulysses", 2, 4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"bidirectional": "images"}, "context_mode=ring has no masks for model.decoder.bidirectional=images"),
        ({"attention_softcap": 50.0}, "context_mode=ring has no model.decoder.attention_softcap=50: set"),
    ],
)
def test_what_a_ring_does_not_compute_is_refused_and_avoided(changes, named):
    decoder = dataclasses.replace(MODEL.decoder, **changes)
    with pytest.raises(ValueError, match=named):
        mode_of(decoder, "ring", 2, 1)
    assert mode_of(decoder, "auto", 2, 1) == ("ulysses", 2) and mode_of(decoder, "auto", 8, 1)[0] == "allgather"


def test_a_ring_with_a_window_is_refused_with_what_to_set():
    assert choose_mode("auto", 8, 2, "no masks for model.decoder.sliding_window") == "ulysses"
    assert choose_mode("auto", 8, 3, "no masks for model.decoder.sliding_window") == "allgather"
    assert choose_mode("ring", 8, 1, "no masks for model.decoder.sliding_window") == "ring"  # one rank has no ring
    with pytest.raises(
        ValueError, match=r"model\.decoder\.sliding_window: set parallel.context_mode=allgather or ulysses"
    ):
        choose_mode("ring", 8, 2, "no masks for model.decoder.sliding_window")
    with pytest.raises(ValueError, match=r"set parallel\.context_mode=allgather$"):
        choose_mode("ring", 8, 3, "no masks for model.decoder.sliding_window")
    with pytest.raises(ValueError, match=r"cannot share .* set parallel\.context_mode=allgather, or"):
        choose_mode("ulysses", 8, 3, "no masks for model.decoder.sliding_window")


def cores(context: int) -> tuple[dict[str, nn.Module], int]:
    """A core of each mode and this rank's index. With four processes and a context of two, the ranks that share a row
    are not neighbours."""
    shape = 1, 1, context, torch.distributed.get_world_size() // context
    world = lay_out(shape, torch.device("cpu"))
    group = world.new_group("context")
    found = {
        "ring": RingAttention(group, world.new_group("context")),
        "allgather": AllGatherAttention(group),
        "ulysses": UlyssesAttention(group),
    }
    if context == 4:
        ring = RingAttention(*(world.new_group("context", 2, across=True) for _ in range(2)))
        found["ulysses_ring"] = UlyssesAttention(world.new_group("context", 2), ring)
    return found, group.rank()


def of_rank(lengths: list[int], rank: int, context: int, together: int):
    """The ContextPlan and the IntervalPlan of a rank for documents of these lengths, and the places in the row of its
    tokens."""
    batch = make_batch([*lengths, 0])
    batch = dataclasses.replace(batch, windowed=batch.segments.within(WINDOW))
    part, _ = cut(batch, rank, context, min(together, context))
    return part.segments, part.windowed, part.token_T


def with_gradients(core, inputs, segments, dtype):
    """out, dq, dk and dv."""
    q, k, v, dout = [x.to(dtype) for x in inputs]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = core(*leaves, segments)
    gradients = torch.autograd.grad(out, leaves, dout)
    return [x.double() for x in (out.detach(), *gradients)]


def one_process(q, k, v, segments):
    return attention(q, k, v, segments, causal=True)


def errors(contexts: list[int]) -> dict:
    """(context, packing, mode, dtype): for out, dq, dk and dv the largest errors of this rank and of one process, and
    the largest number."""
    found = {}
    for context in contexts:
        core_of_mode, rank = cores(context)
        for name, (lengths, heads, kv_heads) in PACKINGS.items():
            parts = {mode: of_rank(lengths, rank, context, MODES[mode]) for mode in core_of_mode}
            for dtype, modes in ((torch.float32, core_of_mode), (torch.bfloat16, ["ring"])):
                torch.manual_seed(0)
                inputs = [torch.randn(96, n, 8).to(dtype) for n in (heads, kv_heads, kv_heads, heads)]
                exact = with_gradients(one_process, inputs, Segments.of(lengths), torch.float64)
                alone = with_gradients(one_process, inputs, Segments.of(lengths), dtype)
                for mode in modes:
                    plan, _, rows = parts[mode]
                    ours = with_gradients(core_of_mode[mode], [x[rows] for x in inputs], plan, dtype)
                    found[context, name, mode, dtype] = [
                        (distance(o, e[rows]), distance(a, e), e.abs().max().item())
                        for o, a, e in zip(ours, alone, exact)
                    ]
            segments = Segments.of(lengths).within(WINDOW)
            exact, alone = (with_gradients(one_process, inputs, segments, x) for x in (torch.float64, torch.float32))
            for mode in WINDOWED:
                _, windowed, rows = parts[mode]
                ours = with_gradients(core_of_mode[mode], [x[rows] for x in inputs], windowed, torch.float32)
                found[context, name, f"{mode}, window", torch.float32] = [
                    (distance(o, e[rows]), distance(a, e), e.abs().max().item()) for o, a, e in zip(ours, alone, exact)
                ]
    return found


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def gradient_errors() -> dict[str, float]:
    """How far the gradients of a small model are, summed over two ranks that share its row, from those of one."""
    core_of_mode, rank = cores(2)
    ring = core_of_mode["ring"]
    batch = make_batch([53, 1, 25, 6, 11])
    alone = small_model()
    alone(batch)[0].backward()
    found = {}
    for mode in core_of_mode:
        part, _ = cut(batch, rank, 2, min(MODES[mode], 2))
        model = small_model()
        apply_context(model, mode, ring.group, (ring.group, ring.gradient_group) if mode == "ring" else None)
        assert all(type(block.attention.core) is type(core_of_mode[mode]) for block in model.decoder.blocks)
        model(part)[0].backward()
        found[mode] = 0.0
        for ours, expected in zip(model.parameters(), alone.parameters()):
            torch.distributed.all_reduce(ours.grad)
            found[mode] = max(found[mode], distance(ours.grad, expected.grad) / expected.grad.abs().max().item())
    return found


def small_model() -> AVLM:
    torch.manual_seed(0)
    model = AVLM(MODEL)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def peaks(num_tokens: int) -> dict[str, int]:
    """Most bytes that attention over one document and its backward hold: on one rank, and on each of a ring of four."""
    core_of_mode, rank = cores(4)
    plan, _, _ = of_rank([num_tokens], rank, 4, 1)
    return {
        "one": peak(AttentionCore(causal=True), Segments.of([num_tokens]), num_tokens),
        "four": peak(core_of_mode["ring"], plan, num_tokens // 4),
    }


def peak(core: nn.Module, segments: Any, num_tokens: int) -> int:
    with LiveBytes() as memory:
        q, k, v = [torch.randn(num_tokens, heads, 64, requires_grad=True) for heads in (8, 2, 2)]
        out = core(q, k, v, segments)
        out.backward(torch.ones_like(out))
    return memory.peak


def on_ranks(world_size: int) -> dict:
    torch.distributed.init_process_group("gloo")
    found = {"errors": errors([2] if world_size == 2 else [4, 2])}
    found |= {"gradients": gradient_errors()} if world_size == 2 else {"peaks": peaks(2048)}
    torch.distributed.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(on_ranks, 2, 2)


@pytest.fixture(scope="module")
def four_ranks():
    return run_ranks(on_ranks, 4, 4)


@pytest.mark.parametrize("ranks", ["two_ranks", "four_ranks"])
def test_every_mode_is_the_attention_of_one_process(ranks, request):
    for found in request.getfixturevalue(ranks):
        for case, of_tensors in found["errors"].items():
            for tensor, (off, alone_off, largest) in zip(("out", "dq", "dk", "dv"), of_tensors):
                slack = 0.0
                if case[-1] == torch.float32:
                    slack = 4 * torch.finfo(torch.float32).eps * max(1.0, largest)
                assert off <= 2 * alone_off + slack, f"{case} {tensor}: {off:.3g} off, one process {alone_off:.3g}"


def test_a_decoder_on_two_ranks_has_the_gradients_of_one(two_ranks):
    for found in two_ranks:
        assert all(off < 1e-5 for off in found["gradients"].values()), found["gradients"]


def test_each_rank_of_a_ring_of_four_holds_little_more_than_a_quarter(four_ranks):
    for found in four_ranks:
        assert found["peaks"]["four"] <= 0.3 * found["peaks"]["one"], found["peaks"]


def test_a_part_moves_to_a_device_and_is_pinned_with_all_that_it_holds(monkeypatch):
    batch = make_batch([41, 1, 0, 25, 6, 23])
    part, _ = cut(dataclasses.replace(batch, windowed=batch.segments.within(WINDOW)), 1, 4)
    moved = part.to("meta")

    def check(value):
        if isinstance(value, torch.Tensor):
            assert value.device.type == "meta"
        elif isinstance(value, tuple):
            for inner in value:
                check(inner)
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                check(getattr(value, field.name))

    check(moved)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.to("meta"))  # pinned memory needs a GPU
    check(part.pin_memory())
    assert moved.segments.ring and moved.segments.ring[0].sends == part.segments.ring[0].sends

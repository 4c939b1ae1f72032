"""Ranks that share a row share it evenly, and their attention is that of one process."""

import dataclasses
import random

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from avlm.config.model import DecoderConfig, ModelConfig
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample
from avlm.models.attention import AttentionCore
from avlm.models.avlm import AVLM
from avlm.models.batch import Batch
from avlm.parallel.context import cut, plan
from avlm.parallel.context_attention import (
    AllGatherAttention,
    RingAttention,
    UlyssesAttention,
    apply_context,
    choose_mode,
)
from kernels.attention import attention
from kernels.segments import Segments
from tests.parallel.live_bytes import LiveBytes
from tests.parallel.spawn import run_ranks

MODEL = ModelConfig(
    decoder=DecoderConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=8, num_kv_heads=4
    )
)
# name: (documents of 96 rows, query heads, key/value heads)
PACKINGS = {
    "one document": ([96], 4, 4),
    "several, of odd lengths": ([41, 1, 25, 6, 23], 8, 4),
    "tiny ones, some shorter than the ring": ([1, 2, 3] * 16, 4, 4),
    "a tiny one between large ones": ([47, 2, 47], 16, 4),
    "a document of more than a chunk of queries": ([3, 91, 2], 8, 8),
}
MODES = ("ring", "allgather", "ulysses")


def random_packing(num_tokens: int, generator: random.Random) -> list[int]:
    """One document, or as many as it takes of up to 8 tokens, an eighth of the row, or the whole row."""
    longest = generator.choice([None, 8, num_tokens // 8, num_tokens])
    if longest is None:
        return [num_tokens]
    lengths = []
    while (room := num_tokens - sum(lengths)) > 0:
        lengths.append(min(room, generator.randint(1, longest)))
    return lengths


def test_a_thousand_packings_are_shared_within_five_percent():
    generator = random.Random(0)
    for _ in range(1000):
        context, rows = generator.choice([2, 3, 4, 8]), generator.choice([64, 250, 513])
        lengths = random_packing(context * rows, generator)
        rows_CL = plan(lengths, context).rows_CL
        assert rows_CL.shape == (context, rows)
        assert rows_CL.flatten().sort().values.equal(torch.arange(context * rows))
        assert (rows_CL.diff() > 0).all(), "rows of a rank do not ascend"
        keys_T = torch.cat([torch.arange(1, length + 1) for length in lengths])  # that each row sees
        pairs_C = keys_T[rows_CL].sum(1).double()
        assert ((pairs_C / pairs_C.mean() - 1).abs() <= 0.05).all(), f"{lengths}: {pairs_C}"


def make_batch(lengths: list[int]) -> Batch:
    """Documents in which the token of each row is the row; two of three rows have a target, the last of none has."""
    samples, first = [], 0
    for length in lengths[:-1]:
        token_T = torch.arange(first, first + length)
        target_T = torch.where(token_T % 3 == 0, -100, token_T + 1)
        target_T[-1:] = -100
        samples.append(EncodedSample(str(first), ("text", "mixed")[length % 2], token_T, target_T))
        first += length
    return pack(samples, sum(lengths), MODEL)


@pytest.mark.parametrize("context", [1, 2, 4])
def test_targets_follow_their_rows(context):
    whole = make_batch([41, 1, 0, 25, 6, 23])
    parts, places = zip(*(cut(whole, rank, context) for rank in range(context)))
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
        plan([90, 8], 4)


def test_the_mode_follows_the_heads():
    assert [choose_mode("auto", 8, context) for context in (2, 3, 8, 16)] == ["ulysses", "ring", "ulysses", "ring"]
    assert choose_mode("ring", 8, 2) == "ring" and choose_mode("allgather", 1, 2) == "allgather"
    with pytest.raises(ValueError, match=r"cannot share 2 key/value heads .*context=4 ranks") as error:
        choose_mode("ulysses", 2, 4)
    assert "\n" not in str(error.value)


def cores(context: int) -> tuple[dict[str, nn.Module], int]:
    """A core of each mode and this rank's place. With four processes and a context of two, the ranks that share a row
    are not neighbours."""
    world = int(torch.distributed.get_world_size())
    mesh = init_device_mesh("cpu", (context, world // context), mesh_dim_names=("context", "tensor"))
    group = mesh.get_group("context")
    gradient_group = init_device_mesh("cpu", (context, world // context), mesh_dim_names=("again", "tensor"))["again"]
    ring = RingAttention(group, gradient_group.get_group())
    return {"ring": ring, "allgather": AllGatherAttention(group), "ulysses": UlyssesAttention(group)}, group.rank()


def of_segments(lengths: list[int], rank: int, context: int):
    """The ContextPlan of a rank for documents of these lengths, and the rows that it holds."""
    batch = make_batch([*lengths, 0])
    part, _ = cut(batch, rank, context)
    return part.segments, part.token_T  # the token of a row is the row


def with_gradients(core, inputs, segments, dtype):
    q, k, v, dout = (x.to(dtype) for x in inputs)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = core(q, k, v, segments)
    return [x.double() for x in (out.detach(), *torch.autograd.grad(out, (q, k, v), dout))]


def errors(contexts: list[int]) -> dict:
    """(context, packing, mode, dtype): for out, dq, dk and dv the largest errors of this rank and of one process."""
    found = {}
    for context in contexts:
        core_of_mode, rank = cores(context)
        for name, (lengths, heads, kv_heads) in PACKINGS.items():
            plan_of_rank, rows = of_segments(lengths, rank, context)
            for dtype in (torch.float32, torch.bfloat16):
                torch.manual_seed(0)
                inputs = [torch.randn(96, n, 8).to(dtype) for n in (heads, kv_heads, kv_heads, heads)]
                one = lambda q, k, v, segments: attention(q, k, v, segments, causal=True)
                exact = with_gradients(one, inputs, Segments.of(lengths), torch.float64)
                alone = with_gradients(one, inputs, Segments.of(lengths), dtype)
                for mode in MODES if dtype == torch.float32 else ["ring"]:
                    local = [x[rows] for x in inputs]
                    ours = with_gradients(core_of_mode[mode], local, plan_of_rank, dtype)
                    off = [(o - e[rows]).abs().max().item() for o, e in zip(ours, exact)]
                    alone_off = [(a - e).abs().max().item() for a, e in zip(alone, exact)]
                    largest = [e.abs().max().item() for e in exact]
                    found[context, name, mode, dtype] = list(zip(off, alone_off, largest))
    return found


def gradient_errors() -> dict[str, float]:
    """How far the gradients of a small model are, summed over two ranks that share its row, from those of one."""
    core_of_mode, rank = cores(2)
    ring = core_of_mode["ring"]
    batch = make_batch([41, 1, 25, 6, 23])
    gradients = {}
    for mode in ("alone", *MODES):
        torch.manual_seed(0)
        model = AVLM(MODEL)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        if mode != "alone":
            apply_context(model, ring.group, ring.gradient_group, mode)
            assert all(type(block.attention.core) is type(core_of_mode[mode]) for block in model.decoder.blocks)
        model(cut(batch, rank, 1 if mode == "alone" else 2)[0])[0].backward()
        gradients[mode] = [parameter.grad for parameter in model.parameters()]
        if mode != "alone":
            for gradient in gradients[mode]:
                torch.distributed.all_reduce(gradient)
    off = lambda mode: max((g - a).abs().max() / a.abs().max() for g, a in zip(gradients[mode], gradients["alone"]))
    return {mode: off(mode).item() for mode in MODES}


def peaks(num_tokens: int) -> dict[str, int]:
    """Most bytes that attention over one document and its backward hold: on one rank, and on each of a ring of four."""
    core_of_mode, rank = cores(4)
    plan_of_rank, _ = of_segments([num_tokens], rank, 4)
    plain = AttentionCore(causal=True), Segments.of([num_tokens]), num_tokens
    found = {}
    for name, (core, segments, rows) in {
        "one": plain,
        "four": (core_of_mode["ring"], plan_of_rank, num_tokens // 4),
    }.items():
        with LiveBytes() as memory:
            q, k, v = (torch.randn(rows, heads, 64, requires_grad=True) for heads in (8, 2, 2))
            out = core(q, k, v, segments)
            out.backward(torch.ones_like(out))
        found[name] = memory.peak
    return found


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
                slack = 4 * torch.finfo(case[-1]).eps * max(1.0, largest) if case[-1] == torch.float32 else 0.0
                assert off <= 2 * alone_off + slack, f"{case} {tensor}: {off:.3g} off, one process {alone_off:.3g}"


def test_a_decoder_on_two_ranks_has_the_gradients_of_one(two_ranks):
    for found in two_ranks:
        assert all(off < 1e-5 for off in found["gradients"].values()), found["gradients"]


def test_a_ring_of_four_holds_little_over_a_quarter(four_ranks):
    for found in four_ranks:
        assert found["peaks"]["four"] <= 0.3 * found["peaks"]["one"], found["peaks"]


def test_a_plan_moves_to_a_device_with_all_that_it_holds():
    moved = cut(make_batch([41, 1, 0, 25, 6, 23]), 1, 4)[0].segments.to("meta")

    def check(value):
        if isinstance(value, torch.Tensor):
            assert value.device.type == "meta"
        elif isinstance(value, tuple):
            [check(inner) for inner in value]
        elif dataclasses.is_dataclass(value):
            [check(getattr(value, field.name)) for field in dataclasses.fields(value)]

    check(moved)
    assert moved.ring[0][0] is moved.ring[0][1], "one object: kernels take it for self-attention"

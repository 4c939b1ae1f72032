"""The Triton kernels of attention, run by the public function in Triton's interpreter, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from avlm.config.decoder import DecoderConfig
from avlm.models.decoder import Decoder
from avlm.models.rope import rope_frequencies, rope_table
from kernels import attention_backward, attention_forward, attention_statistics, attention_tiles
from kernels.attention import (
    _backward_op,
    _forward_op,
    attention,
    attention_reference,
    attention_with_lse,
    attention_with_lse_reference,
)
from kernels.segments import Segments
from tests.kernels.exact import NAMES, assert_as_exact_as_pytorch, random_inputs, results, slots

pytestmark = pytest.mark.interpreter
LENGTHS = [130, 1, 0, 200, 65]  # around the edges of a tile


def small_tiles(monkeypatch, late: bool = False, rows: int = 16, keys: int = 16):
    """Many blocks for few rows. ``late``: products are issued one iteration late where they can be."""
    tile = lambda E: dict(BLOCK_M=rows, BLOCK_N=keys, BLOCK_E=max(16, 1 << (E - 1).bit_length()))
    monkeypatch.setattr(attention_forward, "forward_config", lambda E, *_: tile(E) | dict(LATE_PV=late))
    monkeypatch.setattr(attention_backward, "keys_config", lambda E, *_: tile(E) | dict(LATE_DK=late))
    monkeypatch.setattr(attention_backward, "queries_config", lambda E, _: tile(E))


def add_dq(monkeypatch):
    monkeypatch.setattr(attention_backward, "one_pass", lambda *_: True)


def test_the_public_function_runs_the_kernels(launches):
    q = torch.randn(5, 2, 16, requires_grad=True)
    attention(q, q, q, Segments.of([5]), causal=True).sum().backward()
    assert launches == ["_forward_kernel", "_statistics_kernel", "_keys_kernel", "_queries_kernel"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "dtype"),
    [
        (64, 2, 2, torch.float16),
        (80, 2, 1, torch.float16),
        (96, 2, 1, torch.float32),
        (128, 2, 1, torch.float16),
        (256, 1, 1, torch.float16),
        (20, 2, 1, torch.float32),
        (64, 3, 1, torch.float32),
    ],
)
def test_every_head_dim_with_the_tiles_that_ship(head_dim, heads, kv_heads, dtype, causal):
    segments = Segments.of(LENGTHS if dtype == torch.float16 else [40, 0, 33])
    inputs = random_inputs(segments, segments, heads, kv_heads, head_dim, dtype)
    assert_as_exact_as_pytorch(inputs, dtype, segments, segments, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_dq_added_up_by_the_keys_kernel(causal, monkeypatch, descriptors_that_add, launches):
    add_dq(monkeypatch)
    segments = Segments.of(LENGTHS)
    inputs = random_inputs(segments, segments, 4, 2, 64, torch.float16)
    assert_as_exact_as_pytorch(inputs, torch.float16, segments, segments, causal=causal)
    assert "_queries_kernel" not in launches
    assert_as_exact_as_pytorch(inputs, torch.float16, segments, segments, causal=causal, deterministic=True)
    assert "_queries_kernel" in launches


@st.composite
def layouts(draw):
    """Segments of queries and keys, each perhaps with slots that are partly used."""
    count = draw(st.integers(1, 4))
    numbers = st.lists(st.integers(0, 34), min_size=count, max_size=count)
    q_lengths = draw(numbers)
    k_lengths = q_lengths if draw(st.booleans()) else draw(numbers)
    part = lambda lengths: [draw(st.integers(0, n)) for n in lengths] if draw(st.booleans()) else None
    return (q_lengths, part(q_lengths)), (k_lengths, part(k_lengths))


@given(layout=layouts(), causal=st.booleans(), group=st.integers(1, 3), kv_heads=st.integers(1, 2), data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_segments_slots_and_groups_of_heads(layout, causal, group, kv_heads, data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    segments, segments_k = (slots(*lengths) for lengths in layout)
    with pytest.MonkeyPatch.context() as patch:
        rows, keys = data.draw(st.sampled_from([(16, 16), (32, 16), (16, 32)]))
        small_tiles(patch, data.draw(st.booleans()), rows, keys)
        inputs = random_inputs(segments, segments_k, group * kv_heads, kv_heads, 16, dtype)
        assert_as_exact_as_pytorch(inputs, dtype, segments, segments_k, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_scores_of_ten_thousand_neither_overflow_nor_vanish(causal):
    """A log-sum-exp of 1e4 in float32 is known to 1e-3, and so are the probabilities that the backward makes of it."""
    segments = Segments.of([70, 3])
    q, k, v, dout, dlse = random_inputs(segments, segments, 2, 2, 64, torch.float32)
    inputs = [q * 100, k * 100, v, dout, dlse]
    ours, exact = (
        results(function, inputs, dtype, segments, segments, causal=causal, scale=0.1)
        for function, dtype in ((attention_with_lse, torch.float32), (attention_with_lse_reference, torch.float64))
    )
    assert 1e4 < exact["lse"].abs().max() < 1e5
    for name in NAMES:
        off = (ours[name] - exact[name]).abs().max() / exact[name].abs().max()
        assert off < (1e-4 if name == "out" else 1e-6 if name == "lse" else 0.02), f"{name}: {off:.2g}"


@pytest.mark.parametrize(("rows", "keys"), [(16, 16), (32, 16), (16, 32)])
def test_the_diagonal_at_every_place_in_a_tile(rows, keys, monkeypatch):
    small_tiles(monkeypatch, True, rows, keys)
    offsets = range(-8, 8)
    segments, segments_k = Segments.of([24] * len(offsets)), Segments.of([24 + d for d in offsets])
    inputs = random_inputs(segments, segments_k, 1, 1, 16, torch.float32)
    assert_as_exact_as_pytorch(inputs, torch.float32, segments, segments_k, causal=True)


def test_more_segments_than_a_program_counts_at_a_time(monkeypatch):
    small_tiles(monkeypatch)
    segments = Segments.of([1] * 130 + [5])
    q, k, v = (torch.randn(135, 1, 16) for _ in range(3))
    out, expected = (f(q, k, v, segments, causal=True) for f in (attention, attention_reference))
    assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("one_pass", [False, True])
def test_memory_that_nobody_wrote_does_not_show(one_pass, poisoned, monkeypatch, descriptors_that_add):
    if one_pass:
        add_dq(monkeypatch)
    segments, segments_k = slots([20, 30], [11, 30]), slots([40, 17], [33, 0])
    inputs = random_inputs(segments, segments_k, 2, 1, 16, torch.float32)
    for causal in (False, True):
        options = dict(causal=causal, deterministic=not one_pass)
        assert_as_exact_as_pytorch(inputs, torch.float32, segments, segments_k, **options)


@pytest.mark.parametrize("one_pass", [False, True])
def test_a_document_has_exactly_no_influence_on_another(one_pass, monkeypatch, descriptors_that_add):
    if one_pass:
        add_dq(monkeypatch)
    q, k, v = (torch.randn(150, 2, 64, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, Segments.of([70, 80]), causal=False)
    gradients = torch.autograd.grad(out[:70].square().sum(), (q, k, v))
    assert all(g[:70].any() and not g[70:].any() for g in gradients)
    with torch.no_grad():
        k[70:], v[70:] = torch.inf, torch.nan
    assert attention(q, k, v, Segments.of([70, 80]), causal=False)[:70].equal(out[:70])


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(2, 29, 16).transpose(0, 1),
        lambda: torch.randn(29, 2, 32)[..., ::2],
        lambda: torch.randn(29, 33)[:, :32].unflatten(1, (2, 16)),
        lambda: torch.randn(29 * 32 + 1)[1:].view(29, 2, 16),
        lambda: torch.randn(2, 16).expand(29, 2, 16),
    ],
    ids=["heads first", "every second", "odd rows", "odd start", "one row for all"],
)
def test_strides_that_the_copy_engine_cannot_read_are_copied(make):
    segments = Segments.of([20, 9])
    q, k, v = (make() for _ in range(3))
    assert attention_tiles.loadable(q, 16) is not q
    out = attention(q, k, v, segments, causal=True)
    assert torch.allclose(out, attention_reference(q, k, v, segments, causal=True), atol=1e-5)


def test_parts_of_a_fused_projection_are_read_in_place():
    qkv = torch.randn(29, 6, 64, dtype=torch.float16)
    q, k, v = qkv.split(2, dim=1)
    assert all(attention_tiles.loadable(x, 64) is x for x in (q, k, v))
    out = attention(q, k, v, Segments.of([29]), causal=True)
    expected = attention_reference(q, k, v, Segments.of([29]), causal=True)
    assert torch.allclose(out.float(), expected.float(), atol=2e-3)


@pytest.mark.parametrize("head_dim", [8, 72, 80, 96, 112, 192])
def test_head_dims_that_are_no_powers_of_two_are_read_in_place(head_dim):
    q = torch.randn(29, 2, head_dim, dtype=torch.float16)
    assert attention_tiles.loadable(q, attention_tiles.padded_head_dim(head_dim)) is q


def test_boundaries_with_gaps_between_them_are_read_right():
    cu_seqlens = torch.tensor([0, 99, 12, 99, 20, 99], dtype=torch.int32)[::2]
    lengths = torch.tensor([[9, 99], [8, 99]], dtype=torch.int32)[:, 0]
    q, k, v = (torch.randn(20, 2, 16, requires_grad=True) for _ in range(3))
    strided, plain = Segments(cu_seqlens, 12, lengths), slots([12, 8], [9, 8])
    a, b = (attention(q, k, v, segments, causal=True) for segments in (strided, plain))
    assert a.equal(b)
    gradients = [torch.autograd.grad(x.sum(), (q, k, v)) for x in (a, b)]
    assert all(x.equal(y) for x, y in zip(*gradients))


@pytest.mark.parametrize("lengths", [[0], [], [0, 0]])
def test_no_tokens_give_no_output_and_no_gradient(lengths):
    q, k, v = (torch.randn(0, 2, 16, requires_grad=True) for _ in range(3))
    out, lse = attention_with_lse(q, k, v, Segments.of(lengths), causal=True)
    assert out.shape == (0, 2, 16) and lse.shape == (2, 0)
    assert all(g.shape == (0, 2, 16) for g in torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)))


def test_keys_that_come_in_parts_give_the_whole(monkeypatch):
    """What ring attention does: out and lse go on from part to part, gradients of the parts add up."""
    small_tiles(monkeypatch)
    segments, left, right = Segments.of([50, 7]), Segments.of([31, 0]), Segments.of([19, 7])
    whole = Segments.of([50, 7])
    q, k, v, dout, dlse = random_inputs(segments, whole, 4, 2, 16, torch.float32)
    rows = [torch.arange(31), torch.cat([torch.arange(31, 50), torch.arange(50, 57)])]
    parts = [(k[r], v[r], part) for r, part in zip(rows, (left, right))]
    out, lse = None, None
    for k_part, v_part, part in parts:
        earlier = None if out is None else (out.float(), lse)
        out, lse = attention_forward.forward(q, k_part, v_part, segments, part, False, 0.25, earlier=earlier)
    expected, expected_lse = attention_with_lse(q, k, v, segments, causal=False, scale=0.25)
    assert out.dtype == torch.float32
    assert torch.allclose(out, expected, atol=1e-5) and torch.allclose(lse, expected_lse, atol=1e-5)

    statistics = attention_statistics.statistics(out, dout, lse, dlse)
    backward = lambda k, v, part: attention_backward.backward(
        dout, q, k, v, *statistics, segments, part, False, 0.25, True, torch.float32
    )
    dq, dk, dv = backward(k, v, whole)
    shares = [backward(*part) for part in parts]
    assert torch.allclose(sum(share[0] for share in shares), dq, atol=1e-5)
    for i, gradient in ((1, dk), (2, dv)):
        assert torch.allclose(torch.cat([share[i] for share in shares]), gradient, atol=1e-5)


def test_earlier_results_of_queries_without_new_keys_stay():
    segments, none = Segments.of([20, 20]), Segments.of([0, 20])
    q, k, v = torch.randn(40, 2, 16), torch.randn(20, 2, 16), torch.randn(20, 2, 16)
    earlier_out, earlier_lse = torch.randn(40, 2, 16), torch.randn(2, 40)
    earlier_out[25:] = 0.0
    earlier_lse[:, 25:] = -torch.inf
    earlier = earlier_out, earlier_lse
    out, lse = attention_forward.forward(q, k, v, segments, none, False, 0.25, earlier=earlier)
    assert torch.allclose(out[:20], earlier_out[:20])
    assert torch.allclose(lse[:, :20], earlier_lse[:, :20])
    alone, alone_lse = attention_with_lse(q, k, v, segments, causal=False, segments_k=none)
    assert torch.allclose(out[25:], alone[25:]) and torch.allclose(lse[:, 25:], alone_lse[:, 25:])


def test_the_op_keeps_its_promises_to_torch():
    segments = Segments.of([9, 4])
    q, k, v = (torch.randn(13, h, 16) for h in (4, 2, 2))
    layout = (segments.cu_seqlens, segments.cu_seqlens, *[None] * 6, 8, 8, True, 0.25, None)
    torch.library.opcheck(_forward_op, (q, k, v, *layout))
    out, lse = _forward_op(q, k, v, *layout)
    torch.library.opcheck(_backward_op, (out, lse, q, k, v, out, lse, *layout, True))


def test_a_compiled_decoder_block_has_no_graph_break_and_the_same_gradients():
    size = dict(vocab_size=8, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, num_kv_heads=1)
    decoder = Decoder(DecoderConfig(**size))
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    [block] = decoder.blocks
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for lengths in ([5, 3], [6, 3, 4], [2, 2, 2, 1]):
        x, position = torch.randn(sum(lengths), 32), torch.cat([torch.arange(n) for n in lengths])
        rope = rope_table(rope_frequencies(decoder.config, "cpu"), position)
        a, b = (f(x, rope, Segments.of(lengths)) for f in (block, compiled))
        gradients = [torch.autograd.grad(y.square().sum(), list(block.parameters())) for y in (a, b)]
        assert torch.allclose(a, b, atol=1e-5)
        assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in zip(*gradients))


def test_a_tensor_that_is_query_key_and_value_keeps_all_its_gradient_when_compiled():
    function = lambda x: attention(x, x, x, Segments.of([5, 3]), causal=True).square().sum()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = torch.randn(8, 2, 16, requires_grad=True)
    [a], [b] = (torch.autograd.grad(f(x), x) for f in (function, compiled))
    assert torch.allclose(a, b, atol=1e-6)


def test_checkpointing_and_torch_func_see_one_op(launches):
    q, k, v = (torch.randn(9, 2, 16, requires_grad=True) for _ in range(3))
    run = lambda *qkv: attention(*qkv, Segments.of([9]), causal=True).square().sum()
    expected = torch.autograd.grad(run(q, k, v), (q, k, v))
    launches.clear()
    kept = torch.autograd.grad(checkpoint(run, q, k, v, use_reentrant=False), (q, k, v))
    assert launches.count("_forward_kernel") == 2
    functional = torch.func.grad(run, argnums=(0, 1, 2))(q, k, v)
    assert all(a.equal(b) and a.equal(c) for a, b, c in zip(expected, kept, functional))


def test_a_second_derivative_is_refused():
    q = torch.randn(5, 2, 16, requires_grad=True)
    [gradient] = torch.autograd.grad(
        attention(q, q, q, Segments.of([5]), causal=True).square().sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()

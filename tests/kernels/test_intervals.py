"""Attention whose masks are intervals of keys, and attention with a soft cap: plain PyTorch against a dense mask in
float64, the Triton kernels against plain PyTorch."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.attention import (
    _backward_op,
    _forward_op,
    attention,
    attention_reference,
    attention_with_lse,
    attention_with_lse_reference,
)
from kernels.segments import Intervals, Segments
from tests.kernels.exact import assert_as_exact_as_pytorch, random_inputs, slots
from tests.kernels.test_attention_kernel import add_dq, small_tiles

IMAGES = (5, 9), (20, 31)  # rows of a document, from and to
MASKS = {
    "sliding window": lambda i, L: (i - 9, i),
    "chunks": lambda i, L: (i // 12 * 12, i),
    "prefix, then causal": lambda i, L: (0 * i, i.clamp(min=min(13, L) - 1)),
    "images in a causal row": lambda i, L: (0 * i, last_of_image(i, L)),
    "nothing for every third": lambda i, L: (i - 5, torch.where(i % 3 == 0, i - 6, i).cummax(0).values),
    "keys that nobody sees": lambda i, L: (torch.where(i < 20, 0, 26), torch.where(i < 20, 7, i)),
    "nothing at all": lambda i, L: (0 * i, 0 * i - 1),
}


def last_of_image(i: Tensor, L: int) -> Tensor:
    for start, end in IMAGES:
        i = torch.where((i >= start) & (i < end), min(end, L) - 1, i)
    return i


def masked(lengths: list[int], mask: str) -> Segments:
    """Segments of these lengths that see themselves through a mask."""
    segments = Segments.of(lengths)
    parts = [MASKS[mask](torch.arange(length), length) for length in lengths]
    first_T, last_T = (torch.cat(part) for part in zip(*parts))
    return dataclasses.replace(segments, intervals=Intervals.of(first_T, last_T, segments, segments))


@st.composite
def random_masks(draw):
    """Segments of queries and of keys, perhaps with slots, and any intervals whose ends never fall."""
    count = draw(st.integers(1, 3))
    numbers = st.lists(st.integers(0, 34), min_size=count, max_size=count)
    q_lengths = draw(numbers)
    k_lengths = q_lengths if draw(st.booleans()) else draw(numbers)
    used = [draw(st.integers(0, n)) for n in q_lengths] if draw(st.booleans()) else None
    segments = slots(q_lengths, used)
    segments_k = segments
    if k_lengths is not q_lengths:
        used = [draw(st.integers(0, n)) for n in k_lengths] if draw(st.booleans()) else None
        segments_k = slots(k_lengths, used)
    first, last = [], []
    for Q, L in zip(q_lengths, k_lengths):
        ends = st.lists(st.integers(-3, L + 3), min_size=Q, max_size=Q)
        first += sorted(draw(ends))
        last += sorted(draw(ends))
    intervals = Intervals.of(torch.tensor(first).int(), torch.tensor(last).int(), segments, segments_k)
    return dataclasses.replace(segments, intervals=intervals), segments_k


def dense(q, k, v, segments, segments_k, scale, softcap) -> tuple[Tensor, Tensor]:
    """out_THE and lse_HT from a mask of all rows by all keys."""
    visible_TS = torch.zeros(len(q), len(k), dtype=torch.bool)
    seen = segments.intervals
    for (q_start, Q), (k_start, L) in zip(segments.spans, segments_k.spans):
        for i in range(q_start, q_start + Q):
            for j in range(L):
                visible_TS[i, k_start + j] = seen.first_T[i] <= j <= seen.last_T[i]
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    s_HTS = scale * torch.einsum("the,she->hts", q, k)
    if softcap is not None:
        s_HTS = softcap * torch.tanh(s_HTS / softcap)
    p_HTS = torch.where(visible_TS, s_HTS.exp(), 0.0)
    is_empty_HT = p_HTS.sum(-1) == 0
    total_HT = torch.where(is_empty_HT, 1.0, p_HTS.sum(-1))
    lse_HT = torch.where(is_empty_HT, -torch.inf, total_HT.log())
    return torch.einsum("hts,she->the", p_HTS / total_HT[..., None], v), lse_HT


@pytest.mark.parametrize("softcap", [None, 1.5])
@given(masks=random_masks(), past=st.integers(0, 3), causal=st.booleans(), data=st.data())
@settings(max_examples=30, deadline=None)
def test_plain_pytorch_follows_a_dense_mask(softcap, masks, past, causal, data):
    segments, segments_k = masks
    past = past if segments_k is segments else 0
    if past:  # rows that belong to no segment
        pad = lambda x: torch.nn.functional.pad(x, (0, past))
        values = [pad(getattr(segments.intervals, field.name)) for field in dataclasses.fields(Intervals)]
        segments = segments_k = dataclasses.replace(segments, intervals=Intervals(*values))
    kv_heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    torch.manual_seed(0)
    T, S = int(segments.cu_seqlens[-1]) + past, int(segments_k.cu_seqlens[-1]) + past
    q = torch.randn(T, kv_heads * group, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(S, kv_heads, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    dout, dlse = torch.randn_like(q), torch.randn(kv_heads * group, T, dtype=torch.float64)
    expected, expected_lse = dense(q, k, v, segments, segments_k, 0.7, softcap)
    options = dict(causal=causal, segments_k=segments_k, scale=0.7, softcap=softcap)
    out = attention_reference(q, k, v, segments, **options)
    out_too, lse = attention_with_lse_reference(q, k, v, segments, **options)
    assert torch.allclose(out, expected, atol=1e-12) and torch.allclose(out_too, expected, atol=1e-12)
    assert torch.allclose(lse.double(), expected_lse, atol=1e-5)
    gradients = lambda out: torch.autograd.grad((out * dout).sum(), (q, k, v), retain_graph=True)
    for a, b, c in zip(gradients(expected), gradients(out), gradients(out_too)):
        assert torch.allclose(a, b, atol=1e-11) and torch.allclose(a, c, atol=1e-11)
    seen = expected_lse > -torch.inf
    if seen.any():
        of_lse = lambda lse: torch.autograd.grad((lse.double() * dlse)[seen].sum(), (q, k))
        for a, b in zip(of_lse(expected_lse), of_lse(lse)):
            assert torch.allclose(a, b, atol=1e-5)


def test_a_window_is_what_it_says():
    segments = Segments.of([5, 0, 3]).within(2)
    seen = segments.intervals
    assert seen.first_T.tolist() == [0, 0, 1, 2, 3, 0, 0, 1] and seen.last_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    same = Intervals.of(seen.first_T, seen.last_T, segments, segments)
    assert same.first_query_S.equal(seen.first_query_S)
    assert same.last_query_S.tolist() == [1, 2, 3, 4, 4, 1, 2, 2]  # our own may point past the end
    whole = Segments.of([5, 2])
    assert whole.within(5) is whole, "the causal mask says it all"
    moved = segments.to("meta")
    assert moved.intervals.last_query_S.device.type == "meta"


def test_intervals_that_fall_are_refused():
    segments = Segments.of([2, 3])
    Intervals.of(torch.tensor([1, 1, 0, 0, 0]), torch.tensor([1, 1, 0, 1, 2]), segments, segments)
    with pytest.raises(ValueError, match="must not fall within a segment"):
        Intervals.of(torch.tensor([1, 0, 0, 0, 0]), torch.tensor([1, 1, 0, 1, 2]), segments, segments)


ROW = torch.zeros(5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("intervals", "options", "message"),
    [
        ((ROW.long(), ROW, ROW, ROW), {}, r"intervals\.first_T must be an int32 vector of 5, not torch\.int64 \(5,\)"),
        ((ROW, ROW[:4], ROW, ROW), {}, r"intervals\.last_T must be an int32 vector of 5, not torch\.int32 \(4,\)"),
        ((ROW, ROW, ROW[None], ROW), {}, r"intervals\.first_query_S must .*\(1, 5\)"),
        ((ROW, ROW, ROW, ROW.to("meta")), {}, "on the device of their rows, cpu, not meta"),
        ((ROW, ROW, ROW, ROW), {"softcap": 0.0}, "softcap must be above 0 and at most 1000, not 0.0"),
        ((ROW, ROW, ROW, ROW), {"softcap": float("inf")}, "softcap must be above 0 and at most 1000, not inf"),
    ],
)
@pytest.mark.parametrize("function", [attention, attention_with_lse])
def test_what_does_not_fit_is_told_in_one_line(function, intervals, options, message):
    segments = dataclasses.replace(Segments.of([5]), intervals=Intervals(*intervals))
    q = torch.zeros(5, 2, 8)
    with pytest.raises(ValueError, match=message) as caught:
        function(q, q, q, segments, causal=True, **options)
    assert "\n" not in str(caught.value)


def test_debug_mode_reads_the_intervals(monkeypatch):
    monkeypatch.setattr("kernels.backend.DEBUG", True)
    q = torch.zeros(5, 2, 8)
    right = Segments.of([2, 3]).within(2)
    attention(q, q, q, right, causal=True)
    for name, values, message in (
        ("first_T", [0, -1, 0, 0, 1], "must not be negative: -1"),
        ("last_T", [1, 0, 0, 1, 2], "must not fall within a segment"),
        ("last_query_S", [1, 1, 0, 2, 2], "not the queries that see each key"),
        ("first_query_S", [0, 0, 0, 1, 2], "not the queries that see each key"),
    ):
        wrong = dataclasses.replace(right.intervals, **{name: torch.tensor(values, dtype=torch.int32)})
        with pytest.raises(ValueError, match=message):
            attention(q, q, q, dataclasses.replace(right, intervals=wrong), causal=True)


# In the interpreter, with our own kernels.


@pytest.mark.interpreter
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("mask", MASKS)
def test_kernels_follow_every_kind_of_mask(mask, softcap, late, monkeypatch):
    small_tiles(monkeypatch, late)
    segments = masked([40, 0, 1, 57], mask)
    inputs = random_inputs(segments, segments, 2, 1, 16, torch.float32)
    options = dict(causal=mask != "nothing at all", softcap=softcap)
    assert_as_exact_as_pytorch(inputs, torch.float32, segments, segments, **options)


@pytest.mark.interpreter
@given(masks=random_masks(), softcap=st.sampled_from([None, 3.0]), causal=st.booleans(), data=st.data())
@settings(max_examples=25, deadline=None)
def test_kernels_follow_any_mask(masks, softcap, causal, data):
    segments, segments_k = masks
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    with pytest.MonkeyPatch.context() as patch:
        rows, keys = data.draw(st.sampled_from([(16, 16), (32, 16), (16, 32)]))
        small_tiles(patch, data.draw(st.booleans()), rows, keys)
        inputs = random_inputs(segments, segments_k, 2, data.draw(st.integers(1, 2)), 16, dtype)
        assert_as_exact_as_pytorch(inputs, dtype, segments, segments_k, causal=causal, softcap=softcap)


@pytest.mark.interpreter
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_the_tiles_that_ship(head_dim, softcap):
    segments = Segments.of([300, 70]).within(100)
    inputs = random_inputs(segments, segments, 2, 1, head_dim, torch.float16)
    assert_as_exact_as_pytorch(inputs, torch.float16, segments, segments, causal=True, softcap=softcap)


@pytest.mark.interpreter
@pytest.mark.parametrize("mask", [None, "sliding window", "images in a causal row"])
@pytest.mark.parametrize("one_pass", [False, True])
def test_rows_past_the_last_segment_are_nothing(one_pass, mask, poisoned, monkeypatch, descriptors_that_add):
    small_tiles(monkeypatch)
    if one_pass:
        add_dq(monkeypatch)
    past = 37  # more than a tile
    segments = Segments.of([20, 33])
    if mask:
        segments = masked([20, 33], mask)
        pad = lambda x: torch.nn.functional.pad(x, (0, past))
        values = [pad(getattr(segments.intervals, field.name)) for field in dataclasses.fields(Intervals)]
        segments = dataclasses.replace(segments, intervals=Intervals(*values))
    q, k, v, dout = (torch.randn(53 + past, 2, 16, requires_grad=True) for _ in range(4))
    inputs = [q, k, v, dout, torch.randn(2, 53 + past)]
    options = dict(causal=True, deterministic=not one_pass)
    assert_as_exact_as_pytorch(inputs, torch.float32, segments, segments, **options)
    for function in (attention_with_lse, attention_with_lse_reference):
        out, lse = function(q, k, v, segments, causal=True)
        gradients = torch.autograd.grad((out * dout).sum(), (q, k, v))
        assert (lse[:, 53:] == -torch.inf).all() and lse[:, :53].isfinite().all()
        for x in (out, *gradients):
            assert not x[53:].any() and x[:53].isfinite().all()


@pytest.mark.interpreter
def test_the_ops_keep_their_promises_with_intervals():
    segments = Segments.of([9, 4]).within(3)
    seen = segments.intervals
    q, k, v = (torch.randn(13, h, 16) for h in (4, 2, 2))
    intervals = seen.first_T, seen.last_T, seen.first_query_S, seen.last_query_S
    layout = (segments.cu_seqlens, None, None, None, *intervals, 9, 9, True, 0.25, 5.0)
    torch.library.opcheck(_forward_op, (q, k, v, *layout))
    out, lse = _forward_op(q, k, v, *layout)
    torch.library.opcheck(_backward_op, (out, lse, q, k, v, out, lse, *layout, True))


@pytest.mark.interpreter
def test_a_compiled_window_has_the_same_gradients(launches):
    function = lambda x, segments: attention(x, x, x, segments, causal=True, softcap=4.0).square().sum()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = torch.randn(8, 2, 16, requires_grad=True)
    segments = Segments.of([5, 3]).within(2)
    [a], [b] = (torch.autograd.grad(f(x, segments), x) for f in (function, compiled))
    assert torch.allclose(a, b, atol=1e-6)
    assert launches.count("_forward_kernel") == 2


@pytest.mark.interpreter
def test_keys_before_a_segment_are_never_seen_whatever_the_intervals_say():
    """Intervals are not read on the host. What begins before a segment must not reach the one before it."""
    segments = Segments.of([20, 26])
    row_T = torch.cat([torch.arange(n) for n in (20, 26)]).int()
    made = Intervals(row_T - 9, row_T, row_T, row_T + 9)
    q, k, v = (torch.randn(46, 2, 16, requires_grad=True) for _ in range(3))
    outs = [
        attention(q, k, v, dataclasses.replace(segments, intervals=intervals), causal=True)
        for intervals in (made, Intervals.of(row_T - 9, row_T, segments, segments))
    ]
    assert outs[0].equal(outs[1])
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in outs]
    assert all(a.equal(b) for a, b in zip(*gradients))


@pytest.mark.interpreter
def test_the_backward_of_slots_that_leave_rows_over():
    segments = dataclasses.replace(Segments.of([10, 12]), lengths=torch.tensor([7, 12], dtype=torch.int32))
    q, k, v = (torch.randn(29, 2, 16, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, segments, causal=True)
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert not out[22:].any() and all(not g[22:].any() and g[:7].any() for g in gradients)

"""Torch's own attention over packed rows behind our functions: layout, slots, queries without keys, gradients, rings.

The kernels need a GPU of sm_80 or later. On the CPU an exact stand-in with their conventions takes their place, so that
what is ours around them is tested everywhere; the tests marked gpu run the kernels themselves.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import attention_varlen, backend
from kernels.attention import attention, attention_reference, attention_with_lse, attention_with_lse_reference
from kernels.attention_block import block_backward, block_forward, statistics
from kernels.segments import Segments
from tests.kernels.exact import random_inputs, results, slots, spare_rows
from tests.kernels.flash_stand_in import stand_in

needs_cpu = pytest.mark.skipif(backend.INTERPRETED, reason="in the interpreter our own kernels run")
DEVICES = [pytest.param("cpu", marks=needs_cpu), pytest.param("cuda", marks=pytest.mark.gpu)]
FP16, BF16 = torch.float16, torch.bfloat16

# lengths of queries, of keys (None: the same segments), used part of both
LAYOUTS = {
    "packed": ([5, 1, 33, 16], None, None, None),
    "empty ones": ([0, 4, 0, 3, 0], None, None, None),
    "single tokens": ([1, 1, 1], None, None, None),
    "fewer queries": ([1, 3, 4], [9, 3, 20], None, None),
    "more queries": ([6, 2, 9], [4, 5, 1], None, None),
    "no keys, no queries": ([4, 3, 0], [0, 5, 6], None, None),
    "slots": ([4, 8, 3], None, [2, 8, 0], [2, 8, 0]),
    "slots of keys": ([3, 1, 2], [10, 10, 4], None, [7, 10, 0]),
    "slots of queries": ([3, 9, 2], [10, 10, 4], [1, 9, 0], None),
    "slots of both": ([3, 9, 2], [10, 10, 4], [1, 9, 0], [7, 10, 3]),
}


@pytest.fixture
def calls():
    """Calls of the stand-in, where the table is that of an A100."""
    with stand_in(80) as names:
        yield names


@pytest.fixture(params=DEVICES)
def device(request):
    """A GPU with its own table, or the CPU with the stand-in."""
    if request.param == "cpu":
        request.getfixturevalue("calls")
    return request.param


def layout(name, device):
    lengths, lengths_k, used, used_k = LAYOUTS[name]
    segments = slots(lengths, used, device)
    return segments, segments if lengths_k is None else slots(lengths_k, used_k, device)


def through_varlen(q, k, v, segments, *, causal, segments_k, scale=None):
    """out, whose gradient comes from torch's kernels, and lse, which has none there."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    out = attention(q, k, v, segments, causal=causal, segments_k=segments_k, scale=scale)
    with torch.no_grad():
        _, lse = attention_with_lse(q, k, v, segments, causal=causal, segments_k=segments_k, scale=scale)
    return out, lse


def without_dlse(q, k, v, segments, *, causal, segments_k, scale=None):
    out, lse = attention_with_lse_reference(q, k, v, segments, causal=causal, segments_k=segments_k, scale=scale)
    return out, lse.detach()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads", "dtype"), [(8, 2, 2, FP16), (72, 4, 2, BF16)])
def test_every_layout_is_as_exact_as_pytorch(name, causal, head_dim, heads, kv_heads, dtype, device):
    segments, segments_k = layout(name, device)
    inputs = random_inputs(segments, segments_k, heads, kv_heads, head_dim, dtype)
    exact, theirs, ours = (
        results(function, inputs, in_dtype, segments, segments_k, causal=causal)
        for function, in_dtype in (
            (without_dlse, torch.float64),
            (without_dlse, dtype),
            (through_varlen, dtype),
        )
    )
    for part, expected in exact.items():
        assert (ours[part] == -torch.inf).equal(expected == -torch.inf), part
        assert not ours[part].isnan().any(), part
        known = expected.isfinite()
        if known.any():
            theirs_off, ours_off = ((x[part][known] - expected[known]).abs().max() for x in (theirs, ours))
            floor = 4 * torch.finfo(dtype).eps * max(1.0, expected[known].abs().max())
            assert ours_off <= 2 * theirs_off + floor, f"{part}: {ours_off:.3g} off, PyTorch {theirs_off:.3g}"


@needs_cpu
def test_slots_become_segments_without_spare_room():
    """Used queries see used keys; spare queries see nothing; spare keys are seen by nobody."""
    cu_q, cu_k = attention_varlen.boundaries(slots([4, 3], [2, 3]), slots([5, 6], [5, 1]))
    assert cu_q.tolist() == [0, 2, 4, 4, 7, 7, 7]
    assert cu_k.tolist() == [0, 5, 5, 5, 6, 6, 11]
    assert cu_q.dtype == cu_k.dtype == torch.int32
    plain = Segments.of([4, 3])
    assert all(cu.equal(plain.cu_seqlens) for cu in attention_varlen.boundaries(plain, plain))


@needs_cpu
def test_the_mode_of_torch_decides_whether_gradients_repeat(calls):
    q = torch.randn(9, 2, 8, dtype=FP16, requires_grad=True)
    segments = Segments.of([5, 4])
    for asked, mode, expected in [
        (None, False, "backward"),
        (None, True, "deterministic backward"),
        (True, False, "deterministic backward"),
        (False, True, "backward"),
    ]:
        torch.use_deterministic_algorithms(mode)
        try:
            attention(q, q, q, segments, causal=True, deterministic=asked).sum().backward()
            assert torch.are_deterministic_algorithms_enabled() == mode
        finally:
            torch.use_deterministic_algorithms(False)
        assert calls[-2:] == ["forward", expected]


@needs_cpu
def test_a_gradient_of_lse_never_reaches_kernels_that_lack_it(calls):
    segments = Segments.of([5, 4])
    q, k, v = (torch.randn(9, 2, 8, dtype=FP16, requires_grad=True) for _ in range(3))
    double = [x.detach().double().requires_grad_() for x in (q, k, v)]
    ours, exact = (attention_with_lse(*x, segments, causal=True)[1].square().sum() for x in ((q, k, v), double))
    gradients, expected = (torch.autograd.grad(loss, x[:2]) for loss, x in ((ours, (q, k)), (exact, double)))
    assert calls == []
    for gradient, of_exact in zip(gradients, expected):
        assert torch.allclose(gradient.double(), of_exact, atol=0.02)


@needs_cpu
def test_views_of_one_fused_tensor_are_read_in_place_and_odd_ones_are_copied(calls):
    fused = torch.randn(12, 3, 2, 16, dtype=FP16)
    odd = torch.randn(12, 2, 20, dtype=FP16)[..., 4:]  # rows of 16 that do not start at multiples of 16 bytes
    segments = Segments.of([7, 5])
    for q, k, v in (
        fused.unbind(1),
        (odd, odd, odd),
        [x.transpose(0, 1).contiguous().transpose(0, 1) for x in [odd] * 3],
    ):
        out = attention(q, k, v, segments, causal=True)
        exact = attention_reference(*(x.double() for x in (q, k, v)), segments, causal=True)
        assert out.is_contiguous() and torch.allclose(out.double(), exact, atol=2e-3)


@needs_cpu
@pytest.mark.parametrize("learns", [True, False])
def test_a_compiled_function_has_one_graph_for_all_lengths(calls, learns):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, s: attention(q * 2, q, q, s, causal=True), fullgraph=True, backend=counter)
    q = torch.randn(12, 2, 8, dtype=FP16, requires_grad=learns)
    for lengths in ([12], [5, 7], [1] * 12, [4, 4, 4], [9, 1, 2]):
        segments = Segments.of(lengths)
        torch._dynamo.maybe_mark_dynamic(segments.cu_seqlens, 0)
        found, expected = compiled(q, segments), attention(q * 2, q, q, segments, causal=True)
        assert found.equal(expected)
        if learns:
            gradients = [torch.autograd.grad(x.sum(), q)[0] for x in (found, expected)]
            assert torch.allclose(*gradients, atol=2e-3)
    assert counter.frame_count <= 2  # the first may have a fixed number of segments


# Rings.

QUERIES = [40, 5, 0]
BLOCKS = [
    ([9, 4, 3], [9, 2, 0]),
    ([0, 7, 2], [0, 7, 1]),
    ([33, 0, 2], [20, 0, 2]),
    (QUERIES, None),
]  # lengths and used parts of keys; the last block is causal


@pytest.mark.parametrize(("heads", "kv_heads", "dtype"), [(2, 2, FP16), (6, 2, BF16)])
def test_blocks_of_a_ring_add_up_to_attention_over_all_keys(heads, kv_heads, dtype, device):
    queries = Segments.of(QUERIES, device)
    q, dout = torch.randn(2, sum(QUERIES), heads, 16, device=device).to(dtype)
    blocks = []
    for room, used in BLOCKS:
        segments = queries if used is None else slots(room, used, device)
        k, v = torch.randn(2, sum(room), kv_heads, 16, device=device).to(dtype)
        k[spare_rows(segments, len(k))] = v[spare_rows(segments, len(v))] = torch.nan
        blocks.append((k, v, segments, used is None))
    so_far = None
    for k, v, segments, causal in blocks:
        so_far = block_forward(q, k, v, queries, segments, causal=causal, scale=0.3, earlier=so_far)
    out, lse = so_far
    assert out.dtype == lse.dtype == torch.float32
    of_softmax = statistics(out.to(dtype), dout, lse)
    gradients = []
    for k, v, segments, causal in blocks:
        gradients.append(block_backward(dout, q, k, v, *of_softmax, queries, segments, causal=causal, scale=0.3))
    dq, dk, dv = zip(*gradients)
    assert all(x.dtype == torch.float32 for x in (*dq, *dk, *dv))
    exact = all_at_once(q, dout, blocks)
    ours = dict(out=out, lse=lse, dq=sum(dq), dk=torch.cat(dk), dv=torch.cat(dv))
    for name, expected in exact.items():
        # Results of four blocks, each rounded once, add up.
        bound = 4 * 4 * torch.finfo(dtype).eps * max(1.0, expected.abs().max())
        assert (ours[name].double() - expected).abs().max() < bound, name


def all_at_once(q, dout, blocks):
    """The same in float64 by autograd, from the used keys of all blocks, segment by segment; causal as a whole."""
    q = q.double().requires_grad_()
    k, v = (torch.cat([block[i] for block in blocks]).double().nan_to_num().requires_grad_() for i in (0, 1))
    rows, lengths = [], []
    for n in range(len(QUERIES)):
        offset = length = 0
        for keys, _, segments, _ in blocks:
            start, used = segments.spans[n]
            rows += range(offset + start, offset + start + used)
            length += used
            offset += len(keys)
        lengths.append(length)
    segments_k = Segments.of(lengths, q.device)
    out, lse = attention_with_lse_reference(
        q, k[rows], v[rows], blocks[-1][2], segments_k=segments_k, causal=True, scale=0.3
    )
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout.double())
    return dict(out=out.detach(), lse=lse.detach().double(), dq=dq, dk=dk, dv=dv)


# The ops of this torch.


@needs_cpu
@pytest.mark.parametrize("used", [None, [3, 2]])
def test_this_torch_takes_what_we_pass_and_returns_the_shapes_that_we_expect(used):
    """By its own fake implementations on a GPU that need not be there."""
    with FakeTensorMode(), torch.device("cuda"):
        q, k = torch.empty(9, 4, 72, dtype=BF16), torch.empty(9, 2, 72, dtype=BF16)
        cu = torch.empty(3, dtype=torch.int32)
        lengths = None if used is None else torch.empty(2, dtype=torch.int32)
        segments = Segments(cu, 5, lengths)
        out, lse = attention_varlen.forward(q, k, k, segments, segments, True, 0.5)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, BF16, (4, 9), torch.float32)
        gradients = attention_varlen.backward(q, q, k, k, out, lse, segments, segments, True, 0.5, False)
        assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, BF16) for x in (q, k, k)]

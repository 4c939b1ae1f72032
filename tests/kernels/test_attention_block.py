"""Attention over one block of keys after another, as in a ring, against attention over all keys in float64."""

import pytest
import torch

from kernels.attention import attention_reference, attention_with_lse_reference
from kernels.attention_block import CHUNK, block_backward, block_forward, statistics
from kernels.backend import INTERPRETED
from kernels.segments import Segments
from tests.kernels.exact import slots, spare_rows

# Lengths of three segments' queries, and of their keys in blocks: room, used part. The last block is causal.
QUERIES = [5 * CHUNK // 2, 5, 0]
BLOCKS = [
    ([9, 4, 3], [9, 2, 0]),
    ([0, 7, 2], [0, 7, 1]),
    ([33, 0, 2], [20, 0, 2]),
    (QUERIES, QUERIES),
]
SCALE = 0.3


def random_blocks(heads, kv_heads, dtype):
    """q, dout and (k, v, segments, causal) of each block; rows outside the used part of a slot are NaN."""
    q, dout = torch.randn(2, sum(QUERIES), heads, 16).to(dtype)
    blocks = []
    for room, used in BLOCKS:
        causal = room is QUERIES
        segments = Segments.of(QUERIES) if causal else slots(room, used)
        k, v = torch.randn(2, sum(room), kv_heads, 16).to(dtype)
        spare = spare_rows(segments, sum(room))
        k[spare] = torch.nan
        v[spare] = torch.nan
        blocks.append((k, v, segments, causal))
    return q, dout, blocks


def block_by_block(q, dout, blocks, dtype):
    """out, lse, dq, and dk and dv of all blocks one after the other."""
    q, dout = q.to(dtype), dout.to(dtype)
    so_far = None
    gradients = []
    queries = blocks[-1][2]  # the causal block, whose queries and keys have the same segments
    for k, v, segments, causal in blocks:
        options = dict(causal=causal, scale=SCALE, earlier=so_far)
        so_far = block_forward(q, k.to(dtype), v.to(dtype), queries, segments, **options)
    out, lse = so_far
    lse_and_delta = statistics(out.to(dtype), dout, lse)
    for k, v, segments, causal in blocks:
        inputs = dout, q, k.to(dtype), v.to(dtype), *lse_and_delta
        gradients.append(block_backward(*inputs, queries, segments, causal=causal, scale=SCALE))
    dq, dk, dv = zip(*gradients)
    return dict(out=out, lse=lse, dq=sum(dq), dk=torch.cat(dk), dv=torch.cat(dv))


def all_at_once(q, dout, blocks, dtype):
    """The same by autograd, from the keys of all blocks gathered segment by segment. They are causal as a whole: the
    queries see all keys of the earlier blocks."""
    keys, values, segments, _ = zip(*blocks)
    q = q.to(dtype).requires_grad_()
    k = torch.cat(keys).to(dtype).requires_grad_()
    v = torch.cat(values).to(dtype).requires_grad_()
    rows = []
    lengths = [0] * len(QUERIES)
    for n in range(len(QUERIES)):
        offset = 0
        for block, cut in zip(keys, segments):
            start, length = cut.spans[n]
            rows.append(torch.arange(offset + start, offset + start + length))
            lengths[n] += length
            offset += len(block)
    rows = torch.cat(rows)
    layout = dict(segments=segments[-1], segments_k=Segments.of(lengths))
    out, lse = attention_with_lse_reference(q, k[rows], v[rows], **layout, causal=True, scale=SCALE)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout.to(dtype))
    return dict(out=out.detach(), lse=lse.detach(), dq=dq, dk=dk, dv=dv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)])
def test_blocks_add_up_to_attention_over_all_keys(heads, kv_heads, dtype):
    given = random_blocks(heads, kv_heads, dtype)
    exact = all_at_once(*given, torch.float64)
    theirs = all_at_once(*given, dtype)
    ours = block_by_block(*given, dtype)
    for name, expected in exact.items():
        assert ours[name].dtype == torch.float32
        theirs_off, ours_off = ((x[name].double() - expected).abs().max() for x in (theirs, ours))
        floor = 4 * torch.finfo(dtype).eps * max(1.0, expected.abs().max())
        assert ours_off <= 2 * theirs_off + floor, f"{name}: {ours_off:.3g} off, PyTorch {theirs_off:.3g}"


def test_blocks_of_bfloat16_are_not_rounded_in_between():
    """Each of 40 blocks would add an error of its own."""
    segments = Segments.of([8])
    q, k, v = (torch.randn(n, 2, 16).bfloat16() for n in (8, 320, 320))
    exact = attention_reference(*(x.double() for x in (q, k, v)), segments, causal=False, segments_k=Segments.of([320]))
    so_far = None
    for block in zip(k.split(8), v.split(8)):
        so_far = block_forward(q, *block, segments, segments, causal=False, scale=16**-0.5, earlier=so_far)
    assert (so_far[0] - exact).abs().max() < 1e-5


def test_float64_stays_float64():
    given = random_blocks(4, 2, torch.float64)
    exact, ours = all_at_once(*given, torch.float64), block_by_block(*given, torch.float64)
    for name in ("out", "dq", "dk", "dv"):  # lse of the function that this is compared with is float32
        assert ours[name].dtype == torch.float64
        assert (ours[name] - exact[name]).abs().max() < 1e-12, name


def test_queries_without_keys_keep_what_earlier_blocks_gave():
    queries, keys = Segments.of([3, 4]), slots([0, 5], [0, 5])
    q, k, v = (torch.randn(n, 2, 16) for n in (7, 5, 5))
    options = dict(causal=False, scale=SCALE)
    out, lse = block_forward(q, k, v, queries, keys, **options)
    assert not out[:3].any() and (lse[:, :3] == -torch.inf).all()
    earlier = torch.randn(7, 2, 16), torch.randn(2, 7)
    later_out, later_lse = block_forward(q, k, v, queries, keys, **options, earlier=earlier)
    earlier_out, earlier_lse = earlier
    assert later_out[:3].equal(earlier_out[:3])
    assert torch.allclose(later_lse[:, :3], earlier_lse[:, :3])
    assert not torch.allclose(later_out[3:], earlier_out[3:])
    dq, *_ = block_backward(q, q, k, v, *statistics(out, q, lse), queries, keys, **options)
    assert not dq[:3].any() and dq[3:].any()


def test_more_queries_than_keys_leave_the_first_without_any():
    queries, keys = Segments.of([3 * CHUNK, 1]), Segments.of([5, 1])
    q, dout = torch.randn(2, 3 * CHUNK + 1, 2, 16)
    k, v = torch.randn(2, 6, 2, 16)
    options = dict(causal=True, scale=SCALE)
    out, lse = block_forward(q, k, v, queries, keys, **options)
    gradients = block_backward(dout, q, k, v, *statistics(out, dout, lse), queries, keys, **options)
    double = [x.double().requires_grad_() for x in (q, k, v)]
    exact = attention_reference(*double, queries, segments_k=keys, **options)
    no_keys = torch.arange(3 * CHUNK + 1) < 3 * CHUNK - 5
    assert not out[no_keys].any()
    assert (lse[:, no_keys] == -torch.inf).all()
    assert lse[:, ~no_keys].isfinite().all()
    for ours, expected in zip((out, *gradients), (exact, *torch.autograd.grad(exact, double, dout.double()))):
        assert torch.allclose(ours.double(), expected, atol=1e-5)


def test_a_block_without_rows_is_legal():
    nothing = Segments.of([])
    q, k = torch.randn(0, 2, 16), torch.randn(0, 1, 16)
    out, lse = block_forward(q, k, k, nothing, nothing, causal=True, scale=SCALE)
    assert out.shape == (0, 2, 16) and lse.shape == (2, 0)
    gradients = block_backward(q, q, k, k, *statistics(out, q, lse), nothing, nothing, causal=True, scale=SCALE)
    assert [x.shape[0] for x in gradients] == [0, 0, 0]


def test_intervals_are_refused_by_name():
    segments = Segments.of([5]).within(2)
    q = torch.zeros(5, 2, 8)
    with pytest.raises(ValueError, match=r"segments\.intervals are neither: gather all keys"):
        block_forward(q, q, q, segments, segments, causal=True, scale=1.0)


def test_the_kernels_do_the_blocks(launches):
    """In the interpreter. Otherwise the formula in PyTorch runs on the CPU."""
    block_by_block(*random_blocks(2, 1, torch.float32), torch.float32)
    kernels = {"_forward_kernel", "_statistics_kernel", "_keys_kernel", "_queries_kernel"}
    assert set(launches) == (kernels if INTERPRETED else set())

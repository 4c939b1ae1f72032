"""Attention against the formula in float64, one query at a time."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.attention import attention, attention_with_lse
from kernels.segments import Segments

# name: (query lengths, key lengths, used part of the query slots or None, of the key slots or None)
LAYOUTS = {
    "one": ([7], None, None, None),
    "several": ([5, 1, 33, 16, 16], None, None, None),
    "empty ones": ([0, 4, 0, 3, 0], None, None, None),
    "nothing": ([0], None, None, None),
    "fewer queries": ([1, 3, 4], [9, 3, 20], None, None),
    "more queries": ([6, 2], [4, 5], None, None),
    "no keys": ([4, 3], [0, 5], None, None),
    "slots": ([4, 8, 3], None, [2, 8, 0], None),
    "decoding into slots": ([1, 1, 1], [10, 10, 10], None, [7, 10, 1]),
}


def segments_of(lengths: list[int], used: list[int] | None) -> Segments:
    segments = Segments.of(lengths)
    if used is None:
        return segments
    return Segments(segments.cu_seqlens, segments.max_length, torch.tensor(used, dtype=torch.int32))


def naive(q: Tensor, k: Tensor, v: Tensor, segments: Segments, segments_k: Segments, causal: bool, scale: float):
    """out_THE and lse_HT by the definition: the visible keys of every single query."""
    outs, lses = {}, {}
    group = q.shape[1] // k.shape[1]
    for (q_start, Q), (k_start, L) in zip(segments.spans, segments_k.spans):
        for i in range(Q):
            visible = max(0, min(L, i + L - Q + 1)) if causal else L
            for head in range(q.shape[1]):
                keys = k[k_start : k_start + visible, head // group]
                score = scale * keys @ q[q_start + i, head]
                lses[head, q_start + i] = score.logsumexp(0) if visible else score.new_tensor(-torch.inf)
                values = v[k_start : k_start + visible, head // group]
                outs[q_start + i, head] = score.softmax(0) @ values
    zero = (q[0, 0] * 0 if len(q) else q.new_zeros(q.shape[2])) + 0 * (k.sum() + v.sum())
    T, H = q.shape[:2]
    rows = [torch.stack([outs.get((t, head), zero) for head in range(H)]) for t in range(T)]
    out = torch.stack(rows) if rows else q + 0 * (k.sum() + v.sum())
    lse = torch.tensor(
        [[lses[head, t].item() if (head, t) in lses else -torch.inf for t in range(T)] for head in range(H)]
    )
    return out, lse


def inputs(layout: str, heads: int, kv_heads: int, dtype: torch.dtype):
    lengths, lengths_k, used, used_k = LAYOUTS[layout]
    segments = segments_of(lengths, used)
    segments_k = segments if lengths_k is None else segments_of(lengths_k, used_k)
    T, S = sum(lengths), sum(lengths_k or lengths)
    torch.manual_seed(0)
    tensors = [torch.randn(n, h, 8, dtype=torch.float64) for n, h in ((T, heads), (S, kv_heads), (S, kv_heads))]
    exact = [x.requires_grad_() for x in tensors]
    return segments, segments_k, exact, [x.detach().to(dtype).requires_grad_() for x in exact]


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_lse_and_gradients_follow_the_formula(layout, heads, kv_heads, causal, with_lse):
    segments, segments_k, exact, rounded = inputs(layout, heads, kv_heads, torch.float32)
    given = None if LAYOUTS[layout][1] is None else segments_k
    expected, expected_lse = naive(*exact, segments, segments_k, causal, 8**-0.5)
    if not with_lse:
        out = attention(*rounded, segments, causal=causal, segments_k=given)
    else:
        out, lse = attention_with_lse(*rounded, segments, causal=causal, segments_k=given)
        assert lse.dtype == torch.float32 and torch.allclose(lse, expected_lse, atol=1e-5)
    assert out.dtype == torch.float32 and torch.allclose(out.double(), expected, atol=1e-5)
    weight = torch.randn(out.shape, dtype=torch.float64)
    (expected * weight).sum().backward()
    (out * weight.float()).sum().backward()
    for a, b in zip(rounded, exact):
        assert a.grad is not None and torch.allclose(a.grad.double(), b.grad, atol=1e-5)


def test_the_scale_is_the_callers():
    segments, segments_k, exact, rounded = inputs("several", 2, 2, torch.float32)
    expected, _ = naive(*exact, segments, segments_k, True, 0.3)
    assert torch.allclose(attention(*rounded, segments, causal=True, scale=0.3).double(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_come_back_as_they_went_in(dtype):
    segments, segments_k, exact, rounded = inputs("several", 6, 2, dtype)
    expected, _ = naive(*exact, segments, segments_k, True, 8**-0.5)
    out, lse = attention_with_lse(*rounded, segments, causal=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    error = (out.double() - expected).abs().max()
    assert error < (1e-12 if dtype == torch.float64 else 0.05)


def test_rows_outside_the_used_part_of_a_slot_are_zero_even_beside_nan():
    segments = segments_of([4, 4], [2, 3])
    q, k, v = (torch.randn(8, 2, 8) for _ in range(3))
    for x in (k, v):
        x[[2, 3, 7]] = torch.nan  # memory that nobody wrote
    for causal in (False, True):
        out, lse = attention_with_lse(q, k, v, segments, causal=causal)
        assert not out[[2, 3, 7]].any() and (lse[:, [2, 3, 7]] == -torch.inf).all()
        assert out.isfinite().all()


def test_other_segments_do_not_matter():
    q, k, v = (torch.randn(12, 2, 8) for _ in range(3))
    whole = attention(q, k, v, Segments.of([5, 7]), causal=True)
    for x in (q, k, v):
        x[5:] = 9.0
    assert attention(q, k, v, Segments.of([5, 7]), causal=True)[:5].equal(whole[:5])


Q, KV = torch.zeros(5, 4, 8), torch.zeros(5, 2, 8)
GOOD = dict(q=Q, k=KV, v=KV, segments=Segments.of([5]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(5, 32)}, r"takes packed rows .* not q \(5, 32\)"),
        ({"v": torch.zeros(6, 2, 8)}, r"one shape, .* k \(5, 2, 8\), v \(6, 2, 8\)"),
        ({"q": torch.zeros(5, 3, 8)}, "3 query heads of 8 cannot share 2 key heads"),
        ({"q": torch.zeros(5, 0, 8)}, "0 query heads"),
        ({"q": torch.zeros(5, 4, 8).half()}, "share one floating dtype, not torch.float16, torch.float32"),
        ({"segments_k": Segments.of([2, 3])}, "there are 1 segments of queries, but 2 segments of keys"),
        ({"segments": Segments.of([])}, "5 queries belong to no segment"),
        ({"segments": Segments(torch.tensor([0, 5]), 5)}, r"int32 vectors, not torch.int64 \(2,\)"),
        (
            {"segments": Segments(torch.zeros(0, dtype=torch.int32), 5)},
            r"N \+ 1 cu_seqlens and N lengths, not 0 and none",
        ),
        ({"segments": segments_of([5, 0], [5])}, "N lengths, not 3 and 1"),
        ({"scale": 0.0}, "positive and finite, not 0.0"),
        ({"scale": float("nan")}, "positive and finite, not nan"),
    ],
)
def test_what_cannot_be_computed_is_refused_in_one_line(changes, message):
    given = GOOD | changes
    options = {name: given.pop(name) for name in ("segments_k", "scale") if name in given}
    with pytest.raises(ValueError, match=message) as caught:
        attention(*given.values(), causal=True, **options)
    assert "\n" not in str(caught.value)


def test_debug_mode_reads_the_boundaries(monkeypatch):
    monkeypatch.setattr("kernels.backend.DEBUG", True)
    q = torch.randn(5, 2, 16)
    for boundaries in ([0, 4], [1, 5], [0, 3, 2, 5]):
        segments = Segments(torch.tensor(boundaries, dtype=torch.int32), 5)
        with pytest.raises(ValueError, match="ascend from 0 to 5"):
            attention(q, q, q, segments, causal=True)
    with pytest.raises(ValueError, match=r"lengths \[6\] do not fit into slots of \[5\]"):
        attention(q, q, q, segments_of([5], [6]), causal=True)


def test_importing_the_kernels_does_not_touch_the_gpu():
    code = """
import torch
from kernels import attention, attention_hopper, cross_entropy, decode, projector
from kernels.benchmark import attention
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])

"""The Hopper kernel: what it refuses and, on such a GPU, the formula. ``test_compiled`` reads its machine code."""

import pytest
import torch
from torch import Tensor

from kernels import attention_hopper
from kernels.attention import attention_with_lse_reference
from kernels.segments import Segments

CONFIGURATIONS = pytest.mark.parametrize(("head_dim", "causal"), [(64, False), (64, True), (128, False), (128, True)])

# name: (query lengths, key lengths or None for the same)
LAYOUTS = {
    "one": ([577], None),
    "several": ([130, 1, 64, 333, 129], None),
    "empty ones": ([0, 70, 0, 128, 0], None),
    "fewer queries": ([3, 200, 65], [300, 513, 66]),
    "more queries": ([300, 260], [100, 1]),
    "no keys": ([40, 30, 150], [0, 500, 0]),
    "no keys at all": ([40, 200], [0, 0]),
}


def inputs(lengths: list[int], lengths_k: list[int] | None, head_dim: int, device: str = "cuda"):
    """q, k, v as slices of one tensor where that is possible, six heads for two, and their segments."""
    segments = Segments.of(lengths, device)
    segments_k = segments if lengths_k is None else Segments.of(lengths_k, device)
    draw = lambda rows: torch.randn(rows, 10, head_dim, dtype=torch.bfloat16, device=device)
    q = qkv = draw(sum(lengths))
    kv = qkv if lengths_k is None else draw(sum(lengths_k))
    return q[:, :6], kv[:, 6:8], kv[:, 8:], segments, segments_k


def in_the_same_dtype(q, k, v, segments: Segments, segments_k: Segments, causal: bool, scale: float) -> Tensor:
    """out_THE as PyTorch computes the formula in bfloat16."""
    out = torch.zeros_like(q)
    for (q_start, Q), (k_start, L) in zip(segments.spans, segments_k.spans):
        k_HLE, v_HLE = (x[k_start : k_start + L].repeat_interleave(3, 1).transpose(0, 1) for x in (k, v))
        s_HQL = scale * (q[q_start : q_start + Q].transpose(0, 1) @ k_HLE.mT)
        if causal:
            s_HQL = s_HQL.masked_fill(s_HQL.new_ones(Q, L).bool().triu(L - Q + 1), -torch.inf)
        out[q_start : q_start + Q] = (s_HQL.softmax(-1).nan_to_num(0.0) @ v_HLE).transpose(0, 1)
    return out


def test_other_inputs_are_refused_by_name():
    q, k, v, segments, _ = inputs([5, 3], None, 64, "cpu")
    forward = lambda *x, segments=segments: attention_hopper.forward(*x, segments, segments, True, 0.125)
    with pytest.raises(ValueError, match=r"bfloat16 and float16, not torch\.float32"):
        forward(q.float(), k.float(), v.float())
    with pytest.raises(ValueError, match="head dims 64 and 128, not 32"):
        forward(q[..., :32], k[..., :32], v[..., :32])
    with pytest.raises(ValueError, match=r"Segments\.lengths"):
        forward(q, k, v, segments=Segments(segments.cu_seqlens, 5, torch.tensor([2, 3], dtype=torch.int32)))
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        forward(q, torch.zeros(8, 2, 65, dtype=torch.bfloat16)[..., :64], v)


@pytest.fixture
def hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@CONFIGURATIONS
def test_out_and_lse_follow_the_formula(head_dim, causal, layout, hopper):
    q, k, v, segments, segments_k = inputs(*LAYOUTS[layout], head_dim)
    scale = head_dim**-0.5
    exact, exact_lse = attention_with_lse_reference(
        *(x.double() for x in (q, k, v)), segments, causal=causal, segments_k=segments_k, scale=scale
    )
    allowed = 2 * (in_the_same_dtype(q, k, v, segments, segments_k, causal, scale) - exact).abs().max()
    out, lse = attention_hopper.forward(q, k, v, segments, segments_k, causal, scale)
    assert out.dtype == torch.bfloat16 and (out - exact).abs().max() <= allowed
    assert lse.dtype == torch.float32 and torch.allclose(lse, exact_lse, rtol=0, atol=1e-3)


@pytest.mark.gpu
@CONFIGURATIONS
def test_nan_in_other_segments_does_not_leak(head_dim, causal, hopper):
    q, k, v, segments, _ = inputs([100, 190, 77], None, head_dim)
    clean, clean_lse = attention_hopper.forward(q, k, v, segments, segments, causal, 0.1)
    for x in (q, k, v):
        x[:100], x[290:] = torch.nan, torch.nan
    out, lse = attention_hopper.forward(q, k, v, segments, segments, causal, 0.1)
    assert out[100:290].equal(clean[100:290]) and lse[:, 100:290].equal(clean_lse[:, 100:290])

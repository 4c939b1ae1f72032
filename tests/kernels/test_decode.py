"""Decoding against a cache equals attention of the last row over the same keys."""

import pytest
import torch

from kernels.attention import attention
from kernels.decode import decode_attention
from kernels.segments import Segments


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)])
@pytest.mark.parametrize("scale", [None, 0.4])
def test_a_new_token_sees_the_used_slots_and_no_others(heads, kv_heads, scale):
    torch.manual_seed(0)
    lengths = [7, 1, 12, 0]
    q = torch.randn(4, heads, 8)
    k, v = torch.randn(4, 12, kv_heads, 8), torch.randn(4, 12, kv_heads, 8)
    length = torch.tensor(lengths)
    out = decode_attention(q, k, v, length, scale=scale)
    rows = torch.cat([torch.arange(12 * b, 12 * b + n) for b, n in enumerate(lengths)])
    expected = attention(
        q,
        k.flatten(0, 1)[rows],
        v.flatten(0, 1)[rows],
        Segments.of([1] * 4),
        causal=True,
        segments_k=Segments.of(lengths),
        scale=scale,
    )
    assert torch.allclose(out, expected, atol=1e-6) and not out[3].any()
    k[0, 7:], v[0, 7:] = 5.0, -5.0  # spare room
    assert decode_attention(q, k, v, length, scale=scale)[0].equal(out[0])


def test_no_sequences_are_legal():
    out = decode_attention(
        torch.zeros(0, 6, 8), torch.zeros(0, 5, 2, 8), torch.zeros(0, 5, 2, 8), torch.zeros(0, dtype=torch.int64)
    )
    assert out.shape == (0, 6, 8)


def test_bf16_comes_back_as_bf16():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    length = torch.tensor([3, 5])
    out = decode_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), length)
    assert out.dtype == torch.bfloat16
    assert (out.float() - decode_attention(q, k, v, length)).abs().max() < 0.05

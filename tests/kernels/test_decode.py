"""Decoding against a cache: the formula in float64, missed by at most twice what PyTorch misses it by in that dtype."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import decode
from kernels.backend import INTERPRETED, implementation
from kernels.decode import decode_attention

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


@pytest.fixture(autouse=True, scope="module")
def _memory_starts_as_nan():
    """Deterministic PyTorch fills what nobody has written yet with NaN, outputs and scratch included."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(lengths: list[int], S: int, H: int, K: int, E: int, dtype=torch.float32, first=None) -> tuple[Tensor, ...]:
    """q, k, v, lengths and, if given, first slots. Hidden slots are NaN where the kernel runs, which must not read
    them."""
    B = len(lengths)
    torch.manual_seed(0)
    q = torch.randn(B, H, E).to(DEVICE, dtype)
    k = torch.randn(B, S, K, E).to(DEVICE, dtype)
    v = torch.randn(B, S, K, E).to(DEVICE, dtype)
    spare = torch.nan if implementation("decode", q, E) == "triton" else 5.0
    for b, n in enumerate(lengths):
        k[b, n:] = spare
        v[b, n:] = -spare
        if first is not None:
            k[b, : first[b]] = spare
            v[b, : first[b]] = -spare
    numbers = [lengths] if first is None else [lengths, first]
    return q, k, v, *(torch.tensor(x, device=DEVICE, dtype=torch.int64) for x in numbers)


def formula(q, k, v, length, first, scale, softcap):
    group = q.shape[1] // k.shape[2]
    out = torch.zeros_like(q, dtype=torch.float64)
    for b, (n, start) in enumerate(zip(length.tolist(), first.tolist())):
        k_HSE, v_HSE = (x[b, start:n].double().transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        score_HS = scale * (k_HSE @ q[b].double()[:, :, None])[:, :, 0]
        if softcap is not None:
            score_HS = softcap * torch.tanh(score_HS / softcap)
        out[b] = (score_HS.softmax(-1)[:, None] @ v_HSE)[:, 0]
    return out


def pytorch(q, k, v, length, first, scale):
    out = torch.zeros_like(q)
    for b, (n, start) in enumerate(zip(length.tolist(), first.tolist())):
        if n > start:
            keys, values = k[b, start:n].transpose(0, 1), v[b, start:n].transpose(0, 1)
            out[b] = F.scaled_dot_product_attention(q[b, :, None], keys, values, scale=scale, enable_gqa=True)[:, 0]
    return out


def assert_as_exact_as_pytorch(q, k, v, length, first=None, scale=None, softcap=None):
    out = decode_attention(q, k, v, length, first, scale=scale, softcap=softcap)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    first = torch.zeros_like(length) if first is None else first
    exact = formula(q, k, v, length, first, scale, softcap)
    assert out.dtype == q.dtype and out.shape == q.shape
    if out.numel():
        without_cap = formula(q, k, v, length, first, scale, None)
        theirs = (pytorch(q, k, v, length, first, scale).double() - without_cap).abs().max().item()
        error = (out.double() - exact).abs().max().item()
        largest = (
            1.0 if softcap is None else max(1.0, softcap)
        )  # of the terms of which a capped score is the difference
        allowed = 2 * theirs + 4 * torch.finfo(torch.float32).eps * largest
        assert error <= allowed, f"error {error}, PyTorch's {theirs}"
    assert not out[length <= first].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("H", "K", "E"),
    [
        (2, 2, 64),
        (8, 2, 128),
        (4, 2, 80),
        (6, 1, 96),
        (20, 1, 64),
        (6, 2, 40),
        (2, 1, 256),
        (1, 1, 8),
    ],
)
def test_heads_and_head_dims_of_any_kind(H, K, E, dtype):
    assert_as_exact_as_pytorch(*inputs([200, 0, 1, 37], 210, H, K, E, dtype))


def test_lengths_around_the_splits_and_far_below_the_cache():
    S, lengths = 2100, [2100, 2049, 1024, 257, 128, 127, 1, 0]
    assert decode._num_splits(len(lengths), S, 1, 16) == 6
    assert_as_exact_as_pytorch(*inputs(lengths, S, 2, 1, 16))


def test_more_splits_than_are_merged_at_a_time():
    q, k, v, length = inputs([4400], 4500, 1, 1, 256)
    assert decode._num_splits(1, 4500, 1, 16) > 8192 // 256
    k *= torch.linspace(0.1, 3, 4500, device=DEVICE)[:, None, None]  # the last splits weigh most
    assert_as_exact_as_pytorch(q, k, v, length)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), max_size=3),
    spare=st.integers(0, 200),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    scale=st.sampled_from([None, 0.4, -0.4, 0.0]),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_any_lengths_in_any_cache(lengths, spare, heads, scale, index):
    q, k, v, length = inputs(lengths, max(lengths, default=0) + spare, *heads, 16)
    assert_as_exact_as_pytorch(q, k, v, length.to(index), scale=scale)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 700), min_size=1, max_size=3),
    window=st.sampled_from([0, 1, 100, 300, 999]),
    heads=st.sampled_from([(1, 1), (4, 2)]),
    softcap=st.sampled_from([None, 2.0, 50.0]),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_slots_before_the_first_visible_one_are_not_read(lengths, window, heads, softcap, index):
    first = [max(0, n - window) for n in lengths]
    q, k, v, *numbers = inputs(lengths, 720, *heads, 16, first=first)
    assert_as_exact_as_pytorch(q, k, v, *(x.to(index) for x in numbers), softcap=softcap)


def test_a_first_slot_past_the_last_leaves_nothing_and_one_before_the_cache_everything():
    q, k, v, length = inputs([7, 300], 300, 4, 2, 16)
    assert not decode_attention(q, k, v, length, length + 5).any()
    assert decode_attention(q, k, v, length, -length).equal(decode_attention(q, k, v, length))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_ten_thousand_overflow_nowhere(sign, dtype):
    q, k, v, length = inputs([300, 64], 300, 4, 2, 64, dtype)
    assert_as_exact_as_pytorch(q, k, v, length, scale=1250.0)  # one key takes it all
    q[..., 0], k[..., 0] = 100.0, 100.0 * sign  # the same 1e4 for all keys
    assert_as_exact_as_pytorch(q, k, v, length, scale=1.0)


def test_spare_slots_and_lengths_past_the_cache_change_nothing():
    q, k, v, length = inputs([7, 500], 500, 4, 2, 16)
    out = decode_attention(q, k, v, length)
    k[0, 7:], v[0, 7:] = 3.0, -3.0
    assert decode_attention(q, k, v, length).equal(out)
    assert decode_attention(q, k, v, length + torch.tensor([0, 9], device=DEVICE)).equal(out)


def test_strided_tensors_give_what_contiguous_ones_give():
    q, k, v, length = inputs([300, 41], 300, 4, 2, 16)
    out = decode_attention(q, k, v, length)
    kv = torch.stack([k, v], dim=2)  # (B, S, 2, K, E)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    q = torch.stack([q, q], dim=-1)[..., 0]
    length = torch.stack([length, length], dim=1)[:, 0]
    for keys, values in [(kv[:, :, 0], kv[:, :, 1]), heads_first]:
        assert not keys.is_contiguous() and not q.is_contiguous() and not length.is_contiguous()
        assert torch.allclose(decode_attention(q, keys, values, length), out, atol=1e-6)


@pytest.mark.parametrize(("lengths", "S"), [([], 5), ([], 0), ([0, 0], 0), ([0, 0], 300)])
def test_no_sequences_no_slots_and_no_keys_are_legal(lengths, S):
    out = decode_attention(*inputs(lengths, S, 6, 2, 8))
    assert out.shape == (len(lengths), 6, 8) and not out.any()


def test_float64_stays_float64():
    q, k, v, length = inputs([9, 12], 12, 4, 2, 8, torch.float64)
    out = decode_attention(q, k, v, length)
    assert torch.allclose(out, formula(q, k, v, length, 0 * length, 8**-0.5, None), atol=1e-14, rtol=0)


Q, KV, LENGTH = torch.zeros(2, 4, 8), torch.zeros(2, 5, 2, 8), torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Q[0], KV, KV, LENGTH), r"\(4, 8\), \(2, 5, 2, 8\)"),
        ((Q, KV, KV[:, :4], LENGTH), r"disagree .*\(2, 4, 2, 8\)"),
        ((Q, KV, KV, LENGTH[:1]), r"disagree .*\(1,\)"),
        ((Q[:1], KV, KV, LENGTH), r"disagree .*\(1, 4, 8\)"),
        ((Q[:, :3], KV, KV, LENGTH), "3 query heads are not a multiple of 2"),
        ((torch.zeros(2, 4, 264), *[torch.zeros(2, 5, 2, 264)] * 2, LENGTH), "head dim 264"),
        ((Q.half(), KV, KV, LENGTH), "float16, torch.float32 and torch.float32"),
        ((Q.int(), KV.int(), KV.int(), LENGTH), "int32, torch.int32"),
        ((Q, KV, KV, LENGTH.float()), "length_B must be int32 or int64, not torch.float32"),
        ((Q, KV, KV, LENGTH.to("meta")), "not cpu, cpu, cpu and meta"),
        ((Q, KV, KV, LENGTH, LENGTH.int()), r"like length_B: \(2,\) torch.int64 on cpu, not \(2,\) torch.int32 on cpu"),
        ((Q, KV, KV, LENGTH, LENGTH[:1]), r"like length_B: .* not \(1,\) torch.int64 on cpu"),
        ((Q, KV, KV.mT.contiguous().mT, LENGTH), r"contiguous, not strides .*\(80, 16, 1, 2\)"),
        ((Q, KV.clone().requires_grad_(), KV, LENGTH), r"torch.no_grad\(\)"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        decode_attention(*arguments)
    assert "\n" not in str(error.value)


def test_parameters_are_welcome_where_no_gradient_is_asked_for():
    with torch.no_grad():
        assert not decode_attention(Q.clone().requires_grad_(), KV, KV, LENGTH).requires_grad


@pytest.mark.interpreter
def test_the_public_function_runs_the_kernels(launches):
    decode_attention(*inputs([300], 300, 4, 2, 16))
    assert launches == ["_split_kernel", "_merge_kernel"]
    decode_attention(*inputs([60], 100, 4, 2, 16))  # one split needs no merging
    assert launches[2:] == ["_split_kernel"]
    decode_attention(*inputs([60], 100, 4, 2, 16, torch.float64))
    assert len(launches) == 3


@pytest.mark.interpreter
def test_the_operator_keeps_its_promises_to_pytorch():
    q, k, v, length = inputs([40, 0], 50, 4, 2, 16)
    torch.library.opcheck(torch.ops.avlm.decode_attention.default, (q, k, v, length, None, 0.3, None))
    torch.library.opcheck(torch.ops.avlm.decode_attention.default, (q, k, v, length, length // 2, 0.3, 5.0))


def test_a_compiled_model_holds_one_operator_for_all_cache_sizes():
    graphs = []

    def backend(graph, _):
        targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        # Without what compares sizes, which torch 2.14 writes into the graph.
        graphs.append([str(target) for target in targets if target.__module__ not in ("_operator", "builtins")])
        return graph.forward

    compiled = torch.compile(lambda *x: 2 * decode_attention(*x), fullgraph=True, dynamic=True, backend=backend)
    for lengths, S in [([40, 3, 0], 50), ([200, 300, 9, 1, 1], 700)]:
        x = inputs(lengths, S, 4, 2, 16)
        assert torch.allclose(compiled(*x), 2 * decode_attention(*x), atol=1e-6)
    assert len(graphs) == 1
    if implementation("decode", x[0], 16) == "triton":
        assert graphs == [["avlm.decode_attention.default"]]


@pytest.mark.parametrize(("B", "K", "S"), [(1, 8, 8192), (1, 8, 65536), (4, 8, 16384), (1, 1, 65536), (32, 8, 65536)])
def test_an_h100_is_filled_without_splits_that_are_too_small_or_too_long(B, K, S):
    N = decode._num_splits(B, S, K, 132)
    assert B * K * N >= 0.9 * 3 * 132
    assert decode.MIN_SPLIT <= S / N <= decode.MAX_SPLIT


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("E", [64, 128])
def test_a_long_cache_in_equal_bits_without_waiting_for_the_device(E, dtype):
    x = inputs([65536, 1000, 0, 40001], 65536, 32, 8, E, dtype)
    assert_as_exact_as_pytorch(*x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = decode_attention(*x), decode_attention(*x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert first.equal(second)

"""Linear cross entropy: the formula in float64, missed by at most twice what PyTorch misses it by in that dtype."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import cross_entropy
from kernels.backend import INTERPRETED
from kernels.benchmark import timing
from kernels.cross_entropy import linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16][: 2 if INTERPRETED else 3]  # the interpreter has no bfloat16
NAMES = ("loss", "loss_R", "dhidden", "dweight")


@pytest.fixture(autouse=True, scope="module")
def _memory_starts_as_nan():
    """Deterministic PyTorch fills what nobody has written yet with NaN, outputs and scratch included."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 8)


def inputs(R: int, V: int, D: int = 16, dtype=torch.float32, ignored: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden and weight, whose logits have deviation 2, and targets, of which the last ``ignored`` are -100."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(R, D), torch.randn(V, D) * 2 * D**-0.5
    target = torch.randint(V, (R,))
    target[R - ignored :] = -100
    return *(x.to(DEVICE, dtype).requires_grad_() for x in (hidden, weight)), target.to(DEVICE)


def pytorch(hidden, weight, target, softcap=None):
    """The loss as one writes it in PyTorch: logits in the dtype of the inputs, the rest in float32 at least."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss_R = F.cross_entropy(logits, target, reduction="none")
    return loss_R.sum(), loss_R


def results(function, hidden, weight, target, dtype, scale=1 / 3, **options) -> dict[str, Tensor]:
    """Losses and the gradients of scale * loss in float64."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
    loss, loss_R = function(*leaves, target, **options)
    gradients = torch.autograd.grad(scale * loss, leaves)
    return {name: x.detach().double() for name, x in zip(NAMES, (loss, loss_R, *gradients))}


def assert_as_exact_as_pytorch(hidden, weight, target, **options):
    """Our largest error is at most twice PyTorch's, and a few units in the last place: of few numbers it is luck."""
    dtype = hidden.dtype
    exact = results(pytorch, hidden, weight, target, torch.float64, **options)
    theirs = results(pytorch, hidden, weight, target, dtype, **options)
    ours = results(linear_cross_entropy, hidden, weight, target, dtype, **options)
    for name, e in exact.items():
        assert ours[name].shape == e.shape
        if e.numel():
            error, their_error = ((x[name] - e).abs().max().item() for x in (ours, theirs))
            half = name.startswith("d") and dtype.itemsize == 2  # whose gradients we round three times, by half an eps
            floor = 2 * torch.finfo(dtype).eps if half else 16 * torch.finfo(torch.float32).eps
            floor *= e.abs().max().item()
            assert error <= 2 * their_error + floor, f"{name}: {error:.3g} off, PyTorch {their_error:.3g}"


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("R", "V"), [(7, 11), (1, 2), (5, 257), (3, 8192), (2, 50257), (2, 152064)])
def test_vocabularies_from_two_to_152064(R, V, dtype, softcap):
    assert_as_exact_as_pytorch(*inputs(R, V, 24, dtype, ignored=R // 3), softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R", [1, 16, 17, 45])
def test_chunks_add_up(R, dtype, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 16)
    assert_as_exact_as_pytorch(*inputs(R, 300, 16, dtype, ignored=R // 3))


@settings(max_examples=12, deadline=None)
@given(
    R=st.integers(0, 24),
    V=st.integers(1, 400),
    D=st.integers(1, 20),
    ignored=st.integers(0, 24),
    chunk=st.sampled_from([1, 7, 64]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    softcap=st.sampled_from([None, 0.5, 30.0]),
)
def test_any_sizes_and_any_softcap(R, V, D, ignored, chunk, dtype, softcap):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "CHUNK_ROWS", chunk)
        leaves = inputs(R, V, D, dtype, min(R, ignored))
        exact, ours = (
            results(f, *leaves, of, softcap=softcap)
            for f, of in ((pytorch, torch.float64), (linear_cross_entropy, dtype))
        )
    for name, e in exact.items():  # so few numbers are as exact as PyTorch's by luck only
        largest = max(1.0, *e.abs().flatten().tolist()) if e.numel() else 1.0
        assert torch.allclose(ours[name], e, rtol=0, atol=40 * torch.finfo(dtype).eps * largest), name


def test_logits_of_ten_thousand_overflow_nowhere():
    hidden, weight, target = inputs(6, 300)
    with torch.no_grad():
        hidden *= 5000
    assert_as_exact_as_pytorch(hidden, weight, target)
    with torch.no_grad():  # the same 1e4 for all, beside which nothing of their differences may be lost
        hidden[:, 1:] /= 5000
        hidden[:, 0], weight[:, 0] = 1e4, 1.0
    assert_as_exact_as_pytorch(hidden, weight, target)


@pytest.mark.parametrize("R", [0, 5, 20])
def test_without_targets_loss_and_gradients_are_zeros_that_keep_the_graph(R, small_chunks):
    hidden, weight, target = inputs(R, 37, ignored=R)
    loss, loss_R = linear_cross_entropy(hidden, weight, target, softcap=5.0)
    assert loss.dtype == torch.float32 and loss.shape == () and loss.item() == 0
    assert loss_R.shape == (R,) and not loss_R.any()
    loss.backward()
    assert hidden.grad.shape == (R, 16) and not hidden.grad.any()
    assert weight.grad.shape == (37, 16) and not weight.grad.any()


def test_the_loss_of_each_row_is_for_looking_only():
    hidden, weight, target = inputs(9, 37)
    loss, loss_R = linear_cross_entropy(hidden, weight, target)
    assert loss.requires_grad and not loss_R.requires_grad and loss_R.dtype == torch.float32
    assert torch.allclose(loss_R.sum(), loss)


def test_targets_outside_the_vocabulary_are_seen_and_do_no_harm():
    hidden, weight, target = inputs(9, 37)
    target[2], target[4], target[7] = 37, -1, 2**40
    good = torch.tensor([i not in (2, 4, 7) for i in range(9)], device=DEVICE)
    loss, loss_R = linear_cross_entropy(hidden, weight, target)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    alone, alone_R = linear_cross_entropy(hidden[good], weight, target[good])
    expected = torch.autograd.grad(alone, (hidden, weight))
    assert loss.isnan() and loss_R[~good].isnan().all() and torch.allclose(loss_R[good], alone_R)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, expected))


def test_debug_mode_reads_the_targets(monkeypatch):
    monkeypatch.setattr("kernels.backend.DEBUG", True)
    hidden, weight, target = inputs(9, 37, ignored=2)
    linear_cross_entropy(hidden, weight, target)
    target[2], target[4] = 40, -1
    with pytest.raises(ValueError, match="2 targets are outside the vocabulary of 37, the first is 40"):
        linear_cross_entropy(hidden, weight, target)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_costs_no_product(frozen, small_chunks):
    leaves = inputs(21, 300)
    both = torch.autograd.grad(linear_cross_entropy(*leaves)[0], leaves[:2])
    leaves[frozen].requires_grad_(False)
    loss, _ = linear_cross_entropy(*leaves)
    held = [x.numel() for x in loss.grad_fn.saved_tensors]
    assert held[frozen] == 0 and held[1 - frozen] == leaves[1 - frozen].numel()
    [gradient] = torch.autograd.grad(loss, leaves[1 - frozen])
    assert torch.allclose(gradient, both[1 - frozen], atol=1e-5)


def test_without_gradients_there_is_only_the_loss(small_chunks):
    hidden, weight, target = inputs(21, 300)
    loss, loss_R = linear_cross_entropy(hidden, weight, target)
    with torch.no_grad():
        again, again_R = linear_cross_entropy(hidden, weight, target)
    assert not again.requires_grad and torch.allclose(again, loss) and torch.allclose(again_R, loss_R)
    assert not linear_cross_entropy(hidden.detach(), weight.detach(), target)[0].requires_grad


def test_strided_inputs_give_what_contiguous_ones_give():
    hidden, weight, target = inputs(9, 37)
    expected = results(linear_cross_entropy, hidden, weight, target, torch.float32)
    strided = hidden.T.contiguous().T, weight.T.contiguous().T, torch.stack([target, target], 1)[:, 0]
    assert not any(x.is_contiguous() for x in strided)
    actual = results(linear_cross_entropy, *strided, torch.float32)
    assert all(torch.allclose(actual[name], x, atol=1e-5) for name, x in expected.items())


def test_float64_stays_float64():
    ours, exact = (results(f, *inputs(9, 37), torch.float64, softcap=5.0) for f in (linear_cross_entropy, pytorch))
    assert all(torch.allclose(ours[name], x, atol=1e-13, rtol=1e-12) for name, x in exact.items())


def in_shards(sizes: list[int], hidden, weight, target, **options) -> list[dict[str, Tensor]]:
    """What every rank computes of its rows of the weight. One thread runs at a time, until it has to reduce."""
    running, together = threading.Lock(), threading.Barrier(len(sizes))
    parts: list = [None] * len(sizes)

    def rank(i: int) -> dict[str, Tensor]:
        def reduce(tensor: Tensor, op: str) -> None:
            assert tensor.dtype == torch.float32 and tensor.numel() <= 3 * len(target)
            parts[i] = tensor.clone()
            running.release()
            together.wait()
            whole = torch.stack(parts).amax(0) if op == "max" else torch.stack(parts).sum(0)
            together.wait()
            running.acquire()
            tensor.copy_(whole)

        first = sum(sizes[:i])
        with running:
            shard = weight[first : first + sizes[i]]
            return results(
                linear_cross_entropy, hidden, shard, target, hidden.dtype, first=first, reduce=reduce, **options
            )

    with ThreadPoolExecutor(len(sizes)) as pool:
        return list(pool.map(rank, range(len(sizes))))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("sizes", [[1, 200, 99], [300]], ids=str)
def test_a_vocabulary_in_shards_gives_what_the_whole_gives(sizes, softcap, small_chunks):
    hidden, weight, target = inputs(17, 300, ignored=3)
    target[4] = 300
    whole = results(linear_cross_entropy, hidden, weight, target, torch.float32, softcap=softcap)
    ranks = in_shards(sizes, hidden, weight, target, softcap=softcap)
    for rank in ranks:
        assert all(torch.allclose(rank[name], whole[name], atol=1e-5, equal_nan=True) for name in ("loss", "loss_R"))
    assert torch.allclose(sum(rank["dhidden"] for rank in ranks), whole["dhidden"], atol=1e-6)
    assert torch.allclose(torch.cat([rank["dweight"] for rank in ranks]), whole["dweight"], atol=1e-6)


@pytest.mark.interpreter
def test_the_public_function_runs_the_kernel_once_for_each_chunk(launches, small_chunks):
    hidden, weight, target = inputs(33, 30)
    linear_cross_entropy(hidden, weight.detach(), target)
    assert launches == ["_losses_kernel"] * 5
    linear_cross_entropy(hidden, weight, target)  # dweight is worth chunks of 16 rows, which hidden is wide
    assert len(launches) == 5 + 3
    in_shards([15, 15], hidden[:16], weight, target[:16])
    assert len(launches) == 5 + 3 + 2 * 2
    linear_cross_entropy(hidden.double(), weight.double(), target)
    assert len(launches) == 5 + 3 + 4


def test_a_second_backward_and_a_second_derivative_are_refused():
    hidden, weight, target = inputs(9, 37)
    loss, _ = linear_cross_entropy(hidden, weight, target)
    torch.autograd.grad(loss, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, hidden)
    loss, _ = linear_cross_entropy(hidden, weight, target)
    [gradient] = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_memory_is_a_chunk_of_logits_and_the_gradients(monkeypatch):
    R, V = 48 if INTERPRETED else 160, 16384
    hidden, weight, target = inputs(R, V)
    chunk = dweight = 16 * V * 4 / 2**20  # of as many rows as hidden is wide

    def peak(function, rows=R):
        step = lambda: torch.autograd.grad(function(hidden[:rows], weight, target[:rows])[0], (hidden, weight))
        return timing.peak_mib(step, DEVICE)

    theirs = peak(pytorch)
    assert theirs > 2 * R / 16 * chunk
    if not INTERPRETED:  # chunks of the usual size, and 30 % of the rows with a target
        assert peak(linear_cross_entropy, 48) < theirs / 5
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 8)
    assert peak(linear_cross_entropy) < chunk + dweight + 0.1


HIDDEN, WEIGHT, TARGET = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((HIDDEN[0], WEIGHT, TARGET), {}, r"takes hidden_RD, .* not hidden \(4,\), weight \(5, 4\), target \(3,\)"),
        ((HIDDEN, WEIGHT, TARGET[:, None]), {}, r"target \(3, 1\)"),
        ((HIDDEN, WEIGHT[:, :3], TARGET), {}, r"disagree on R or D: .*weight \(5, 3\)"),
        ((HIDDEN, WEIGHT, TARGET[:2]), {}, r"disagree on R or D: .*target \(2,\)"),
        ((HIDDEN, WEIGHT[:0], TARGET), {}, r"the vocabulary is empty: .*weight \(0, 4\)"),
        ((HIDDEN.half(), WEIGHT, TARGET), {}, "one floating dtype, not torch.float16 and torch.float32"),
        ((HIDDEN.int(), WEIGHT.int(), TARGET), {}, "one floating dtype, not torch.int32 and torch.int32"),
        ((HIDDEN, WEIGHT, TARGET.int()), {}, "target must be int64, not torch.int32"),
        ((HIDDEN, WEIGHT.to("meta"), TARGET), {}, "on one device, not cpu, meta and cpu"),
        ((HIDDEN, WEIGHT, TARGET), {"softcap": 0.0}, "softcap must be positive, not 0.0"),
        ((HIDDEN, WEIGHT, TARGET), {"first": 5}, "first must be the start of a shard, which needs reduce, not 5"),
        ((HIDDEN, WEIGHT, TARGET), {"first": -5, "reduce": print}, "not -5"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(arguments, options, message):
    with pytest.raises(ValueError, match=message) as error:
        linear_cross_entropy(*arguments, **options)
    assert "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_real_sizes_in_equal_bits_without_waiting_for_the_device(dtype):
    hidden, weight, target = inputs(5000, 32000, 1024, dtype, ignored=100)  # three chunks, added up in float32
    assert_as_exact_as_pytorch(hidden, weight, target)
    assert_as_exact_as_pytorch(hidden[:300], weight, target[:300], softcap=5.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        runs = []
        for _ in range(2):
            loss, loss_R = linear_cross_entropy(hidden, weight, target)
            runs.append((loss, loss_R, *torch.autograd.grad(loss, (hidden, weight))))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(a.equal(b) for a, b in zip(*runs))

"""The projector and its placement against float64, missed by at most twice what PyTorch misses it by in that dtype."""

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import projector_gemm
from kernels.backend import INTERPRETED
from kernels.projector import (
    place_projected,
    place_projected_reference,
    projector_mlp,
    projector_mlp_reference,
    side_by_side,
)

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
NAMES = ("into", "x", "w1", "b1", "w2", "b2")
DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True, scope="module")
def _memory_starts_as_nan():
    """Deterministic PyTorch fills what nobody has written yet with NaN, outputs and scratch included."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def tensors(T: int, P: int, C: int, hidden: int, D: int, S: int = 1, dtype=torch.float32) -> list[Tensor]:
    """into_TD, x_PC and the weights, all leaves that want gradients."""
    shapes = [(T, D), (P, C), (hidden, S * C), (hidden,), (D, hidden), (D,)]
    scales = [1, 1, (S * C) ** -0.5, 1, hidden**-0.5, 1]
    return [(s * torch.randn(shape)).to(DEVICE, dtype).requires_grad_() for shape, s in zip(shapes, scales)]


def distinct(size: int, *shape: int) -> Tensor:
    """Random indices below ``size``, -1 where there are not enough."""
    index = torch.full((torch.Size(shape).numel(),), -1)
    index[:size] = torch.randperm(size)[: len(index)]
    return index[torch.randperm(len(index))].view(shape).to(DEVICE)


def run(function, leaves: list[Tensor], rows: Tensor, weight: Tensor, dtype: torch.dtype, **options) -> list[Tensor]:
    """The result and the gradients of all leaves, computed in ``dtype``. ``into`` is no leaf when it is consumed."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    out = function(leaves[0] * 1.0, rows, *leaves[1:], **options)
    return [out.detach(), *torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)]


def assert_as_exact_as_pytorch(leaves: list[Tensor], rows: Tensor, source: Tensor | None) -> None:
    """Of few numbers PyTorch may happen to miss none: there, some units in the last place are allowed."""
    dtype, weight = leaves[0].dtype, torch.randn_like(leaves[0])
    exact = run(place_projected_reference, leaves, rows, weight, torch.float64, source_RS=source)
    theirs = run(place_projected_reference, leaves, rows, weight, dtype, source_RS=source)
    ours = run(place_projected, leaves, rows, weight, dtype, source_RS=source)
    for name, e, t, o in zip(("out", *(f"d{name}" for name in NAMES)), exact, theirs, ours):
        assert o.dtype == dtype and o.shape == e.shape, name
        few = 4 * torch.finfo(dtype).eps * e.norm().item() if e.numel() < 256 else 0.0
        theirs_off, ours_off = ((x.double() - e).norm().item() for x in (t, o))
        assert ours_off <= 2 * theirs_off + few, f"{name}: {ours_off:.3g} off, PyTorch {theirs_off:.3g}"
        if e.numel() >= 256:
            few = 2 * torch.finfo(dtype).eps * e.abs().max().item()
            theirs_off, ours_off = ((x.double() - e).abs().max().item() for x in (t, o))
            assert ours_off <= 2 * theirs_off + few, f"{name}: {ours_off:.3g} off at most, PyTorch {theirs_off:.3g}"


def formula(x, w1, b1, w2, b2):
    z = x @ w1.T + b1
    return (z / 2 * (1 + torch.erf(z / 2**0.5))) @ w2.T + b2


@pytest.mark.parametrize("num_rows", [0, 1, 13])
def test_the_mlp_follows_the_formula_with_exact_gelu(num_rows):
    leaves = tensors(num_rows, num_rows, 6, 10, 8)[1:]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    weight = torch.randn(num_rows, 8, device=DEVICE)
    out, expected = projector_mlp(*leaves), formula(*exact)
    assert out.shape == (num_rows, 8) and torch.allclose(out.double(), expected, atol=1e-5)
    gradients = torch.autograd.grad((out * weight).sum(), leaves)
    for a, b in zip(gradients, torch.autograd.grad((expected * weight).sum(), exact)):
        assert torch.allclose(a.double(), b, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("P", "R", "S", "C", "hidden", "D"),
    [
        (141, None, 1, 64, 264, 24),  # no source; rows and columns past a tile
        (145, 141, 1, 72, 16, 264),  # class tokens skipped
        (300, 75, 4, 24, 40, 16),  # pixels shuffled
        (17, 3, 8, 40, 24, 8),  # frames stacked, some of them past the end
        (20, 7, 3, 6, 10, 9),  # no width that the copy engine takes
        (13, None, 1, 7, 5, 3),
        (1, 1, 1, 1, 1, 1),
    ],
)
def test_any_widths_and_front_ends(P, R, S, C, hidden, D, dtype):
    source = None if R is None else distinct(P, R, S)
    R = P if R is None else R
    assert_as_exact_as_pytorch(tensors(R + 20, P, C, hidden, D, S, dtype), distinct(R + 20, R), source)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_rows_of_any_source(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    dtype, S = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([1, 2]))
    widths = data.draw(st.sampled_from([(7, 20, 9), (24, 40, 16), (40, 66, 33)]))  # each is compiled, on a GPU
    torch.manual_seed(draw(0, 1000))
    P, T = draw(0, 140), draw(0, 140)
    R = draw(0, T)
    leaves = tensors(T, P, *widths, S, dtype)
    assert_as_exact_as_pytorch(leaves, distinct(T, R), distinct(P, R, S))


@pytest.mark.interpreter
def test_many_small_tiles_in_turns(monkeypatch):
    tile = dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, PRECISION="ieee")
    monkeypatch.setattr(projector_gemm, "config", lambda dtype, reads_z=False: tile)
    assert_as_exact_as_pytorch(tensors(150, 150, 16, 40, 40), distinct(150, 147), distinct(150, 147, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_ends_of_gelu(dtype):
    leaves = tensors(40, 20, 8, 64, 24, 1, dtype)
    with torch.no_grad():
        leaves[3] *= 30.0  # the biases: z from -80 to 80
    assert_as_exact_as_pytorch(leaves, distinct(40, 20), None)


def test_a_source_stands_for_every_front_end_of_the_model():
    """The class token left out, 2 x 2 pixels shuffled, 3 frames stacked, as einops and torch.cat say it."""
    images = torch.randn(2, 17, 8, device=DEVICE)  # a class token and 4 x 4 patches
    token = torch.arange(2 * 17, device=DEVICE).view(2, 17)[:, 1:]
    pattern = "i (y fy x fx) ... -> (i y x) (fy fx ...)"
    sizes = dict(y=2, fy=2, x=2, fx=2)
    shuffled = rearrange(images[:, 1:], "i (y fy x fx) c -> (i y x) (fy fx c)", **sizes)
    frames = torch.randn(7, 8, device=DEVICE)
    stacked = torch.cat([frames, frames.new_zeros(2, 8)]).view(3, 24)
    frame = torch.tensor([[0, 1, 2], [3, 4, 5], [6, -1, -1]], device=DEVICE)
    for x, source, expected in [
        (images.flatten(0, 1), token.reshape(-1, 1), images[:, 1:].flatten(0, 1)),
        (images.flatten(0, 1), rearrange(token, pattern, **sizes), shuffled),
        (frames, frame, stacked),
    ]:
        weights = [w.detach() for w in tensors(1, 1, expected.shape[1], 32, 16)[2:]]
        assert side_by_side(x, source).equal(expected)
        out = projector_mlp(x, *weights, source_RS=source)
        assert torch.allclose(out, projector_mlp_reference(expected, *weights), atol=1e-5)


def test_no_media_give_zero_gradients_and_not_none():
    leaves = tensors(9, 0, 8, 16, 24, 2)
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    out = place_projected(leaves[0] * 2, nothing, *leaves[1:], source_RS=nothing.view(0, 2))
    assert out.equal(leaves[0] * 2)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert gradients[0].eq(2).all() and not any(g.any() for g in gradients[1:])
    with torch.no_grad():
        assert projector_mlp(*leaves[1:], source_RS=nothing.view(0, 2)).shape == (0, 24)


def test_into_is_overwritten_unless_autograd_forbids_it():
    leaf, *rest = tensors(9, 3, 8, 16, 24)
    rows = distinct(9, 3)
    kept = torch.ones(9, dtype=torch.bool, device=DEVICE).index_fill(0, rows, False)
    before, into = leaf.detach().clone(), leaf * 1.0
    out = place_projected(into, rows, *rest)
    assert out is into and out._version == 1 and out[kept].equal(before[kept])
    for other in (leaf, (leaf * 1.0)[:], _Identity.apply(leaf * 1.0, rest[0])[0]):
        again = place_projected(other, rows, *rest)
        assert again.equal(out) and other.equal(before)
        [gradient] = torch.autograd.grad(again.sum(), leaf)
        assert gradient.equal(kept[:, None].expand(9, 24).float())
    with torch.no_grad():
        assert place_projected(leaf, rows, *rest).data_ptr() == leaf.data_ptr()


class _Identity(torch.autograd.Function):
    """What FSDP wraps around the inputs of a module: views that may not be overwritten."""

    @staticmethod
    def forward(ctx, *inputs):
        return inputs

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


@pytest.mark.parametrize(("ours", "theirs"), [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_features_of_another_dtype_are_cast_to_the_rows_that_they_join(ours, theirs):
    into, *rest = (x.detach().to(ours) for x in tensors(30, 20, 8, 16, 24))
    rest = [x.requires_grad_() for x in rest]
    rows, weight = distinct(30, 20), torch.randn(30, 24, device=DEVICE).to(theirs)
    expected = projector_mlp(*rest)
    out = place_projected(into.to(theirs), rows, *rest)
    assert out.dtype == theirs and out[rows].equal(expected.to(theirs))
    gradients = [torch.autograd.grad(y, rest, g) for y, g in ((out, weight), (expected, weight[rows].to(ours)))]
    for a, b in zip(*gradients):
        assert a.dtype == ours and torch.allclose(a, b, atol=2e-3)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("trained", "kernels"),
    [
        ("", []),
        ("into", ["_scatter"]),
        ("b2", ["_gather"]),
        ("w2", ["_gather"]),
        ("b1", ["_gather", "_dgelu"]),
        ("w1 b1 w2 b2", ["_gather", "_dgelu", "_gather"]),
        ("x", ["_gather", "_dgelu", "_scatter"]),
        ("into x w1 b1 w2 b2", ["_scatter", "_gather", "_dgelu", "_gather", "_scatter"]),
    ],
)
def test_only_what_is_trained_is_computed_and_kept(trained, kernels, launches):
    leaves = [x.requires_grad_(name in trained.split()) for name, x in zip(NAMES, tensors(9, 6, 8, 16, 24))]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = place_projected(leaves[0] * 1.0, distinct(9, 5), *leaves[1:], source_RS=distinct(6, 5, 1))
    assert launches == ["_up_kernel", "_down_kernel"]
    inputs = {x.data_ptr() for x in leaves}
    activations = [x.shape for x in kept if x.is_floating_point() and x.data_ptr() not in inputs]
    needs_z = set(trained.split()) - {"into", "b2"}
    assert activations == ([(5, 16)] if needs_z else [])  # z, and not what gelu makes of it
    if trained:
        out.sum().backward()
        assert launches[2:] == [f"{kernel}_kernel" for kernel in kernels]
    assert [name for name, x in zip(NAMES, leaves) if x.grad is not None] == [n for n in NAMES if n in trained.split()]


@pytest.mark.interpreter
def test_indices_out_of_range_write_and_read_nothing():
    memory, *rest = (x.detach() for x in tensors(30, 6, 8, 16, 24))
    rows = torch.tensor([0, 10, -1, 5, -(2**40), 2**40])
    source = torch.tensor([0, 6, 2, -7, 2**40, 4]).view(6, 1)
    before = memory.clone()
    out = place_projected(memory[10:20], rows, *rest, source_RS=source)
    known = rest[0][[0, 0, 2, 0, 0, 4]] * torch.tensor([1, 0, 1, 0, 0, 1])[:, None]
    expected = projector_mlp_reference(known, *rest[1:])
    assert torch.allclose(out[[0, 5]], expected[[0, 3]], atol=1e-5)
    untouched = [i for i in range(30) if i not in (10, 15)]
    assert memory[untouched].equal(before[untouched])
    x = rest[0].requires_grad_()
    [dx] = torch.autograd.grad(place_projected(before, rows + 1, x, *rest[1:], source_RS=source).sum(), x)
    assert dx.any(1).tolist() == [True, False, True, False, False, False]  # of rows 1 and 0; the others have no source


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("rows", "source", "message"),
    [
        ([0, 9], [0, 1], r"rows must lie in \[0, 9\), not between 0 and 9"),
        ([-1, 2], [0, 1], r"rows must lie in \[0, 9\), not between -1 and 2"),
        ([4, 4], [0, 1], "rows must be distinct: of 2 only 1 are"),
        ([4, 5], [0, 6], r"source must lie in \[0, 6\), not between 0 and 6"),
        ([4, 5], [-2, 1], r"source must lie in \[0, 6\), not between -2 and 1"),
        ([4, 5], [3, 3], "rows to write must be distinct"),
    ],
)
def test_debug_mode_reads_the_indices(rows, source, message, monkeypatch):
    into, *rest = tensors(9, 6, 8, 16, 24)
    monkeypatch.setattr("kernels.backend.DEBUG", True)
    with pytest.raises(ValueError, match=message):
        place_projected(into * 1.0, torch.tensor(rows), *rest, source_RS=torch.tensor(source)[:, None]).sum().backward()


INTO, X = torch.zeros(9, 8), torch.zeros(3, 4)
W1, B1 = torch.zeros(6, 4), torch.zeros(6)
W2, B2 = torch.zeros(8, 6), torch.zeros(8)
ROWS, SOURCE = torch.arange(3), torch.zeros(3, 1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=X[0]), r"x_PC, w1_FK, b1_F, w2_DF and b2_D, not x \(4,\)"),
        (dict(x=X[:, :3]), r"widths disagree, with 1 tower rows.* x \(3, 3\), w1 \(6, 4\)"),
        (dict(b1=B2), r"widths disagree.* b1 \(8,\)"),
        (dict(w2=W2[:, :5]), r"widths disagree.* w2 \(8, 5\)"),
        (dict(source_RS=SOURCE.expand(3, 2)), "widths disagree, with 2 tower rows"),
        (dict(source_RS=SOURCE.int()), r"int64 matrix, not torch.int32 \(3, 1\)"),
        (dict(source_RS=SOURCE[:, 0]), r"int64 matrix, not torch.int64 \(3,\)"),
        (dict(x=X.half()), "share one floating dtype, not .*float16"),
        (dict(w1=W1.to("meta")), "on one device, not .*'meta'"),
        (dict(source_RS=SOURCE.to("meta")), "on one device, not .*'meta'"),
        (dict(into=INTO[:, :7]), r"floating rows of 8, not torch.float32 \(9, 7\)"),
        (dict(into=INTO.int()), "floating rows of 8, not torch.int32"),
        (dict(into=torch.zeros(8, 9).T), r"contiguous, not strides \(1, 9\)"),
        (dict(rows=ROWS[:2]), r"3 input rows need 3 int64 rows of into, not torch.int64 \(2,\)"),
        (dict(source_RS=SOURCE[:2]), r"2 input rows need 2 int64 rows of into, not torch.int64 \(3,\)"),
        (dict(rows=ROWS.int()), "rows of into, not torch.int32"),
        (dict(rows=ROWS.to("meta")), "one device: cpu, meta, cpu"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(changes, message):
    arguments = dict(into=INTO, rows=ROWS, x=X, w1=W1, b1=B1, w2=W2, b2=B2) | changes
    source = arguments.pop("source_RS", None)
    with pytest.raises(ValueError, match=message) as error:
        place_projected(*arguments.values(), source_RS=source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("expanded", [(0, 1), (0,)])
def test_gradients_that_share_memory_are_read_right(expanded):
    """That of a sum is one number, or one row, shown many times."""
    leaves = tensors(1, 20, 8, 16, 24)[1:]
    gradients = [torch.autograd.grad(f(*leaves).sum(expanded).sum(), leaves) for f in (projector_mlp, formula)]
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(*gradients))
    assert projector_gemm._aligned(torch.zeros(16).expand(5, 16)).stride() == (16, 1)  # the interpreter would take 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("S", [1, 4])
def test_a_batch_of_images_in_equal_bits_without_waiting_for_the_device(S, dtype):
    R = 4 * 576 // S
    leaves, rows = tensors(4096, 4 * 577, 256, 1024, 512, S, dtype), distinct(4096, R)
    source = torch.arange(4 * 577, device=DEVICE).view(4, 577)[:, 1:].reshape(R, S)
    assert_as_exact_as_pytorch(leaves, rows, source)
    weight = torch.randn_like(leaves[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = (run(place_projected, leaves, rows, weight, dtype, source_RS=source) for _ in range(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(a.equal(b) for a, b in zip(first, second))

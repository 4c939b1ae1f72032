"""The projector and its placement against float64."""

import pytest
import torch

from kernels.projector import place_projected, projector_mlp


def inputs(num_rows: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(num_rows, 6), (10, 6), (10,), (8, 10), (8,)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def formula(x, w1, b1, w2, b2):
    z = x @ w1.T + b1
    return (z / 2 * (1 + torch.erf(z / 2**0.5))) @ w2.T + b2


@pytest.mark.parametrize("num_rows", [0, 1, 13])
def test_the_mlp_follows_the_formula_with_exact_gelu(num_rows):
    exact, rounded = inputs(num_rows), inputs(num_rows, torch.float32)
    out, expected = projector_mlp(*rounded), formula(*exact)
    assert out.shape == (num_rows, 8) and torch.allclose(out.double(), expected, atol=1e-5)
    weight = torch.randn(num_rows, 8, dtype=torch.float64)
    (out * weight.float()).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(rounded, exact):
        assert torch.allclose(a.grad.double(), b.grad, atol=1e-4)


@pytest.mark.parametrize("rows", [[], [4], [8, 0, 3]])
def test_placement_writes_its_rows_and_passes_gradients_to_the_others(rows):
    parts = inputs(len(rows))
    into, rows = torch.randn(9, 8, dtype=torch.float64, requires_grad=True), torch.tensor(rows, dtype=torch.int64)
    before = into.detach().clone()
    out = place_projected(into, rows, *parts)
    kept = torch.ones(9, dtype=torch.bool)
    kept[rows] = False
    assert into.equal(before) and out[kept].equal(before[kept])
    assert torch.allclose(out[rows], formula(*parts))
    weight = torch.randn(9, 8, dtype=torch.float64)
    gradients = torch.autograd.grad((out * weight).sum(), [into, *parts])
    assert gradients[0].equal(weight * kept[:, None])
    references = torch.autograd.grad((formula(*parts) * weight[rows]).sum(), parts)
    assert all(torch.allclose(a, b) for a, b in zip(gradients[1:], references))


def test_features_of_another_dtype_are_cast_to_the_rows_that_they_join():
    parts = inputs(2, torch.float32)
    out = place_projected(torch.zeros(5, 8, dtype=torch.bfloat16), torch.tensor([1, 4]), *parts)
    assert out.dtype == torch.bfloat16 and out[1].any() and not out[0].any()

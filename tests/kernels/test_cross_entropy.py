"""Cross entropy in chunks against PyTorch's on the full logits."""

import pytest
import torch
import torch.nn.functional as F

from kernels import cross_entropy
from kernels.cross_entropy import linear_cross_entropy


@pytest.mark.parametrize("num_rows", [1, 3, 8, 21])
def test_loss_and_gradients_equal_those_of_the_full_logits(num_rows, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 8)
    torch.manual_seed(0)
    hidden = torch.randn(num_rows, 16, requires_grad=True)
    weight = torch.randn(37, 16, requires_grad=True)
    target, scale = torch.randint(37, (num_rows,)), torch.rand(num_rows)
    loss = linear_cross_entropy(hidden, weight, target)
    expected = F.cross_entropy(hidden @ weight.T, target, reduction="none")
    assert loss.dtype == torch.float32 and loss.shape == (num_rows,) and torch.allclose(loss, expected, atol=1e-5)
    gradients = torch.autograd.grad((loss * scale).sum(), (hidden, weight))
    references = torch.autograd.grad((expected * scale).sum(), (hidden, weight))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients, references))


def test_more_rows_than_a_real_chunk():
    torch.manual_seed(0)
    num_rows = cross_entropy.CHUNK_ROWS + 5
    hidden, weight = torch.randn(num_rows, 4, requires_grad=True), torch.randn(11, 4)
    target = torch.randint(11, (num_rows,))
    loss = linear_cross_entropy(hidden, weight, target)
    expected = F.cross_entropy(hidden @ weight.T, target, reduction="none")
    assert torch.allclose(loss, expected, atol=1e-5)
    [a], [b] = (torch.autograd.grad(x.mean(), hidden) for x in (loss, expected))
    assert torch.allclose(a, b, atol=1e-7)


def test_no_rows_give_exactly_zero_gradients():
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64))
    assert loss.shape == (0,) and loss.dtype == torch.float32
    loss.sum().backward()
    assert hidden.grad.shape == (0, 4) and weight.grad.shape == (11, 4) and not weight.grad.any()


def test_logits_of_bf16_are_reduced_in_float32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 64).bfloat16(), torch.randn(500, 64).bfloat16()
    target = torch.randint(500, (50,))
    loss = linear_cross_entropy(hidden, weight, target)
    expected = F.cross_entropy((hidden @ weight.T).double(), target, reduction="none")
    assert loss.dtype == torch.float32 and torch.allclose(loss.double(), expected, atol=1e-4)

"""One product for the experts of a layer, against one product after the other."""

import math

import pytest
import torch

from kernels.grouped import grouped_linear, grouped_linear_reference, waits_for_device

CASES = [(device, dtype) for device in ("cpu", "cuda") for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(
    ("device", "dtype"), [pytest.param(*case, marks=[pytest.mark.gpu] * (case[0] == "cuda")) for case in CASES]
)
def test_it_is_a_product_for_each_group_and_rows_of_none_leave_nothing_behind(device, dtype):
    """What is not computed is not even finite."""
    end_N = torch.tensor([16, 16, 41], dtype=torch.int32, device=device)
    x_AI = torch.randn(64, 32, device=device, dtype=dtype).index_fill(0, torch.arange(41, 64, device=device), math.nan)
    weight = torch.randn(3, 24, 32, device=device, dtype=dtype)
    dy = torch.randn(41, 24, device=device, dtype=dtype)
    results = []
    for function, kind in ((grouped_linear, dtype), (grouped_linear_reference, torch.float32)):
        leaves = [tensor.clone().to(kind).requires_grad_() for tensor in (x_AI, weight)]
        y_AO = function(*leaves, end_N)[:41]
        y_AO.backward(dy.to(kind))
        results.append([y_AO.float(), leaves[0].grad[:41].float(), leaves[1].grad.float()])
    error = 1e-5 if dtype == torch.float32 and device == "cpu" else 0.02
    for ours, expected in zip(*results):
        assert (ours - expected).norm() <= error * expected.norm()
    assert results[0][2][1].eq(0).all(), "of a group without rows"


def test_what_trains_decides_what_is_kept():
    end_N = torch.tensor([3, 4], dtype=torch.int32)
    kept = []
    for trains in (True, False):
        x_AI = torch.randn(4, 16, requires_grad=True)
        weight = torch.randn(2, 8, 16, requires_grad=trains)
        y_AO = grouped_linear(x_AI, weight, end_N)
        kept.append([tensor is not None for tensor in y_AO.grad_fn.saved_tensors])
        y_AO.sum().backward()
        assert (weight.grad is not None) == trains and x_AI.grad is not None
    assert kept == [[True, True, True], [False, True, True]]


@pytest.mark.gpu
def test_nothing_waits_for_a_gpu_that_has_the_kernel():
    x_AI = torch.randn(64, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(3, 24, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    end_N = torch.tensor([16, 16, 64], dtype=torch.int32, device="cuda")
    if waits_for_device(x_AI):
        pytest.skip("torch has no kernel for this GPU")
    torch.cuda.set_sync_debug_mode("error")
    try:
        grouped_linear(x_AI, weight, end_N).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""Attention on a GPU: bfloat16, long rows, repeatable bits, and no race or stray access under compute-sanitizer."""

import shutil
import subprocess
import sys

import pytest
import torch

from kernels.attention import attention
from kernels.segments import Segments
from tests.kernels.exact import assert_as_exact_as_pytorch, random_inputs, slots

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("deterministic", [False, True])
def test_outputs_and_gradients(head_dim, causal, dtype, deterministic):
    segments = Segments.of([577, 1, 0, 300, 1024], "cuda")
    inputs = random_inputs(segments, segments, 8, 2, head_dim, dtype)
    assert_as_exact_as_pytorch(inputs, dtype, segments, segments, causal=causal, deterministic=deterministic)


@pytest.mark.parametrize("causal", [False, True])
def test_slots_and_unequal_lengths(causal):
    segments, segments_k = slots([40, 700, 3], [11, 700, 3], "cuda"), slots([900, 50, 0], [333, 50, 0], "cuda")
    inputs = random_inputs(segments, segments_k, 4, 4, 64, torch.bfloat16)
    assert_as_exact_as_pytorch(inputs, torch.bfloat16, segments, segments_k, causal=causal)


def test_a_row_of_16k_tokens():
    segments = Segments.of([16384], "cuda")
    inputs = random_inputs(segments, segments, 2, 1, 128, torch.bfloat16)
    assert_as_exact_as_pytorch(inputs, torch.bfloat16, segments, segments, causal=True)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_deterministic_gradients_repeat_bit_for_bit(head_dim):
    segments = Segments.of([3000, 1096], "cuda")
    q, k, v, dout, _ = random_inputs(segments, segments, 16, 4, head_dim, torch.bfloat16)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    run = lambda: torch.autograd.grad(
        attention(q, k, v, segments, causal=True, deterministic=True), (q, k, v), grad_outputs=dout
    )
    first = run()
    assert all(a.equal(b) for _ in range(5) for a, b in zip(first, run()))


SMALL_CASE = """
import torch
from kernels.attention import attention
from kernels.segments import Segments
for head_dim in (64, 128):
    q, k, v = (torch.randn(300, 2, head_dim, device="cuda").bfloat16().requires_grad_() for _ in range(3))
    attention(q, k, v, Segments.of([170, 0, 130], "cuda"), causal=True).sum().backward()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable, "-c", SMALL_CASE]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:]

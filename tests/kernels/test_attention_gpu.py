"""Attention on a GPU: bfloat16, long rows, repeatable bits, and no race or stray access under compute-sanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("causal", [False, True])
def test_many_segments_and_segments_without_queries(causal):
    segments, segments_k = Segments.of([2] * 300 + [0], "cuda"), Segments.of([3] * 300 + [200], "cuda")
    inputs = random_inputs(segments, segments_k, 4, 2, 64, torch.bfloat16)
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
from kernels.decode import decode_attention
for head_dim in (64, 80, 128):
    q, k, v = (torch.randn(300, h, head_dim, device="cuda").bfloat16().requires_grad_() for h in (4, 2, 2))
    attention(q, k, v, Segments.of([170, 0, 130], "cuda"), causal=True).sum().backward()
with torch.no_grad():
    cache = torch.randn(2, 300, 2, 64, device="cuda").bfloat16()
    decode_attention(q[:2, :, :64], cache, cache, torch.tensor([300, 7], device="cuda"))
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable, "-c", SMALL_CASE]
    # Without the caching allocator every tensor ends where its memory ends, and a stray access is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = dict(capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[2], env=environment)
    result = subprocess.run(command, **options)
    assert result.returncode == 0, result.stdout[-2000:]

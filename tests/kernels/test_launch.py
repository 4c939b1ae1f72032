"""Launches without Triton's binding of arguments: the right code for each kind of argument, and less host time."""

import pytest
import torch

from kernels import launch
from kernels.attention_statistics import statistics
from tests.measurements.launch_time import measure, nothing_is_launched

pytestmark = pytest.mark.compiler


def test_three_quarters_of_triton_s_host_time_at_most():
    times = measure(128)
    ours, theirs = (sum(pair[i] for pair in times.values()) for i in (0, 1))
    assert ours <= 0.75 * theirs, times


def test_tensors_that_start_elsewhere_get_code_of_their_own():
    """Code for pointers at multiples of 16 bytes must not run on others."""
    aligned, odd = torch.zeros(4, 128), torch.zeros(4 * 128 + 1)[1:].view(4, 128)
    out = torch.zeros(128, 4, 16)
    numbers = []
    with nothing_is_launched():
        for lse, dlse in ((aligned, None), (odd, None), (aligned, aligned), (aligned, odd), (aligned, None)):
            statistics(out, out, lse, dlse)
            numbers.append(len(launch._compiled))
        codes = {compiled.hash for compiled, _ in launch._compiled.values()}
    assert numbers == [1, 2, 3, 4, 4] and len(codes) == 4

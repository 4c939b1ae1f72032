"""tests/measurements/gpu_hour.sh, which is written for a GPU, runs to its end without one; hazard_repeats.py finds a
kernel that goes wrong now and then."""

import itertools
import json
import math
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch

from kernels.attention import attention_with_lse_reference
from tests.measurements import hazard_repeats

ROOT = Path(__file__).parents[2]
SCRIPT = "tests/measurements/gpu_hour.sh"
PARTS = ("environment", "selftest", "hazard", "gpu_tests", "benchmark", "lora", "alignment")


def run(tmp_path, *parts: str, **variables: str) -> tuple[subprocess.CompletedProcess, dict[str, str]]:
    """The result of a dry run and the outcome of each part."""
    variables |= {"DRY": "1", "RESULTS": str(tmp_path / "results"), "OUT": str(tmp_path / "out")}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    result = subprocess.run([SCRIPT, *parts], cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = (tmp_path / "results" / "cpu" / "summary.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| ")]
    return result, {row[1]: row[2] for row in table[1:]}


@pytest.mark.slow
def test_every_part_is_done_and_its_results_lie_in_the_archive(tmp_path):
    result, outcomes = run(tmp_path)
    assert outcomes == dict.fromkeys(PARTS, "done"), result.stdout[-3000:]
    assert result.returncode == 0
    with tarfile.open(tmp_path / "out" / "cpu.tar.gz") as archive:
        names = {name.removeprefix("cpu/") for name in archive.getnames()}
    assert {"summary.md", "README.md", "rows.csv", "roofline.png", *(f"{part}.log" for part in PARTS)} <= names
    for config in ("avlm_8b", "avlm_8b_vision_alignment"):
        step = json.loads((tmp_path / "results" / "cpu" / f"step_{config}.json").read_text())
        assert step["tokens_per_second"] > 0 and len(step["kernels"]) == 10
        assert step["losses"] == pytest.approx([math.log(512)] * 3, rel=0.05)  # random weights, 512 tokens


def test_a_part_that_fails_or_is_cut_off_does_not_stop_the_next(tmp_path):
    result, outcomes = run(tmp_path, "selftest", "environment", PYTHON="false")
    assert outcomes == {"selftest": "failed (1)", "environment": "failed (1)"} and result.returncode == 1


def test_what_no_time_is_left_for_is_not_begun(tmp_path):
    result, outcomes = run(tmp_path, "selftest", "hazard", TOTAL="0")
    assert set(outcomes.values()) == {"not begun: no time left"} and result.returncode == 1


def test_an_unknown_part_is_refused_before_any_other_runs(tmp_path):
    environment = {**os.environ, "DRY": "1", "RESULTS": str(tmp_path)}
    command = [SCRIPT, "environment", "benchmarks"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and (result.stdout, result.stderr) == ("", "no part benchmarks\n")


@pytest.mark.parametrize("bad_launch", [None, 0, 3])
def test_one_bit_in_one_of_many_launches_is_found(bad_launch, monkeypatch):
    """The first launch is compared with float64, all others with the first."""
    launches = itertools.count()

    def kernel(q, k, v, segments, segments_k, causal, scale):
        out, lse = attention_with_lse_reference(q, k, v, segments, causal=causal, segments_k=segments_k, scale=scale)
        if next(launches) == bad_launch:
            out.view(torch.int32)[2, 1, 3] ^= 1 << 22  # the highest bit of a mantissa
        return out, lse

    monkeypatch.setitem(hazard_repeats.KERNELS, "triton", kernel)
    sizes = dict(lengths=(5, 3), heads=2, kv_heads=1, head_dim=8, causal=True, dtype=torch.float32)
    found, is_right = hazard_repeats.run(hazard_repeats.Case(kernel="triton", **sizes), repeats=6, device="cpu")
    assert is_right == (bad_launch is None)
    assert f"alone: {6 if bad_launch == 0 else int(bad_launch == 3)} of 6 differ" in found

"""tests/measurements/gpu_hour.sh, which is written for a GPU, runs to its end without one."""

import json
import os
import subprocess
import tarfile

import pytest

from tests.training.test_train import ENVIRONMENT, ROOT

SCRIPT = "tests/measurements/gpu_hour.sh"
PARTS = ("environment", "selftest", "hazard", "gpu_tests", "benchmark", "lora", "alignment")


def run(tmp_path, *parts: str, **variables: str) -> tuple[subprocess.CompletedProcess, dict[str, str]]:
    """The result of a dry run and the outcome of each part."""
    variables |= {"DRY": "1", "RESULTS": str(tmp_path / "results"), "OUT": str(tmp_path / "out")}
    environment = {**os.environ, **ENVIRONMENT, **variables}
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
    for config in ("lora", "vision_alignment"):
        step = json.loads((tmp_path / "results" / "cpu" / f"step_avlm_8b_{config}.json").read_text())
        assert step["tokens_per_second"] > 0 and len(step["kernels"]) == 10


def test_a_part_that_fails_or_is_cut_off_does_not_stop_the_next(tmp_path):
    result, outcomes = run(tmp_path, "selftest", "environment", PYTHON="false")
    assert outcomes == {"selftest": "failed (1)", "environment": "failed (1)"} and result.returncode == 1


def test_what_no_time_is_left_for_is_not_begun(tmp_path):
    result, outcomes = run(tmp_path, "selftest", "hazard", TOTAL="0")
    assert set(outcomes.values()) == {"not begun: no time left"} and result.returncode == 1


def test_an_unknown_part_is_refused(tmp_path):
    result, _ = run(tmp_path, "benchmarks")
    assert result.returncode == 2 and result.stderr == "no part benchmarks\n"

"""What README, docs and config headers tell a reader to run is there, and measurements and checks reach their end."""

import re
import subprocess
import sys

import pytest

from tests.training.test_train import ENVIRONMENT, ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "configs").rglob("*.yaml"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
NAMED = sorted(set(re.findall(r"python (?:-m )?((?:tests|avlm|kernels)[\w./]*\w|train\.py|generate\.py)", TEXT)))
# Scripts of tests/, each with arguments that shorten it. Those of avlm/ and kernels/ have tests of their own.
SCRIPTS = {
    "tests.measurements.equivalence": [],  # what `make equivalence` runs
    "tests.measurements.wire": [],
    "tests.measurements.measure_balance": ["--repeats", "1"],
    "tests.measurements.launch_time": [],
    "tests.measurements.elementwise_bytes": [],
    "tests.measurements.step_time": ["--table"],
    "tests.kernels.test_compiled": [],
    "tests.measurements.fuzz": ["--count", "100"],
    "tests.measurements.checkpoint_checks": ["0.05"],
    "tests.measurements.kill_in_save": ["3"],
    "tests.measurements.save_plan": ["8"],
    "tests.measurements.save_wait": ["64"],
    "tests.measurements.rows_to_ranks": ["--tokens", "8192"],
    "tests.measurements.starts": ["--records", "20000"],
    "tests.measurements.faults": ["killed", "stopped"],
    "tests/measurements/packing_against_bucketing.py": [],
    "tests/measurements/speed_against_processors.py": [],
    "tests/measurements/speed_against_transformers.py": [],
    "tests.measurements.speed_against_families": ["--seconds", "30"],
    "tests.measurements.served_by_transformers": [],
    "tests.measurements.duplex_toy": ["--steps", "10", "--train", "20", "--test", "2", "--folder", "data/duplex_test"],
}
AFTER_MAKE_DEMO = {"tests/measurements/demo_variants.py", "tests/measurements/connectors.py"}  # an hour and more
WITH_LLAMA_CPP = {"tests.measurements.served_by_llama_cpp"}  # which is built from source
WITH_VLLM = {"tests/measurements/vllm_answers.py"}  # which has an environment of its own


def test_every_command_of_the_pages_names_a_file_that_is_there():
    assert len(NAMED) > 15
    for name in NAMED:
        path = name if name.endswith(".py") else name.replace(".", "/")
        places = [ROOT / path, ROOT / f"{path}.py", ROOT / path / "__main__.py"]
        assert any(place.is_file() for place in places), f"{name} is not there"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`make ([a-z-]+)", TEXT))
    assert named <= targets, f"no make targets: {named - targets}"


def test_the_commands_of_a_run_answer_help_before_they_import_torch():
    """torch takes seconds to import. Those of kernels/ and of the demos do not."""
    of_a_run = [name for name in NAMED if not name.startswith(("tests", "kernels", "avlm.demo"))]
    assert {"train.py", "generate.py", "avlm.weights", "avlm.training.plots", "avlm.evaluation.page"} <= {*of_a_run}
    script = f"""
import runpy, sys, avlm
sys.argv[1:] = ["--help"]
for name in {of_a_run}:
    run = runpy.run_path if name.endswith(".py") else runpy.run_module
    try:
        run(name, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0 and "torch" not in sys.modules, name
    else:
        raise AssertionError(name)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("usage:") == len(of_a_run)


def test_every_test_that_the_pages_name_is_there():
    named = re.findall(r"`(?:tests/)?([\w/]+\.py)::(test_\w+)`", TEXT)
    assert len(named) >= 7
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file} has no {name}"


def test_every_script_of_the_pages_is_run_to_its_end_by_a_test():
    assert {
        name for name in NAMED if name.startswith("tests")
    } <= SCRIPTS.keys() | AFTER_MAKE_DEMO | WITH_LLAMA_CPP | WITH_VLLM


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_of_the_pages_reaches_its_end(name):
    where = [name] if name.endswith(".py") else ["-m", name]
    result = subprocess.run(
        [sys.executable, *where, *SCRIPTS[name]], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-2000:]}"

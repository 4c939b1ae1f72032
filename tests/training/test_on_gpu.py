"""What surrounds the numerics, on a GPU: saves in the background, moments in bf16, float8, profile, memory snapshot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.parallel.small import TREE

ROOT = Path(__file__).parents[2]
DECODER = {**TREE["model"]["decoder"], "hidden_size": 64, "num_kv_heads": 4}
HAS_FLOAT8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def train(folder: Path, *overrides: str) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the steps of a run that continues one in ``folder``."""
    data = {"train": "synthetic:images=1,clips=1,documents=2,seconds=1", "seq_length": 256}
    tree = {**TREE, "output_dir": str(folder / "run"), "model": {**TREE["model"], "decoder": DECODER}, "data": data}
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "train.py", str(folder / "config.yaml"), "deterministic=true", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [(record["loss"], record["grad_norm"]) for record in records if "loss" in record]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "float8", ["false", pytest.param("true", marks=pytest.mark.skipif(not HAS_FLOAT8, reason="old"))]
)
def test_a_run_saves_in_the_background_is_traced_and_resumes_exactly(tmp_path, float8):
    options = ["checkpoint.async_save=true", "checkpoint.every=2", "optimizer.moments=bf16", f"train.float8={float8}"]
    whole = train(tmp_path / "whole", *options, "train.stop_after=7", "debug.profile=[3, 2]")
    train(tmp_path / "halves", *options, "train.stop_after=3")
    assert train(tmp_path / "halves", *options, "train.stop_after=7") == whole
    suffixes = {path.suffix for path in (tmp_path / "whole/run/profile").iterdir()}
    assert suffixes == {".gz", ".pickle"}, "a trace and a memory snapshot"

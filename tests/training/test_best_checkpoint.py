"""The best checkpoint by a validation metric: saved when found, kept whatever comes after, known to a resume."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from avlm.config.run import CheckpointConfig
from avlm.evaluation.__main__ import main
from avlm.evaluation.answers import predictions_path
from avlm.parallel import mesh
from avlm.process.exit import run_command
from avlm.storage.run_folder import Progress, complete_checkpoints, folder_of, read_progress, read_records
from avlm.training import optimizer
from avlm.training.saving import Saver
from tests.parallel.small import build, make_config
from tests.parallel.spawn import run_ranks
from tests.training.test_train import ENVIRONMENT, ROOT, run
from tests.training.test_train_layouts import write_files


def save_five(cfg, folder):
    """What is kept after each of five saves: steps 1 and 4 were the best so far."""
    world, model = build(cfg)
    adam = optimizer.build(model, cfg.stages[0].optimizer)
    saver = Saver(Path(folder), CheckpointConfig(keep=1), world)
    kept = []
    for step, best in enumerate([1, 1, 1, 4, 4], start=1):
        saver.save(Progress(step=step, best_step=best), model, adam, {})
        names = [path.name for path in complete_checkpoints(Path(folder))]
        kept.append(([int(name[-2:]) for name in names], (Path(folder) / "checkpoints" / "best").read_text()))
    mesh.stop()
    return kept


def test_retention_spares_the_best_until_there_is_a_better_one(tmp_path):
    for kept in run_ranks(save_five, 2, make_config(), str(tmp_path)):
        assert [steps for steps, _ in kept] == [[1], [1, 2], [1, 3], [4], [4, 5]]
        assert [best[-2:] for _, best in kept] == ["01", "01", "01", "04", "04"]


OVERRIDES = (
    "optimizer.lr=0.1",
    "optimizer.warmup_steps=1",
    "optimizer.clip_norm=100",
    "data.metrics.some=[cer, exact_match]",
)
OVERRIDES += ("checkpoint.best=val/some/loss", "checkpoint.keep=1", "checkpoint.every=100")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that is stopped when its validation loss, after a fall, has long been rising: the rate is far too high."""
    folder = tmp_path_factory.mktemp("best")
    path = write_files(folder, precision="fp32", validate_every=1, validate_answers=1, stop_after=6)
    result = run(path, *OVERRIDES)
    assert result.returncode == 0, result.stderr
    return folder


def evaluate(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "avlm.evaluation", *options]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


def losses(folder: Path) -> dict[int, float]:
    rows = read_records(folder / "run" / "metrics.jsonl")
    return {row["step"]: row["val/some/loss"] for row in rows if "val/some/loss" in row}


def best_of(values: dict[int, float]) -> int:
    return min(values, key=values.get)


def kept_in(folder: Path) -> list[int]:
    return [read_progress(path).step for path in complete_checkpoints(folder / "run")]


def test_the_best_step_is_saved_outside_the_rhythm_and_outlives_the_newest(stopped):
    best = best_of(losses(stopped))
    assert 1 < best < 6, "otherwise this shows nothing"
    assert kept_in(stopped) == [best, 6]
    assert (stopped / "run" / "checkpoints" / "best").read_text() == f"step_{best:08d}"
    found = read_progress(folder_of(stopped / "run", 6))
    assert (found.best_step, found.best_metric, found.best_value) == (best, "val/some/loss", losses(stopped)[best])


def test_a_resumed_run_knows_the_best_so_far(stopped):
    """Steps that are worse than the best of the first part are not saved, and the best stays."""
    result = run(stopped / "config.yaml", *OVERRIDES, "train.stop_after=8")
    assert result.returncode == 0, result.stderr
    assert "resuming step_00000006" in result.stdout
    best = best_of(losses(stopped))
    assert len(losses(stopped)) == 8 and best < 6
    assert kept_in(stopped) == [best, 8]
    assert "(the best so far)" not in result.stdout


def test_predictions_of_a_step_and_the_best_checkpoint_are_evaluated(stopped):
    """The command line answers the validation set from the best checkpoint as training did at that step."""
    best, folder = best_of(losses(stopped)), stopped / "run"
    path = predictions_path(folder, best, "some")
    during = path.read_text()
    assert json.loads(during)["prediction"] is not None
    path.unlink()
    options = ("--metrics", "cer,exact_match", "--step", "best", "--limit", "1")
    result = evaluate(str(folder), "--data", f"some={stopped / 'some.jsonl'}", *options)
    assert result.returncode == 0, result.stderr
    assert path.read_text() == during
    report = json.loads((folder / "report.json").read_text())
    assert report["step"] == best and report["results"][0]["metric"] == "cer"
    [row] = [row for row in read_records(folder / "metrics.jsonl") if row["step"] == best and "val/some/cer" in row]
    assert report["results"][0]["metrics"] == {"cer": row["val/some/cer"], "exact_match": row["val/some/exact_match"]}
    assert "| task | set | samples | cer |" in (folder / "report.md").read_text()


def test_adapters_on_a_base_in_bf16_are_evaluated_as_during_the_run(tmp_path):
    path = write_files(tmp_path, validate_every=2, validate_answers=1, stop_after=2)
    changes = ("model.lora={rank: 2, targets: [decoder.*], base: bf16}", "stages.all.train=[lora, vision_projector]")
    result = run(path, *changes, "data.metrics.some=[cer]")
    assert result.returncode == 0, result.stderr
    predictions = predictions_path(tmp_path / "run", 2, "some")
    during = predictions.read_text()
    predictions.unlink()
    sets = f"some={tmp_path / 'some.jsonl'}"
    result = evaluate(str(tmp_path / "run"), "--data", sets, "--metrics", "cer", "--limit", "1")
    assert result.returncode == 0, result.stderr
    assert predictions.read_text() == during


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--metrics", "wer,bleu"), "--metrics names 'bleu', which is no metric (known: "),
        (("--step", "5000"), "no complete checkpoint of step 5000: there are those of steps "),
        (("--step", "worst"), "--step worst: give a number, best or latest"),
        (("--data", "b=absent.jsonl"), "--data b=absent.jsonl: there is no absent.jsonl"),
    ],
)
def test_what_the_command_line_cannot_do_is_one_line(stopped, options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", str(stopped / "run"), "--data", f"a={stopped / 'some.jsonl'}", *options])
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and message in line

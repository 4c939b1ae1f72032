"""train.py on several ranks: every layout has the losses of one rank, resumes over another, and fails as one."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from avlm.preflight.check import check_layout
from avlm.storage.run_folder import complete_checkpoints, read_records
from tests.data.small_files import image_file, photo, write_tokenizer
from tests.parallel.small import TREE, make_config
from tests.parallel.spawn import run_ranks
from tests.training.test_train import (
    ENVIRONMENT,
    ROOT,
    STAGES,
    command,
    losses,
    run,
    train_to_end,
    wait_until,
    write_config,
)

SHORT = {"stages": [{**stage, "steps": 3} for stage in STAGES], "checkpoint": {"every": 2, "keep": 3}}
NOT_COMPARED = {"stage", "data_seconds", "step_seconds", "tokens_per_second", "recomputed_flops", "memory_gib"}


def finish(path: Path, *overrides: str, ranks: int = 1) -> Path:
    """Run to the end; the folder of the config."""
    run_ranks(train_to_end, ranks, path, overrides)
    return path.parent


def assert_same_rows(folder: Path, expected: Path) -> None:
    """Loss, loss of each kind, gradient norm, validation, and what is counted: tokens, targets, skipped samples."""
    found, wanted = (read_records(path / "run" / "metrics.jsonl") for path in (folder, expected))
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for row, of_expected in zip(found, wanted):
        compared = lambda row: {k: v for k, v in row.items() if k not in NOT_COMPARED and not k.startswith("seconds/")}
        assert compared(row) == pytest.approx(compared(of_expected), rel=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """One rank, two stages of three steps, never interrupted."""
    return finish(write_config(tmp_path_factory.mktemp("alone"), **SHORT))


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """Two data ranks that accumulate two rows each, never interrupted."""
    return finish(write_config(tmp_path_factory.mktemp("pair"), **SHORT), "train.accumulate=2", ranks=2)


def test_tensor_times_context_ranks_have_the_rows_of_one_rank(alone, tmp_path):
    layout = ("parallel.tensor=2", "parallel.context=2", "debug.check_collectives=true")
    assert_same_rows(finish(write_config(tmp_path, **SHORT), *layout, ranks=4), alone)


def test_balanced_media_recompute_and_local_accumulation_have_the_rows_of_the_plain_run(pair, tmp_path):
    options = ("parallel.balance_media=true", "train.recompute.decoder=full", "debug.check_collectives=true")
    options += ("train.rows_per_step=4", "train.accumulate_mode=local")
    assert_same_rows(finish(write_config(tmp_path, **SHORT), *options, ranks=2), pair)


def test_a_run_goes_on_in_another_layout(alone, tmp_path):
    path = write_config(tmp_path, **SHORT)
    finish(path, "train.stop_after=1")
    finish(path, "parallel.tensor=2", ranks=2)
    assert_same_rows(tmp_path, alone)


def test_stages_chained_by_init_from_have_the_losses_of_one_run(tmp_path):
    """The data of a run's stages are those of its seed and the next ones; the stages are those of avlm_8b.yaml."""
    projectors = ["vision_projector", "audio_projector"]
    trained = {
        "vision_alignment": projectors[:1],
        "audio_alignment": projectors[1:],
        "finetune": ["decoder", *projectors],
    }
    stages = [{"name": name, "steps": 2, "train": modules} for name, modules in trained.items()]
    whole = finish(write_config(tmp_path / "whole", stages=stages))
    found, before = [], None
    for i, stage in enumerate(stages):
        path = write_config(tmp_path / stage["name"], stages=[stage], seed=1 + i)
        finish(path, *([f"init_from.all={before}"] if before else []))
        found += losses(path.parent).values()
        before = path.parent / "run"
    assert found == list(losses(whole).values())


def test_synthetic_rows_do_not_go_on_with_another_number_of_data_ranks(pair, tmp_path):
    stored = pair / "run" / "checkpoints" / "step_00000004"
    result = run(write_config(tmp_path, **SHORT), "train.accumulate=2", f"resume={stored}")
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert "synthetic rows belong to their rank: continue with 2 data ranks" in line


def write_files(folder: Path, **train) -> Path:
    """A config with files: pictures with one answer or another, a picture that is none, and a text longer than a
    row; the answer to a validation set's second sample is never learned."""
    samples = []
    for i in range(12):
        (folder / f"{i}.png").write_bytes(image_file(photo(16, 16, seed=i)) if i != 5 else b"no picture")
        samples.append(conversation("<image> hello?", "one two") | {"images": [f"{i}.png"]})
        samples.append(conversation("what?", "three"))
    samples.append(conversation("what is this picture of? " * 40, "four"))
    write_samples(folder / "all.jsonl", samples)
    write_samples(folder / "some.jsonl", [samples[0], conversation("hello?", "four"), samples[3]])
    write_samples(folder / "one.jsonl", samples[:1])
    write_samples(folder / "three.jsonl", samples[:1] * 3)
    data = {
        **{"train": str(folder / "all.jsonl"), "validation": {"some": str(folder / "some.jsonl")}, "num_workers": 0},
        **{"tokenizer": str(write_tokenizer(folder / "tokenizer")), "template": "chatml", "seq_length": 64},
        "max_bad_fraction": 0.2,
    }
    model = TREE["model"] | {"decoder": TREE["model"]["decoder"] | {"vocab_size": 400}}
    stages = [{"name": "all", "steps": 62, "train": ["decoder", "vision_projector"]}]
    return write_config(folder, data=data, model=model, stages=stages, optimizer={"lr": 1e-2}, train=train)


def test_files_go_on_with_another_number_of_data_ranks(tmp_path):
    path = write_files(tmp_path)
    finish(path, "train.stop_after=2", ranks=2)
    more = ("train.stop_after=4", "train.rows_per_step=2")
    samples = (tmp_path / "all.jsonl").read_text()
    (tmp_path / "all.jsonl").write_text(samples * 2)
    result = run(path, *more, "stages.all.steps=99")
    assert result.returncode == 2 and "all.jsonl holds 50 records, but 25 when the state was written" in result.stderr
    (tmp_path / "all.jsonl").write_text(samples)
    # The refused run has not become the longer one.
    assert run(path, *more).returncode == 0
    before, after = (read_records(tmp_path / "run" / "metrics.jsonl")[i] for i in (1, 3))
    assert after["step"] == 4 and abs(after["tokens"] - before["tokens"]) < 16, "as many rows in a step"


def conversation(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_samples(path: Path, samples: list[dict]) -> None:
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> tuple[Path, Path]:
    """A run on files that stands before its last two steps, and the same after them, on one rank."""
    before = tmp_path_factory.mktemp("files")
    finish(write_files(before, precision="fp32", validate_every=100, validate_answers=3), "train.stop_after=60")
    after = shutil.copytree(before, tmp_path_factory.mktemp("after"), dirs_exist_ok=True)
    return before, finish(before / "config.yaml", f"output_dir={after / 'run'}") and after


@pytest.mark.parametrize("layout", ["tensor", "context"])
def test_validation_and_answers_of_ranks_that_share_a_row_are_those_of_one_rank(learned, tmp_path, layout):
    before, after = learned
    shutil.copytree(before / "run", tmp_path / "run")
    finish(before / "config.yaml", f"output_dir={tmp_path / 'run'}", f"parallel.{layout}=2", ranks=2)
    *_, last_step, validation = read_records(tmp_path / "run" / "metrics.jsonl")
    assert last_step["skipped_samples"] > 1, "the picture that is none, and the text that is too long"
    assert 0 < validation["val/some/exact_match"] < 1, "one of the answers is never learned"
    assert_same_rows(tmp_path, after)


@pytest.mark.slow
def test_validation_goes_on_where_a_data_rank_has_no_rows(tmp_path):
    """The mean over three samples that are the same is that of one, which leaves one of two data ranks without."""
    path = write_files(tmp_path, precision="fp32", validate_every=1, validate_answers=2)
    sets = [f"data.validation.{name}={tmp_path / name}.jsonl" for name in ("one", "three")]
    finish(path, *sets, "train.stop_after=1", "parallel.context=2", ranks=4)
    validation = read_records(tmp_path / "run" / "metrics.jsonl")[-1]
    assert validation["val/one/loss"] == pytest.approx(validation["val/three/loss"], rel=1e-5)


def test_torchrun_restarts_a_run_that_lost_a_worker_from_its_checkpoint(pair, tmp_path):
    path, folder = write_config(tmp_path, **SHORT), tmp_path / "run"
    restarting = command(path, "train.accumulate=2", ranks=2)
    restarting.insert(restarting.index("--standalone"), "--max-restarts=1")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(restarting, cwd=ROOT, env=ENVIRONMENT, **pipes)
    wait_until(lambda: complete_checkpoints(folder) or process.poll() is not None)
    assert process.poll() is None, process.communicate()[1]
    first = int((folder / ".lock").read_text().split()[1])  # "process N on HOST"
    os.kill(first, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "resuming step_" in out
    assert_same_rows(tmp_path, pair)
    assert len(losses(tmp_path)) == 6


def test_a_rank_that_fails_ends_all_within_seconds_and_is_heard_first(pair, tmp_path):
    """The loader state of one data rank is of another run: that rank finds it while the other waits for its data."""
    stored = shutil.copytree(pair / "run", tmp_path / "stored") / "checkpoints" / "step_00000004"
    state = json.loads((stored / "loader_00001.json").read_text())
    (stored / "loader_00001.json").write_text(json.dumps(state | {"seed": 7}))
    marker = json.loads((stored / "complete").read_text())
    del marker["files"], marker["checksum"]  # they would tell
    (stored / "complete").write_text(json.dumps(marker))
    overrides = ("train.accumulate=2", f"resume={stored}")
    process = subprocess.Popen(
        command(write_config(tmp_path, **SHORT), *overrides, ranks=2),
        **{"cwd": ROOT, "env": ENVIRONMENT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True},
    )
    lines = [(time.monotonic(), line) for line in process.stderr]
    assert process.wait(timeout=60) != 0
    (failed, first), *others = [(at, line) for at, line in lines if line.startswith("error")]
    assert "error (rank 1): the loader state is for seed=7, this run has" in first
    assert time.monotonic() - failed < 20
    assert all("error (rank 0): another rank ended; look for its own error" in line for _, line in others)
    assert not any("[rank" in line for _, line in lines), "no traceback of a rank"


def test_ranks_that_were_started_with_another_config_are_named(tmp_path):
    path = write_config(tmp_path, **SHORT)
    processes = []
    for rank, seed in enumerate([1, 2]):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "RANK": str(rank), "WORLD_SIZE": "2"}
        pipes = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command(path, f"seed={seed}"), env=ENVIRONMENT | place, **pipes))
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert all(process.returncode == 2 for process in processes)
    expected = "ranks disagree on config: rank 1 has `seed: 2`, most have `seed: 1`; start the same command"
    assert any(expected in text for text in errors)
    assert all(len(text.splitlines()) == 1 for text in errors), errors
    assert not (tmp_path / "run").exists()


WINDOWED = {**TREE["model"], "decoder": {**TREE["model"]["decoder"], "sliding_window": 8}}


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({"parallel": {"tensor": 3}}, 3, "parallel.tensor=3 does not divide model.decoder.num_kv_heads=2"),
        (
            {"parallel": {"context": 4, "context_mode": "ulysses"}},
            4,
            "ulysses cannot share 2 key/value heads of a rank among parallel.context=4 ranks",
        ),
        (
            {"parallel": {"context": 2, "tensor": 2}, "data": {"train": "synthetic", "seq_length": 66}},
            4,
            "stage all: data.seq_length=66 is not a multiple of .* = 4, which share its rows: take 68",
        ),
        ({"parallel": {"tower_sharding": "replicate"}}, 2, "stage all trains audio, vision: choose unit or block"),
        (
            {"train": {"rows_per_step": 64}},
            56,
            r"rows_per_step=64 rows cannot be shared evenly by 56 data ranks .*: take 56 or 112, or .* that divide 64$",
        ),
        ({"train": {"rows_per_step": 2}, "parallel": {"tensor": 2}}, 8, "by 4 data ranks .*: take 4, or .* divide 2$"),
        ({"parallel": {"context": 3, "shard": 2}}, 4, "context=3 x tensor=1 does not make 4 ranks"),
        (
            {"parallel": {"context": 2, "context_mode": "ring"}, "model": WINDOWED},
            2,
            "context_mode=ring has no masks for .*sliding_window: set parallel.context_mode=allgather or ulysses",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_before_anything_starts(changes, world_size, message):
    with pytest.raises(ValueError, match=message):
        check_layout(make_config(**changes), world_size)


def test_a_layout_that_does_not_fit_is_one_line_and_exit_code_2(tmp_path):
    environment = ENVIRONMENT | {"RANK": "0", "WORLD_SIZE": "3"}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    result = subprocess.run(command(write_config(tmp_path), "parallel.tensor=3"), **options)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "parallel.tensor=3 does not divide model.decoder.num_kv_heads=2" in result.stderr
    assert not (tmp_path / "run").exists()

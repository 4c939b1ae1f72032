"""train.py as its users run it: stages, exact resume after a kill, signals, and what is refused."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import train
from avlm.config.load import load_config
from avlm.data import check
from avlm.process.exit import run_command
from avlm.storage.checkpoint_files import MARKER
from avlm.storage.run_folder import complete_checkpoints, read_progress, read_records
from tests.data.small_files import image_file, photo, write_tokenizer
from tests.parallel.small import TREE
from tests.parallel.spawn import run_ranks

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
STAGES = [
    {"name": "first", "steps": 6, "train": ["vision", "vision_projector"]},
    {"name": "second", "steps": 6, "train": ["decoder", "audio", "audio_projector"]},
]


TEXT_STAGE = {"name": "words", "train": ["decoder"]}
WORDS = TREE["model"] | {"decoder": TREE["model"]["decoder"] | {"vocab_size": 400}}


def text_data(folder: Path) -> dict:
    """Settings of a set that worker processes read."""
    turns = [{"role": "user", "content": "hello?"}, {"role": "assistant", "content": "one two"}]
    (folder / "text.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 24)
    tokenizer = str(write_tokenizer(folder / "tokenizer"))
    return {
        **{"train": str(folder / "text.jsonl"), "tokenizer": tokenizer, "template": "chatml"},
        **{"seq_length": 64, "num_workers": 2},
    }


def write_config(folder: Path, **changes) -> Path:
    tree = {
        **TREE,
        "output_dir": str(folder / "run"),
        "data": {"train": "synthetic:documents=2,images=2,clips=1,seconds=1", "seq_length": 128},
        "stages": STAGES,
        "train": {"precision": "fp32"},
        "checkpoint": {"every": 4, "keep": 2},
        "device": "cpu",
    }
    path = folder / "config.yaml"
    folder.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(tree | changes))
    return path


def command(path: Path, *overrides: str, ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, "train.py", str(path), *overrides]


def run(path: Path, *overrides: str, ranks: int = 1, **options) -> subprocess.CompletedProcess:
    options |= {"cwd": ROOT, "env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 240}
    return subprocess.run(command(path, *overrides, ranks=ranks), **options)


def train_to_end(path: Path, overrides: tuple[str, ...] = ()) -> None:
    """What a rank does, for ``run_ranks``, which starts in a second."""
    train.main(load_config(path, list(overrides)))


def losses(folder: Path) -> dict[int, float]:
    rows = [row for row in read_records(folder / "run" / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "every step stands once"
    return {row["step"]: row["loss"] for row in rows}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """Two ranks, two stages, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    result = run(write_config(folder), ranks=2)
    assert result.returncode == 0, result.stderr
    return folder


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def wait_until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_run_goes_on_bit_for_bit(whole_run, tmp_path):
    path, log = write_config(tmp_path), tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen(command(path, ranks=2), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    # Past a stage change, and past the checkpoint of step 8.
    wait_until(lambda: len(read_records(log)) >= 9 or process.poll() is not None)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    workers = [int(pid) for pid in children.split()]
    process.kill()
    process.wait()
    assert workers
    wait_until(lambda: not any(is_alive(pid) for pid in workers), seconds=10)  # workers die with their launcher

    again = run(path, ranks=2)
    assert again.returncode == 0, again.stderr
    assert "resuming step_" in again.stdout
    assert losses(tmp_path) == losses(whole_run)


def test_stages_follow_each_other_and_leave_checkpoints(whole_run):
    rows = [row for row in read_records(whole_run / "run" / "metrics.jsonl") if "loss" in row]
    assert [row["stage"] for row in rows] == ["first"] * 6 + ["second"] * 6
    assert rows[6]["lr"] < rows[8]["lr"], "a stage warms up anew"
    assert {"loss/image", "loss/mixed"} & rows[0].keys()
    kept = [path.name for path in complete_checkpoints(whole_run / "run")]
    assert kept == ["step_00000008", "step_00000012"]
    assert (whole_run / "run" / "checkpoints" / "latest").read_text() == "step_00000012"


def test_a_finished_run_has_nothing_left_to_do(whole_run):
    before = losses(whole_run)
    run_ranks(train_to_end, 2, whole_run / "config.yaml")
    assert losses(whole_run) == before


def test_what_a_run_began_with_may_not_change(whole_run):
    result = run(whole_run / "config.yaml", "model.decoder.rope_theta=1e4", ranks=2)
    assert result.returncode != 0
    line = next(line for line in result.stderr.splitlines() if line.startswith("error"))
    assert "model.decoder.rope_theta is 10000.0, but" in line and "was made with 500000.0" in line


def test_a_short_loss_curve_is_pinned(whole_run):
    """A refactor changes no loss: a commit that moves these says why."""
    found = losses(whole_run)
    expected = json.loads((ROOT / "tests" / "training" / "pinned_losses.json").read_text())
    assert {int(step): loss for step, loss in expected.items()} == pytest.approx(found, rel=1e-4)


def test_files_are_trained_validated_answered_and_resumed(tmp_path):
    """JSONL from two ranks, with a bad sample, validation with answers at a checkpoint's step, a resume, and wandb."""
    lines = []
    for i in range(24):
        (tmp_path / f"{i}.png").write_bytes(image_file(photo(16, 16, seed=i)) if i != 5 else b"no picture")
        turns = [{"role": "user", "content": "<image> hello?"}, {"role": "assistant", "content": "one two"}]
        lines.append(json.dumps({"messages": turns, "images": [f"{i}.png"]}) + "\n")
    (tmp_path / "all.jsonl").write_text("".join(lines))
    (tmp_path / "one.jsonl").write_text(lines[0])
    data = {
        **{"train": str(tmp_path / "all.jsonl"), "validation": {"one": str(tmp_path / "one.jsonl")}, "num_workers": 1},
        **{"tokenizer": str(write_tokenizer(tmp_path / "tokenizer")), "template": "chatml", "seq_length": 64},
        "max_bad_fraction": 0.01,
    }
    model = TREE["model"] | {"decoder": TREE["model"]["decoder"] | {"vocab_size": 400}}
    path = write_config(tmp_path, data=data, model=model, train={"validate_every": 4, "validate_answers": 2})
    stopped = run(path, "wandb.mode=offline", "train.stop_after=5", ranks=2)
    assert stopped.returncode == 0 and "warning: stage first: " in stopped.stderr, "one of 24 is forgiven in every pass"
    result = run(path, "wandb.mode=offline", ranks=2)
    assert result.returncode == 0, result.stderr
    parts = [part.name.rpartition("-")[2] for part in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert parts == [(tmp_path / "run" / "wandb_id").read_text()] * 2, "one run at wandb, of one rank, gone on with"
    assert "resuming step_00000005 at step 5 of 12" in result.stdout
    assert "bytes are not an image: give JPEG, PNG, WEBP (all.jsonl:6)" in result.stderr
    rows = read_records(tmp_path / "run" / "metrics.jsonl")
    validations = [row for row in rows if "val/one/loss" in row]
    assert [row["step"] for row in validations] == [4, 6, 8, 12]
    assert all(0 <= row["val/one/exact_match"] <= 1 for row in validations)
    assert all(0.1 < row["memory_gib"] < 20 for row in rows if "loss" in row)
    assert losses(tmp_path)[12] < losses(tmp_path)[1]


def train_without_a_look(path: Path) -> str:
    """How a run ends whose first samples, which are looked at before it, were good."""
    check.look = lambda stream: []
    with pytest.raises(ValueError) as ended:
        train_to_end(path)
    return str(ended.value)


def test_a_run_whose_samples_turn_out_to_be_bad_stops(tmp_path):
    data = {**text_data(tmp_path), "num_workers": 0, "packing_buffer": 24}
    lines = Path(data["train"]).read_text().splitlines(keepends=True)
    Path(data["train"]).write_text("".join(lines[:12]) + '{"messages": []}\n' * 12)
    path = write_config(tmp_path, data=data, model=WORDS, stages=[{**TEXT_STAGE, "steps": 50}])
    [ended] = run_ranks(train_without_a_look, 1, path)
    assert "samples were bad and skipped (named above), more than data.max_bad_fraction=0.01" in ended


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_ends(tmp_path, number):
    """SIGTERM to the process alone; the others to its whole group, data workers and launcher too, as terminals and
    many schedulers send them. With a checkpoint under way most of the time, but for SIGINT."""
    ranks = 2 if number == signal.SIGHUP else 1
    saves = {"every": 2, "async_save": number != signal.SIGINT}
    stages = [{**TEXT_STAGE, "steps": 100000}]
    path = write_config(tmp_path, data=text_data(tmp_path), model=WORDS, stages=stages, checkpoint=saves)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(path, ranks=ranks), cwd=ROOT, env=ENVIRONMENT, start_new_session=True, **pipes)
    wait_until(lambda: len(read_records(tmp_path / "run" / "metrics.jsonl")) >= 3 or process.poll() is not None)
    if number == signal.SIGTERM:
        refused = run(path)
        assert refused.returncode == 2 and "belongs to a run that is live" in refused.stderr
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (128 + number if ranks == 1 else 1), err  # torchrun has a code of its own
    assert "[rank" not in err and "error (rank" not in err and ("error" not in err.lower() or ranks == 2)
    newest = complete_checkpoints(tmp_path / "run")[-1]
    assert read_progress(newest).step == max(losses(tmp_path))
    assert "stopped by a signal after step" in out


def test_a_half_written_checkpoint_is_passed_over_and_said(tmp_path):
    path = write_config(tmp_path)
    assert run(path, "train.stop_after=9").returncode == 0
    newest = complete_checkpoints(tmp_path / "run")[-1]
    assert newest.name == "step_00000009"
    (newest / MARKER).unlink()
    result = run(path)
    assert result.returncode == 0, result.stderr
    assert "step_00000009 is incomplete; resuming step_00000008 at step 8 of 12" in result.stdout
    assert max(losses(tmp_path)) == 12


def test_a_run_goes_on_while_its_disk_is_full(tmp_path):
    """A limit on the size of a file stands for the full disk: a write fails in the middle, with the system's error."""
    path = write_config(tmp_path, stages=[{**STAGES[0], "steps": 200}], checkpoint={"every": 4, "keep": 1000})
    assert run(path, "train.stop_after=4").returncode == 0
    small, none = 100_000, resource.RLIM_INFINITY
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (small, none))
    full = run(path, "train.stop_after=8", preexec_fn=limit)
    line = full.stderr.splitlines()[-1]
    assert full.returncode == 2 and line.startswith("error: could not write checkpoint")
    assert line.endswith("the newest complete checkpoint is " + str(tmp_path / "run/checkpoints/step_00000004"))

    live = command(path, "checkpoint.async_save=true")
    process = subprocess.Popen(live, cwd=ROOT, env=ENVIRONMENT, preexec_fn=limit, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("warning: could not write checkpoint"):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (none, none))  # somebody makes room
            break
    assert "step_00000008: " in line and "tries again after the next step" in line
    process.communicate(timeout=240)
    assert process.returncode == 0
    steps = [read_progress(each).step for each in complete_checkpoints(tmp_path / "run")]
    assert steps[0] == 4 and steps[-1] == 200 and steps[1] > 8, "tried again until there was room"
    assert [step for step in steps if step > 100] == list(range(104, 201, 4))


def test_the_end_of_a_pipe_is_no_error(tmp_path):
    shown = f"{sys.executable} train.py {write_config(tmp_path)} --print | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", shown], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    result = run(write_config(tmp_path), "optimizer.lr=1e30", "optimizer.clip_norm=1e30")
    assert result.returncode == 2
    line = result.stderr.splitlines()[-1]
    assert "gradient norm" in line and "at step" in line and "synthetic:" in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=absent.jsonl", "no data at absent.jsonl"),
        ("parallel.replicate=2", "does not divide 1 ranks"),
        ("trian.log_every=1", "unknown key trian (did you mean train?)"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, override, message, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: train.main(load_config(write_config(tmp_path), [override])))
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and message in line


def test_a_mistake_that_shows_when_the_ranks_have_met_is_one_line_too(tmp_path):
    result = run(write_config(tmp_path), "resume=runs/none")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "resume=runs/none is not a complete checkpoint" in result.stderr.splitlines()[-1]


def test_print_shows_the_resolved_config_and_stops(tmp_path):
    result = run(write_config(tmp_path), "--print", "seed=5")
    assert yaml.safe_load(result.stdout)["seed"] == 5
    assert not (tmp_path / "run").exists()

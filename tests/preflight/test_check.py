"""What is found before ranks start, and what a resume may change."""

import errno
from dataclasses import replace

import pytest

from avlm.config.load import dump_config, resolve_config
from avlm.config.run import ResumeConfig
from avlm.data.check import check_skipped
from avlm.preflight.check import check
from avlm.preflight.report import report
from avlm.storage import locks
from avlm.storage.checkpoint_files import MARKER
from avlm.storage.run_folder import find, folder_of
from avlm.training.resume import check_resume
from tests.parallel.small import TREE, make_config


def test_a_few_bad_samples_are_forgiven_and_many_stop_the_run():
    check_skipped(read=20, skipped=10, max_fraction=0.01)
    check_skipped(read=10_000, skipped=100, max_fraction=0.01)
    check_skipped(read=219, skipped=19, max_fraction=0.01, num_samples=62)
    with pytest.raises(ValueError, match=r"41 of 219"):
        check_skipped(read=219, skipped=41, max_fraction=0.01, num_samples=62)
    with pytest.raises(ValueError, match=r"101 of 10000 samples were bad .* data.max_bad_fraction=0.01"):
        check_skipped(read=10_000, skipped=101, max_fraction=0.01)


@pytest.fixture
def saved(tmp_path):
    """A run folder with a checkpoint's marker and its config."""
    cfg = replace(make_config(), output_dir=str(tmp_path))
    path = folder_of(tmp_path, 3)
    path.mkdir(parents=True)
    (path / MARKER).write_text('{"step": 3, "stage": 0, "stage_step": 3}')
    (tmp_path / "config.yaml").write_text(dump_config(cfg))
    return cfg, path


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("seed", {"seed": 2}),
        ("stages.all.optimizer.lr", {"optimizer": {"lr": 1.0}}),
        ("stages.all.data.seq_length", {"data": TREE["data"] | {"seq_length": 32}}),
        ("train.precision", {"train": {"precision": "bf16"}}),
    ],
)
def test_a_resume_names_the_key_that_may_not_change(saved, key, change):
    cfg, path = saved
    changed = resolve_config({**TREE, "output_dir": cfg.output_dir, **change}, "test")
    with pytest.raises(ValueError, match=f"^{key} is "):
        check_resume(changed, path, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"stop_after": 5, "log_every": 1}},
        {"checkpoint": {"every": 7}},
        {"parallel": {"shard": 1}},
        {"data": TREE["data"] | {"max_bad_fraction": 0.5, "validation": {"x": "synthetic"}}},
    ],
)
def test_a_resume_may_change_where_and_how_often(saved, change):
    cfg, path = saved
    check_resume(resolve_config({**TREE, "output_dir": cfg.output_dir, **change}, "test"), path, 1)


@pytest.mark.parametrize(
    "progress", ['"stage": 7, "stage_step": 3', '"stage": 0, "stage_step": 300', '"stage_step": 2']
)
def test_a_marker_that_lies_is_noticed(saved, progress):
    cfg, path = saved
    (path / MARKER).write_text('{"step": 3, ' + progress + "}")
    with pytest.raises(ValueError, match=r"is at step 3, which is step .* so it is damaged"):
        check_resume(cfg, path, 1)


def test_a_new_run_is_not_begun_over_an_old_one(saved):
    with pytest.raises(ValueError, match="holds an earlier run: set resume=auto"):
        check_resume(saved[0], None, 1)


def test_an_older_checkpoint_is_not_resumed_beside_later_ones(saved, tmp_path):
    cfg, path = saved
    later = folder_of(tmp_path, 9)
    later.mkdir()
    (later / MARKER).touch()
    with pytest.raises(ValueError, match=r"holds later checkpoints \(step_00000009\)"):
        find(replace(cfg, resume=ResumeConfig(checkpoint=str(path))))


def test_the_report_counts_parameters_tokens_and_memory():
    text = report(make_config(stages=[{"name": "see", "steps": 3, "train": ["vision"]}]), world_size=2)
    assert text.startswith("see: 3 steps of up to 128 tokens; trains ") and "GiB a rank" in text


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EAGAIN, errno.EIO])
def test_a_file_system_without_locks_is_said_and_counts_as_locked(tmp_path, monkeypatch, capsys, number):
    def lockf(file, flags):
        raise OSError(number, "as it is there")

    monkeypatch.setattr(locks.fcntl, "lockf", lockf)
    with open(tmp_path / ".lock", "w") as file:
        if number == errno.EIO:
            with pytest.raises(OSError):
                locks.lock(file, wait=False)
            return
        assert locks.lock(file, wait=False) == (number != errno.EAGAIN)
    assert ("cannot be locked here (as it is there)" in capsys.readouterr().err) == (number != errno.EAGAIN)


@pytest.mark.parametrize("world_size", [0, -4])
def test_a_world_without_ranks_is_refused(world_size):
    with pytest.raises(ValueError, match=f"does not make {world_size} ranks"):
        report(make_config(), world_size)


def test_files_are_read_by_every_rank_that_no_launcher_would_end(monkeypatch):
    """Under torchrun the first rank of a machine finds the error, and torchrun ends the others."""
    config = make_config(data={"train": "gone.jsonl", "seq_length": 64})
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(FileNotFoundError, match=r"no data at gone\.jsonl"):
        check(config, world_size=1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    check(config, world_size=1)

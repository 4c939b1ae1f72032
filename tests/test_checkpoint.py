"""Saving and loading in process; tests/test_train.py kills and resumes whole runs."""

from pathlib import Path

import pytest
import torch

from avlm import checkpoint
from avlm.checkpoint import Progress, Saver
from avlm.config import CheckpointConfig
from avlm.parallel import mesh
from tests.parallel.spawn import run_ranks
from tests.parallel.test_fsdp import build, make_config, make_rows, whole
from train import train_step


def save_while_training(cfg, folder, asynchronous):
    """Whether a checkpoint holds what was there when it was asked for, although training went on at once."""
    world, model, adam = build(cfg)
    step = lambda: train_step(model, make_rows(cfg, 2)[world.rank :: world.size], 50.0, adam, 1.0, world)
    step()
    expected = {name: whole(p) for name, p in model.named_parameters()}
    moments = [whole(state["exp_avg"]) for state in adam.state.values()]
    saver = Saver(Path(folder), CheckpointConfig(keep=1, asynchronous=asynchronous), world)
    saver.save(Progress(step=1), model, adam, {"place": world.rank})
    step()
    saver.wait()
    changed = any(not torch.equal(whole(p), expected[name]) for name, p in model.named_parameters())

    [path] = checkpoint.complete_checkpoints(Path(folder))
    checkpoint.load(path, model, adam)
    same = all(torch.equal(whole(p), expected[name]) for name, p in model.named_parameters())
    same &= all(torch.equal(whole(state["exp_avg"]), m) for state, m in zip(adam.state.values(), moments))
    place = checkpoint.load_rank_state(path, world)["place"] == world.rank
    saver.save(Progress(step=2), model, adam, {})
    saver.wait()
    kept = [p.name for p in checkpoint.complete_checkpoints(Path(folder))]
    mesh.stop()
    return changed, same, place, kept


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_holds_the_moment_it_was_asked_for(tmp_path, asynchronous):
    for result in run_ranks(save_while_training, 2, make_config(), str(tmp_path), asynchronous):
        assert result == (True, True, True, ["step_00000002"])
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000002"


def test_a_folder_without_a_complete_checkpoint_is_said_so(tmp_path):
    (tmp_path / "checkpoints" / "step_00000003").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
        checkpoint.read_run(tmp_path)

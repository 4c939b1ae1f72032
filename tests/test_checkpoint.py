"""Saving and loading in process; tests/test_train.py kills and resumes whole runs."""

import resource
from pathlib import Path

import pytest
import torch

from avlm import checkpoint, optimizer, parallel
from avlm.checkpoint import Progress, Saver
from avlm.config import CheckpointConfig
from avlm.models.avlm import AVLM
from avlm.parallel import mesh
from tests.parallel.small import TREE, build, make_config, make_rows, whole
from tests.parallel.spawn import run_ranks
from train import train_step


def save_and_load(cfg, folder):
    """Whether a checkpoint brings back what training has changed since."""
    world, model = build(cfg)
    adam = optimizer.build(model, cfg.stages[0].optimizer)
    step = lambda: train_step(
        model, make_rows(cfg, ["text", "image"])[world.rank :: world.size], 50.0, adam, 1.0, world
    )
    step()
    expected = {name: whole(p) for name, p in model.named_parameters()}
    moments = [whole(state["exp_avg"]) for state in adam.state.values()]
    saver = Saver(Path(folder), CheckpointConfig(keep=1), world)
    saver.save(Progress(step=1), model, adam, {"place": world.rank})
    step()
    changed = any(not torch.equal(whole(p), expected[name]) for name, p in model.named_parameters())

    [path] = checkpoint.complete_checkpoints(Path(folder))
    checkpoint.load(path, model, adam)
    same = all(torch.equal(whole(p), expected[name]) for name, p in model.named_parameters())
    same &= all(torch.equal(whole(state["exp_avg"]), m) for state, m in zip(adam.state.values(), moments))
    checkpoint.load_random_state(path, world)
    place = checkpoint.read_loader_state(path, world)["place"] == world.rank
    saver.save(Progress(step=2), model, adam, {})
    kept = [p.name for p in checkpoint.complete_checkpoints(Path(folder))]
    mesh.stop()
    return changed, same, place, kept


def test_a_checkpoint_brings_back_weights_moments_and_loader_state(tmp_path):
    for result in run_ranks(save_and_load, 2, make_config(), str(tmp_path)):
        assert result == (True, True, True, ["step_00000002"])
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000002"


def fail_on_one_rank(cfg, folder):
    """What each rank hears when the disk of the second fills up."""
    world, model = build(cfg)
    adam = optimizer.build(model, cfg.stages[0].optimizer)
    saver = Saver(Path(folder), CheckpointConfig(), world)
    saver.save(Progress(step=1), model, adam, {})
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        saver.save(Progress(step=2), model, adam, {"large": "x" * 2000})
    except OSError as error:
        message = str(error)
    mesh.stop()
    return message


def test_a_full_disk_of_one_rank_is_heard_of_by_all_and_harms_nothing(tmp_path):
    first, second = run_ranks(fail_on_one_rank, 2, make_config(), str(tmp_path))
    assert "another rank failed" in first and "step_00000001" in first
    assert "File too large" in second
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000001"]


def refuse_other_weights(cfg, other, folder):
    world, model = build(cfg)
    adam = optimizer.build(model, cfg.stages[0].optimizer)
    Saver(Path(folder), CheckpointConfig(), world).save(Progress(step=1), model, adam, {})
    [path] = checkpoint.complete_checkpoints(Path(folder))
    messages = []
    for changed in other:
        with torch.device("meta"):
            wrong = AVLM(changed.model)
        parallel.apply(wrong, world, changed)
        try:
            checkpoint.load(path, wrong)
        except ValueError as error:
            messages.append(str(error))
    mesh.stop()
    return messages


def test_missing_extra_and_misshapen_tensors_of_a_checkpoint_are_named(tmp_path):
    decoder = TREE["model"]["decoder"]
    changed = [
        make_config(model=TREE["model"] | {"decoder": decoder | change})
        for change in ({"num_layers": 3}, {"num_layers": 1}, {"intermediate_size": 32})
    ]
    [[missing, extra, misshapen]] = run_ranks(refuse_other_weights, 1, make_config(), changed, str(tmp_path))
    assert "differ in model.decoder.blocks.2." in missing
    assert "differ in model.decoder.blocks.1." in extra
    assert "cannot be loaded" in misshapen and "size" in misshapen.lower()


def test_a_folder_without_a_complete_checkpoint_is_said_so(tmp_path):
    (tmp_path / "checkpoints" / "step_00000003").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
        checkpoint.read_run(tmp_path)

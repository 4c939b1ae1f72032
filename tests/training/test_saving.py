"""Checkpoints that are written while training goes on, and parameters that are written once."""

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from avlm.config.run import CheckpointConfig
from avlm.models.avlm import AVLM
from avlm.parallel import mesh
from avlm.parallel.apply import own_part
from avlm.storage.run_folder import Progress, complete_checkpoints, folder_of, read_progress
from avlm.training import checkpoint, optimizer, saving
from avlm.training.saving import Saver
from tests.measurements.kill_in_save import try_kills
from tests.parallel.small import TREE, build, make_config, make_rows, whole
from tests.parallel.spawn import run_ranks
from train import train_step

ALIGNMENT = [{"name": "align", "steps": 20, "train": ["vision_projector", "audio_projector"]}]
LAYOUTS = [{"replicate": 2, "shard": 2}, {"tensor": 2}, {"context": 2, "tower_sharding": "replicate"}]


class Training:
    """A run in process: steps and saves of one stage."""

    def __init__(self, cfg, folder, **options):
        self.cfg = cfg
        self.folder = Path(folder)
        self.world, self.model = build(cfg)
        self.adam = optimizer.build(self.model, cfg.stages[0].optimizer)
        self.saver = Saver(self.folder, CheckpointConfig(**options), self.world)
        self.said = []

    def step(self):
        [row] = make_rows(self.cfg, ["both"])
        row = own_part(row, self.cfg.model, self.world)
        train_step(self.model, [row], 50.0, self.adam, 1.0, self.world)

    def save(self, step, wait=True):
        return self.saver.save(Progress(step=step), self.model, self.adam, {}, wait)

    def save_or_warn(self, progress, before=None, is_final=False):
        return self.saver.save_or_warn(progress, before or progress, self.model, self.adam, {}, self, is_final)

    def message(self, line):
        self.said.append(line)

    def state(self):
        tensors = {name: whole(parameter) for name, parameter in self.model.named_parameters()}
        for parameter, moments in self.adam.state.items():
            tensors |= {(id(parameter), name): whole(moment) for name, moment in moments.items()}
        return tensors

    def load(self, step):
        path = folder_of(self.folder, step)
        checkpoint.load_model(path, self.model)
        checkpoint.load_optimizer(path, self.model, self.adam)
        return self.state()


def are_same(state, other):
    return all(torch.equal(state[name], other[name]) for name in state)


def save_and_go_on(cfg, folder):
    """(failure, training changed the model meanwhile, the marker was not there then, what the checkpoint holds is what
    there was when it was asked for), for a first and for a later save; and the weights of the later."""
    run = Training(cfg, folder)
    write, gate = saving.Writer.write, threading.Event()
    saving.Writer.write = lambda *arguments: (gate.wait(), write(*arguments))[1]
    found = []
    for step in (1, 2):
        gate.clear()
        run.step()
        expected = run.state()
        run.save(step, wait=False)
        run.step()
        changed = not are_same(run.state(), expected)
        is_half = folder_of(run.folder, step).is_dir() and not (folder_of(run.folder, step) / "complete").exists()
        run.world.barrier()
        gate.set()
        failure = run.saver.finish()
        found.append((failure, changed, is_half, are_same(run.load(step), expected)))
    weights = {name: whole(parameter).float().numpy() for name, parameter in run.model.named_parameters()}
    mesh.stop()
    return found, weights


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_checkpoint_holds_the_step_at_which_it_was_asked_for_though_training_goes_on(layout, tmp_path):
    cfg = make_config(parallel=layout, stages=ALIGNMENT if "tower_sharding" in layout else TREE["stages"])
    results = run_ranks(save_and_go_on, 4, cfg, str(tmp_path))
    for found, _ in results:
        assert found == [("", True, True, True)] * 2
    _, expected = results[0]
    model = AVLM(cfg.model)  # in one process
    checkpoint.load_model(folder_of(tmp_path, 2), model)
    for name, parameter in model.named_parameters():
        assert (parameter.detach().numpy() == expected[name]).all(), name


def save_four_times(cfg, folder):
    """Bytes that each save wrote into files of its own, and whether the last checkpoint is whole without the others.
    The third save cannot make links; before the fourth another stage begins."""
    run = Training(cfg, folder, keep=1)
    link, found = os.link, []
    for step in (1, 2, 3, 4):
        run.step()
        if step == 3:
            os.link = lambda *paths: (_ for _ in ()).throw(OSError(errno.EPERM, "Operation not permitted"))
        if step == 4:
            os.link = link
            for parameter in run.model.parameters():
                parameter.requires_grad_(True)
            run.adam = optimizer.build(run.model, cfg.stages[0].optimizer)
        inodes = {file.stat().st_ino for file in run.folder.rglob("*.distcp")}
        run.world.barrier()
        assert not run.save(step)
        files = list(folder_of(run.folder, step).glob("*.distcp"))
        found.append(sum(file.stat().st_size for file in files if file.stat().st_ino not in inodes))
        expected = run.state()
        run.step()
        alone = are_same(run.load(step), expected) and len(complete_checkpoints(run.folder)) == 1
        assert alone, f"the checkpoint of step {step}"
        run.world.barrier()
    mesh.stop()
    return found


def test_what_a_stage_does_not_train_is_written_once(tmp_path):
    cfg = make_config(stages=ALIGNMENT)
    for first, later, without_links, other_stage in run_ranks(save_four_times, 2, cfg, str(tmp_path)):
        assert later < first / 3
        assert without_links == first, "written again"
        assert other_stage > first, "with moments of all parameters"


def fail_in_background(cfg, folder):
    """What is said and known while the second rank's disk is full, from a best step on, and then has room."""
    run = Training(cfg, folder, async_save=True, keep=1)
    write = saving.Writer.write
    best = Progress(step=4, best_step=4, best_value=1.0)
    first = run.save_or_warn(best)
    before = Progress(step=6, best_step=4, best_value=1.0)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert not run.saver.finish()
    if run.world.rank == 1:
        saving.Writer.write = full
    progress = [run.save_or_warn(Progress(step=6, best_step=6, best_value=0.5), before)]
    run.saver.writing.exception()  # wait for it
    known = [run.saver.is_unsaved()]
    progress.append(run.save_or_warn(Progress(step=7, best_step=6, best_value=0.5)))
    run.saver.writing.exception()
    said = len(run.said)
    saving.Writer.write = write
    progress.append(run.save_or_warn(Progress(step=8, best_step=4, best_value=1.0)))
    run.saver.writing.exception()
    known.append(run.saver.is_unsaved())
    run.save_or_warn(Progress(step=9, best_step=4, best_value=1.0), is_final=True)
    mesh.stop()
    return first.best_step, [(each.step, each.best_step) for each in progress], known, said, run.said


def test_a_disk_that_fills_up_in_the_background_is_told_once_and_its_step_is_not_the_best(tmp_path):
    for first, progress, known, said, lines in run_ranks(fail_in_background, 2, make_config(), str(tmp_path)):
        assert first == 4
        assert progress == [(6, 6), (7, 4), (8, 4)], "step 6 is the best until it turns out that it was not saved"
        assert known == [True, False]
        assert said == 1 and len(lines) == 1
        assert "step_00000006: no space left on device" in lines[0] and "step_00000004; the run continues" in lines[0]
    kept = [read_progress(path).step for path in complete_checkpoints(tmp_path)]
    assert kept == [4, 9] and not folder_of(tmp_path, 6).exists()


def fail_at_the_end(cfg, folder):
    run = Training(cfg, folder, async_save=True)
    run.save_or_warn(Progress(step=1))
    assert not run.saver.finish()
    if run.world.rank == 1:
        saving.Writer.write = lambda *arguments: os.stat("/nonexistent")
    try:
        run.save_or_warn(Progress(step=2), is_final=True)
    except OSError as error:
        return str(error)


def test_the_last_save_has_to_succeed(tmp_path):
    for message in run_ranks(fail_at_the_end, 2, make_config(), str(tmp_path)):
        assert "step_00000002: no such file or directory; the newest complete checkpoint is" in message
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000001"]


def leave_remains(cfg, folder):
    run = Training(cfg, folder, keep=2)
    for step in (1, 2, 3):
        run.save(step)
        if step == 1:
            shutil.copytree(folder_of(run.folder, 1), folder_of(run.folder, 0))
            (folder_of(run.folder, 0) / "complete").unlink()
    run.saver.cleaner.shutdown()
    mesh.stop()


def test_half_removed_checkpoints_of_an_earlier_run_are_removed(tmp_path):
    run_ranks(leave_remains, 1, make_config(), str(tmp_path))
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == ["step_00000002", "step_00000003"]


def test_kills_while_checkpoints_are_written_lose_nothing_that_was_complete(tmp_path):
    """Two of those that the script tries 50 of: losses and weights at the end are those of a run without them."""
    assert try_kills(tmp_path, 2).total() == 2

"""Saving and loading in process; tests/training/test_train.py kills and resumes whole runs."""

import errno
import itertools
import re
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from avlm.config.run import CheckpointConfig
from avlm.models.avlm import AVLM
from avlm.parallel import mesh
from avlm.parallel.apply import apply_parallel
from avlm.storage.run_folder import Progress, complete_checkpoints, read_progress, read_run
from avlm.training import checkpoint, optimizer, saving
from avlm.training.saving import Saver
from avlm.weights.sources import open_checkpoint
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
    saver.save(Progress(step=1), model, adam, {"place": world.rank, "workers": 2})
    step()
    changed = any(not torch.equal(whole(p), expected[name]) for name, p in model.named_parameters())

    [path] = complete_checkpoints(Path(folder))
    checkpoint.load_model(path, model)
    checkpoint.load_optimizer(path, model, adam)
    same = all(torch.equal(whole(p), expected[name]) for name, p in model.named_parameters())
    same &= all(torch.equal(whole(state["exp_avg"]), m) for state, m in zip(adam.state.values(), moments))
    checkpoint.load_random_state(path, world)
    place = checkpoint.read_loader_state(path, world, 2)["place"] == world.rank
    saver.save(Progress(step=2), model, adam, {})
    kept = [p.name for p in complete_checkpoints(Path(folder))]
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
    message = saver.save(Progress(step=2), model, adam, {"large": "x" * 2000})
    mesh.stop()
    return message


def test_a_full_disk_of_one_rank_is_heard_of_by_all_and_harms_nothing(tmp_path):
    first, second = run_ranks(fail_on_one_rank, 2, make_config(), str(tmp_path))
    assert first == second and "step_00000002: file too large; the newest complete checkpoint is" in first
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000001"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of one process."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(save_once, 1, make_config(), str(folder))
    [path] = complete_checkpoints(folder)
    return path


def save_once(cfg, folder):
    world, model = build(cfg)
    adam = optimizer.build(model, cfg.stages[0].optimizer)
    assert not Saver(Path(folder), CheckpointConfig(), world).save(Progress(step=3), model, adam, {"workers": 1})
    mesh.stop()


def flip(content: bytes, place: float) -> bytes:
    """One bit, at this part of the way."""
    at = int(len(content) * place)
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


def read_all(path):
    world = SimpleNamespace(rank=0, size=1, data_rank=0, data_size=1, device=torch.device("cpu"))
    read_progress(path)
    checkpoint.load_random_state(path, world)
    checkpoint.read_loader_state(path, world, 2)
    checkpoint.load_model(path, AVLM(make_config().model))


@pytest.mark.parametrize("place", [0.01, 0.4, 0.9])
@pytest.mark.parametrize(
    "name", [".metadata", "rank_00000.safetensors", "rank_00000.json", "loader_00000.json", "complete"]
)
def test_a_flipped_bit_in_a_small_file_of_a_checkpoint_is_noticed(saved, tmp_path, name, place):
    path = shutil.copytree(saved, tmp_path / saved.name)
    read_all(path)
    (path / name).write_bytes(flip((path / name).read_bytes(), place))
    with pytest.raises(ValueError, match=re.escape(str(path / name))):
        read_all(path)


def test_a_flipped_bit_in_a_stored_weight_is_noticed(saved, tmp_path):
    for i, stored in enumerate(itertools.islice(open_checkpoint(saved).values(), 3)):
        path = shutil.copytree(saved, tmp_path / str(i) / saved.name)
        [place] = [info for index, info in stored.reader.storage_data.items() if index.fqn == stored.name]
        file = path / place.relative_path
        content = file.read_bytes()
        of_tensor = content[place.offset : place.offset + place.length]
        at = of_tensor.find(stored[:].numpy().tobytes()) + 2
        assert at > 2
        changed = of_tensor[:at] + bytes([of_tensor[at] ^ 0x10]) + of_tensor[at + 1 :]
        file.write_bytes(content[: place.offset] + changed + content[place.offset + place.length :])
        with pytest.raises(ValueError, match=r"__0_0.distcp is damaged \(archive/data/0\): it is not what was written"):
            read_all(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("complete", b"", "complete is not valid JSON"),
        ("complete", b"null", "complete must hold an object of keys, not None"),
        ("complete", b'{"step": 3, "x": 1}', "complete: x: "),
        ("complete", b'{"step": "3"}', "complete: step: "),
        ("complete", b'{"step": 4}', "complete records step 4"),
        ("complete", b"[" * 10**5, "complete is not valid JSON"),
        ("complete", b'{"step": 3, "files": {"loader_00000.json": ""}}', "complete is damaged"),
        ("complete", b'{"step": 3, "files": 5}', "complete is damaged"),
        ("complete", b'{"step": 3, "stage": -1}', "complete: stage: "),
        ("rank_00000.json", b"{}", "rank_00000.json holds no random state"),
        ("loader_00000.json", b"null", "loader_00000.json holds None, not a state"),
        ("loader_00000.json", b"[" * 10**5, "loader_00000.json is not valid JSON"),
        ("rank_00000.safetensors", b"\0" * 9, "rank_00000.safetensors cannot be read"),
    ],
)
def test_files_of_an_older_checkpoint_that_are_not_what_they_should_be_are_named(
    saved, tmp_path, name, content, message
):
    """Those had no checksums."""
    path = shutil.copytree(saved, tmp_path / saved.name)
    (path / "complete").write_text('{"step": 3}')
    read_all(path)
    (path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_all(path)


def test_a_full_disk_is_called_so(monkeypatch, tmp_path):
    """What PyTorch's zip writer says of it is "unexpected pos 704 vs 598"."""
    writer = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    assert "unexpected pos" in saving._reason(writer, tmp_path / "step", need=1)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    found = saving._reason(writer, tmp_path / "step", need=2**30)
    assert found == "no space left on device (1.0 MiB are free, 1024.0 are needed)"
    writer.__context__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert saving._reason(writer, tmp_path / "step", need=2**30) == "disk quota exceeded"


def test_a_file_of_another_step_is_noticed(saved, tmp_path):
    """It has the same layout, and is whole."""
    folder = tmp_path / "other"
    run_ranks(save_once, 1, make_config(seed=2), str(folder))
    [other] = complete_checkpoints(folder)
    path = shutil.copytree(saved, tmp_path / saved.name)
    shutil.copyfile(other / "__0_0.distcp", path / "__0_0.distcp")
    with pytest.raises(ValueError, match=r"__0_0.distcp belongs to another checkpoint"):
        read_all(path)
    with pytest.raises(ValueError, match=r"__0_0.distcp belongs to another checkpoint"):
        next(iter(open_checkpoint(path).values()))[:]
    (path / "__0_0.distcp").unlink()
    with pytest.raises(ValueError, match=r"lacks __0_0.distcp, which its marker names"):
        read_all(path)


def test_only_errors_of_writing_let_a_run_continue(monkeypatch, tmp_path):
    """Any other is a fault of ours, or leaves the ranks at different points."""

    def fails(*arguments):
        raise LookupError("no such part")

    monkeypatch.setattr(saving.Writer, "write", fails)
    with pytest.raises(AssertionError, match="LookupError: no such part"):
        run_ranks(save_once, 1, make_config(), str(tmp_path), method="fork")


def refuse_other_weights(cfg, other, folder):
    world, model = build(cfg)
    adam = optimizer.build(model, cfg.stages[0].optimizer)
    Saver(Path(folder), CheckpointConfig(), world).save(Progress(step=1), model, adam, {})
    [path] = complete_checkpoints(Path(folder))
    messages = []
    for changed in other:
        with torch.device("meta"):
            wrong = AVLM(changed.model)
        apply_parallel(wrong, world, changed.parallel, changed.train)
        try:
            checkpoint.load_model(path, wrong)
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
        read_run(tmp_path)

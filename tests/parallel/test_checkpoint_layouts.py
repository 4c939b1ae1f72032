"""A checkpoint of one layout of ranks is read by any other, exported and read back: the same logits everywhere."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from avlm.config.load import dump_config
from avlm.config.run import CheckpointConfig, InitFrom
from avlm.models.avlm import AVLM
from avlm.parallel import mesh
from avlm.storage import model_folder
from avlm.storage.run_folder import Progress, read_run
from avlm.training import optimizer
from avlm.training.saving import Saver
from avlm.weights.__main__ import main
from avlm.weights.export import export
from avlm.weights.load import init_weights, load_weights
from avlm.weights.sources import open_checkpoint
from tests.parallel.small import MODELS, build, make_config, make_rows, whole
from tests.parallel.spawn import run_ranks
from train import train_step

LORA = {"rank": 3, "targets": ["decoder.*", "audio.*.up"]}
LAYOUTS = {2: {"tensor": 2}, 3: {}}  # ranks -> parallel


def config_of(folder, kind="square", **keys):
    return make_config(output_dir=str(folder), model={**MODELS[kind], "lora": LORA}, **keys)


def train_and_save(folder, kind="square"):
    """Two steps on FSDP2 x TP, with a checkpoint after each; the weights of both."""
    cfg = config_of(folder, kind, parallel={"shard": 2, "tensor": 2})
    world, model = build(cfg)
    adam = optimizer.build(model, cfg.stages[0].optimizer)
    saver = Saver(Path(folder), CheckpointConfig(), world)
    found = []
    for step in (1, 2):
        rows = make_rows(cfg, ["both", "image"], seed=step)
        train_step(model, [rows[world.data_rank]], 50.0, adam, 1.0, world)
        saver.save(Progress(step=step), model, adam, {})
        found.append(weights_of(model))
    if world.is_first:
        (Path(folder) / "config.yaml").write_text(dump_config(cfg))
    mesh.stop()
    return found


def weights_of(model):
    return {name: whole(parameter).numpy() for name, parameter in model.named_parameters()}


def are_same(weights, expected):
    assert weights.keys() == expected.keys()
    return all((weights[name] == expected[name]).all() for name in expected)


def start_from(source, layout):
    """The weights that a run on these ranks takes from a source."""
    _, model = build(config_of("unused", parallel=layout, init_from={"all": source}))
    weights = weights_of(model)
    mesh.stop()
    return weights


def logits(model, cfg):
    [row] = make_rows(cfg, ["both"], seed=9)
    with torch.no_grad():
        x_TD = model.hidden(row)
        return model.decoder.head(model.decoder.norm(x_TD), None)


def export_together(run, folder):
    """What ``torchrun -m avlm.weights export`` does on each rank, with small files."""
    model_folder.SHARD_BYTES = 20_000
    sys.argv = ["weights", "export", run, folder, "--dtype", "float32"]
    main()
    mesh.stop()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(run folder, weights at its first checkpoint, at its last)."""
    run = tmp_path_factory.mktemp("layouts") / "run"
    run.mkdir()
    return run, *run_ranks(train_and_save, 4, str(run))[0]


@pytest.mark.parametrize("size", LAYOUTS)
def test_what_four_ranks_saved_is_what_a_run_on_other_ranks_starts_from(size, saved):
    run, first, last = saved
    assert not are_same(first, last)
    source, expected = run, last
    if size == 3:
        source, expected = run / "checkpoints" / "step_00000001", first
    for weights in run_ranks(start_from, size, str(source), LAYOUTS[size]):
        assert are_same(weights, expected)


def test_its_export_is_read_back_with_the_same_logits(saved, tmp_path):
    run, _, last = saved
    cfg = config_of(run)
    expected = AVLM(cfg.model)
    init_weights(expected, InitFrom(all=str(run)), seed=1)  # in a single process
    assert are_same(weights_of(expected), last)
    config, path = read_run(run)
    export(config.model, open_checkpoint(path), tmp_path / "out")
    merged = AVLM(dataclasses.replace(cfg.model, lora=None))
    load_weights(merged, InitFrom(all=str(tmp_path / "out")))
    torch.testing.assert_close(logits(merged, cfg), logits(expected, cfg), atol=1e-5, rtol=1e-5)


def test_a_model_with_deepstack_that_four_ranks_saved_is_read_by_one(tmp_path):
    *_, last = run_ranks(train_and_save, 4, str(tmp_path), "deep")[0]
    config, path = read_run(tmp_path)
    model = AVLM(config.model)
    init_weights(model, InitFrom(all=str(path)), seed=1)
    assert {"vision.position", "vision_projector.deep.1.norm.bias"} <= last.keys()
    assert are_same(weights_of(model), last)


def test_a_slice_is_read_from_the_chunks_that_it_lies_in_and_no_other(saved, monkeypatch):
    run, _, last = saved
    name = "decoder.blocks.0.ffn.up.weight"
    tensor = open_checkpoint(run / "checkpoints" / "step_00000002")[name]
    assert len(tensor.metadata.chunks) == 4  # 64 rows, of which a rank has 16
    read = []
    read_data = FileSystemReader.read_data

    def count(self, plan, planner):
        read.append(len(plan.items))
        return read_data(self, plan, planner)

    monkeypatch.setattr(FileSystemReader, "read_data", count)
    for rows, num_chunks in ((slice(16, 32), 1), (slice(20, 40), 2), (slice(None), 4)):
        assert (tensor[rows].numpy() == last[name][rows]).all()
        assert read.pop() == num_chunks


def test_ranks_share_the_files_of_an_export(saved, tmp_path, monkeypatch):
    run, *_ = saved
    run_ranks(export_together, 2, str(run), str(tmp_path / "two"))
    monkeypatch.setattr(model_folder, "SHARD_BYTES", 20_000)
    config, path = read_run(run)
    data = config.stages[-1].data
    export(config.model, open_checkpoint(path), tmp_path / "one", data=data, dtype=torch.float32)
    files, written = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert written.pop("README.md").startswith(b"---\nlibrary_name: avlm\n")  # the command's, which knows the run
    assert written == files
    file_of = json.loads(files["model.safetensors.index.json"])["weight_map"]
    assert len(set(file_of.values())) > 5
    held = set()
    for name in set(file_of.values()):
        held |= load_file(tmp_path / "two" / name).keys()
    assert held == file_of.keys()


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}

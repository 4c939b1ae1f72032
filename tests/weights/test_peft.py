"""The command that exports adapters for PEFT: their dtype, their base, and what it says stays behind."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from avlm.config.load import dump_config, load_config
from avlm.config.model import LoraConfig
from avlm.config.run import InitFrom
from avlm.weights.__main__ import main
from tests.models.handmade import build
from tests.models.test_avlm import TEXT_ONLY, WHOLE
from tests.weights.test_sources import write_run


def run_of(folder, model, targets, train, init_from=None):
    """A run with adapters, of one stage that trains ``train``; (its folder, the model)."""
    built = build(dataclasses.replace(model, lora=LoraConfig(rank=4, targets=targets)))
    write_run(folder, built)
    config = load_config(folder / "config.yaml")
    stage = dataclasses.replace(config.stages[0], train=train)
    config = dataclasses.replace(config, stages=[stage], init_from=init_from or config.init_from)
    (folder / "config.yaml").write_text(dump_config(config))
    return folder, built


def command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["weights", "export", *map(str, arguments)])
    main()


@pytest.mark.parametrize(
    ("model", "targets", "train", "said"),
    [
        (TEXT_ONLY, ["decoder.*"], ["lora"], None),
        (TEXT_ONLY, ["decoder.*"], ["decoder"], "decoder"),
        (
            WHOLE,
            ["decoder.*", "audio.*.up"],
            ["lora", "vision_projector", "audio_projector"],
            "vision, audio, adapters of audio, vision_projector, audio_projector",
        ),
    ],
)
def test_what_a_peft_folder_lacks_is_said_in_one_line(model, targets, train, said, tmp_path, monkeypatch, capsys):
    run, _ = run_of(tmp_path / "run", model, targets, train)
    command(monkeypatch, run, tmp_path / "out", "--format", "adapter", "--base", "my/base")
    line = f"{tmp_path / 'out'} lacks {said}: --format avlm keeps them, with all adapters merged\n"
    assert capsys.readouterr().out == ("" if said is None else line)
    command(monkeypatch, run, tmp_path / "whole")
    assert capsys.readouterr().out == ""
    modules = {name.split(".")[0] for name in load_file(tmp_path / "whole" / "model.safetensors")}
    assert said is None or modules >= {part.split()[-1] for part in said.split(", ")}


def test_adapters_stay_as_they_are_stored_unless_a_dtype_is_asked_for(tmp_path, monkeypatch):
    run, model = run_of(tmp_path / "run", WHOLE, ["decoder.*"], ["lora"])
    up = model.decoder.blocks[1].attention.q.lora_up.weight
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    for asked, expected in ((None, up), ("bfloat16", up.bfloat16())):
        folder = tmp_path / str(asked)
        command(monkeypatch, run, folder, "--format", "adapter", *(["--dtype", asked] if asked else []))
        written = load_file(folder / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in written.values()} == {expected.dtype} and written[name].equal(expected)
    command(monkeypatch, run, tmp_path / "whole")
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "whole" / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}


def test_the_base_of_an_adapter_is_named_by_the_command_or_by_the_run(tmp_path, monkeypatch, capsys):
    plain, _ = run_of(tmp_path / "plain", WHOLE, ["decoder.*"], ["lora"], InitFrom(all="a/run"))
    named, _ = run_of(tmp_path / "named", WHOLE, ["decoder.*"], ["lora"], InitFrom(decoder="org/decoder"))
    for run, given, expected in ((plain, None, None), (plain, "my/base", "my/base"), (named, None, "org/decoder")):
        arguments = ["--format", "adapter", "--overwrite", *(["--base", given] if given else [])]
        command(monkeypatch, run, tmp_path / "out", *arguments)
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == expected
        assert ("out names no base decoder: --base NAME adds" in capsys.readouterr().out) == (expected is None)
    with pytest.raises(ValueError, match="--base my/base is for --format adapter, and the format is decoder"):
        command(monkeypatch, plain, tmp_path / "decoder", "--format", "decoder", "--base", "my/base")
    assert not (tmp_path / "decoder").exists()

"""The command that exports adapters for PEFT: onto the model that they belong to, and what it cannot carry."""

import dataclasses
import json
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from avlm.config.load import dump_config, load_config
from avlm.config.model import LoraConfig
from avlm.config.run import InitFrom
from avlm.families import qwen2_vl
from avlm.families.door import FORMATS
from avlm.models.avlm import AVLM
from avlm.models.batch import AUDIO, IMAGE
from avlm.weights.__main__ import main
from avlm.weights.export import export
from avlm.weights.folder import read_config
from avlm.weights.load import init_weights
from tests.families import test_audio_families, test_mistral3, test_qwen3_omni_moe
from tests.families.measured import close
from tests.families.test_qwen_vl import logits_of, prompt
from tests.families.test_qwen_vl_keys import config_of, keys_of
from tests.models.handmade import build, make_batch, normalised, pixels_of, save
from tests.models.test_avlm import TEXT_ONLY, VISION_ONLY, WHOLE, llava
from tests.weights.test_export import VOXTRAL
from tests.weights.test_sources import write_run

QWEN_VL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
ANY_ROWS = ("pixtral", "mistral3")
HEARING = ("qwen2_audio", "audioflamingo3", "qwen2_5_omni")
QWEN = qwen2_vl.read(keys_of("qwen2_vl"), {})
ONTO_DECODER = ["--format", "adapter", "--onto", "decoder"]


def run_of(folder, model, targets, train, init_from=None):
    """A run with adapters, of one stage that trains ``train``; (its folder, the model)."""
    built = build(dataclasses.replace(model, lora=LoraConfig(rank=4, targets=targets)))
    write_trained(folder, built, train, init_from)
    return folder, built


def write_trained(folder, model, train, init_from=None):
    write_run(folder, model)
    config = load_config(folder / "config.yaml")
    stage = dataclasses.replace(config.stages[0], train=train)
    config = dataclasses.replace(config, stages=[stage], init_from=init_from or config.init_from)
    (folder / "config.yaml").write_text(dump_config(config))


def command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["weights", "export", *map(str, arguments)])
    main()


def base_folder(family, folder):
    """A model folder of a family, without adapters."""
    if family == "llava":
        return save(llava(), folder)
    if family in QWEN_VL:
        return save(getattr(transformers, FORMATS[family].CLASS)(config_of(family)), folder)
    if family in ANY_ROWS:
        return save(getattr(transformers, FORMATS[family].CLASS)(test_mistral3.config_of(family)), folder)
    if family in HEARING:
        return save(test_audio_families.fresh(family), folder)
    if family == test_qwen3_omni_moe.NAME:
        return save(test_qwen3_omni_moe.CLASS(test_qwen3_omni_moe.config_of()), folder)
    export(VOXTRAL, build(VOXTRAL, seed=1).state_dict(), folder, "voxtral")
    return folder


def logits_of_both(family, ours, theirs):
    """Of our model and of transformers', for a text with an image or a recording."""
    if family in (*QWEN_VL, *HEARING):
        ask_of = prompt if family in QWEN_VL else test_audio_families.prompt
        ask = ask_of(family, theirs.get_base_model(), ours.config)
        with torch.no_grad():
            return logits_of(ours, ask.batch), theirs(**ask.inputs).logits[0]
    if family == test_qwen3_omni_moe.NAME:
        ask = test_qwen3_omni_moe.prompt(theirs.get_base_model(), ours.config, is_merged=True)
        with torch.no_grad():
            return logits_of(ours, ask.batch), theirs(**ask.inputs).logits[0]
    if family in ANY_ROWS:
        ask = test_mistral3.prompt(ours.config)
        with torch.no_grad():
            return logits_of(ours, ask.batch), theirs(**ask.inputs).logits[0]
    if family == "llava":
        document, pixels = [1, *[IMAGE] * 9, 4, 5, 6], pixels_of(1, 24)
        batch = make_batch(ours.config, [document], pixels)
        media = {"pixel_values": normalised(pixels, ours.config.vision)}
        token = theirs.config.image_token_id
    else:
        document, clips = [1, *[AUDIO] * 25, 4, 5], [torch.randn(80, 200)]
        batch = make_batch(ours.config, [document], clips=clips)
        media = {"input_features": torch.stack(clips)}
        token = theirs.config.audio_token_id
    ids = torch.tensor([[token if each < 0 else each for each in document]])
    with torch.no_grad():
        x_TD = ours.hidden(batch)
        mine = ours.decoder.head(ours.decoder.norm(x_TD), None)
        return mine, theirs(input_ids=ids, **media).logits[0, :, : mine.shape[1]]


@pytest.mark.parametrize(
    ("family", "targets", "train"),
    [
        ("llava", ["decoder.*"], ["lora", "vision_projector"]),
        ("llava", ["decoder.blocks.1.attention.q", "decoder.*.up", "vision.blocks.*"], ["lora"]),
        ("voxtral", ["decoder.*.v", "audio.blocks.0.up"], ["lora", "audio_projector"]),
        ("qwen2_vl", ["decoder.*.k", "vision.*.up"], ["lora", "vision_projector"]),
        ("qwen2_5_vl", ["decoder.*", "vision.*.gate", "vision.blocks.1.attention.o"], ["lora"]),
        ("qwen3_vl", ["decoder.*.q", "vision.*.down"], ["lora", "vision_projector"]),
        ("qwen3_vl_moe", ["decoder.*.attention.*"], ["lora"]),
        ("pixtral", ["decoder.*.v", "vision.*.gate"], ["lora"]),
        ("mistral3", ["decoder.*.q", "vision.*.down"], ["lora", "vision_projector"]),
        ("qwen2_audio", ["decoder.*.v", "audio.blocks.0.up"], ["lora", "audio_projector"]),
        ("audioflamingo3", ["decoder.*.v", "audio.*.q"], ["lora", "audio_projector"]),
        ("qwen2_5_omni", ["decoder.*.q", "vision.*.q", "audio.*.down"], ["lora", "audio_projector"]),
        ("qwen3_omni_moe", ["decoder.*.attention.*", "audio.blocks.*"], ["lora", "vision_projector"]),
    ],
)
def test_adapters_load_onto_the_class_of_their_base_and_give_its_logits(
    family, targets, train, tmp_path, monkeypatch, capsys
):
    base = base_folder(family, tmp_path / "base")
    config = dataclasses.replace(read_config(base), lora=LoraConfig(rank=4, alpha=6.0, targets=targets))
    start = InitFrom(all=str(base))
    model = AVLM(config)
    init_weights(model, start, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or name.split(".")[0] in train:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    write_trained(tmp_path / "run", model, train, start)
    command(monkeypatch, tmp_path / "run", tmp_path / "adapter", "--format", "adapter")
    said = capsys.readouterr().out
    assert f"adapters onto {family}, " in said and " in float32, " in said and "lacks" not in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of missing keys
        theirs = eval(said.split("load it: ")[1], {"transformers": transformers, "peft": peft})
    assert type(theirs.get_base_model()).__name__ == FORMATS[family].CLASS
    ours, expected = logits_of_both(family, model, theirs.eval())
    close(ours, expected, f"{family} adapters")
    theirs.save_pretrained(tmp_path / "theirs")  # the very names and numbers that PEFT itself writes
    written = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("theirs", "adapter")]
    assert written[0].keys() == written[1].keys()
    assert all(tensor.equal(written[1][name]) for name, tensor in written[0].items())
    for folder in ("theirs", "adapter"):
        again = AVLM(config)
        init_weights(again, InitFrom(all=str(base), adapter=str(tmp_path / folder)), seed=2)
        assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters()))
    write_trained(tmp_path / "more", again, ["lora"], InitFrom(all=str(base), adapter=str(tmp_path / "adapter")))
    command(monkeypatch, tmp_path / "more", tmp_path / "later", "--format", "adapter")
    later = load_file(tmp_path / "later" / "adapter_model.safetensors")
    assert later.keys() >= written[1].keys(), "a projector that came with the adapters is not the base's"
    assert all(tensor.equal(later[name]) for name, tensor in written[1].items())


@pytest.mark.parametrize(
    ("model", "targets", "train", "arguments", "refused"),
    [
        (WHOLE, ["decoder.*"], ["lora"], [], "cannot be a qwen2_5_omni: .*mrope_sections.*--onto decoder"),
        (TEXT_ONLY, ["decoder.*"], ["decoder"], [], "trains decoder itself .*--format decoder writes the whole model"),
        (VISION_ONLY, ["decoder.*"], ["lora"], [], "cannot be a llava: .*without downsampling.*--onto decoder"),
        (VISION_ONLY, ["vision.blocks.*"], ["lora"], ["--onto", "decoder"], "holds adapters onto decoder, and the mod"),
        (VOXTRAL, ["decoder.*"], ["lora", "audio"], [], r"trains audio itself \(audio.blocks.0.*--format voxtral"),
        (VOXTRAL, ["decoder.*"], ["lora"], ["--onto", "llava"], "cannot be a llava: .*with a vision tower"),
        (QWEN, ["vision.*.q"], ["lora"], [], r"vision.blocks.0.attention.q has adapters, .* part of blocks.0.attn.qkv"),
    ],
)
def test_what_a_folder_of_adapters_cannot_hold_is_refused_by_name(
    model, targets, train, arguments, refused, tmp_path, monkeypatch
):
    run, _ = run_of(tmp_path / "run", model, targets, train)
    with pytest.raises(ValueError, match=refused):
        command(monkeypatch, run, tmp_path / "out", "--format", "adapter", *arguments)
    assert not (tmp_path / "out").exists()


def test_what_is_written_what_it_lacks_and_how_it_loads_is_said(tmp_path, monkeypatch, capsys):
    run, _ = run_of(tmp_path / "run", WHOLE, ["decoder.*", "audio.*.up"], ["lora", "vision_projector"])
    out = tmp_path / "out"
    command(monkeypatch, run, out, "--format", "adapter", "--onto", "decoder", "--base", "my/base")
    wrote, load, lacks = capsys.readouterr().out.splitlines()
    assert wrote == f"wrote {out}: adapters onto decoder, 28 tensors in float32, 0.0 MB"
    assert load.endswith(f"(transformers.AutoModelForCausalLM.from_pretrained('my/base'), '{out}')")
    left = "vision, audio, adapters of audio, vision_projector, audio_projector"
    assert lacks == f"it lacks {left}: --format avlm keeps them, with all adapters merged"
    command(monkeypatch, run, tmp_path / "whole")
    wrote, load = capsys.readouterr().out.splitlines()
    assert "whole: format avlm, " in wrote and " in bfloat16, " in wrote
    assert load == f"load it: avlm.load('{tmp_path / 'whole'}')"


def test_adapters_stay_as_they_are_stored_unless_a_dtype_is_asked_for(tmp_path, monkeypatch):
    run, model = run_of(tmp_path / "run", WHOLE, ["decoder.*"], ["lora"])
    up = model.decoder.blocks[1].attention.q.lora_up.weight
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    for asked, expected in ((None, up), ("bfloat16", up.bfloat16())):
        folder = tmp_path / str(asked)
        command(monkeypatch, run, folder, *ONTO_DECODER, *(["--dtype", asked] if asked else []))
        written = load_file(folder / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in written.values()} == {expected.dtype} and written[name].equal(expected)
    command(monkeypatch, run, tmp_path / "whole")
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "whole" / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}


def test_the_base_of_an_adapter_is_named_by_the_command_or_by_the_run(tmp_path, monkeypatch, capsys):
    plain, _ = run_of(tmp_path / "plain", WHOLE, ["decoder.*"], ["lora"], InitFrom(all="a/run"))
    named, _ = run_of(tmp_path / "named", WHOLE, ["decoder.*"], ["lora"], InitFrom(decoder="org/decoder"))
    for run, given, expected in ((plain, None, None), (plain, "my/base", "my/base"), (named, None, "org/decoder")):
        arguments = [*ONTO_DECODER, "--overwrite", *(["--base", given] if given else [])]
        command(monkeypatch, run, tmp_path / "out", *arguments)
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == expected
        assert ("it names no base: --base NAME adds the decoder" in capsys.readouterr().out) == (expected is None)
    with pytest.raises(ValueError, match="--base my/base is for --format adapter, and the format is decoder"):
        command(monkeypatch, plain, tmp_path / "decoder", "--format", "decoder", "--base", "my/base")
    assert not (tmp_path / "decoder").exists()

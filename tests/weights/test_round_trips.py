"""What was exported is a start again: of runs, of the same class in transformers, and of every other format that holds
it. (Logits and answers of each format next to those of its class: tests/families, tests/weights/test_served.py.)"""

import dataclasses
import itertools
import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from avlm.config.run import DataConfig
from avlm.config.values import validated
from avlm.data.sample import SampleEncoder
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation.generation import generate
from avlm.families import door
from avlm.models.avlm import AVLM
from avlm.weights.__main__ import main
from avlm.weights.export import export
from avlm.weights.load import load_weights, open_model
from avlm.weights.model_from import open_config
from tests.data.small_files import CONTROL, image_file, photo, tone, write_tokenizer
from tests.families import test_audio_families_keys
from tests.models.handmade import build
from tests.training.test_train import ENVIRONMENT, ROOT
from tests.weights.served_models import ASKED, CHATML, FAMILIES, MODELS, joint, of_family, served
from tests.weights.test_gguf import MARKERS
from tests.weights.test_gguf import WHOLE as HELD_BY_LLAMA_CPP

STAGE = {"name": "tune", "steps": 1, "train": ["audio_projector"], "optimizer": {"lr": 0.01}}
PROMPTS = {
    "plain": {"template": "plain", "system": "Be brief."},
    "marked": {"template": "chatml", "markers": {"image": ["<s>", "</s>"], "audio": ["</s>", ""]}},
    "own template": {"template": "tokenizer", "video": {"num_frames": 3, "audio": "after"}},
    "no videos": {"template": "llava", "video": {"text": {"frame": "{n}: "}}},
}


@pytest.mark.parametrize("name", [*PROMPTS, "audio alone", *FAMILIES])
def test_an_export_for_transformers_starts_a_run_with_its_weights_and_prompts(name, tmp_path):
    config, options = MODELS["swiglu"], PROMPTS.get(name, {})
    if name in FAMILIES:
        config, options, _ = of_family(name)
    elif name == "audio alone":
        config = MODELS[name]
    model, encoder, _ = served(config, tmp_path, **options)
    tree = {"model": {"from": str(tmp_path / "out")}, "data": {"train": "mine.jsonl"}, "stages": [STAGE]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    run = open_config(tmp_path / "mine.yaml")
    assert run.init_from.all == str(tmp_path / "out")
    assert_same_but_for_rows(run.model, model.config)
    start = AVLM(run.model)
    [report] = load_weights(start, run.init_from)
    assert not report.initialised
    for parameter, value in model.named_parameters():
        assert torch.equal(start.get_parameter(parameter)[: len(value)], value), parameter
    data = run.stages[0].data
    again = SampleEncoder(run.model, data, Tokenizer(data.tokenizer))
    asked = [each for each in ASKED if config.vision or not each.images + each.videos]
    for each in asked:
        ours, theirs = encoder.encode(each), again.encode(each)
        assert torch.equal(ours.token_T, theirs.token_T) and torch.equal(ours.target_T, theirs.target_T)
        assert (ours.position_T is None) == (theirs.position_T is None)
        assert ours.position_T is None or torch.equal(ours.position_T, theirs.position_T)


def assert_same_but_for_rows(back, config) -> None:
    """The embedding of an export may have rows for media tokens."""
    assert dataclasses.replace(back, decoder=config.decoder) == config
    assert dataclasses.replace(back.decoder, vocab_size=config.decoder.vocab_size) == config.decoder


def test_train_py_starts_from_an_export_and_its_run_is_exported_the_same_way(tmp_path, monkeypatch):
    served(MODELS["llava"], tmp_path, template="plain", video={"num_frames": 3, "audio": "after"})
    (tmp_path / "a.png").write_bytes(image_file(photo(30, 20)))
    (tmp_path / "a.wav").write_bytes(tone(0.4))
    talk = [{"role": "user", "content": "<image><audio>one?"}, {"role": "assistant", "content": "two"}]
    record = json.dumps({"messages": talk, "images": ["a.png"], "audios": ["a.wav"]})
    (tmp_path / "mine.jsonl").write_text(f"{record}\n" * 8)
    tree = {"model": {"from": str(tmp_path / "out")}, "data": {"train": str(tmp_path / "mine.jsonl")}}
    tree |= {"output_dir": str(tmp_path / "run"), "device": "cpu", "stages": [STAGE], "train": {"precision": "fp32"}}
    tree["data"] |= {"num_workers": 0, "seq_length": 64}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "train.py", str(tmp_path / "mine.yaml")]
    ran = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    options = ["--format", "transformers", "--dtype", "float32"]
    monkeypatch.setattr("sys.argv", ["", "export", str(tmp_path / "run"), str(tmp_path / "again"), *options])
    main()
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    trained = {name for name in before if not torch.equal(before[name], after[name])}
    assert trained and trained == {name for name in before if name.startswith("model.audio_projector.")}
    for name in ("chat_template.jinja", "processor_config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "again" / name).read_text(), name


AUDIO_FAMILIES = list(test_audio_families_keys.FAMILIES)


@pytest.mark.parametrize("name", [*FAMILIES, *AUDIO_FAMILIES])
def test_an_export_of_a_family_goes_back_into_its_class_tensor_by_tensor(name, tmp_path):
    """What is read and written again has the files of the first export, so that the class loads the same model."""
    family = door.FORMATS[name]
    if name in AUDIO_FAMILIES:
        keys = test_audio_families_keys.keys_of(name)
        config = family.read(keys, {})
        prompts = door.prompts(family, config, {"config.json": keys})
    else:
        config, prompts = joint(name)
        config = dataclasses.replace(config, audio=None, audio_projector=None)
    words = dict.fromkeys([*CONTROL, *family.MEDIA_TOKENS, "<global-img>", "[E]", "[B]"])
    source = write_tokenizer(tmp_path / "tokenizer", [*words], eos_token="</s>", chat_template=CHATML)
    size = Tokenizer(source).size
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=size))
    given = {"train": "x", "tokenizer": str(source), "template": "chatml", **prompts}
    export(config, build(config).state_dict(), tmp_path / "1", name, data=validated(DataConfig, given, "data"))
    write_again(tmp_path / "1", tmp_path / "2", name)
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in "12")
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    for path in (tmp_path / "1").glob("*.json"):
        assert json.loads(path.read_text()) == json.loads((tmp_path / "2" / path.name).read_text()), path.name


def write_again(folder, other, format: str, **options) -> None:
    opened = open_model(str(folder))
    model = opened.load(torch.device("cpu"), torch.float32)
    export(opened.config, model.state_dict(), other, format, data=opened.data, **options)


def test_a_chain_of_formats_keeps_every_weight_and_answer(tmp_path):
    source = write_tokenizer(tmp_path / "tokenizer", [*CONTROL, "<pad>"], pad_token="<pad>", eos_token="<|im_end|>")
    size = Tokenizer(source).size
    decoder = dataclasses.replace(HELD_BY_LLAMA_CPP.decoder, vocab_size=size)
    config = dataclasses.replace(HELD_BY_LLAMA_CPP, decoder=decoder)
    data = DataConfig(train="x", tokenizer=str(source), template="chatml", seq_length=1024, markers=MARKERS)
    model = build(config)
    folders = [tmp_path / name for name in ("avlm", "transformers", "avlm again", "gguf", "avlm at last")]
    export(config, model.state_dict(), folders[0], data=data)
    asked = ASKED[:4]
    expected = answers(model, SampleEncoder(config, data, Tokenizer(source)), asked)
    for before, folder in itertools.pairwise(folders):
        format = folder.name.split()[0]
        write_again(before, folder, format, **({"type": "f32"} if format == "gguf" else {}))
    for folder in folders:
        opened = open_model(str(folder))
        assert_same_but_for_rows(opened.config, config)
        back = opened.load(torch.device("cpu"), torch.float32)
        for name, value in model.named_parameters():
            assert torch.equal(back.get_parameter(name)[: len(value)], value), (folder.name, name)
        assert answers(back, SampleEncoder(opened.config, opened.data, Tokenizer(folder)), asked) == expected


def answers(model, encoder, asked) -> list[list[int]]:
    prompts = [encoder.prompt(each.messages[:-1], each.images, each.audios, each.videos) for each in asked]
    return [each.token_ids for each in generate(model, prompts, stop_ids=encoder.chat.stop_ids, max_new_tokens=8)]

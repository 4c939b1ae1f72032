"""Exports as others run them: where answers part, rounding explains it or the first sample is named."""

import dataclasses
import doctest
import json
from pathlib import Path

import pytest
import torch

from avlm.config.media import VideoConfig
from avlm.config.run import DataConfig
from avlm.config.values import validated
from avlm.data.sample import SampleEncoder
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation.__main__ import main
from avlm.evaluation.engines import Agreement, next_logprobs
from avlm.evaluation.generation import generate
from avlm.evaluation.transformers_engine import Engine
from avlm.families import qwen2_vl
from avlm.weights.export import export
from tests.data.small_files import CONTROL, image_file, photo, tone, video_file, write_tokenizer
from tests.families import test_gemma_vision_keys
from tests.models.handmade import build
from tests.training.test_train import ROOT
from tests.weights.served_models import ASKED, changed, joint


def folder_of(tmp_path: Path, config=None, **data) -> Path:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", eos_token="</s>")
    config = config or changed("decoder", vocab_size=Tokenizer(tokenizer).size)
    given = DataConfig(train="x", tokenizer=str(tokenizer), template="plain", **data)
    export(config, build(config).state_dict(), tmp_path / "out", "transformers", data=given, dtype=torch.float32)
    return tmp_path / "out"


def set_of(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(image_file(photo(30, 20)))
    (tmp_path / "a.wav").write_bytes(tone(0.4))
    asked = [("<image>one?", {"images": ["a.png"]}), ("<audio>two?", {"audios": ["a.wav"]}), ("three?", {})]
    lines = []
    for question, media in asked:
        talk = [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]
        lines.append(json.dumps({"messages": talk, **media}) + "\n")
    (tmp_path / "set.jsonl").write_text("".join(lines))
    return tmp_path / "set.jsonl"


def command(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["avlm.evaluation", *map(str, arguments)])
    try:
        main()
    finally:
        if torch.distributed.is_initialized():  # a command that fails ends with its process
            torch.distributed.destroy_process_group()


def test_an_export_is_answered_by_ours_and_by_transformers_side_by_side(tmp_path, monkeypatch, capsys):
    folder, out = folder_of(tmp_path), tmp_path / "scores"
    options = ["--data", f"some={set_of(tmp_path)}", "--out", out, "--max-new-tokens", 6]
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "repetition_penalty": 1e6}))
    command(monkeypatch, folder, "--engine", "transformers", *options)
    said = capsys.readouterr().out
    assert "3 of 3 answers equal\n" in said and f"| {folder} | {folder}, transformers |" in said
    answers = [(place / "predictions/some.jsonl").read_text() for place in (out, out / "transformers")]
    assert answers[0] == answers[1] and json.loads((out / "transformers/report.json").read_text())["engine"]
    assert "ablations" in (out / "report.json").read_text()

    # The template is a file that transformers alone reads; a model of random weights hardly sees or hears.
    template = folder / "chat_template.jinja"
    template.write_text("three one TURN three" + template.read_text())
    with pytest.raises(ValueError, match=r"out, transformers: some, set.jsonl:\d: .* instead of .* nats less likely"):
        command(monkeypatch, folder, "--engine", "transformers", *options)
    assert "3 of 3 answers equal\n" not in capsys.readouterr().out


def test_the_examples_of_the_page_about_serving_are_true(tmp_path, monkeypatch):
    folder_of(tmp_path, video=VideoConfig(num_frames=3, audio="after")).rename(tmp_path / "served")
    for i, name in enumerate(("a.png", "b.png")):
        (tmp_path / name).write_bytes(image_file(photo(30, 20, seed=i)))
    (tmp_path / "a.wav").write_bytes(tone(0.4))
    (tmp_path / "a.mp4").write_bytes(video_file(2.0, 8, sound=True))
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testfile(str(ROOT / "docs" / "serving.md"), module_relative=False)
    assert tried > 15 and failed == 0


FOREIGN = "raise SystemExit('was run')"
INJECTED = f"LlavaProcessor as Base\n{FOREIGN}\nfrom transformers import LlavaProcessor"


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("modeling_avlm.py", FOREIGN),
        ("more/other.py", FOREIGN),
        ("config.json", {"auto_map": {"AutoConfig": "someone/else--modeling.Config"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["someone/else--code.Tokenizer", None]}}),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "code.Images"}}),
        (
            "processor_config.json",
            {"image_processor": {"auto_map": {"AutoImageProcessor": "someone/else--code.Images"}}},
        ),
        ("config.json", {"base_processor": INJECTED}),
    ],
)
def test_code_that_an_export_did_not_write_is_not_run(file, change, tmp_path, monkeypatch):
    folder = folder_of(tmp_path)
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))
    if change == {"base_processor": INJECTED}:
        code = (folder / "processing_avlm.py").read_text()
        (folder / "processing_avlm.py").write_text(code.replace("LlavaProcessor", INJECTED, 1))
    with pytest.raises(ValueError, match=r"is not (the code that an export writes|that of an export), and"):
        Engine(folder, DataConfig(train="x"), changed("decoder"))


@pytest.mark.parametrize("name", ["plain", "qwen2_5_vl", "paligemma2"])
def test_answers_that_part_are_judged_by_our_log_probabilities(name, tmp_path):
    if name == "paligemma2":  # the tokens of a prompt see each other, those of an answer do not
        config, prompts = test_gemma_vision_keys.model_of(name), {"template": "paligemma"}
    else:
        config, prompts = (changed("decoder"), {}) if name == "plain" else joint(name)
    control = [*CONTROL, *qwen2_vl.MEDIA_TOKENS]
    tokenizer = Tokenizer(write_tokenizer(tmp_path / "tokenizer", control, eos_token="</s>"))
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=tokenizer.size))
    data = validated(
        DataConfig, {"train": "x", "tokenizer": str(tmp_path / "tokenizer"), "template": "plain", **prompts}, "data"
    )
    model, encoder = build(config), SampleEncoder(config, data, tokenizer)
    stops = encoder.chat.stop_ids
    sample = dataclasses.replace(ASKED[1], key="first")
    prompt = encoder.prompt(sample.messages[:-1], sample.images)
    [answer] = generate(model, [prompt], stop_ids=[], max_new_tokens=6)
    for i, logprob in enumerate(answer.logprobs):
        of_all = next_logprobs(model, prompt, answer.token_ids[:i])
        assert of_all.argmax() == answer.token_ids[i]
        torch.testing.assert_close(of_all.max().item(), logprob, atol=1e-5, rtol=1e-5)
    second = next_logprobs(model, prompt, answer.token_ids[:2])
    likeliest, gap = second.argsort(descending=True).tolist(), second.sort(descending=True).values
    other = [*answer.token_ids[:2], likeliest[1]]
    for tolerance, parted in [(float(gap[0] - gap[1]) + 1e-4, 1), (float(gap[0] - gap[1]) - 1e-4, 0)]:
        agreement = Agreement(model, encoder, stops, tolerance)
        agreement.add("set", sample, answer.token_ids, answer.token_ids, 8)
        agreement.add("set", sample, answer.token_ids, other, 8)
        assert (agreement.count, agreement.parted) == (2, parted)
        assert agreement.first.startswith("set, first: ") == (not parted)
    ended = Agreement(model, encoder, stops, 100.0)
    ended.add("set", sample, answer.token_ids, answer.token_ids[:2], 8)
    assert str(ended) == "0 of 1 answer equal, 1 part where two tokens are about equally likely"


@pytest.mark.parametrize("engine", ["transformers", "llama_cpp"])
def test_a_folder_of_another_format_is_refused_before_any_answer(engine, tmp_path, monkeypatch, capsys):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", eos_token="</s>")
    config = changed("decoder", vocab_size=Tokenizer(tokenizer).size)
    data = DataConfig(train="x", tokenizer=str(tokenizer), template="plain")
    export(config, build(config).state_dict(), tmp_path / "out", "avlm", data=data)
    assert (tmp_path / "out/model.safetensors").stat().st_mode & 0o044 == 0o044
    format = {"transformers": "transformers", "llama_cpp": "gguf"}[engine]
    with pytest.raises(ValueError, match=f"--engine {engine} cannot run .*: give an export of --format {format}"):
        options = ["--data", f"some={set_of(tmp_path)}", "--out", tmp_path / "scores"]
        command(monkeypatch, tmp_path / "out", "--engine", engine, *options)
    assert not capsys.readouterr().out

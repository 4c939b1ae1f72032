"""The command line of generate.py."""

import dataclasses
import json
import sys

import pytest
import transformers
from PIL import Image

import generate as command
from avlm.config.model import LoraConfig
from avlm.config.run import DataConfig
from avlm.process.exit import run_command
from avlm.weights.export import export
from tests.data.small_files import image_file, photo, tone, video_file
from tests.models.handmade import build, save
from tests.models.test_avlm import DECODER, WHOLE
from tests.weights.test_sources import write_run


def run(monkeypatch, capsys, *arguments) -> tuple[str, str, int]:
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments), "--device", "cpu"])
    code = 0
    try:
        run_command(command.main)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return captured.out, captured.err, code


def test_the_command_line_prints_one_json_object_per_prompt(exported, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "a.png")
    Image.new("RGB", (40, 30), (20, 30, 230)).save(tmp_path / "b.png")
    media = ["--image", tmp_path / "a.png", "--image", tmp_path / "b.png", "--max-new-tokens", "5", "--json"]
    prompts = ["--prompt", "what", "--prompt", "<image>and<image>"]
    out, err, code = run(monkeypatch, capsys, exported, *media, *prompts)
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 2 and all(set(row) == {"text", "token_ids", "logprobs"} for row in rows)
    assert all(1 <= len(row["token_ids"]) == len(row["logprobs"]) <= 5 for row in rows)
    again, _, _ = run(monkeypatch, capsys, exported, *media, *prompts)
    assert again == out


def test_a_prompt_without_tags_gets_every_medium_in_front(exported, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.wav").write_bytes(tone(0.4))
    (tmp_path / "c.mkv").write_bytes(video_file(1.0))
    (tmp_path / "b.png").write_bytes(image_file(photo(30, 20)))
    media = ["--audio", tmp_path / "a.wav", "--image", tmp_path / "b.png", "--video", tmp_path / "c.mkv"]
    arguments = [exported, *media, "--json", "--max-new-tokens", "4"]
    plain, err, code = run(monkeypatch, capsys, *arguments, "--prompt", "well?")
    assert code == 0, err
    tagged, _, _ = run(monkeypatch, capsys, *arguments, "--prompt", "<image><audio><video>\nwell?")
    swapped, _, _ = run(monkeypatch, capsys, *arguments, "--prompt", "<audio><image><video>\nwell?")
    raw, err, code = run(monkeypatch, capsys, *arguments, "--prompt", "<audio>well?", "--raw")
    assert plain == tagged != swapped and code == 0, err
    assert json.loads(raw)["token_ids"]


def test_the_command_line_streams_one_prompt(exported, monkeypatch, capsys):
    arguments = [exported, "--prompt", "hello", "--max-new-tokens", "6"]
    streamed, _, code = run(monkeypatch, capsys, *arguments)
    whole, _, _ = run(monkeypatch, capsys, *arguments, "--json")
    assert code == 0 and streamed.rstrip("\n") == json.loads(whole)["text"].rstrip("\ufffd").rstrip("\n")


@pytest.mark.parametrize("tied", [False, True])
def test_a_hugging_face_decoder_answers_with_its_own_template(tied, tokenizer_folder, tmp_path, monkeypatch, capsys):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 260, "eos_token_id": 257, "tie_word_embeddings": tied}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    save(theirs, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.save_pretrained(tmp_path)
    templated = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi there"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    raw = tokenizer("hi there", return_tensors="pt")
    for inputs, flags in ((templated, []), (raw, ["--raw"])):
        expected = theirs.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
        arguments = [tmp_path, "--prompt", "hi there", "--max-new-tokens", "8", "--json", *flags]
        out, err, code = run(monkeypatch, capsys, *arguments)
        assert code == 0, err
        assert json.loads(out)["token_ids"] == expected[0, inputs["input_ids"].shape[1] :].tolist()
    (tmp_path / "tokenizer_config.json").unlink()  # and with it the name of eos, which a prompt as it stands needs not
    assert run(monkeypatch, capsys, *arguments)[0] == out


def test_a_run_with_adapters_a_checkpoint_of_it_and_its_export_answer_alike(
    tokenizer_folder, tmp_path, monkeypatch, capsys
):
    lora = LoraConfig(rank=4, targets=["decoder.*", "vision.*.up"])
    config = dataclasses.replace(WHOLE, decoder=dataclasses.replace(DECODER, vocab_size=260), lora=lora)
    data = DataConfig(train="synthetic", tokenizer=str(tokenizer_folder), template="chatml", seq_length=64)
    older, newer = build(config, seed=1), build(config, seed=2)
    paths = [write_run(tmp_path / "run", model, step, data) for step, model in ((3, older), (5, newer))]
    export(config, newer.state_dict(), tmp_path / "export", data=data)
    (tmp_path / "b.png").write_bytes(image_file(photo(30, 20)))
    media = ["--image", tmp_path / "b.png", "--prompt", "what is this", "--json", "--max-new-tokens", "8"]
    answers = []
    for model in (tmp_path / "run", paths[1], tmp_path / "export", paths[0]):
        out, err, code = run(monkeypatch, capsys, model, *media)
        assert code == 0, err
        answers.append(json.loads(out)["token_ids"])
    assert answers[0] == answers[1] == answers[2] != answers[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", __file__, "--image", __file__, "--prompt", "x"], "error: image 1: "),
        (["--image", "nowhere.png", "--prompt", "x"], "there is no image file nowhere.png"),
        (["--prompt", "<image> what"], "the prompt has 1 <image> tag but 0 images"),
        (["--prompt", "x", "--max-new-tokens", "1000"], "max_position"),
        (["--json"], "--json needs --prompt"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_two(arguments, message, exported, monkeypatch, capsys):
    out, err, code = run(monkeypatch, capsys, exported, *arguments)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_a_folder_that_cannot_answer_is_refused(tmp_path, monkeypatch, capsys):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    transformers.CLIPVisionModel(vision).save_pretrained(tmp_path)
    for folder, message in ((tmp_path, "cannot answer"), (tmp_path / "no", "no model folder")):
        _, err, code = run(monkeypatch, capsys, folder, "--prompt", "x")
        assert code == 2 and message in err

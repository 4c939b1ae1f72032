"""Any models on the same sets: what is opened, where it writes, and the table of all."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from avlm import load
from avlm.config.run import DataConfig
from avlm.data.sample import Sample
from avlm.evaluation.report import comparison, table
from avlm.evaluation.results import _by_kind, _summary
from avlm.evaluation.side_by_side import find_candidates
from tests.models.handmade import build, save
from tests.models.test_avlm import DECODER, WHOLE
from tests.training.test_train import ENVIRONMENT, ROOT
from tests.weights.test_sources import write_run


@pytest.fixture(scope="module")
def base(tokenizer_folder, tmp_path_factory) -> Path:
    """A decoder of Hugging Face with a template, and a stop token that only its generation config names."""
    folder = tmp_path_factory.mktemp("hub") / "base"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    save(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=260)), folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 258]}))
    return folder


@pytest.fixture(scope="module")
def tuned(tokenizer_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    config = dataclasses.replace(WHOLE, decoder=dataclasses.replace(DECODER, vocab_size=260))
    data = DataConfig(train="synthetic", tokenizer=str(tokenizer_folder), template="chatml", seq_length=64)
    write_run(folder, build(config), 3, data)
    return folder


def evaluate(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "avlm.evaluation", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


def test_a_base_model_and_a_run_are_put_side_by_side(base, tuned, tmp_path):
    file = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "hello?"}, {"role": "assistant", "content": "hello"}]
    file.write_text(json.dumps({"messages": turns}) + "\n")
    options = ["--data", f"mine={file}", "--metrics", "exact_match,cer", "--max-new-tokens", "8"]
    result = evaluate(base, tuned, *options)
    assert result.returncode == 0, result.stderr
    for model, folder in ((base, tuned / "base"), (tuned, tuned)):
        report = json.loads((folder / "report.json").read_text())
        [entry] = report["results"]
        assert report["model"] == str(model) and report["step"] == (3 if model == tuned else None)
        [line] = (folder / entry["predictions"]).read_text().splitlines()
        [own] = load(model, device="cpu").answers(["hello?"], max_new_tokens=8)
        assert json.loads(line)["prediction"] == own.strip()
    text = (tuned / "comparison.md").read_text()
    assert f"{text}\nwritten to {tuned / 'comparison.md'}" in result.stdout
    assert f"| set | samples | metric | {base} | {tuned} |" in text
    assert [row.split(" | ")[2] for row in text.splitlines()[2:]] == ["exact match", "cer"]


def test_results_go_to_runs_or_where_they_are_told_to(base, tuned, tmp_path):
    def folders(*names, out=None):
        return [each.folder for each in find_candidates([str(name) for name in names], "latest", out)]

    assert folders(tuned) == [tuned] and folders(base, tuned) == [tuned / "base", tuned]
    assert folders(base, out=tmp_path) == [tmp_path]
    other = tmp_path / "other" / "base"
    other.mkdir(parents=True)
    assert folders(base, tuned, out=tmp_path) == [tmp_path / "base", tmp_path / "tuned"]
    assert len({*folders(base, other, tuned), tuned}) == 3, "two models of one name"
    checkpoint = tuned / "checkpoints" / "step_00000003"
    assert folders(tuned, checkpoint) == [tuned, tuned / checkpoint.name], "a run's own report is not replaced"
    for names, step, message in (
        ([base], "latest", "is no run: say by --out FOLDER where its results go"),
        ([base], "best", "--step best chooses a checkpoint of a run"),
        ([base, base], "latest", "is given twice"),
    ):
        with pytest.raises(ValueError, match=message):
            find_candidates([str(name) for name in names], step, None)


def test_ablations_count_the_samples_that_have_the_modality():
    """Of three samples two are images, both right, one of them without looking; the audio is right without hearing."""
    samples = [Sample("a", [], images=[b""]), Sample("b", [], audios=[b""]), Sample("c", [], images=[b""])]
    right, wrong = (1.0, 1.0), (0.0, 1.0)
    scores = {"exact_match": [right, right, right]}
    ablated = {"no_image": [right, None, wrong], "no_audio": [None, right, None]}
    whole = _summary(range(3), scores, ablated, {"no_image": 0.1})
    assert whole["ablations"] == {"no_image": 0.5, "no_audio": 1.0}
    assert whole["ablation_counts"] == {"no_image": 2, "no_audio": 1}
    assert whole["ablation_chances"] == {"no_image": None, "no_audio": None}, "chance is that of the whole set"
    kinds = _by_kind(samples, scores, ablated)
    assert [(each["kind"], each["count"], each["ablations"]) for each in kinds] == [
        ("image", 2, {"no_image": 0.5}),
        ("audio", 1, {"no_audio": 1.0}),
    ]
    result = {"task": "mine", "set": "test", "metric": "exact_match", **whole, "kinds": kinds}
    _, _, *rows = table([result]).splitlines()
    assert rows == [
        "| mine | test | 3 | **100.0 %** | 50.0 % of 2 | 100.0 % of 1 |",
        "| mine | test, image | 2 | **100.0 %** | 50.0 % |  |",
        "| mine | test, audio | 1 | **100.0 %** |  | 100.0 % |",
    ]
    _, _, *rows = comparison({"a": [result], "b": [result]}).splitlines()
    assert "| mine/test | 2 | exact match, no_image | 50.0 % | 50.0 % |" in rows
    assert "| mine/test, audio | 1 | exact match, no_audio | 100.0 % | 100.0 % |" in rows
    deaf = {**result, "ablations": {"no_image": 0.5}, "ablation_counts": {"no_image": 1}}
    _, _, *rows = comparison({"deaf": [deaf], "b": [result]}).splitlines()
    assert "| mine/test |  | exact match, no_image | 50.0 % of 1 | 50.0 % of 2 |" in rows
    assert "| mine/test | 1 | exact match, no_audio |  | 100.0 % |" in rows
    assert _by_kind(samples[::2], {"exact_match": [right, right]}, {}) == [], "one kind only"

"""Model cards: what the run's files say, nothing of the machine, and code that runs as it stands."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from avlm.config.connector import ResamplerConfig
from avlm.config.load import dump_config
from avlm.config.run import Config, DataConfig, InitFrom, OptimizerConfig, StageConfig
from avlm.data.text.tokenizer import Tokenizer
from avlm.families import door
from avlm.storage.checkpoint_files import MARKER
from avlm.storage.run_folder import Progress
from avlm.weights.__main__ import main
from avlm.weights.model_card import _limits, _sizes, write_card
from tests.data.small_files import CONTROL, image_file, photo, tone, write_tokenizer
from tests.models.handmade import build
from tests.models.test_avlm import WHOLE
from tests.weights.served_models import FAMILIES, changed, of_family, served
from tests.weights.test_export import VOXTRAL
from tests.weights.test_export_prompts import LLAVA
from tests.weights.test_sources import write_run

CARD = "README.md"
SCORES = {"exact_match": 0.8125, "wer": 0.0416}
RESULT = {"name": "test", "metric": "exact_match", "value": 0.8125, "metrics": SCORES, "count": 1234, "chance": 0.125}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Makes a run of two stages that stands at step 5 of 9, with absolute paths in its config."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "a.wav"):
        (tmp_path / name).write_bytes(image_file(photo(30, 20)) if name == "a.png" else tone(0.4))

    def run(model, **init_from) -> Path:
        tokenizer = write_tokenizer(tmp_path / "tokenizer", CONTROL, eos_token="</s>")
        size = Tokenizer(tokenizer).size
        model = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, vocab_size=size))
        sources = {
            str(tmp_path / "mine/secret/a.jsonl"): 3,
            "hf://owner/set?split=train": 1,
            "s3://key@b/c/d/shards": 4,
        }
        data = DataConfig(train=sources, tokenizer=str(tokenizer), template="plain", seq_length=64)
        adam = OptimizerConfig(lr=0.00125)
        stages = [StageConfig(name="align", steps=3, optimizer=adam, data=data, freeze_language_model=True)]
        stages += [StageConfig(name="tune", steps=6, optimizer=adam, data=data, train=["decoder"])]
        config = Config(output_dir="run", model=model, stages=stages, init_from=InitFrom(**init_from))
        checkpoint = write_run(tmp_path / "run", build(model), step=5)
        (tmp_path / "run/config.yaml").write_text(dump_config(config))
        progress = Progress(step=5, stage=1, stage_step=2, read=17_171, skipped=2)
        (checkpoint / MARKER).write_text(json.dumps(dataclasses.asdict(progress)))
        records = []
        for step in range(1, 8):  # the run is further than its last checkpoint
            stage = "align" if step <= 3 else "tune"
            records.append(
                {"step": step, "stage": stage, "tokens": 1000.0 + step, "target_tokens": 100.0, "epoch": 0.25}
            )
        for step, loss in [(3, 9.75), (5, 2.625), (7, 1.0)]:
            records.append({"step": step, "stage": "tune", "val/held out/loss": loss})
        (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
        return tmp_path / "run"

    return run


def export(monkeypatch, run: Path, format: str, *options: str) -> str:
    monkeypatch.setattr("sys.argv", ["avlm.weights", "export", str(run), "out", "--format", format, *options])
    main()
    return (run.parent / "out" / CARD).read_text()


def run_code(card: str, capsys) -> str:
    """What the code of a card prints."""
    capsys.readouterr()
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
    return capsys.readouterr().out


@pytest.mark.parametrize("format", ["transformers", "avlm"])
def test_a_card_has_the_numbers_of_the_runs_files_and_no_path_of_its_machine(
    format, run, monkeypatch, tmp_path, capsys
):
    model = changed("vision_projector", downsample=2)
    folder = run(model, vision="openai/clip", decoder=str(tmp_path / "own/models/small"), all="runs/gone")
    (tmp_path / "runs").mkdir()  # in which gone was once: it is no owner of the Hub's
    ablations = {"no_image": 0.25}
    (folder / "report.json").write_text(json.dumps({"step": 5, "results": [{**RESULT, "ablations": ablations}]}))
    card = export(monkeypatch, folder, format)
    header = yaml.safe_load(card.split("---\n")[1])
    assert header == {
        "library_name": format,
        "pipeline_tag": "image-text-to-text",
        "tags": ["avlm", "audio-text-to-text", "video-text-to-text"],
        "base_model": ["openai/clip"],
        "datasets": ["owner/set"],
    }
    assert str(tmp_path) not in card and "key@" not in card
    modules = "vision, audio, vision_projector, audio_projector"
    assert f"| align | {modules} | 3 | 3,006 | 300 | 0.25 | 0.00125 to 0.000125 | " in card
    assert "| tune | decoder | 2 | 2,009 | 200 | 0.25 | " in card
    assert "| `…/secret/a.jsonl` (37.5 %), `owner/set` (12.5 %), `…/d/shards` (50 %) |" in card
    assert "Step 5 of 9, after 17,169 samples in packed rows of 64 tokens." in card
    assert "everything from `runs/gone`; decoder from `…/models/small`; vision from `openai/clip`" in card
    total = sum(parameter.numel() for parameter in build(with_vocabulary(model, tmp_path)).parameters())
    assert f"| together |  | {total:,} |" in card
    assert "| held out | loss | 2.625 |" in card
    assert "| test | 1,234 | exact_match | 81.2 % | 12.5 % | 25.0 % |" in card and "| wer | 4.2 % |" in card
    assert "license" not in card.lower()
    assert run_code(card, capsys).strip()
    if format == "transformers":
        lines = sum(len(path.read_text().splitlines()) for path in (tmp_path / "out").glob("*.py"))
        assert f"{lines} lines that subclass transformers' `LlavaForConditionalGeneration`" in card
        assert lines <= 300, "they are read by whoever trusts them"
        modules = re.findall(r"^(?:from|import) (\w+)", "".join(p.read_text() for p in tmp_path.glob("out/*.py")), re.M)
        assert {*modules} == {"contextlib", "math", "numpy", "torch", "transformers"}


def with_vocabulary(model, tmp_path):
    size = Tokenizer(tmp_path / "tokenizer").size
    return dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, vocab_size=size))


FORMATS = {"llava": (LLAVA, "image-text-to-text"), "voxtral": (VOXTRAL, "audio-text-to-text")}
FORMATS["decoder"] = (changed("decoder"), "text-generation")


@pytest.mark.parametrize("format", FORMATS)
def test_the_code_of_a_card_loads_the_class_of_its_format(format, run, monkeypatch, capsys):
    model, task = FORMATS[format]
    folder = run(model, **({"vision": "openai/clip"} if format == "decoder" else {}))
    (folder / "report.json").write_text(json.dumps({"step": 3, "results": [{**RESULT, "ablations": {}}]}))
    card = export(monkeypatch, folder, format)
    assert yaml.safe_load(card.split("---\n")[1])["pipeline_tag"] == task
    assert "base_model" not in card and ("Initial weights: random." in card) == (format != "decoder")
    assert "1,234" not in card, "the scores of another step are not this model's"
    assert "trust_remote_code" not in card and run_code(card, capsys).strip()
    assert ("The towers were left out" in card) == (format == "decoder")
    assert ("It takes no videos: its class has none." in card) == (format == "llava")


def test_the_formats_that_hear_videos_are_those_of_parts_of_larger_models():
    stage = StageConfig(
        name="a",
        steps=3,
        optimizer=OptimizerConfig(lr=1e-3),
        data=DataConfig(train="x", seq_length=64),
        train=["audio"],
    )
    run = Config(output_dir="run", model=WHOLE, stages=[stage])
    said = "Of videos only frames are read"
    hearing = [name for name in door.FORMATS if said not in _limits(name, run, ["audio", "video"])]
    assert hearing == list(door.WITHIN) == ["qwen2_5_omni", "qwen3_omni_moe"]


def test_the_help_names_the_formats_that_are_parts_of_larger_models(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["avlm.weights", "export", "--help"])
    with pytest.raises(SystemExit):
        main()
    [text] = re.findall(r"--whole WHOLE +(.*?)--overwrite", capsys.readouterr().out.split("options:")[1], re.DOTALL)
    assert "(qwen2_5_omni and qwen3_omni_moe)" in " ".join(text.split())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_code_of_a_card_runs_for_every_family(name, tmp_path, monkeypatch, capsys):
    config, options, _ = of_family(name)
    config = dataclasses.replace(config, audio=None, audio_projector=None)
    model, encoder, _ = served(config, tmp_path, format=name, seq_length=512, **options)
    stage = StageConfig(
        name="a", steps=3, optimizer=OptimizerConfig(lr=1e-3), data=encoder.data, train=["vision_projector"]
    )
    run = Config(output_dir="run", model=model.config, stages=[stage])
    write_card(run, Progress(step=3, stage_step=3), tmp_path, tmp_path / "out", name)
    monkeypatch.chdir(tmp_path)
    card = (tmp_path / "out" / CARD).read_text()
    assert run_code(card, capsys) and f"import {door.FORMATS[name].CLASS}," in card


def test_conformer_blocks_are_named():
    adapter = ResamplerConfig(type="conformer", num_layers=2, num_heads=4, intermediate_size=8)
    projector = dataclasses.replace(WHOLE.audio_projector, resampler=adapter)
    model = dataclasses.replace(
        WHOLE, audio=dataclasses.replace(WHOLE.audio, block="conformer"), audio_projector=projector
    )
    assert _sizes(model, "audio").startswith("Conformer blocks")
    assert _sizes(model, "audio_projector").startswith("2 Conformer blocks")

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import yaml

from avlm.config.run import DataConfig
from avlm.data import inspect_row, inspect_samples, shard
from avlm.data.inspect import main
from avlm.data.media_reader import MediaReader
from avlm.data.sample import Sample
from avlm.process.exit import run_command
from tests.data.small_files import ANY_GRID, data, image_file, model, photo, tone, video_file
from tests.training.test_train import ENVIRONMENT, ROOT


@pytest.fixture
def config(tmp_path, tokenizer_folder):
    (tmp_path / "a.png").write_bytes(image_file(photo(30, 20)))
    (tmp_path / "a.wav").write_bytes(tone(0.2))
    turns = [{"from": "human", "value": "see <image> hear <audio>"}, {"from": "gpt", "value": "one"}]
    records = [{"conversations": turns, "image": "a.png", "audio": "a.wav"}] * 3 + [{"conversations": []}]
    (tmp_path / "set.json").write_text(json.dumps(records))
    settings = dataclasses.asdict(data(tokenizer_folder, train=str(tmp_path / "set.json")))
    stages = [{"name": name, "steps": 1, "train": ["decoder"]} for name in ("first", "second")]
    tree = {"output_dir": "x", "model": dataclasses.asdict(model()), "data": settings, "optimizer": {"lr": 1.0}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree | {"stages": stages}))
    return tmp_path / "config.yaml"


def test_samples_are_shown_as_the_model_sees_them(config, capsys):
    main([str(config), "--count", "2", "--stage", "second"])
    shown = capsys.readouterr().out
    text = "<|im_start|>user\nsee <image x16> hear <audio x10><|im_end|>\n<|im_start|>assistant\n[one<|im_end|>]\n"
    grid = "image1.png: 30 x 20 pixels, 4 x 4 patches, 16 features\n"
    assert shown.count(text + grid) == 2 and shown.count(": 49 tokens, 2 learned\n") == 2
    assert re.match(r"set\.json:[123]: 49 tokens, 2 learned\n", shown), "records are counted from 1"


@pytest.mark.parametrize("workers", [0, 3])
def test_statistics_are_those_of_the_set(config, capsys, workers):
    main([str(config), f"data.num_workers={workers}", "--count", "0"])
    shown = capsys.readouterr().out
    for line in (
        r".*set\.json: 4 samples",
        r"skipped 1 sample: conversation has no assistant turn: there is nothing to learn \(set\.json:4\)",
        "1 row of 256 tokens, 57.4 % full",
        r"image features 32.7 % of the tokens \(3 images\)",
        r"audio features 20.4 % of the tokens \(3 windows\)",
        "learned 4.1 % of the tokens: mixed 6",
        r" +32 to 63 +3 #{40}",
        rf"[\d,]+ samples a second from {'3 workers, [0-9]+ each' if workers else '1 worker'}",
    ):
        assert re.search(f"^{line}$", shown, re.M), line


def test_statistics_count_each_sample_of_shards_once(config, capsys):
    folder = config.parent
    records = json.loads((folder / "set.json").read_text())[:3] * 4
    records.append({"conversations": [{"from": "human", "value": "hello?"}]})
    (folder / "own.json").write_text(json.dumps(records))
    shard.main([str(folder / "own.json"), str(folder / "big")])
    main([str(config), f"data.train={folder / 'big'}", "data.shuffle_buffer=1000", "--count", "0"])
    shown = capsys.readouterr().out
    assert "big: 13 samples\nskipped 1 sample: conversation has no assistant turn" in shown and "(12 images)" in shown


def test_of_a_large_set_the_first_samples_are_counted(config, capsys, monkeypatch):
    monkeypatch.setattr(inspect_samples, "MAX_SAMPLES", 2)
    folder = config.parent
    (folder / "b.json").write_text((folder / "set.json").read_text())
    blend = f"data.train={{{folder / 'set.json'}: 3, {folder / 'b.json'}: 1}}"
    main([str(config), blend, "--count", "0"])
    shown = capsys.readouterr().out
    for line in (
        r".*set\.json: 4 samples, 75 % of the samples drawn",
        r".*b\.json: 4 samples, 25 % of the samples drawn",
        "of the first 2:",
    ):
        assert re.search(f"^{line}$", shown, re.M), line
    assert "an epoch" not in shown, "each set of a blend has its own"
    main([str(config), "--count", "0"])
    assert "of the first 2:\n1 row of 256 tokens, 38.3 % full\nan epoch has about 2 rows\n" in capsys.readouterr().out


def test_the_help_says_what_happens(config, capsys, tmp_path):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "usage: python -m avlm.data.inspect [-h]",
        f"of its first {inspect_samples.MAX_SAMPLES:,} samples",
        f"up to {inspect_row.MAX_PANELS} images as the tower gets them, and up to {inspect_row.MAX_PANELS} windows",
        f"over {inspect_samples.SPEED_ROWS} rows",
        "section.key=value ...",
        "DIR/KEY_image1.png for the first image",
        "(default: 4)",
    ):
        assert words in said
    main([str(config), "--count", "1", "--out", str(tmp_path / "seen")])
    shown = capsys.readouterr().out
    assert f"wrote 2 media files to {tmp_path / 'seen'}\n" in shown
    names = sorted(path.name for path in (tmp_path / "seen").iterdir())
    key = re.match(r"set\.json:(\d)", shown)[1]
    assert names == ["row_001.png", f"set.json_{key}_audio1.wav", f"set.json_{key}_image1.png"]
    assert (tmp_path / "seen" / names[2]).read_bytes() == (tmp_path / "a.png").read_bytes()
    assert (tmp_path / "seen" / names[0]).read_bytes().startswith(b"\x89PNG")
    assert shown.index("[one<|im_end|>]") < shown.index("1 row of") < shown.index("samples a second")


def test_what_is_learned_is_green_on_a_terminal(config, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    main([str(config), "--count", "1"])
    shown = capsys.readouterr().out
    assert "\033[32m[one<|im_end|>]\033[0m" in shown and "\033[36m<image x16>\033[0m" in shown


def test_a_page_shows_the_samples_and_needs_no_other_file(config, capsys, tmp_path):
    main([str(config), "--count", "2", "--html", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert page.count("<section>") == 2 and "4 samples</h1>" in page
    assert page.count('<span class="learned">one&lt;|im_end|&gt;</span>') == 2
    assert page.count('<span class="media">&lt;image x16&gt;</span>') == 2
    assert page.count("<figcaption>image1.png: 30 x 20 pixels, 4 x 4 patches, 16 features</figcaption>") == 2
    assert page.count('<img src="data:image/png;base64,') == 2 and page.count('alt="image1.png">') == 2
    assert page.count('<audio controls src="data:audio/webm;base64,') == 2 and not re.search(
        r"https?://|<script|src=\"[^d]", page
    )


def test_grids_of_images_and_videos_are_shown():
    media = Sample("k", [], images=[image_file(photo(200, 90))], videos=[video_file(2.0)])
    reader = MediaReader(dataclasses.replace(model(downsample=2), vision=ANY_GRID), DataConfig(train="x"))
    assert inspect_samples.grids_of(media, reader) == {
        "image1.png": "200 x 90 pixels, 14 x 6 patches, 21 features",
        "video1.mkv": "64 x 48 pixels, 8 frames at 0.1 to 1.9 s, 4 x 4 x 4 patches, 16 features",
    }


def test_mistakes_are_one_line_and_exit_with_2(config, capsys):
    mistakes = (["--count=-1"], ["--stage", "third"], ["data.train=nowhere.json"], ["data.seq_lenght=3"])
    (config.parent / "bad.json").write_text(json.dumps([{"conversations": []}] * 2))
    unusable = [f"data.train={config.parent / 'bad.json'}"]
    for arguments in (*mistakes, ["data.train=synthetic"], unusable):
        with pytest.raises(SystemExit, match="2"):
            run_command(lambda given=arguments: main([str(config), *given]))
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
    assert "none of 2 samples of" in error and "bad.json:1: conversation has no assistant turn" in error


def test_a_reader_who_has_seen_enough_ends_it_quietly(config):
    command = f"{sys.executable} -m avlm.data.inspect {config} | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (141, "")

import dataclasses
import json

import pytest
import yaml

from avlm.data import inspect
from avlm.data.inspect import main
from tests.data.small_files import data, image_file, model, photo, tone


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
    assert shown.count(text) == 2
    assert "tokens, 2 learned" in shown


def test_statistics_tell_how_full_the_rows_are_and_what_was_skipped(config, capsys):
    main([str(config), "--count", "0"])
    shown = capsys.readouterr().out
    assert "16 rows of 256 tokens: fill" in shown and "samples per row" in shown
    assert "set.json:4: conversation has no assistant turn" in shown
    assert "mixed" in shown


def test_lengths_and_speed_are_shown(config, capsys):
    main([str(config), "--count", "0"])
    shown = capsys.readouterr().out
    [line] = [line for line in shown.splitlines() if "32 to 63" in line]
    samples = int(line.split()[3])
    assert samples > 16 and line.endswith("#" * 40), "every sample has 44 tokens"
    assert "samples per second from 1 workers" in shown


def test_the_help_says_what_happens(config, capsys, tmp_path):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "usage: python -m avlm.data.inspect [-h]",
        f"of the first {inspect.STATISTICS_ROWS} rows",
        f"up to {inspect.MAX_PANELS} images as the tower gets them, and up to {inspect.MAX_PANELS} windows",
        "section.key=value ...",
        "DIR/row_000.png for the first",
        "(default: 4)",
    ):
        assert words in said
    main([str(config), "data.seq_length=64", "--out", str(tmp_path / "sheets")])  # rows of one sample each
    shown = capsys.readouterr().out
    assert shown.count(" learned\n") == 4 and "16 rows of 64 tokens" in shown
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == [f"row_00{i}.png" for i in range(4)]
    assert shown.index(" learned\n") < shown.index("[one<|im_end|>]") < shown.index("16 rows")


def test_what_is_learned_is_green_on_a_terminal(config, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    main([str(config), "--count", "1"])
    shown = capsys.readouterr().out
    assert "\033[32m[one<|im_end|>]\033[0m" in shown and "\033[36m<image x16>\033[0m" in shown


def test_sheets_are_written(config, tmp_path, capsys):
    main([str(config), "--count", "1", "--out", str(tmp_path / "sheets")])
    assert (tmp_path / "sheets/row_000.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_are_one_line_and_exit_with_2(config, capsys):
    for arguments in (["--count=-1"], ["--stage", "third"], ["data.train=nowhere.json"], ["data.seq_lenght=3"]):
        with pytest.raises(SystemExit, match="2"):
            main([str(config), *arguments])
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1

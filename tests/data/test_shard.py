"""Energon folders made of JSON files."""

import json
import re
import tarfile

import pytest

from avlm.data.energon import shards
from avlm.data.energon.source import count_samples
from avlm.data.loader import open_loader, open_samples
from avlm.data.shard import main
from avlm.data.stream import Stream
from avlm.process.exit import run_command
from tests.data.small_files import data, image_file, model, photo, tone


@pytest.fixture
def own(tmp_path):
    """Records of several forms, the last without its file."""
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.b.png").write_bytes(image_file(photo(30, 20)))
    (tmp_path / "a.wav").write_bytes(tone(0.2))
    turns = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "one", "train": False}]
    turns += [{"from": "human", "value": "and?"}, {"from": "gpt", "value": "two"}]
    heard = [{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": "what?"}]
    records = [
        {"system": "be short", "conversations": turns, "image": "media/a.b.png", "id": 7},
        {"messages": [{"role": "user", "content": heard}, {"role": "assistant", "content": "two"}], "answers": ["two"]},
        {"image": "media/a.b.png", "text": "three"},
        {"image": "gone.png", "text": "four"},
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_every_form_of_record_becomes_a_prepared_folder_with_its_media(own, tokenizer_folder, capfd, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    file, big = str(own / "own.jsonl"), own / "big"
    main([file, str(big)])
    said = capfd.readouterr()
    assert said.out == f"3 samples in 3 shards of {big}\n"
    assert re.fullmatch(r"left out 1 sample: no media file .*gone\.png \(own\.jsonl:4\)\n", said.err)
    main([file, str(big), "--split", "val"])
    capfd.readouterr()
    settings = data(tokenizer_folder)
    assert count_samples(big, "train") == 3
    lines = (own / "own.jsonl").read_text().splitlines(keepends=True)
    (own / "good.jsonl").write_text("".join(lines[:3]))
    for mine, theirs in zip(open_samples(str(own / "good.jsonl"), settings), open_samples(str(big), settings)):
        assert theirs.key.startswith("val_")
        for name in ("messages", "images", "audios", "videos", "answers"):
            assert getattr(mine, name) == getattr(theirs, name)
    stream = Stream(str(big), settings, model(), rank=0, world=1, seed=1, train=True)
    row = next(iter(open_loader(stream)))
    assert set(row.keys) == {f"train_{i:08d}" for i in range(3)} and not row.skipped
    with tarfile.open(big / "train_000000.tar") as first:
        assert first.getnames() == ["train_00000000.json", "train_00000000.image0.png"]
    assert "Except" not in capfd.readouterr().out


def test_shards_that_only_lack_the_index_are_prepared(own, capfd, tokenizer_folder):
    main([str(own / "own.jsonl"), str(own / "big")])
    for name in ("train_000000.tar", "other.tar"):
        (own / "raw").mkdir(exist_ok=True)
        (own / "raw" / name).write_bytes((own / "big/train_000000.tar").read_bytes())
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: main(["--prepare", str(own / "raw"), "--split", "val"]))
    assert re.search(r"^error: .*raw cannot be prepared: .*duplicate keys", capfd.readouterr().err.splitlines()[-1])
    (own / "raw/train_000000.tar").unlink()
    main(["--prepare", str(own / "raw"), "--split", "val"])
    assert len(list(open_samples(str(own / "raw"), data(tokenizer_folder)))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.txt", "big"], "error: a.txt is no .json or .jsonl file\n"),
        (["gone.jsonl", "big"], "error: no data file gone.jsonl\n"),
        (["--prepare", "."], "error: . holds no shards (.tar)\n"),
        (["bad.jsonl", "big"], "error: no sample can be read: big gets no shard\n"),
        (["own.jsonl", "held"], "error: held has shards of the split train already"),
        (["own.jsonl"], "give FILE and DIR, or --prepare DIR\n"),
    ],
)
def test_mistakes_are_told_in_one_line(own, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(own)
    (own / "bad.jsonl").write_text('{"image": "gone.png", "text": "x"}\n')
    (own / "held").mkdir()
    (own / "held" / "train_0.tar").touch()
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: main(arguments))
    assert message in capsys.readouterr().err

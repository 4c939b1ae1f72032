"""report.html: what it shows, in which order, that text stays text, and that it needs nothing but itself."""

import base64
import html
import io
import json
import re

import av
import pytest
from PIL import Image

from avlm.config.load import dump_config
from avlm.config.run import DataConfig
from avlm.data.loader import open_samples
from avlm.evaluation import report_page
from avlm.evaluation.report_page import write_page
from tests.data.small_files import image_file, photo, tone, video_file
from tests.parallel.small import make_config

HOSTILE = "<script>alert(1)</script> & <image> of it"


def line(key, question, prediction, value, **more):
    answer = {"key": key, "question": question, "references": ["a truth"], "prediction": prediction}
    return {**answer, "exact_match": value, **more}


def result(name, folder, lines):
    right = sum(each["exact_match"] or 0 for each in lines) / len(lines)
    return {
        **{"name": name, "task": name, "set": "test", "source": str(folder / f"{name}.jsonl"), "count": len(lines)},
        **{"predictions": f"predictions/{name}.jsonl", "metric": "exact_match", "value": right},
        **{"metrics": {"exact_match": right}, "chance": 0.25, "kinds": [], "examples": []},
        **{"ablations": {"no_image": 1.0}, "ablation_chances": {"no_image": 0.25}},
        "ablation_counts": {"no_image": len(lines)},
    }


@pytest.fixture
def run(tmp_path):
    """A run with two sets that were answered: seen (images and a video) and heard."""
    (tmp_path / "config.yaml").write_text(dump_config(make_config()))
    (tmp_path / "large.png").write_bytes(image_file(photo(900, 300)))
    (tmp_path / "small.png").write_bytes(image_file(photo(20, 30)))
    (tmp_path / "a.mkv").write_bytes(video_file(1.0, sound=True))
    (tmp_path / "b.wav").write_bytes(tone(0.5))
    media = {"large.png": "images", "small.png": "images", "a.mkv": "videos", "b.wav": "audios"}
    records = {}
    for name, kind in media.items():
        turns = [("user", f"<{kind[:-1]}>\nWhat is it?"), ("assistant", "a truth")]
        record = {"id": name, "messages": [{"role": role, "content": text} for role, text in turns], kind: [name]}
        records.setdefault("heard" if kind == "audios" else "seen", []).append(json.dumps(record) + "\n")
    for name, lines in records.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    keys = {}
    for name in records:
        keys[name] = [sample.key for sample in open_samples(str(tmp_path / f"{name}.jsonl"), DataConfig(train=""))]
    answers = {
        "seen": [
            line(keys["seen"][0], "<image>\nWhat is it?", "a truth", 1.0),
            line(keys["seen"][1], "<image>\nWhat is it?", HOSTILE, 0.0),
            line(keys["seen"][2], "<video>\nWhat is it?", "a video", 0.0),
        ],
        "heard": [line(keys["heard"][0], "<audio>\nWhat is it?", "a truth", 1.0)],
    }
    (tmp_path / "predictions").mkdir()
    for name, lines in answers.items():
        text = "".join(json.dumps(each) + "\n" for each in lines)
        (tmp_path / "predictions" / f"{name}.jsonl").write_text(text)
    results = [result(name, tmp_path, lines) for name, lines in answers.items()]
    (tmp_path / "report.json").write_text(json.dumps({"step": 7, "results": results}))
    return tmp_path


def cards(text):
    return re.findall(r'<article class="(\w+)" data-set="([^"]+)">(.*?)</article>', text, re.DOTALL)


def media_of(card):
    return [
        (kind, base64.b64decode(content)) for kind, content in re.findall(r'src="data:([^;]+);base64,([^"]+)"', card)
    ]


def test_the_page_shows_media_and_answers_with_the_wrong_ones_first(run):
    text = write_page(run).read_text()
    shown = cards(text)
    assert [(kind, name) for kind, name, _ in shown] == [
        ("wrong", "seen/test"),
        ("wrong", "seen/test"),
        ("right", "seen/test"),
        ("right", "heard/test"),
    ]
    small, video, large, sound = (media_of(card) for _, _, card in shown)
    assert [kind for [(kind, _)] in (small, video, large, sound)] == [
        "image/png",
        "video/webm",
        "image/jpeg",
        "audio/webm",
    ]
    assert Image.open(io.BytesIO(small[0][1])).size == (20, 30)
    assert Image.open(io.BytesIO(large[0][1])).size == (320, 107)
    with av.open(io.BytesIO(video[0][1])) as opened:
        assert {stream.type for stream in opened.streams} == {"video", "audio"}
        assert len(list(opened.decode(video=0))) > 1
    with av.open(io.BytesIO(sound[0][1])) as opened:
        assert sum(frame.samples for frame in opened.decode(audio=0)) / 48_000 == pytest.approx(0.5, abs=0.05)
    assert "chance 25.0 %" in text and '<span class="flag">above</span>' in text
    assert "step 7, 4 held-out samples" in text


def test_the_text_of_a_sample_stays_text_and_the_page_needs_nothing_else(run):
    text = write_page(run).read_text()
    assert html.escape(HOSTILE) in text and "<script>alert" not in text
    assert text.count("<script>") == 1 and "default-src 'none'" in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)


def test_the_page_is_bounded_and_says_what_it_leaves_out(run, monkeypatch):
    monkeypatch.setattr(report_page, "ANSWERS", 2)
    monkeypatch.setattr(report_page, "MEDIA_BYTES", 2000)
    text = write_page(run).read_text()
    assert [kind for kind, name, _ in cards(text) if name == "seen/test"] == ["wrong", "right"]
    assert "media left out: the page would become too large" in text
    (run / "heard.jsonl").unlink()
    assert "heard.jsonl cannot be read: " in write_page(run).read_text()


def test_a_folder_without_a_report_is_told_the_command_that_makes_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no report.json: python -m avlm.evaluation .* --data"):
        write_page(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({"step": 1, "results": [{"task": "a", "set": "test"}]}))
    with pytest.raises(ValueError, match="is of an earlier version: evaluate the run again"):
        write_page(tmp_path)

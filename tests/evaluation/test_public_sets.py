"""Public sets in miniature, in the files in which they are published."""

import io
import json
import subprocess
import sys

import av
import pytest

from avlm.config.run import DataConfig
from avlm.data.media import audio
from avlm.evaluation.sets import read_set
from tests.data.small_files import image_file, photo, tone, video_file
from tests.training.test_train import ENVIRONMENT, ROOT


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """name -> folder."""
    folder = tmp_path_factory.mktemp("published")
    write_vqav2(folder / "vqav2")
    write_librispeech(folder / "LibriSpeech")
    write_valor32k(folder / "valor")
    return {"vqav2": folder / "vqav2", "librispeech": folder / "LibriSpeech", "valor32k": folder / "valor"}


def write_vqav2(folder):
    said = {262148000: ["down"] * 6 + ["at table"] * 4, 262148001: ["2"] * 10}
    for split, kept in (("val2014", [262148000, 262148001]), ("train2014", [262148000])):
        (folder / split).mkdir(parents=True)
        (folder / split / f"COCO_{split}_000000262148.jpg").write_bytes(image_file(photo(40, 30), "JPEG"))
        questions = [
            {"image_id": 262148, "question": f"Where is number {key}?", "question_id": key} for key in reversed(kept)
        ]
        head = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}, "data_subtype": split}
        name = f"v2_OpenEnded_mscoco_{split}_questions.json"
        (folder / name).write_text(json.dumps(head | {"questions": questions}))
        annotations = [
            {
                "question_type": "where",
                "multiple_choice_answer": said[key][0],
                "answers": [
                    {"answer": text, "answer_confidence": "yes", "answer_id": i + 1} for i, text in enumerate(said[key])
                ],
                "image_id": 262148,
                "answer_type": "other",
                "question_id": key,
            }
            for key in kept
        ]
        del head["task_type"]
        (folder / f"v2_mscoco_{split}_annotations.json").write_text(json.dumps(head | {"annotations": annotations}))


def write_librispeech(folder):
    for split, speaker, texts in (
        ("test-clean", 1089, ["HE HOPED THERE WOULD BE STEW", "STUFF IT"]),
        ("test-other", 367, ["OH"]),
    ):
        chapter = folder / split / str(speaker) / "134686"
        chapter.mkdir(parents=True)
        lines = []
        for i, text in enumerate(texts):
            key = f"{speaker}-134686-{i:04}"
            (chapter / f"{key}.flac").write_bytes(flac(0.3 + i))
            lines.append(f"{key} {text}\n")
        (chapter / f"{speaker}-134686.trans.txt").write_text("".join(lines))
    (folder / "SPEAKERS.TXT").write_text("; ID |SEX\n")


def flac(seconds: float) -> bytes:
    """The tone, as FLAC."""
    out = io.BytesIO()
    with av.open(io.BytesIO(tone(seconds))) as source, av.open(out, "w", "flac") as target:
        stream = target.add_stream("flac", rate=16_000, layout="mono", format="s16")
        for frame in source.decode(audio=0):
            frame.pts = None
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    return out.getvalue()


def write_valor32k(folder):
    described = [
        {"video_id": "x-2Abohj8VY_30.000_40.000", "desc": "A man in black speaks while water runs."},
        {"video_id": "gone_0.000_10.000", "desc": "A dog barks."},
        {"video_id": "yz_1.000_11.000", "desc": "A girl sings and plays the guitar on the stage."},
    ]
    (folder / "videos").mkdir(parents=True)
    (folder / "desc_test.json").write_text(json.dumps(described))
    (folder / "desc_val.json").write_text(json.dumps(described[1:2]))
    for entry in (described[0], described[2]):
        (folder / "videos" / f"{entry['video_id']}.mkv").write_bytes(video_file(1.0, sound=True))


def samples(name, folder):
    return read_set(str(folder), DataConfig(train=""), [], None, name)


def test_a_question_of_vqav2_comes_with_its_image_and_ten_answers(published):
    two, down = samples("vqav2/val2014", published["vqav2"])
    question = "<image>\nWhere is number 262148000?\nAnswer the question using a single word or phrase."
    assert down.messages[0]["content"] == question and down.messages[1]["content"] == "down"
    assert down.answers == ["down"] * 6 + ["at table"] * 4 and two.key == "262148001"
    assert list(down.images) == [image_file(photo(40, 30), "JPEG")]


def test_an_utterance_of_librispeech_is_the_audio_of_its_line(published):
    found = samples("librispeech/test-clean", published["librispeech"])
    assert [(sample.key, sample.messages[1]["content"]) for sample in found] == [
        ("1089-134686-0000", "HE HOPED THERE WOULD BE STEW"),
        ("1089-134686-0001", "STUFF IT"),
    ]
    assert len(audio.decode(found[1].audios[0], 600.0, "clip")) == pytest.approx(1.3 * 16_000)
    assert samples("librispeech", published["librispeech"] / "test-other")[0].key == "367-134686-0000"


def test_a_lost_video_of_valor_is_left_out_aloud(published, capsys):
    found = samples("valor32k/test", published["valor32k"])
    assert [sample.key for sample in found] == ["x-2Abohj8VY_30.000_40.000", "yz_1.000_11.000"]
    assert found[0].messages[1]["content"] == "A man in black speaks while water runs."
    assert "1 of 3 videos, such as gone_0.000_10.000, are not in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vqav2", "give vqav2/train2014=.* or vqav2/val2014="),
        ("librispeech/dev-clean", "--data librispeech/dev-clean=.*: give librispeech/test-clean=.* or "),
        ("valor32k", "give valor32k/test=.* or valor32k/val="),
    ],
)
def test_a_split_has_to_be_named_where_there_are_several(published, name, message):
    with pytest.raises(ValueError, match=message):
        samples(name, published[name.partition("/")[0]])


def test_what_a_published_folder_lacks_is_named(tmp_path):
    for name, message in (
        ("vqav2", "it holds no "),
        ("librispeech", "it holds no SPEAKER/CHAPTER/"),
        ("valor32k", "it"),
    ):
        with pytest.raises(ValueError, match=message):
            samples(name, tmp_path)
    write_vqav2(tmp_path)
    write_librispeech(tmp_path)
    (tmp_path / "val2014" / "COCO_val2014_000000262148.jpg").unlink()
    with pytest.raises(ValueError, match=r"has no COCO_val2014_000000262148.jpg, which question 262148001 is about"):
        samples("vqav2/val2014", tmp_path)
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(ValueError, match=r"has no v2_mscoco_val2014_annotations\.json"):
        samples("vqav2/val2014", tmp_path)
    (tmp_path / "test-clean" / "1089" / "134686" / "1089-134686-0001.flac").unlink()
    with pytest.raises(ValueError, match=r"1089-134686.trans.txt has a line for 1089-134686-0001.flac, which is not"):
        samples("librispeech/test-clean", tmp_path)


def test_public_sets_are_scored_by_their_own_metrics(exported, published, tmp_path):
    names = ("vqav2/val2014", "librispeech/test-clean", "valor32k/test")
    sets = [f"{name}={published[name.partition('/')[0]]}" for name in names]
    command = [sys.executable, "-m", "avlm.evaluation", str(exported), "--out", str(tmp_path), "--max-new-tokens", "4"]
    for each in sets:
        command += ["--data", each]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    entries = json.loads((tmp_path / "report.json").read_text())["results"]
    assert [list(entry["metrics"]) for entry in entries] == [["vqa_accuracy"], ["wer"], ["cider"]]
    assert [(entry["count"], list(entry["ablations"])) for entry in entries] == [
        (2, ["no_image"]),
        (2, ["no_audio"]),
        (2, ["no_image", "shuffled"]),
    ]
    page = (tmp_path / "report.md").read_text()
    assert "| task | set | samples | cider |" in page and "| librispeech | test-clean | 2 |" in page
    lines = (tmp_path / entries[0]["predictions"]).read_text().splitlines()
    assert (
        len(json.loads(lines[0])["references"]) == 10 and entries[0]["predictions"] == "predictions/vqav2/val2014.jsonl"
    )

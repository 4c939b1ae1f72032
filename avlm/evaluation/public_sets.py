"""Public sets in the files in which they are published, with their questions and metrics.

    vqav2        visualqa.org: v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json, COCO's
                 val2014/COCO_val2014_000000000042.jpg (Goyal et al. 2017)
    librispeech  openslr.org/12: test-clean/1089/134686/1089-134686.trans.txt and the .flac files next to it
                 (Panayotov et al. 2015)
    valor32k     casia-iva-group.github.io/projects/VALOR: desc_test.json, and a video VIDEO_ID.mp4 of each of its
                 entries that is still to be had (Chen et al. 2023)

A folder may hold the files in folders of its own. If it holds several splits, a name like vqav2/val2014, librispeech/
test-clean or valor32k/test says which.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avlm.data.sample import Sample
from avlm.process.launch import ranks

VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov")


class Files(Sequence):
    """The bytes of files, read when they are asked for: a whole set does not fit into memory."""

    def __init__(self, *paths: Path) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> bytes:
        return self.paths[i].read_bytes()


@dataclass(frozen=True)
class PublicSet:
    """``read`` makes the samples of a folder and a split, "" for the only one; ``metrics`` are those of its papers."""

    read: Callable[[Path, str], Iterator[Sample]]
    metrics: list[str]


def public_set(name: str, source: str) -> PublicSet | None:
    """The set that ``--data NAME=FOLDER`` names, if its folder was not prepared for Energon."""
    folder = Path(source)
    return PUBLIC_SETS.get(name.partition("/")[0]) if folder.is_dir() and not (folder / ".nv-meta").is_dir() else None


def read_vqav2(folder: Path, split: str) -> Iterator[Sample]:
    found = {path.name.split("_")[-2]: path for path in folder.rglob("v2_OpenEnded_*_questions.json")}
    asked = _chosen(found, split, folder, "vqav2", "v2_OpenEnded_*_questions.json")
    name = asked.name.replace("OpenEnded_", "").replace("questions", "annotations")
    answered = next(folder.rglob(name), None)
    if answered is None:
        raise ValueError(f"{folder} has no {name}: without it there are no answers to compare with")
    answers = {entry["question_id"]: entry for entry in _entries(answered, "annotations")}
    images = {path.name: path for path in folder.rglob("COCO_*.jpg")}
    subtype = asked.name.split("_")[-2]
    for entry in _entries(asked, "questions"):
        key = entry["question_id"]
        image = f"COCO_{subtype}_{entry['image_id']:012d}.jpg"
        if image not in images:
            raise ValueError(f"{folder} has no {image}, which question {key} is about")
        if key not in answers:
            raise ValueError(f"{answered} has no answers to question {key}")
        question = f"<image>\n{entry['question']}\nAnswer the question using a single word or phrase."
        texts = [each["answer"] for each in answers[key]["answers"]]
        turns = _turns(question, answers[key]["multiple_choice_answer"])
        yield Sample(str(key), turns, images=Files(images[image]), answers=texts)


def read_librispeech(folder: Path, split: str) -> Iterator[Sample]:
    of_split: dict[str, list[Path]] = {}
    for path in sorted(folder.resolve().rglob("*.trans.txt")):
        of_split.setdefault(path.parents[2].name, []).append(path)
    for path in _chosen(of_split, split, folder, "librispeech", "SPEAKER/CHAPTER/*.trans.txt"):
        for line in path.read_text().splitlines():
            key, _, text = line.partition(" ")
            audio = path.with_name(f"{key}.flac")
            if not audio.is_file():
                raise ValueError(f"{path} has a line for {audio.name}, which is not there")
            yield Sample(key, _turns("<audio>\nTranscribe the speech.", text), audios=Files(audio))


def read_valor32k(folder: Path, split: str) -> Iterator[Sample]:
    found = {path.stem.removeprefix("desc_"): path for path in folder.rglob("desc_*.json")}
    described = _chosen(found, split, folder, "valor32k", "desc_*.json")
    videos = {path.stem: path for path in folder.rglob("*") if path.suffix in VIDEOS}
    entries = _entries(described, None)
    lost = [entry["video_id"] for entry in entries if entry["video_id"] not in videos]
    if lost and ranks()[0] == 0:
        print(
            f"valor32k: {len(lost)} of {len(entries)} videos, such as {lost[0]}, are not in {folder} and left out",
            file=sys.stderr,
        )
    for entry in entries:
        if entry["video_id"] in videos:
            question = "<video>\nDescribe in one sentence what is seen and heard."
            yield Sample(entry["video_id"], _turns(question, entry["desc"]), videos=Files(videos[entry["video_id"]]))


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _chosen(of_split: dict[str, Any], split: str, folder: Path, name: str, pattern: str) -> Any:
    """What belongs to a split. ValueError if that is nothing, or if there are several and none was named."""
    if not of_split:
        raise ValueError(f"--data {name}={folder}: it holds no {pattern}")
    if split in of_split or (not split and len(of_split) == 1):
        return of_split[split or next(iter(of_split))]
    choice = " or ".join(f"{name}/{each}={folder}" for each in sorted(of_split))
    raise ValueError(f"--data {name}{f'/{split}' if split else ''}={folder}: give {choice}")


def _entries(path: Path, key: str | None) -> list[dict[str, Any]]:
    """The list that a published file holds, under ``key`` if there is one."""
    try:
        found = json.loads(path.read_bytes())
        return found if key is None else found[key]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the published file: {error}") from None


PUBLIC_SETS = {
    "vqav2": PublicSet(read_vqav2, ["vqa_accuracy"]),
    "librispeech": PublicSet(read_librispeech, ["wer"]),
    "valor32k": PublicSet(read_valor32k, ["cider"]),
}

"""Records without turns: a question and its answer, or media and the text that they show or say.

query, response          and "history": [[question, answer], ...] before them (ms-swift)
instruction, output      and "input", which follows the instruction (Alpaca, LLaMA-Factory)
question, answer; prompt, completion
image, audio or video, and text or caption: the media are the question. The file may be under "file_name", as in the
                         metadata.jsonl of Hugging Face's folders, or "audio_filepath", as in NeMo's manifests

Media that no tag stands for come first.
"""

import mimetypes
from typing import Any

from avlm.config.values import shown
from avlm.data.record_keys import Record, says_nothing
from avlm.data.text.pieces import MEDIA, Messages
from avlm.data.turns import Tags

ANSWERS = {"query": "response", "instruction": "output", "question": "answer", "prompt": "completion"}
CAPTIONS = ("text", "caption")
MORE_KEYS = ("history", "input")


def with_kind_of_file(record: Record) -> Record:
    """The record with its file under the name of its kind, if it is named otherwise."""
    for key in ("file_name", "audio_filepath"):
        name = record.get(key)
        if isinstance(name, str) and name:
            kind = "audio" if key == "audio_filepath" else (mimetypes.guess_type(name)[0] or "").partition("/")[0]
            if kind in MEDIA and says_nothing(record.get(kind)):
                return {**{other: value for other, value in record.items() if other != key}, kind: name}
    return record


def form_of_pair(record: Record) -> str | None:
    """The key of the question, or of the caption; None if the record is no pair."""
    for question, answer in ANSWERS.items():
        if question in record and answer in record:
            return question
    has_media = any(not says_nothing(record.get(key)) for kind in MEDIA for key in (kind, f"{kind}s"))
    captions = [key for key in CAPTIONS if not says_nothing(record.get(key))]
    return captions[0] if has_media and captions else None


def keys_of(form: str) -> set[str]:
    """The keys that a record of this form may have."""
    return {form, *CAPTIONS} if form in CAPTIONS else {form, ANSWERS[form], *MORE_KEYS}


def read_pair(record: Record, form: str, tags: Tags) -> Messages:
    """The turns of a record whose ``form`` is that of ``form_of_pair``."""
    if form in CAPTIONS:
        captions = {record[key] for key in CAPTIONS if isinstance(record.get(key), str) and record[key]}
        if len(captions) > 1:
            raise ValueError("text and caption of the record differ: give one")
        return _turns([("", _text(record, form))], tags)
    question = _text(record, form)
    if not says_nothing(record.get("input")):
        question += "\n" + _text(record, "input")
    pairs = record.get("history") or []
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise ValueError(f"history must be a list of [question, answer], not {shown(pairs)}")
    return _turns([*pairs, (question, _text(record, ANSWERS[form]))], tags)


def add_missing_tags(messages: Messages, num_files: dict[str, int], tags: Tags) -> None:
    """Put a tag for every file of a kind that has none before the first question."""
    missing = ""
    for kind, count in num_files.items():
        if not tags.count[kind]:
            missing += "".join(tags.add(kind) for _ in range(count))
    if missing:
        question = messages[0]["content"]
        messages[0]["content"] = f"{missing}\n{question}" if question else missing


def _turns(pairs: list, tags: Tags) -> Messages:
    messages = []
    for question, answer in pairs:
        for role, text in (("user", question), ("assistant", answer)):
            tags.add_from(text)
            messages.append({"role": role, "content": text})
    return messages


def _text(record: Record, key: str) -> str:
    if not isinstance(record[key], str):
        raise ValueError(f"{key} must be a text, not {shown(record[key])}: give turns under messages")
    return record[key]


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)

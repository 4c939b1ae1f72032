"""Turns of a record, in the ways in which other trainers write them, as messages with a tag for each medium."""

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from avlm.config.values import shown
from avlm.data.record_keys import HARMLESS_OF_TURN, Record, check_keys, check_whole_file, says_nothing
from avlm.data.text.pieces import MEDIA, TAG, Messages

ROLE_NAMES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
}
LEARNED_IF_TRUE = ("weight", "loss", "loss_scale", "train", "training", "trainable", "learn")
LEARNED_IF_FALSE = ("mask", "masked")
FACTORS = ("weight", "loss_scale")  # flags that turns of any role may have
KEYS = {"role", "content", "from", "value", "type", *LEARNED_IF_TRUE, *LEARNED_IF_FALSE}
PART_KINDS = {  # type of a part -> its kind
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
    **dict.fromkeys(("video", "video_url", "input_video"), "video"),
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
}
SOURCES = ("url", "path", "data")  # keys that name a part's file, or hold it
DATA_FORMATS = {"format", "detail", "mime_type", "media_type"}  # keys that say how a part's data are written


@dataclass
class Tags:
    """Media tags of the turns read so far, by kind.

    count    number of tags
    sources  (number of its tag, source) of media that parts of turns bring; every other tag takes the next of the
             record's own files
    """

    count: Counter[str] = field(default_factory=Counter)
    sources: defaultdict[str, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, source: str | None = None) -> str:
        """The tag of one more medium."""
        if source is not None:
            self.sources[kind].append((self.count[kind], source))
        self.count[kind] += 1
        return f"<{kind}>"

    def add_from(self, text: str) -> None:
        """Count the tags in a text."""
        for kind in TAG.findall(text):
            self.add(kind)

    def num_files(self, kind: str) -> int:
        """How many of the record's own files the tags take."""
        return self.count[kind] - len(self.sources[kind])


def read_turns(given: Any, tags: Tags) -> Messages:
    """Turns under "messages" or "conversations". ValueError for those that are not read."""
    if not isinstance(given, list):
        raise ValueError(
            f"turns are not of the form that records.py describes: they must be a list, not {shown(given)}"
        )
    messages = [_read_turn(turn, tags) for turn in given]
    if any(_is_medium(turn.get("type")) for turn in given):
        return _joined(messages)
    return messages


def read_pairs(record: Record, tags: Tags) -> Messages:
    """Questions under "context", answers under "answers"."""
    context = record["context"]
    answers = record["answers"]
    if not (isinstance(context, list) and isinstance(answers, list) and len(context) == len(answers)):
        raise ValueError(f"context and answers must be lists of one length: {shown(context, 60)}, {shown(answers, 60)}")
    weights = record.get("answer_weights") or [1] * len(answers)
    if not isinstance(weights, list) or len(weights) != len(answers):
        raise ValueError(f"answer_weights must be a list of {len(answers)} numbers, not {shown(weights)}")
    messages = []
    for question, answer, weight in zip(context, answers, weights):
        messages.append({"role": "user", "content": _text(question, tags)})
        text = _text(answer, tags)
        learned = _is_learned({"weight": weight}, "assistant")
        messages.append(_message("assistant", text, learned))
    return messages


def first_with_value(keys: Record, names: tuple[str, ...]) -> tuple[str | None, Any]:
    """The first of the names that has a value, and the value; (None, None) without one."""
    for name in names:
        value = keys.get(name)
        if not says_nothing(value):
            return name, value
    return None, None


def _read_turn(turn: Any, tags: Tags) -> Record:
    if not isinstance(turn, dict):
        raise ValueError(f"a turn is not of the form that records.py describes: {shown(turn)}")
    role = _either(turn, "role", "from")
    content = _either(turn, "content", "value")
    kind = turn.get("type")
    known = KEYS | {"offset"} if kind == "audio" else KEYS
    check_keys(turn, known, f"a turn of {shown(role)}", HARMLESS_OF_TURN)
    check_whole_file(turn)
    if isinstance(role, str):
        role = ROLE_NAMES.get(role.lower(), role)
    if _is_medium(kind):
        if not isinstance(content, str):
            raise ValueError(f"a turn of type {kind} must have a file name as its value, not {shown(content)}")
        text = tags.add(kind, content)
    elif says_nothing(kind) or kind in ("text", "message"):
        text = _text(content, tags)
    else:
        raise ValueError(f"a turn of type {shown(kind)!r} is not read: give text, {', '.join(MEDIA)}")
    return _message(role, text, _is_learned(turn, role))


def _is_medium(kind: Any) -> bool:
    """Whether the type of a turn is that of a medium; it may be anything that JSON can hold."""
    return isinstance(kind, str) and kind in MEDIA


def _message(role: Any, content: Any, learned: bool) -> Record:
    message = {"role": role, "content": content}
    if not learned:
        message["learn"] = False
    return message


def _role_and_learned(message: Record) -> tuple[Any, bool]:
    return message["role"], message.get("learn", True)


def _joined(messages: Messages) -> Messages:
    """Neighbours of one role as one turn: in NeMo's form a medium is a turn of its own."""
    joined = []
    for (role, learned), group in itertools.groupby(messages, key=_role_and_learned):
        texts = [message["content"] for message in group]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"a turn of {shown(role)} is not a text: {shown(texts)}")
        joined.append(_message(role, " ".join(texts), learned))
    return joined


def _either(turn: Record, name: str, other: str) -> Any:
    """The value under one of two names."""
    given = [turn[key] for key in (name, other) if key in turn]
    if not given:
        raise ValueError(f"a turn is not of the form that records.py describes: it has no {name!r}: {shown(turn)}")
    values = [value for value in given if value is not None]
    if len(values) == 2 and values[0] != values[1]:
        raise ValueError(f"a turn has both {name!r} and {other!r}, which differ: give one")
    return values[0] if values else None


def _is_learned(turn: Record, role: Any) -> bool:
    """Whether an assistant's turn is learned, by the flags of other trainers. True for turns of other roles."""
    wanted = set()
    for key in (*LEARNED_IF_TRUE, *LEARNED_IF_FALSE):
        value = turn.get(key)
        if says_nothing(value):
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise ValueError(f"{key}={shown(value)} of a turn: a turn is learned (1 or true) or not (0 or false)")
        wanted.add(bool(value) == (key in LEARNED_IF_TRUE))
        if role != "assistant" and value and key not in (*FACTORS, *LEARNED_IF_FALSE):
            raise ValueError(f"{key}={shown(value)} of a turn of {shown(role)}: only assistant's turns are learned")
    if len(wanted) > 1:
        flags = {key: turn[key] for key in (*LEARNED_IF_TRUE, *LEARNED_IF_FALSE) if key in turn}
        raise ValueError(f"flags of a turn contradict each other: {shown(flags)}")
    return role != "assistant" or wanted != {False}


def _text(content: Any, tags: Tags) -> Any:
    """A turn's content as text, with a tag for each medium. What is neither text nor a list of parts is returned as it
    is, for ``Chat`` to refuse."""
    if isinstance(content, str):
        tags.add_from(content)
    if not isinstance(content, list):
        return content
    text = ""
    after_medium = False
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind, given = _read_part(part)
        if kind == "text":
            tags.add_from(given)
            text += f"\n{given}" if after_medium else given
        else:
            _check_index(part.get("index"), kind, given, tags)
            text += tags.add(kind, given)
        after_medium = kind != "text"
    return text


def _check_index(index: Any, kind: str, source: str | None, tags: Tags) -> None:
    number = tags.num_files(kind)
    if says_nothing(index) or (source is None and index == number):
        return
    raise ValueError(
        f"index={shown(index)} of a part of type {kind} is not read: parts take the record's files in "
        f"their order, and this one the {kind} of index {number}"
    )


def _read_part(part: Any) -> tuple[str, str | None]:
    """(kind, text or source) of a part of a turn's content."""
    if not isinstance(part, dict):
        raise ValueError(f"a part of a turn must be a text or an object, not {shown(part)}")
    name = part.get("type")
    if not name:
        name = next((key for key in ("text", *MEDIA) if part.get(key) is not None), None)
    if not isinstance(name, str) or name not in PART_KINDS:
        raise ValueError(f"a part of type {shown(name)!r} is not read: give {', '.join(PART_KINDS)}")
    kind = PART_KINDS[name]
    if kind == "text":
        check_keys(part, {"type", "text", "annotations", "cache_control"}, "a part of type text")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"a part of type text has no text: {shown(part)}")
        return kind, part["text"]
    names = (name, kind, f"{kind}_url", *SOURCES)
    check_keys(part, {"type", "index", *names, *DATA_FORMATS}, f"a part of type {name}")
    key, given = first_with_value(part, names)
    if isinstance(given, dict):
        check_keys(given, {*SOURCES, *DATA_FORMATS}, f"the {name} of a part")
        key, given = first_with_value(given, SOURCES)
    if given is not None and not isinstance(given, str):
        raise ValueError(f"a part of type {name} must name one file, not {shown(given)}")
    if key == "data" and not given.startswith("data:"):
        given = f"data:;base64,{given}"
    return kind, given

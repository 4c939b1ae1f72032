"""JSON records of three forms, and of the habits of other trainers, as turns, media and references.

messages      {"messages": [{"role", "content"}], "images": [name], "audios": [...], "videos": [...]}
LLaVA         {"conversations": [{"from": "human", "value": ...}], "image": name or list, "audio", "video"}
NeMo AVLM     {"context": [user text], "answers": [assistant text], "images": ..., "answer_weights": [0 or 1]}

Turns of the first two may be written either way. The first two may hold "answers": [text], the references of the last
turn. "system" or "system_prompt" beside the turns is a system turn. A turn's text is a text, or a list of parts as in
OpenAI's API and in Qwen's files: texts and media, with data of their own or with the next of the record's files; a text
that follows a medium begins a line, as in an export's chat template. NeMo's SALM has turns of "type": "audio", whose
value is a file.

A key that is neither read nor listed in harmless_keys.py is refused: what another trainer acts on is never dropped. A
key without a value (null, "", [], {}, or lists and objects of nothing else) says nothing, nor does false under a
record's key that is not read.
"""

import base64
import binascii
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from avlm.config.model import shown
from avlm.data.harmless_keys import HARMLESS, HARMLESS_OF_TURN
from avlm.data.text.pieces import MEDIA, TAG, Messages

ROLE_NAMES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
}
SYSTEM = ("system", "system_prompt")
READ = {"messages", "conversations", "context", "answers", "answer_weights", "mask", "offset", "prompt", *SYSTEM}
READ |= {name for kind in MEDIA for name in (kind, f"{kind}s", f"{kind}_url")}
TURN = {"role", "content", "from", "value", "type"}
LEARNED_IF_TRUE = ("weight", "loss", "loss_scale", "train", "training", "trainable", "learn")
LEARNED_IF_FALSE = ("mask", "masked")
PARTS = {  # type of a part -> what it is, and where its file may be named
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
    **dict.fromkeys(("video", "video_url", "input_video"), "video"),
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
}
SOURCES = ("url", "path", "data")  # keys of a part's object, and of the part itself
BESIDE_DATA = {"format", "detail", "mime_type", "media_type"}  # which say how a part's data are written


@dataclass
class Turns:
    """Turns as they are read, with the media that their parts bring: kind -> (number of its tag, source)."""

    messages: Messages = field(default_factory=list)
    own: dict[str, list[tuple[int, str]]] = field(default_factory=lambda: {kind: [] for kind in MEDIA})
    tags: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MEDIA, 0))

    def add(self, role: Any, content: Any, learn: bool, sources: list[tuple[str, str | None]]) -> None:
        """``sources``: kind and source of every tag of the content, in order; without a source it is the record's."""
        for kind, source in sources:
            if source is not None:
                self.own[kind].append((self.tags[kind], source))
            self.tags[kind] += 1
        self.messages.append({"role": role, "content": content} | ({} if learn else {"learn": False}))


def read_record(
    record: dict[str, Any], media: Callable[[str], bytes]
) -> tuple[Messages, dict[str, list[bytes]], list[str]]:
    """(turns, media by kind, references). ``media`` reads a file by the name in the record. ValueError in one line for
    what is of another form, or is not read."""
    if not isinstance(record, dict):
        raise ValueError(f"a record must be a JSON object, not {type(record).__name__}")
    forms = [key for key in ("messages", "conversations", "context") if key in record]
    form = next((key for key in forms if not _says_nothing(record[key])), forms[0] if forms else None)
    if form is None or (form == "context" and "answers" not in record):
        given = shown(str(sorted(map(str, record))))
        raise ValueError(f"record has neither messages, conversations nor context and answers: {given}")
    flags = {key for key, value in record.items() if value is False and str(key).lower() not in LEARNED_IF_TRUE}
    _check_keys(record, READ | flags, "the record", HARMLESS)
    _check_meaning(record, form)
    turns = Turns()
    system = _system(record)
    if form == "context":
        _read_pairs(record, turns)
    else:
        _read_turns(record[form], turns)
    _check_prompt(record.get("prompt"), turns)
    _prepend_system(turns, system)
    files = {kind: _files(record, kind, turns, media) for kind in MEDIA}
    references = _references(record) if form != "context" else []
    for text in (*references, *(turn["content"] for turn in turns.messages)):
        if isinstance(text, str) and re.search("[\ud800-\udfff]", text):  # JSON can write it, UTF-8 cannot
            raise ValueError("text holds half of a surrogate pair")
    return turns.messages, files, references


def _says_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, dict)) and not value) or value in ("[]", "{}", "null")


def _is_empty(value: Any) -> bool:
    """Whether a value says nothing, nor anything in it, to any depth."""
    left = [value]
    while left:
        each = left.pop()
        if not _says_nothing(each):
            if not isinstance(each, (list, dict)):
                return False
            left += each.values() if isinstance(each, dict) else each
    return True


def _check_keys(keys: dict[str, Any], known: set[str], where: str, harmless: str = "") -> None:
    harmless = set(harmless.split())
    for key, value in keys.items():
        if key not in known and str(key).lower() not in harmless and not _is_empty(value):
            raise ValueError(
                f"{where} has the key {shown(str(key))!r}, which is not read: remove it, or put it under "
                '"metadata" if nothing depends on it'
            )


def _check_meaning(record: dict[str, Any], form: str) -> None:
    """Keys that are harmless with some values only."""
    _check_whole(record)
    if any(str(key).lower() == "label" and value is False for key, value in record.items()):  # ms-swift's for KTO
        raise ValueError("label=false marks an answer that is not wanted: remove the record, or the key")
    for kind in MEDIA:  # where a file comes from; alone it is the file
        if not _says_nothing(record.get(f"{kind}_url")) and all(
            _says_nothing(record.get(name)) for name in (kind, f"{kind}s")
        ):
            raise ValueError(f"{kind}_url is an address: download the file and name it under {kind}s")
    mask = record.get("mask")  # NeMo: whose turns are not learned
    if not _says_nothing(mask) and not (isinstance(mask, str) and ROLE_NAMES.get(mask.lower()) == "user"):
        raise ValueError(f"mask={shown(mask)!r} is not read: only user's turns are left out as a whole")
    if form != "context" and not _says_nothing(record.get("context")) and not isinstance(record.get("answers"), list):
        raise ValueError(f"the record has the key 'context' next to its {form}, which is not read: put it into a turn")
    if sum(not _says_nothing(record.get(form)) for form in ("messages", "conversations", "context")) > 1:
        raise ValueError("the record has its turns twice: give one of messages, conversations and context")


def _check_whole(keys: dict[str, Any]) -> None:
    """Refuse what asks for a part of a file."""
    if keys.get("offset"):
        raise ValueError(f"offset={shown(keys['offset'])} asks for a part of a file: cut the file")
    lengths = [value for key, value in keys.items() if str(key).lower() == "duration" and not _says_nothing(value)]
    if lengths and not _says_nothing(keys.get("offset")):  # NeMo: so many seconds from there
        raise ValueError(
            f"offset={shown(keys['offset'])} and duration={shown(lengths[0])} ask for a part of a file: cut the "
            "file, or remove offset if it is no longer than that"
        )


def _check_prompt(prompt: Any, turns: Turns) -> None:
    """A key "prompt" must repeat the first question."""
    if _says_nothing(prompt):
        return
    plain = lambda text: " ".join(TAG.sub("", text).split()) if isinstance(text, str) else text
    first = next((turn["content"] for turn in turns.messages if turn["role"] == "user"), None)
    if plain(prompt) != plain(first):
        raise ValueError(
            f"the record has the key 'prompt', which is not read and is not its first question: {shown(prompt, 80)}"
        )


def _read_turns(given: Any, turns: Turns) -> None:
    """Turns under "messages" or "conversations"."""
    if not isinstance(given, list):
        raise ValueError(
            f"turns are not of the form that records.py describes: they must be a list, not {shown(given)}"
        )
    read, seen = [], dict.fromkeys(MEDIA, 0)
    for turn in given:
        if not isinstance(turn, dict):
            raise ValueError(f"a turn is not of the form that records.py describes: {shown(turn)}")
        role, content = (_either(turn, *names) for names in (("role", "from"), ("content", "value")))
        known = {*TURN, *LEARNED_IF_TRUE, *LEARNED_IF_FALSE} | ({"offset"} if turn.get("type") == "audio" else set())
        _check_keys(turn, known, f"a turn of {shown(role)}", HARMLESS_OF_TURN)
        _check_whole(turn)
        role = ROLE_NAMES.get(role.lower(), role) if isinstance(role, str) else role
        text, sources = _content(content, turn.get("type"), seen)
        read.append((role, text, _learned(turn, role), sources))
    if any(
        turn.get("type") in MEDIA for turn in given if isinstance(turn.get("type"), str)
    ):  # NeMo joins neighbours of one role, as a medium is a turn of its own
        joined = []
        for (role, learn), group in itertools.groupby(read, key=lambda turn: (turn[0], turn[2])):
            group = list(group)
            if not all(isinstance(turn[1], str) for turn in group):
                raise ValueError(f"a turn of {shown(role)} is no text: {shown([turn[1] for turn in group])}")
            joined.append((role, " ".join(turn[1] for turn in group), learn, [x for turn in group for x in turn[3]]))
        read = joined
    for turn in read:
        turns.add(*turn)


def _either(turn: dict[str, Any], name: str, other: str) -> Any:
    found = [turn[key] for key in (name, other) if key in turn]
    if not found:
        raise ValueError(f"a turn is not of the form that records.py describes: it has no {name!r}: {shown(turn)}")
    found = [value for value in found if value is not None] or found[:1]
    if len(found) == 2 and found[0] != found[1]:
        raise ValueError(f"a turn has both {name!r} and {other!r}, which differ: give one")
    return found[0]


def _learned(turn: dict[str, Any], role: Any) -> bool:
    """Whether an assistant's turn is learned, by the flags of other trainers."""
    wanted = set()
    for key in (*LEARNED_IF_TRUE, *LEARNED_IF_FALSE):
        value = turn.get(key)
        if _says_nothing(value):
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise ValueError(f"{key}={shown(value)} of a turn: a turn is learned (1 or true) or not (0 or false)")
        wanted.add(bool(value) == (key in LEARNED_IF_TRUE))
        if role != "assistant" and value and key not in ("weight", "loss_scale", *LEARNED_IF_FALSE):
            raise ValueError(f"{key}={shown(value)} of a turn of {shown(role)}: only assistant's turns are learned")
    if len(wanted) > 1:
        raise ValueError(
            f"flags of a turn contradict each other: {shown({k: turn[k] for k in LEARNED_IF_TRUE if k in turn})}"
        )
    return role != "assistant" or wanted != {False}


def _content(content: Any, kind: Any, seen: dict[str, int]) -> tuple[Any, list[tuple[str, str | None]]]:
    """(text with tags, kind and source of every tag) of a turn's content. What is neither text nor parts stays, for
    ``Chat`` to refuse. ``seen``: how many files of each kind the turns before take of the record."""
    text, sources = _text(content, kind, seen)
    for tag, source in sources:
        seen[tag] += source is None
    return text, sources


def _text(content: Any, kind: Any, seen: dict[str, int]) -> tuple[Any, list[tuple[str, str | None]]]:
    if kind in MEDIA:
        if not isinstance(content, str):
            raise ValueError(f"a turn of type {kind} must have a file name as its value, not {shown(content)}")
        return f"<{kind}>", [(kind, content)]
    if not _says_nothing(kind) and kind not in ("text", "message"):
        raise ValueError(f"a turn of type {shown(kind)!r} is not read: give text, {', '.join(MEDIA)}")
    if not isinstance(content, list):
        return content, [(tag, None) for tag in TAG.findall(content)] if isinstance(content, str) else []
    text, sources, after_medium = "", [], False
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind, given = _part(part)
        if kind == "text":
            text += ("\n" if after_medium else "") + given
            sources += [(tag, None) for tag in TAG.findall(given)]
        else:
            number = seen[kind] + sum(source == (kind, None) for source in sources)
            if not _says_nothing(index := part.get("index")) and (given is not None or index != number):
                raise ValueError(
                    f"index={shown(index)} of a part of type {kind} is not read: parts take the record's files in "
                    f"their order, and this one the {kind} of index {number}"
                )
            text += f"<{kind}>"
            sources.append((kind, given))
        after_medium = kind != "text"
    return text, sources


def _part(part: Any) -> tuple[str, str | None]:
    """(kind, text or source) of a part of a turn's content."""
    if not isinstance(part, dict):
        raise ValueError(f"a part of a turn must be a text or an object, not {shown(part)}")
    name = part.get("type") or next((key for key in ("text", *MEDIA) if part.get(key) is not None), None)
    if not isinstance(name, str) or name not in PARTS:
        raise ValueError(f"a part of type {shown(name)!r} is not read: give {', '.join(PARTS)}")
    kind = PARTS[name]
    if kind == "text":
        _check_keys(part, {"type", "text", "annotations", "cache_control"}, "a part of type text")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"a part of type text has no text: {shown(part)}")
        return kind, part["text"]
    names = (name, kind, f"{kind}_url", *SOURCES)
    _check_keys(part, {"type", "index", *names, *BESIDE_DATA}, f"a part of type {name}")
    key, given = _first(part, names)
    if isinstance(given, dict):
        _check_keys(given, {*SOURCES, *BESIDE_DATA}, f"the {name} of a part")
        key, given = _first(given, SOURCES)
    if given is None:
        return kind, None
    if not isinstance(given, str):
        raise ValueError(f"a part of type {name} must name one file, not {shown(given)}")
    return kind, f"data:;base64,{given}" if key == "data" and not given.startswith("data:") else given


def _first(keys: dict[str, Any], names: tuple[str, ...]) -> tuple[str | None, Any]:
    """The first of some keys that has a value, and that; (None, None) without one."""
    return next(((name, keys[name]) for name in names if not _says_nothing(keys.get(name))), (None, None))


def _read_pairs(record: dict[str, Any], turns: Turns) -> None:
    """Questions under "context", answers under "answers"."""
    context, answers = record["context"], record["answers"]
    if not (isinstance(context, list) and isinstance(answers, list) and len(context) == len(answers)):
        raise ValueError(f"context and answers must be lists of one length: {shown(context, 60)}, {shown(answers, 60)}")
    weights = record.get("answer_weights") or [1] * len(answers)
    if not isinstance(weights, list) or len(weights) != len(answers):
        raise ValueError(f"answer_weights must be a list of {len(answers)} numbers, not {shown(weights)}")
    seen = dict.fromkeys(MEDIA, 0)
    for question, answer, weight in zip(context, answers, weights):
        for role, text in (("user", question), ("assistant", answer)):
            text, sources = _content(text, None, seen)
            turns.add(role, text, _learned({"weight": weight} if role == "assistant" else {}, role), sources)


def _system(record: dict[str, Any]) -> str | None:
    given = {key: record[key] for key in SYSTEM if not _says_nothing(record.get(key))}
    for key, value in given.items():
        if not isinstance(value, str):
            raise ValueError(f"{key} must be a text, not {shown(value)}")
    if len(set(given.values())) > 1:
        raise ValueError("system and system_prompt of the record differ: give one")
    return next(iter(given.values()), None)


def _prepend_system(turns: Turns, system: str | None) -> None:
    if system is None:
        return
    if TAG.search(system):
        raise ValueError("a medium's tag in the record's system prompt is not read: put it into a turn")
    present = [turn["content"] for turn in turns.messages if turn["role"] == "system"]
    if present and present != [system]:
        raise ValueError("the record has a system prompt beside its turns and another one among them: give one")
    if not present:
        turns.messages.insert(0, {"role": "system", "content": system})


def _files(record: dict[str, Any], kind: str, turns: Turns, media: Callable[[str], bytes]) -> list[bytes]:
    """The media of one kind in the order of their tags: those that parts bring, and between them the record's."""
    names = _names(record, kind)
    for place, source in turns.own[kind]:
        names.insert(place, source)
    return [_read(name, kind, media) for name in names]


def _read(name: str, kind: str, media: Callable[[str], bytes]) -> bytes:
    """A file by its name, or the data that a "data:" URL holds."""
    scheme, colon, rest = name.partition(":")
    if colon and scheme.lower() == "data":
        head, comma, data = rest.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ValueError(f"{kind} {shown(name, 60)!r} must be of the form data:TYPE;base64,DATA")
        try:
            return base64.b64decode("".join(data.split()), validate=True)
        except (binascii.Error, ValueError):
            raise ValueError(f"{kind} {shown(name, 60)!r} is not valid base64") from None
    if colon and rest.startswith("//"):
        if scheme.lower() != "file":
            raise ValueError(f"{kind} {shown(name)!r} is an address: media are read from files, download it first")
        name = unquote(rest.removeprefix("//").removeprefix("localhost"))
    return media(name)


def _references(record: dict[str, Any]) -> list[str]:
    answers = record.get("answers")
    if _says_nothing(answers):
        return []
    if not (isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)):
        raise ValueError(f"answers must be a list of texts, not {shown(repr(answers))}")
    return [answer.strip() for answer in answers]


def _names(record: dict[str, Any], kind: str) -> list[str]:
    """Names under "images" or "image": a list, one name or null; a name may be an object with it under "path"."""
    listed = []
    for key in (f"{kind}s", kind):
        given = record.get(key)
        names = [_path(each, kind) for each in (given if isinstance(given, list) else [given])]
        names = [] if all(map(_says_nothing, names)) else names
        if not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"{kind}s must be file names, not {shown(repr(given))}")
        listed.append(names)
    if all(listed) and listed[0] != listed[1]:
        raise ValueError(f"the record has {kind} and {kind}s, which differ: give one")
    return list(listed[0] or listed[1])


def _path(name: Any, kind: str) -> Any:
    """The name in {"path": name, "bytes": null}, as Arrow writes a file."""
    if not isinstance(name, dict) or "path" not in name:
        return name
    _check_keys(name, {"path"}, f"an object under {kind}s")
    return name.get("path")

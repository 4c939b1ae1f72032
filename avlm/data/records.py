"""JSON records of many forms, with the habits of other trainers, read as turns, media and references.

messages      {"messages": [{"role", "content"}], "images": [name], "audios": [...], "videos": [...]}
LLaVA         {"conversations": [{"from": "human", "value": ...}], "image": name or list, "audio", "video"}
NeMo AVLM     {"context": [user text], "answers": [assistant text], "images": ..., "answer_weights": [0 or 1]}
pairs         {"query", "response"}, {"image", "text"} and others: avlm.data.pairs

Turns of the first two may be written either way. The first two may hold "answers": [text], the references of the last
turn. "system" or "system_prompt" next to the turns is a system turn. A turn's text is a text, or a list of parts as in
OpenAI's API and in Qwen's files: texts and media, which hold their own data or take the next of the record's files. A
text after a medium begins a line, as in an export's chat template. NeMo's SALM has turns of "type": "audio", whose
value is a file.

A key that is neither read nor listed in record_keys.py is refused, so that nothing that another trainer acts on is
dropped. A key without a value says nothing, nor does false under a record's key that is not read.
"""

import base64
import binascii
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from avlm.config.values import shown
from avlm.data.pairs import add_missing_tags, form_of_pair, keys_of, read_pair, with_kind_of_file
from avlm.data.record_keys import HARMLESS, Record, check_keys, check_whole_file, says_nothing
from avlm.data.text.pieces import MEDIA, TAG, Messages
from avlm.data.turns import LEARNED_IF_TRUE, ROLE_NAMES, Tags, first_with_value, read_pairs, read_turns

FORMS = ("messages", "conversations", "context")
SYSTEM = ("system", "system_prompt")
EXAMPLE = (
    '{"messages": [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A dog."}], '
    '"images": ["dog.png"]}'
)
KEYS = {*FORMS, *SYSTEM, "answers", "answer_weights", "mask", "offset", "prompt"}
KEYS |= {key for kind in MEDIA for key in (kind, f"{kind}s", f"{kind}_url")}
SURROGATES = re.compile("[\ud800-\udfff]")


def read_record(record: Record, media: Callable[[str], bytes]) -> tuple[Messages, dict[str, list[bytes]], list[str]]:
    """(turns, media by kind, references). ``media`` reads a file by the name in the record. One-line ValueError for a
    record of another form, or with anything that is not read."""
    if not isinstance(record, dict):
        raise ValueError(f"a record must be a JSON object, not {type(record).__name__}")
    if not any(key in record for key in FORMS):
        record = with_kind_of_file(record)
    form = _form(record)
    _check_record_keys(record, form)
    _check_meaning(record, form)
    tags = Tags()
    system = _system(record)
    if form == "context":
        messages = read_pairs(record, tags)
    elif form in FORMS:
        messages = read_turns(record[form], tags)
    else:
        messages = read_pair(record, form, tags)
        add_missing_tags(messages, {kind: len(_names(record, kind)) for kind in MEDIA}, tags)
    if form != "prompt":
        _check_prompt(record.get("prompt"), messages)
    if system is not None:
        _prepend_system(messages, system)
    files = {kind: _files(record, kind, tags, media) for kind in MEDIA}
    references = [] if form == "context" else _references(record)
    for text in [*references, *(turn["content"] for turn in messages)]:
        if isinstance(text, str) and SURROGATES.search(text):  # JSON can write it, UTF-8 cannot
            raise ValueError("text holds half of a surrogate pair")
    return messages, files, references


def _form(record: Record) -> str:
    present = [key for key in FORMS if key in record]
    with_turns = [key for key in present if not says_nothing(record[key])]
    form = next(iter(with_turns or present), None)
    if form is None or (form == "context" and "answers" not in record):
        form = form_of_pair(record)
    if form is None:
        given = shown(", ".join(sorted(map(str, record))), 80) or "no key"
        raise ValueError(
            f"the record has {given}, and neither messages, conversations, context and answers, query and response, "
            f"nor a medium and text. Give it one of these forms, such as {EXAMPLE}"
        )
    return form


def _check_record_keys(record: Record, form: str) -> None:
    known = KEYS | (set() if form in FORMS else keys_of(form))
    for key, value in record.items():
        if value is False and str(key).lower() not in LEARNED_IF_TRUE:
            known.add(key)
    check_keys(record, known, "the record", HARMLESS)


def _check_meaning(record: Record, form: str) -> None:
    """Refuse some values of keys that are harmless with others."""
    check_whole_file(record)
    for key, value in record.items():
        if str(key).lower() == "label" and value is False:  # in ms-swift's data for KTO
            raise ValueError("label=false marks an answer that is not wanted: remove the record, or the key")
    for kind in MEDIA:
        # Next to a file the address says where it comes from; alone it stands for the file.
        _, file = first_with_value(record, (kind, f"{kind}s"))
        if file is None and not says_nothing(record.get(f"{kind}_url")):
            raise ValueError(f"{kind}_url is an address: download the file and name it under {kind}s")
    mask = record.get("mask")  # NeMo: the role whose turns are not learned
    masks_user = isinstance(mask, str) and ROLE_NAMES.get(mask.lower()) == "user"
    if not says_nothing(mask) and not masks_user:
        raise ValueError(f"mask={shown(mask)!r} is not read: only user's turns are left out as a whole")
    with_turns = [key for key in FORMS if not says_nothing(record.get(key))]
    if form != "context" and "context" in with_turns and not isinstance(record.get("answers"), list):
        raise ValueError(f"the record has the key 'context' next to its {form}, which is not read: put it into a turn")
    if len(with_turns) > 1:
        raise ValueError("the record has its turns twice: give one of messages, conversations and context")


def _check_prompt(prompt: Any, messages: Messages) -> None:
    """A key "prompt" must repeat the first question."""
    if says_nothing(prompt):
        return
    questions = [turn["content"] for turn in messages if turn["role"] == "user"]
    if _plain(prompt) != _plain(next(iter(questions), None)):
        raise ValueError(
            f"the record has the key 'prompt', which is not read and is not its first question: {shown(prompt, 80)}"
        )


def _plain(text: Any) -> Any:
    """A text without media tags, and with single blanks."""
    if not isinstance(text, str):
        return text
    return " ".join(TAG.sub("", text).split())


def _system(record: Record) -> str | None:
    """The system prompt that the record has next to its turns."""
    given = {key: record[key] for key in SYSTEM if not says_nothing(record.get(key))}
    for key, value in given.items():
        if not isinstance(value, str):
            raise ValueError(f"{key} must be a text, not {shown(value)}")
    if len(set(given.values())) > 1:
        raise ValueError("system and system_prompt of the record differ: give one")
    return next(iter(given.values()), None)


def _prepend_system(messages: Messages, system: str) -> None:
    if TAG.search(system):
        raise ValueError("a medium's tag in the record's system prompt is not read: put it into a turn")
    present = [turn["content"] for turn in messages if turn["role"] == "system"]
    if not present:
        messages.insert(0, {"role": "system", "content": system})
    elif present != [system]:
        raise ValueError("the record has a system prompt next to its turns and another one among them: give one")


def _files(record: Record, kind: str, tags: Tags, media: Callable[[str], bytes]) -> list[bytes]:
    """The media of one kind in the order of their tags: those that parts of turns bring, and between them the
    record's own."""
    sources = _names(record, kind)
    for place, source in tags.sources[kind]:
        sources.insert(place, source)
    return [_read(source, kind, media) for source in sources]


def _read(source: str, kind: str, media: Callable[[str], bytes]) -> bytes:
    """A file by its name, or the data in a "data:" URL."""
    scheme, colon, rest = source.partition(":")
    if colon and scheme.lower() == "data":
        return _decoded(source, kind)
    if not colon or not rest.startswith("//"):
        return media(source)
    if scheme.lower() != "file":
        raise ValueError(f"{kind} {shown(source)!r} is an address: media are read from files, download it first")
    return media(unquote(rest.removeprefix("//").removeprefix("localhost")))


def _decoded(url: str, kind: str) -> bytes:
    header, comma, data = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise ValueError(f"{kind} {shown(url, 60)!r} must be of the form data:TYPE;base64,DATA")
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{kind} {shown(url, 60)!r} is not valid base64") from None


def _references(record: Record) -> list[str]:
    answers = record.get("answers")
    if says_nothing(answers):
        return []
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"answers must be a list of texts, not {shown(repr(answers))}")
    return [answer.strip() for answer in answers]


def _names(record: Record, kind: str) -> list[str]:
    """File names under "images" or "image": a list, one name or null. A name may be an object that has it under
    "path"."""
    plural = _names_under(f"{kind}s", record, kind)
    singular = _names_under(kind, record, kind)
    if plural and singular and plural != singular:
        raise ValueError(f"the record has {kind} and {kind}s, which differ: give one")
    return plural or singular


def _names_under(key: str, record: Record, kind: str) -> list[str]:
    given = record.get(key)
    listed = given if isinstance(given, list) else [given]
    names = [_path(each, kind) for each in listed]
    if all(says_nothing(name) for name in names):
        return []
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{kind}s must be file names, not {shown(repr(given))}")
    return names


def _path(name: Any, kind: str) -> Any:
    """The name in {"path": name, "bytes": null}, as Arrow writes a file."""
    if not isinstance(name, dict) or "path" not in name:
        return name
    check_keys(name, {"path"}, f"an object under {kind}s")
    return name["path"]

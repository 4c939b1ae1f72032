"""Conversations -> pieces of text, control tokens and media, each marked as learned or not.

A template emits pieces, so what is learned follows from its structure: the text of every assistant turn and the token
that ends it. Nothing is searched for in token ids. Text of a sample is never read for control tokens: a user who writes
``<|eot_id|>`` sends eight harmless tokens. ``<image>``, ``<audio>`` and ``<video>`` stand for media in every turn, the
assistant's too, and are never learned.

llama3   <bos><|start_header_id|>ROLE<|end_header_id|>\\n\\nTEXT<|eot_id|>...       (Llama 3, text stripped)
chatml   <|im_start|>ROLE\\nTEXT<|im_end|>\\n...                                    (Qwen, SmolLM2)
llava    <bos>SYSTEM USER: TEXT ASSISTANT: TEXT<eos>USER: ...                       (LLaVA 1.5 and NeMo, text stripped)
plain    <bos>TEXT TEXT<eos>...   no roles and nothing added between the turns      (captions for a base model)
tokenizer  the Jinja ``chat_template`` that comes with the tokenizer
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jinja2
import tokenizers
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

ROLES = ("system", "user", "assistant")
MEDIA = ("image", "audio", "video")
TAG = re.compile(r"<(image|audio|video)>")
CONTROL_TOKENS = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
# Unicode noncharacters, which no text may hold: they carry marks through a Jinja template.
LEARN, LEARNT = "\ufdd0", "\ufdd1"
MARKS = dict(zip(MEDIA, "\ufdd2\ufdd3\ufdd4", strict=True))

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Piece:
    """``kind``: text (as it stands), control (one control token), markup (text in which control tokens are read) or a
    medium of MEDIA."""

    kind: str
    text: str
    learned: bool = False


class Tokenizer:
    """A Hugging Face ``tokenizer.json``; bos, eos and chat template from the ``tokenizer_config.json`` beside it."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.file = path / "tokenizer.json" if path.is_dir() else path
        if not self.file.is_file():
            raise FileNotFoundError(
                f"no tokenizer {self.file}: data.tokenizer is a folder with tokenizer.json, or the file"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self.file))
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"{self.file} is no tokenizer: {error}") from None
        self._tokenizer.no_truncation()  # the file may ask for either
        self._tokenizer.no_padding()
        config_file, template_file = (self.file.with_name(n) for n in ("tokenizer_config.json", "chat_template.jinja"))
        config = json.loads(config_file.read_text()) if config_file.is_file() else {}
        self.bos, self.eos = (self._name(config.get(key)) for key in ("bos_token", "eos_token"))
        template = template_file.read_text() if template_file.is_file() else config.get("chat_template")
        if isinstance(template, list):  # several named ones
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        self.chat_template: str | None = template
        # SentencePiece vocabularies open every text with a blank. Inside a line that blank would be wrong, so a text
        # that goes on from another is encoded behind a line break, whose tokens are then dropped.
        line_break = self.encode("\n")
        self._before = line_break if self.encode("a") != self.encode("\na")[len(line_break) :] else []
        # Behind a control token there is another such blank (prepend_scheme "always"), or none ("first").
        control = next(iter(self.control_tokens), "")
        self.blank_after_control = self.encode(control + "a", control=True)[bool(control) :] == self.encode("a")

    @property
    def size(self) -> int:
        """Rows that an embedding needs for every id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, *, goes_on: bool = False, control: bool = False) -> list[int]:
        """Ids of a text, nothing added. ``goes_on``: it continues another text; ``control``: read control tokens."""
        skip = len(self._before) if goes_on and self._before else 0
        self._tokenizer.encode_special_tokens = not control
        return self._tokenizer.encode("\n" + text if skip else text, add_special_tokens=False).ids[skip:]

    def decode(self, ids: list[int], *, control: bool = True) -> str:
        """Text of ids; ``control``: control tokens are shown."""
        return self._tokenizer.decode(ids, skip_special_tokens=not control)

    def find(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def id_of(self, token: str) -> int:
        number = self.find(token)
        if number is None:
            raise ValueError(f"{self.file} has no token {token!r}")
        return number

    @cached_property
    def control_tokens(self) -> list[str]:
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]

    @staticmethod
    def _name(token: str | dict | None) -> str | None:
        return token["content"] if isinstance(token, dict) else token


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Every id must have a row in the embedding; spare rows are fine (checkpoints pad them)."""
    if tokenizer.size > vocab_size:
        raise ValueError(
            f"{tokenizer.file} has {tokenizer.size} ids but model.decoder.vocab_size={vocab_size}: "
            "they belong to different models"
        )


class Chat:
    """A tokenizer with a template. ``system``: the prompt of conversations that have none."""

    def __init__(self, tokenizer: Tokenizer, template: str, system: str | None = None) -> None:
        self.tokenizer, self.template, self.system = tokenizer, template, system
        # llava and plain end a turn with the tokenizer's eos, and open with its bos if it has one.
        own = () if template == "tokenizer" else (tokenizer.eos or "eos_token", tokenizer.bos)
        needed = CONTROL_TOKENS.get(template, own)
        missing = [token for token in needed if token and token not in tokenizer.control_tokens]
        if missing:
            raise ValueError(
                f"template {template} needs control tokens that {tokenizer.file} lacks: {', '.join(missing)}"
            )
        if template == "tokenizer":
            self._jinja = JinjaTemplate(tokenizer)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an assistant turn."""
        ends = {CONTROL_TOKENS[self.template][-1]} if self.template in CONTROL_TOKENS else set()
        return sorted(
            self.tokenizer.id_of(token) for token in ends | ({self.tokenizer.eos} if self.tokenizer.eos else set())
        )

    def pieces(self, messages: Messages, *, prompt: bool = False) -> list[Piece]:
        """Pieces of a conversation; ``prompt``: nothing is learned and it ends where the assistant's answer begins."""
        messages = self._checked(messages, prompt)
        if self.template == "tokenizer":
            pieces = self._jinja.pieces(messages, prompt)
        else:
            builder = {"llama3": _llama3, "chatml": _chatml, "llava": _llava, "plain": _plain}[self.template]
            pieces = builder(messages, prompt, self.tokenizer)
        return [Piece(p.kind, p.text, p.learned and not prompt) for p in pieces]

    def encode(self, pieces: list[Piece]) -> Iterator[tuple[Piece, list[int]]]:
        """Each piece with its ids, none for media. Neighbouring texts with the same fate are tokenised as one."""
        merged: list[Piece] = []
        for piece in filter(lambda piece: piece.text, pieces):
            last = merged[-1] if merged else None
            if last and piece.kind in ("text", "markup") and (last.kind, last.learned) == (piece.kind, piece.learned):
                merged[-1] = Piece(piece.kind, last.text + piece.text, piece.learned)
            else:
                merged.append(piece)
        goes_on = False
        for piece in merged:
            if piece.kind == "control":
                yield piece, [self.tokenizer.id_of(piece.text)]
            elif piece.kind in MEDIA:
                yield piece, []
            else:
                yield piece, self.tokenizer.encode(piece.text, goes_on=goes_on, control=piece.kind == "markup")
            in_control = piece.kind == "markup" and piece.text.endswith(tuple(self.tokenizer.control_tokens))
            goes_on = (piece.kind in ("text", "markup") and not in_control) or not self.tokenizer.blank_after_control

    def _checked(self, messages: Messages, prompt: bool) -> Messages:
        for message in messages:
            if message.get("role") not in ROLES:
                raise ValueError(f"unknown role {message.get('role')!r}: give one of {', '.join(ROLES)}")
            if not isinstance(message.get("content"), str):
                raise ValueError(f"content of a {message['role']} turn is not text: {message.get('content')!r:.80}")
            if re.search("[\ufdd0-\ufdd4]", message["content"]):
                raise ValueError("text holds a Unicode noncharacter (U+FDD0 to U+FDD4)")
        roles = [message["role"] for message in messages]
        if prompt and roles[-1:] != ["user"]:
            raise ValueError(f"a prompt must end with a user turn, not with {roles[-1] if roles else 'nothing'}")
        if not prompt and "assistant" not in roles:
            raise ValueError("conversation has no assistant turn: there is nothing to learn")
        system = [{"role": "system", "content": self.system}] if self.system and "system" not in roles else []
        return [*system, *messages]


def _content(text: str, learned: bool = False) -> Iterator[Piece]:
    """Text with its tags cut out."""
    for i, part in enumerate(TAG.split(text)):
        yield Piece(part, f"<{part}>") if i % 2 else Piece("text", part, learned)


def _llama3(messages: Messages, prompt: bool, tokenizer: Tokenizer) -> Iterator[Piece]:
    bos, header, header_end, end = CONTROL_TOKENS["llama3"]
    yield Piece("control", bos)
    for message in [*messages, {"role": "assistant"}] if prompt else messages:
        yield from (Piece("control", header), Piece("text", message["role"]), Piece("control", header_end))
        yield Piece("text", "\n\n")
        if "content" in message:
            learned = message["role"] == "assistant"
            yield from _content(message["content"].strip(), learned)
            yield Piece("control", end, learned)


def _chatml(messages: Messages, prompt: bool, tokenizer: Tokenizer) -> Iterator[Piece]:
    start, end = CONTROL_TOKENS["chatml"]
    for message in [*messages, {"role": "assistant"}] if prompt else messages:
        yield from (Piece("control", start), Piece("text", message["role"] + "\n"))
        if "content" in message:
            learned = message["role"] == "assistant"
            yield from _content(message["content"], learned)
            yield from (Piece("control", end, learned), Piece("text", "\n"))


def _llava(messages: Messages, prompt: bool, tokenizer: Tokenizer) -> Iterator[Piece]:
    if tokenizer.bos:
        yield Piece("control", tokenizer.bos)
    for message in messages:
        text = message["content"].strip()
        if message["role"] == "system":
            yield from _content(text + " ")
        elif message["role"] == "user":
            yield from _content("USER: " + text + " ")
        else:
            yield Piece("text", "ASSISTANT:")
            yield from _content(" " + text, learned=True)
            yield Piece("control", tokenizer.eos, learned=True)
    if prompt:
        yield Piece("text", "ASSISTANT:")


def _plain(messages: Messages, prompt: bool, tokenizer: Tokenizer) -> Iterator[Piece]:
    if tokenizer.bos:
        yield Piece("control", tokenizer.bos)
    for message in messages:
        learned = message["role"] == "assistant"
        yield from _content(message["content"], learned)
        if learned:
            yield Piece("control", tokenizer.eos, learned=True)


class JinjaTemplate:
    """The tokenizer's own template. What is learned: its ``{% generation %}`` blocks; without them, the text by which
    each assistant turn lengthens the rendering, up to the last control token of the turn."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"{tokenizer.file} comes with no chat_template: choose another data.template (generate.py: --raw)"
            )
        self._names = {"bos_token": tokenizer.bos or "", "eos_token": tokenizer.eos or ""}
        # A date in a prompt would make runs differ from day to day: strftime_now is left undefined.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(tokenizer.chat_template)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat_template of {tokenizer.file.parent} is no Jinja template: {error}") from None
        self._marks_turns = re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template) is not None
        self._control = re.compile("|".join(map(re.escape, tokenizer.control_tokens)) or "(?!)")

    def pieces(self, messages: Messages, prompt: bool) -> Iterator[Piece]:
        marked = [{**m, "content": TAG.sub(lambda tag: MARKS[tag[1]], m["content"])} for m in messages]
        for message in marked:
            if found := self._control.search(message["content"]):
                raise ValueError(f"text holds the control token {found[0]!r}, which a Jinja template would make real")
        if prompt or self._marks_turns:
            text = self._render(marked, prompt)
        else:
            text = self._mark_turns(marked)
        kinds, learned = {mark: kind for kind, mark in MARKS.items()}, False
        for part in re.split("([\ufdd0-\ufdd4])", text):
            if part in (LEARN, LEARNT):
                learned = part == LEARN
            elif part:
                yield Piece(kinds[part], f"<{kinds[part]}>") if part in kinds else Piece("markup", part, learned)

    def _mark_turns(self, messages: Messages) -> str:
        """The rendering with marks around what each assistant turn adds to it."""
        marked, done = "", 0
        whole = self._render(messages, False)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before, after = self._render(messages[:i], True), self._render(messages[: i + 1], False)
                if not (after.startswith(before) and whole.startswith(after)):
                    raise ValueError(
                        "the tokenizer's chat_template rewrites earlier turns, so what is learned cannot be told: "
                        "add {% generation %} blocks to it or choose another data.template"
                    )
                ends = [found.end() for found in self._control.finditer(after, len(before))]
                end = ends[-1] if ends and not after[ends[-1] :].strip() else len(after)
                marked += whole[done : len(before)] + LEARN + whole[len(before) : end] + LEARNT
                done = end
        return marked + whole[done:]

    def _render(self, messages: Messages, prompt: bool) -> str:
        try:
            return self._template.render(messages=messages, add_generation_prompt=prompt, **self._names)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the tokenizer's chat_template fails: {error}") from None


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}``: the text of an assistant."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        return LEARN + caller() + LEARNT


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)

"""The tokenizer's own chat template, in Jinja, with what is learned marked in its rendering.

What a turn's answer becomes is found by marks, Unicode noncharacters put around it before the template is rendered. So
a template may put a block before an answer (Qwen3's empty ``<think>``), drop it from earlier turns, or end each turn in
its own way. Of the text between the generation prompt and the answer, blanks are learned with it; a block is not: it
belongs to the prompt, in training and when the model is asked. The first control token after an answer ends it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise, product

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension

from avlm.data.bounded_jinja import Bounded
from avlm.data.pieces import MEDIA, TAG, Messages, Piece, is_learned
from avlm.data.tokenizer import Tokenizer, one_line

# Unicode noncharacters, which no text may hold.
ANSWER, ANSWER_END, OPEN, CLOSE = "\ufdd0\ufdd1\ufdd5\ufdd6"  # around an answer, and around a generation block
MARKS = dict(zip(MEDIA, "\ufdd2\ufdd3\ufdd4", strict=True))
MARK = re.compile("[\ufdd0-\ufdd6]")
REWRITES = (
    "the tokenizer's chat_template rewrites earlier turns, so what is learned cannot be told: "
    "add {% generation %} blocks to it or choose another data.template"
)
Span = tuple[int, int]


@dataclass
class Turn:
    """An assistant's turn in a rendering. ``start`` of its answer is None where the template takes that apart;
    ``end`` of the answer; what is ``learned``; the token that ends the turn, if one does."""

    start: int | None
    end: int
    learned: list[Span] = field(default_factory=list)
    token: str | None = None


class JinjaTemplate:
    """What is learned: the template's ``{% generation %}`` blocks, without what it puts before the answer in them; in a
    template that has none, each answer up to the control token that ends it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"{tokenizer.file} comes with no chat_template: choose another data.template (generate.py: --raw)"
            )
        # A date in a prompt would make runs differ from day to day: strftime_now is left undefined.
        self._environment = Bounded(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        self._environment.filters["tojson"] = self._environment.bounded("tojson", _to_json)
        self._environment.globals["raise_exception"] = _raise
        absent = {f"{name}_token": _Absent(name=f"{name}_token") for name in ("bos", "eos")}
        self._names = {**absent, **tokenizer.names, "tools": None, "documents": None}
        with one_line(f"the chat_template of {tokenizer.file.parent} is no Jinja template"):
            self._template = self._environment.from_string(tokenizer.chat_template)
        self._has_blocks = re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template) is not None
        self._control = re.compile("|".join(map(re.escape, tokenizer.control_tokens)) or "(?!)")
        ends = [token for token in tokenizer.added_tokens if token.strip(" \n\t\r▁")]
        self._end = re.compile("|".join(map(re.escape, sorted(ends, key=len, reverse=True))) or "(?!)")

    def pieces(self, messages: Messages, prompt: bool, published: bool = False) -> Iterator[Piece]:
        """``published``: a prompt is the template's own, even if an answer of training stands after more than that."""
        marked = [{**m, "content": TAG.sub(lambda tag: MARKS[tag[1]], m["content"])} for m in messages]
        for message in marked:
            if found := self._control.search(message["content"]):
                raise ValueError(f"text holds the control token {found[0]!r}, which a Jinja template would make real")
        if prompt:
            text, spans = self._prompt(marked) if not published else self._render(marked, True), []
        else:
            text, spans = self._training(marked)
        bounds = [0, *chain(*spans), len(text)]
        for i, (start, end) in enumerate(pairwise(bounds)):
            yield from _pieces(text[start:end], learned=bool(i % 2))

    @cached_property
    def ends(self) -> set[str]:
        """The control tokens that end an assistant's turn, or begin the turn after it; none where plain text does, or
        where the template takes no ordinary conversation."""
        talk = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
        messages = [{"role": role, "content": content} for role, content in talk]
        for length in (4, 2):
            try:
                return {turn.token for turn in self._turns(messages[:length])[1] if turn.token}
            except ValueError:  # some templates write one question and its answer only
                continue
        return set()

    @cached_property
    def block(self) -> str:
        """What stands between the template's generation prompt and an answer, in training and in our prompts.
        ValueError where that depends on the conversation."""
        user, system = {"role": "user", "content": "a"}, {"role": "system", "content": "s"}
        blocks = set()
        for talk in ([user], [system, user], [user, {"role": "assistant", "content": "b"}, user]):
            try:
                published = self._render(talk, True)
            except ValueError:  # many templates take no system's turn
                continue
            blocks.add(self._prompt(talk)[len(published) :])
        if len(blocks) > 1:
            raise ValueError(
                "the tokenizer's chat_template puts a different text before an answer in each conversation, which no "
                "generation prompt of an export can do: choose another data.template"
            )
        return blocks.pop() if blocks else ""

    @cached_property
    def _asks(self) -> str:
        """How every prompt ends, from the end of the question on; nothing where that is only blanks."""
        talks = [[("user", "a")], [("user", "b")], [("user", "a"), ("assistant", "b"), ("user", "c")]]
        talks += [[("system", "s"), ("user", "d")]]
        ends = []
        for talk in talks:
            try:
                ends.append(self._render([{"role": role, "content": text} for role, text in talk], True)[::-1])
            except ValueError:  # many templates take no system's turn, and some one question only
                continue
        if len(ends) < 2:
            return ""
        end = ends[0][: min(_shared(ends[0], other) for other in ends[1:])][::-1]
        return end if end.strip() else ""

    def _prompt(self, messages: Messages) -> str:
        """What stands before an answer in training: the template's generation prompt and the block it puts there."""
        published = self._render(messages, True)
        try:
            text, turns = self._turns([*messages, {"role": "assistant", "content": "answer"}])
        except ValueError:  # what the template says of such an answer is no matter of a prompt
            return published
        before = text[: turns[-1].learned[0][0]] if turns[-1].learned else published
        return before if before.startswith(published) else published

    def _training(self, messages: Messages) -> tuple[str, list[Span]]:
        """(rendering, what is learned of it)"""
        text, turns = self._turns(messages)
        can_be_asked = [message["role"] for message in messages[-2:]] == ["user", "assistant"]
        if (
            can_be_asked
            and not self._has_blocks
            and not self._is_asked_so(messages[:-1], text[: turns[-1].learned[0][0]])
        ):
            raise ValueError(
                "the tokenizer's chat_template puts another text before this answer than before one that is asked for, "
                "so the model would learn to answer other prompts than it gets: add {% generation %} blocks to the "
                "template or choose another data.template"
            )
        spoken = [message for message in messages if message["role"] == "assistant"]
        kept = [turn.learned for turn, message in zip(turns, spoken, strict=True) if is_learned(message)]
        return text, [span for spans in kept for span in spans]

    def _is_asked_so(self, question: Messages, before: str) -> bool:
        """Whether ``before`` is the prompt that the model gets when it is asked."""
        return before == self._render(question, True) + self._usual_block or before == self._prompt(question)

    @cached_property
    def _usual_block(self) -> str:
        question = [{"role": "user", "content": "a"}]
        try:
            return self._prompt(question)[len(self._render(question, True)) :]
        except ValueError:
            return ""

    def _turns(self, messages: Messages) -> tuple[str, list[Turn]]:
        """The rendering and each assistant's turn in it."""
        found = self._answers(messages)
        if found is None:
            return self._growth(messages)
        text, turns, blocks = found
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        final = self._answers(messages[: last + 1]) if last + 1 < len(messages) else found
        closing = final[0][final[1][-1].end :] if final else ""  # what the template puts after the last answer
        speakers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        done = 0
        for i, turn in enumerate(turns):
            tail = text[turn.end : turns[i + 1].end if i + 1 < len(turns) else len(text)]
            stop = self._end.search(tail)
            turn.token = stop[0] if stop else None
            stop = stop if self._end.search(closing) else None  # else it is the next turn's
            end = turn.end + (stop.end() if stop else _shared(tail, closing))
            if not self._has_blocks:
                start = self._begin(text, messages[: speakers[i]], turn, done)
                turn.learned = [(start, end)]
            done = end
        for start, end in blocks:
            owner = next((turn for turn in turns if turn.end >= start), turns[-1])
            inside = owner.start is not None and start < owner.start <= end
            start = owner.start if inside and text[start : owner.start].strip() else start
            owner.learned.append((start, end))
        return text, turns

    def _begin(self, text: str, before: Messages, turn: Turn, done: int) -> int:
        """Where an assistant's turn begins to be its own: after the generation prompt, if only blanks stand between
        that and the answer, or if the template took the answer apart; else where the answer begins."""
        if turn.start is not None and not (turn.start and text[turn.start - 1].isspace()):
            return turn.start
        limit = turn.end if turn.start is None else turn.start
        begin = self._end_of_header(text, turn, done)
        if begin is None:
            prompt = self._render(before, True)
            begin = len(prompt)
            if not (text.startswith(prompt) and begin <= limit):  # the template wrote the earlier turns anew
                silent = self._render(before, False)
                header = prompt[len(silent) :] if prompt.startswith(silent) else ""
                found = text.find(header, done, limit) if header else -1
                begin = found + len(header) if found >= 0 else -1
        if turn.start is None:
            if begin < 0:
                raise ValueError(REWRITES)
            return begin
        return begin if begin >= 0 and not text[begin : turn.start].strip() else turn.start

    def _end_of_header(self, text: str, turn: Turn, done: int) -> int | None:
        """Where what ends every prompt stands before an answer, so that the turns before need no rendering of their
        own; None where that cannot be told: the answer is taken apart and might hold such a text itself."""
        limit = turn.end if turn.start is None else turn.start
        found = text.rfind(self._asks, done, limit) if self._asks else -1
        is_sure = turn.start is not None or (
            self._control.search(self._asks) and text.count(self._asks, done, limit) == 1
        )
        return found + len(self._asks) if found >= 0 and is_sure else None

    def _answers(self, messages: Messages) -> tuple[str, list[Turn], list[Span]] | None:
        """(rendering, where each answer stands in it, its generation blocks), by marks that leave it what it is. They
        are put around each answer, or inside the blanks around it, which a template may cut off. None where no marks
        pass through the template."""
        text, marks = self._render_marked(messages)
        places = [place for mark, place in marks if mark in (OPEN, CLOSE)]
        blocks = list(zip(places[::2], places[1::2]))
        number = sum(message["role"] == "assistant" for message in messages)
        tried = []
        for left, right in product(("outer", "inner", "none"), ("outer", "inner")):
            marked = [_with_marks(m, left, right) if m["role"] == "assistant" else m for m in messages]
            if marked in tried:
                continue
            tried.append(marked)
            try:
                found, marks = self._render_marked(marked)
            except ValueError:
                continue
            marks = [(mark, place) for mark, place in marks if mark in (ANSWER, ANSWER_END)]
            order = "".join(mark for mark, _ in marks)
            if found == text and re.fullmatch(f"(?:{ANSWER}?{ANSWER_END}){{{number}}}", order):
                turns, start = [], None
                for mark, place in marks:
                    if mark == ANSWER_END:
                        turns.append(Turn(start, place))
                    start = place if mark == ANSWER else None
                return text, turns, blocks
        return None

    def _growth(self, messages: Messages) -> tuple[str, list[Turn]]:
        """What each assistant's turn adds to the rendering, for templates through which no marks pass."""
        turns, (whole, marks) = [], self._render_marked(messages)
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and not self._has_blocks:
                before, after = self._render(messages[:i], True), self._render(messages[: i + 1], False)
                if not (after.startswith(before) and whole.startswith(after)):
                    raise ValueError(REWRITES)
                found = list(self._control.finditer(after, len(before)))
                closed = found and not after[found[-1].end() :].strip()
                end = found[-1].end() if closed else len(after)
                turns.append(Turn(len(before), end, [(len(before), end)], found[-1][0] if closed else None))
            elif message["role"] == "assistant":
                turns.append(Turn(None, len(whole)))
        places = [place for mark, place in marks if mark in (OPEN, CLOSE)]
        if places and turns:
            if not all(map(is_learned, (m for m in messages if m["role"] == "assistant"))):
                raise ValueError(REWRITES)
            turns[-1].learned = list(zip(places[::2], places[1::2]))
        return whole, turns

    def _render(self, messages: Messages, prompt: bool) -> str:
        return self._render_marked(messages, prompt)[0]

    def _render_marked(self, messages: Messages, prompt: bool = False) -> tuple[str, list[tuple[str, int]]]:
        """(rendering, the marks that stood in it and where), but for those of media, which stay."""
        given = [{"role": message["role"], "content": message["content"]} for message in messages]
        self._environment.begin()
        text, marks = "", []
        with one_line("the tokenizer's chat_template fails"):
            rendered = self._template.render(messages=given, add_generation_prompt=prompt, **self._names)
        for i, part in enumerate(re.split(f"([{ANSWER}{ANSWER_END}{OPEN}{CLOSE}])", rendered)):
            if i % 2:
                marks.append((part, len(text)))
            else:
                text += part
        return text, marks


def _shared(one: str, other: str) -> int:
    """How many characters two texts have in common from their beginning on."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _pieces(text: str, learned: bool) -> Iterator[Piece]:
    kinds = {mark: kind for kind, mark in MARKS.items()}
    for part in re.split(f"([{''.join(kinds)}])", text):
        if part:
            yield Piece(kinds[part], f"<{kinds[part]}>") if part in kinds else Piece("markup", part, learned)


def _with_marks(message: dict[str, str], left: str, right: str) -> dict[str, str]:
    """The message with marks around its text: outside of its blanks, inside of them, or none."""
    text = message["content"]
    core = text.strip()
    lead = text[: len(text) - len(text.lstrip())] if core else text
    trail = text[len(lead) + len(core) :]
    front = {"outer": ANSWER + lead, "inner": lead + ANSWER, "none": lead}[left]
    back = {"outer": trail + ANSWER_END, "inner": ANSWER_END + trail}[right]
    return {**message, "content": front + core + back}


class _Absent(jinja2.Undefined):
    """A special token that the tokenizer lacks: undefined, as in transformers, but nothing where it is added to a
    text."""

    def __add__(self, other: str) -> str:
        return other

    __radd__ = __add__


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}``: the text of an assistant."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        return OPEN + caller() + CLOSE


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter ``tojson``, which escapes no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)

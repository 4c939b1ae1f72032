"""The tokenizer's own chat template, in Jinja, with what is learned marked in its rendering.

What a turn's answer becomes is found by marks, Unicode noncharacters put around it before the template is rendered. So
a template may put a block before an answer (Qwen3's empty ``<think>``), drop it from earlier turns, or end each turn in
its own way. Of the text between the generation prompt and the answer, blanks are learned with it; a block is not: it
belongs to the prompt, in training and when the model is asked. The first control token after an answer ends it. Where
the template ends no turn by a token, the token that begins the next turn does (GLM-4), or the tokenizer's eos, which is
added after the last answer of a conversation that is trained, so that the model learns to stop.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise, product

from avlm.data.text.bounded_jinja import Bounded
from avlm.data.text.jinja_names import CLOSE, OPEN, Absent, Date, Generation, raise_exception, to_json
from avlm.data.text.pieces import MEDIA, TAG, Messages, Piece, is_learned
from avlm.data.text.tokenizer import Tokenizer, one_line

# Unicode noncharacters, which no text may hold.
ANSWER, ANSWER_END = "\ufdd0\ufdd1"  # around an answer
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
    ``end`` of the answer; what is ``learned``; the token that ends the turn, if one does; whether the template itself
    ``closes`` it with a token."""

    start: int | None
    end: int
    learned: list[Span] = field(default_factory=list)
    token: str | None = None
    closes: bool = True


class JinjaTemplate:
    """What is learned: the template's ``{% generation %}`` blocks, without what it puts before the answer in them; in a
    template that has none, each answer up to the control token that ends it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"{tokenizer.file} comes with no chat_template: choose another data.template (generate.py: --raw)"
            )
        self._environment = Bounded(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
        )
        self._environment.filters["tojson"] = self._environment.bounded("tojson", to_json)
        self._environment.globals["raise_exception"] = raise_exception
        absent = {f"{name}_token": Absent(name=f"{name}_token") for name in ("bos", "eos")}
        absent["strftime_now"] = Date(name="strftime_now")
        self._names = {**absent, **tokenizer.names, "tools": None, "documents": None}
        self._eos = tokenizer.eos if tokenizer.eos and tokenizer.find(tokenizer.eos) is not None else None
        with one_line(f"the chat_template of {tokenizer.file.parent} is no Jinja template"):
            self._template = self._environment.from_string(tokenizer.chat_template)
        self._has_blocks = re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template) is not None
        self._control = re.compile("|".join(map(re.escape, tokenizer.control_tokens)) or "(?!)")
        ends = [token for token in tokenizer.added_tokens if token.strip(" \n\t\r▁")]
        self._end = re.compile("|".join(map(re.escape, sorted(ends, key=len, reverse=True))) or "(?!)")
        # Asked here, so that no conversation that is too long for a budget decides what they are.
        self._habits = (self._opening, self._asks, self._usual_block)

    def pieces(self, messages: Messages, prompt: bool, published: bool = False) -> Iterator[Piece]:
        """``published``: a prompt is the template's own, even if an answer of training stands after more than that."""
        self._environment.begin(len(messages))
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
        talk = _talk("system", "user", "assistant", "user", "assistant")
        for messages in (talk[1:], talk[1:3], talk, talk[:3]):
            try:
                turns = self._turns(messages)[1]
            except ValueError:  # some templates write one question and its answer only, or want a system's turn
                continue
            tokens = {turn.token for turn in turns} | (set() if turns[-1].closes else {self._opening})
            return tokens - {None}
        return set()

    @cached_property
    def _opening(self) -> str | None:
        """The token with which the turn after an answer begins, if one does; of templates that end no turn by a
        token."""
        talk = _talk("system", "user", "assistant", "user")
        for messages in (talk[1:], talk):
            try:
                found, final = self._answers(messages), self._answers(messages[:-1])
                text, before = self._render(messages, False), self._render(messages[:-1], False)
            except ValueError:
                continue
            if found and final:
                text, before = found[0][found[1][-1].end :], final[0][final[1][-1].end :]
            rest = self._end.match(text[_shared(text, before) :].lstrip())
            return rest[0] if rest else None
        return None

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
        if is_learned(messages[-1]) and not turns[-1].closes and kept[-1]:
            end = self._opening or self._eos
            if end is None:
                raise ValueError(
                    "the tokenizer's chat_template puts no token after an answer, so the model would never learn to "
                    "stop: name an eos_token in tokenizer_config.json or choose another data.template"
                )
            kept[-1].append((kept[-1][-1][1], len(text) + len(end)))
            text += end
        return text, [span for spans in kept for span in spans]

    def _is_asked_so(self, question: Messages, before: str) -> bool:
        """Whether ``before`` is the prompt that the model gets when it is asked."""
        return before == self._render(question, True) + self._usual_block or before == self._prompt(question)

    @cached_property
    def _usual_block(self) -> str:
        talk = _talk("user", "assistant")
        try:
            if self._answers(talk) is None:
                return ""
            return self._prompt(talk[:1])[len(self._render(talk[:1], True)) :]
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
            turn.closes = self._end.search(closing) is not None  # else the token is the next turn's
            end = turn.end + (stop.end() if stop and turn.closes else _shared(tail, closing))
            if not self._has_blocks:
                start = self._begin(text, messages[: speakers[i]], turn, done)
                turn.learned = [(start, end)]
            done = end
        for start, end in blocks:
            owner = next((turn for turn in turns if turn.end >= start), turns[-1])
            inside = owner.start is not None and start < owner.start <= end
            start = owner.start if inside and text[start : owner.start].strip() else start
            owner.learned.append((start, end))
        for turn in turns:
            if not turn.closes and turn.learned:
                turn.learned += self._next(
                    text, max(turn.learned[-1][1], turn.end + _shared(text[turn.end :], closing))
                )
        return text, turns

    def _next(self, text: str, end: int) -> list[Span]:
        """Where the token that begins the next turn stands after a turn that nothing else ends."""
        found = self._end.search(text, end)
        is_next = found and found[0] == self._opening and not text[end : found.start()].strip()
        return [found.span()] if is_next else []

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
                closes = bool(found) and not after[found[-1].end() :].strip()
                end = found[-1].end() if closes else len(after)
                block = _shared(after[len(before) :], self._usual_block)  # an empty answer may lack blanks at its end
                start = len(before) + (block if block >= len(self._usual_block.rstrip()) else 0)
                opening = [] if closes else self._next(whole, end)
                token = found[-1][0] if closes else self._opening if opening else None
                turns.append(Turn(start, end, [(start, end), *opening], token, closes))
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
        text, marks = "", []
        with one_line("the tokenizer's chat_template fails"):
            rendered = self._template.render(messages=given, add_generation_prompt=prompt, **self._names)
        for i, part in enumerate(re.split(f"([{ANSWER}{ANSWER_END}{OPEN}{CLOSE}])", rendered)):
            if i % 2:
                marks.append((part, len(text)))
            else:
                text += part
        return text, marks


def _talk(*roles: str) -> Messages:
    return [{"role": role, "content": "abcde"[i]} for i, role in enumerate(roles)]


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

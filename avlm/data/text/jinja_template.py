"""The tokenizer's own chat template, in Jinja, with what is learned marked in its rendering.

A template may put a block before an answer (Qwen3's empty ``<think>``), drop it from earlier turns, or end each turn in
its own way. Of the text between the generation prompt and the answer, blanks are learned with it; a block is not: it
belongs to the prompt, in training and when the model is asked. The first control token after an answer ends it. Where
the template ends no turn by a token, the token that begins the next turn does (GLM-4), or the tokenizer's eos, which is
added after the last answer of a conversation that is trained, so that the model learns to stop.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cached_property

from avlm.data.text.jinja_rendering import MARKS, Answer, Renderer, Rendering, Span
from avlm.data.text.pieces import TAG, Messages, Piece, is_learned
from avlm.data.text.tokenizer import Tokenizer

REWRITES = (
    "the tokenizer's chat_template rewrites earlier turns, so what is learned cannot be told: "
    "add {% generation %} blocks to it or choose another data.template"
)


class JinjaTemplate:
    """The parts that are learned are the template's ``{% generation %}`` blocks, without anything before the answer in
    them. In a template that has none, they are the answers, each with the control token that ends it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"{tokenizer.file} comes with no chat_template: choose another data.template (generate.py: --raw)"
            )
        self.renderer = Renderer(tokenizer)
        has_eos = tokenizer.eos is not None and tokenizer.find(tokenizer.eos) is not None
        self._eos = tokenizer.eos if has_eos else None
        self._has_blocks = re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template) is not None
        self._control = _any_of(tokenizer.control_tokens)
        ends = [token for token in tokenizer.added_tokens if token.strip(" \n\t\r▁")]
        self._end = _any_of(sorted(ends, key=len, reverse=True))
        # The template's habits, found out here: no budget of a conversation that is too long decides what they are.
        self._opening = self._find_opening()
        self._header = self._find_header()
        self._usual_block = ""
        self._usual_block = self._find_usual_block()

    def pieces(self, messages: Messages, prompt: bool, published: bool = False) -> Iterator[Piece]:
        """``published``: a prompt is the template's own, even if an answer of training stands after more than that."""
        self.renderer.environment.begin(len(messages))
        marked = []
        for message in messages:
            content = TAG.sub(lambda tag: MARKS[tag[1]], message["content"])
            if found := self._control.search(content):
                raise ValueError(f"text holds the control token {found[0]!r}, which a Jinja template would make real")
            marked.append({**message, "content": content})
        spans: list[Span] = []
        if not prompt:
            text, spans = self._training(marked)
        elif published:
            text = self.renderer.render(marked, True)
        else:
            text = self._prompt(marked)
        done = 0
        for start, end in spans:
            yield from _pieces(text[done:start], learned=False)
            yield from _pieces(text[start:end], learned=True)
            done = end
        yield from _pieces(text[done:], learned=False)

    @cached_property
    def ends(self) -> set[str]:
        """The control tokens that end an assistant's turn, or begin the turn after it; none where plain text does, or
        where the template takes no ordinary conversation."""
        talk = _talk("system", "user", "assistant", "user", "assistant")
        for messages in (talk[1:], talk[1:3], talk, talk[:3]):
            try:
                _, answers = self._turns(messages)
            except ValueError:  # some templates write only one question and its answer, or need a system's turn
                continue
            tokens = {answer.token for answer in answers}
            if not answers[-1].closes:
                tokens.add(self._opening)
            return tokens - {None}
        return set()

    @cached_property
    def block(self) -> str:
        """The text between the template's generation prompt and an answer, in training and in our prompts.
        ValueError if it depends on the conversation."""
        blocks = set()
        for talk in (_talk("user"), _talk("system", "user"), _talk("user", "assistant", "user")):
            try:
                published = self.renderer.render(talk, True)
            except ValueError:  # many templates take no system's turn
                continue
            blocks.add(self._prompt(talk)[len(published) :])
        if len(blocks) > 1:
            raise ValueError(
                "the tokenizer's chat_template puts a different text before an answer in each conversation, which no "
                "generation prompt of an export can do: choose another data.template"
            )
        return blocks.pop() if blocks else ""

    def _find_opening(self) -> str | None:
        """The token with which the turn after an answer begins, if one does; of templates that end no turn by a
        token."""
        talk = _talk("system", "user", "assistant", "user")
        for messages in (talk[1:], talk):
            try:
                longer, shorter = self._after_answer(messages), self._after_answer(messages[:-1])
            except ValueError:
                continue
            opening = self._end.match(longer[_shared(longer, shorter) :].lstrip())
            return opening[0] if opening else None
        return None

    def _after_answer(self, messages: Messages) -> str:
        """The text that the template writes after the last answer; the whole text if no marks pass through it."""
        found = self.renderer.find_answers(messages)
        return found.after_answers if found else self.renderer.render(messages)

    def _find_header(self) -> str:
        """The text with which every prompt ends, after the question; "" if that is only blanks."""
        talk = _talk("system", "user", "assistant", "user")
        backwards = []
        for messages in (_talk("user"), talk[1:2], talk[1:], talk[:2]):
            try:
                backwards.append(self.renderer.render(messages, True)[::-1])
            except ValueError:  # many templates take no system's turn, and some one question only
                continue
        if len(backwards) < 2:
            return ""
        length = min(_shared(backwards[0], other) for other in backwards[1:])
        header = backwards[0][:length][::-1]
        return header if header.strip() else ""

    def _find_usual_block(self) -> str:
        talk = _talk("user", "assistant")
        try:
            if self.renderer.find_answers(talk) is None:
                return ""
            published = self.renderer.render(talk[:1], True)
            return self._prompt(talk[:1])[len(published) :]
        except ValueError:
            return ""

    def _prompt(self, messages: Messages) -> str:
        """The text before an answer in training: the template's generation prompt, and the block it puts there."""
        published = self.renderer.render(messages, True)
        try:
            text, answers = self._turns([*messages, {"role": "assistant", "content": "answer"}])
        except ValueError:  # that the template refuses such an answer does not matter to a prompt
            return published
        if not answers[-1].learned:
            return published
        before = text[: answers[-1].learned_from]
        return before if before.startswith(published) else published

    def _training(self, messages: Messages) -> tuple[str, list[Span]]:
        """The rendering, and the spans of it that are learned."""
        text, answers = self._turns(messages)
        ends_in_answer = [message["role"] for message in messages[-2:]] == ["user", "assistant"]
        if ends_in_answer and not self._has_blocks:
            self._require_asked(messages[:-1], text[: answers[-1].learned_from])
        spoken = [message for message in messages if message["role"] == "assistant"]
        spans = []
        for answer, message in zip(answers, spoken, strict=True):
            if is_learned(message):
                spans += answer.learned
        last = answers[-1]
        if is_learned(messages[-1]) and not last.closes and last.learned:
            # Added, so that the model learns to stop.
            end = self._opening or self._eos
            if end is None:
                raise ValueError(
                    "the tokenizer's chat_template puts no token after an answer, so the model would never learn to "
                    "stop: name an eos_token in tokenizer_config.json or choose another data.template"
                )
            spans.append((last.learned_to, len(text) + len(end)))
            text += end
        return text, spans

    def _require_asked(self, question: Messages, before: str) -> None:
        """Raise ValueError unless ``before``, the text before an answer, is the prompt that the model gets."""
        usual = self.renderer.render(question, True) + self._usual_block
        if before != usual and before != self._prompt(question):
            raise ValueError(
                "the tokenizer's chat_template puts another text before this answer than before one that is asked for, "
                "so the model would learn to answer other prompts than it gets: add {% generation %} blocks to the "
                "template or choose another data.template"
            )

    def _turns(self, messages: Messages) -> tuple[str, list[Answer]]:
        """The rendering and each assistant's turn in it."""
        found = self.renderer.find_answers(messages)
        if found is None:
            return self._growth(messages)
        text, answers = found.text, found.answers
        speakers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        closing = self._closing(messages[: speakers[-1] + 1], len(messages), found)
        closes = self._end.search(closing) is not None  # else the token is the next turn's
        done = 0
        limits = [answer.end for answer in answers[1:]] + [len(text)]
        for i, answer in enumerate(answers):
            tail = text[answer.end : limits[i]]
            stop = self._end.search(tail)
            answer.token = stop[0] if stop else None
            answer.closes = closes
            end = answer.end + (stop.end() if stop and closes else _shared(tail, closing))
            if not self._has_blocks:
                start = self._begin(text, messages[: speakers[i]], answer, done)
                answer.learned = [(start, end)]
            done = end
        _give_blocks(found)
        for answer in answers:
            if answer.learned and not closes:
                end = answer.end + _shared(text[answer.end :], closing)
                answer.learned += self._next(text, max(answer.learned_to, end))
        return text, answers

    def _closing(self, messages: Messages, number: int, found: Rendering) -> str:
        """The text that the template puts after the last answer, with which ``messages`` end. ``found`` is the whole
        conversation of ``number`` messages, rendered."""
        final = found if len(messages) == number else self.renderer.find_answers(messages)
        return final.after_answers if final else ""

    def _next(self, text: str, end: int) -> list[Span]:
        """The span of the token that begins the next turn, if it alone ends this one."""
        found = self._end.search(text, end)
        if found is None or found[0] != self._opening:
            return []
        between = text[end : found.start()]
        return [] if between.strip() else [found.span()]

    def _begin(self, text: str, before: Messages, answer: Answer, done: int) -> int:
        """Where an assistant's turn begins to be its own: after the generation prompt, if only blanks stand between
        that and the answer, or if the template took the answer apart; else where the answer begins. ``done``: the end
        of the turn before."""
        limit = answer.end
        if answer.start is not None:
            limit = answer.start
            if not text[max(limit - 1, 0) : limit].isspace():
                return limit
        begin = self._end_of_header(text, answer, done, limit)
        if begin is None:
            begin = self._end_of_prompt(text, before, done, limit)
        if answer.start is None:
            if begin is None:
                raise ValueError(REWRITES)
            return begin
        has_blanks_only = begin is not None and not text[begin : answer.start].strip()
        return begin if has_blanks_only else answer.start

    def _end_of_header(self, text: str, answer: Answer, done: int, limit: int) -> int | None:
        """The end of the header before an answer, so that the earlier turns need no rendering of their own. None if it
        is not certain: an answer that the template takes apart could contain the header's text itself."""
        header = self._header
        if not header:
            return None
        if answer.start is None and not (self._control.search(header) and text.count(header, done, limit) == 1):
            return None
        found = text.rfind(header, done, limit)
        return found + len(header) if found >= 0 else None

    def _end_of_prompt(self, text: str, before: Messages, done: int, limit: int) -> int | None:
        """The same from a rendering of the earlier turns; None if the template writes them differently there."""
        prompt = self.renderer.render(before, True)
        if text.startswith(prompt) and len(prompt) <= limit:
            return len(prompt)
        silent = self.renderer.render(before)
        if not prompt.startswith(silent):
            return None
        header = prompt[len(silent) :]
        found = text.find(header, done, limit) if header else -1
        return found + len(header) if found >= 0 else None

    def _growth(self, messages: Messages) -> tuple[str, list[Answer]]:
        """Each assistant's turn as the text that it adds to the rendering: for templates that pass no marks."""
        text, blocks = self.renderer.render_blocks(messages)
        answers = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if self._has_blocks:
                answers.append(Answer(None, len(text)))
            else:
                answers.append(self._added(text, messages[: i + 1]))
        if blocks and answers:
            if not all(is_learned(message) for message in messages if message["role"] == "assistant"):
                raise ValueError(REWRITES)
            answers[-1].learned = blocks
        return text, answers

    def _added(self, whole: str, messages: Messages) -> Answer:
        """The last turn of ``messages``, which begin a conversation whose rendering is ``whole``."""
        before = self.renderer.render(messages[:-1], True)
        after = self.renderer.render(messages)
        if not (after.startswith(before) and whole.startswith(after)):
            raise ValueError(REWRITES)
        start, end = len(before), len(after)
        block = _shared(after[start:], self._usual_block)
        if block >= len(self._usual_block.rstrip()):  # an empty answer may lack blanks at its end
            start += block
        found = list(self._control.finditer(after, len(before)))
        if found and not after[found[-1].end() :].strip():
            end = found[-1].end()
            return Answer(start, end, [(start, end)], found[-1][0])
        opening = self._next(whole, end)
        token = self._opening if opening else None
        return Answer(start, end, [(start, end), *opening], token, closes=False)


def _give_blocks(found: Rendering) -> None:
    """Give each generation block to its answer, without anything that the template puts before the answer in it."""
    for start, end in found.blocks:
        owner = next((answer for answer in found.answers if answer.end >= start), found.answers[-1])
        is_inside = owner.start is not None and start < owner.start <= end
        if is_inside and found.text[start : owner.start].strip():
            start = owner.start
        owner.learned.append((start, end))


def _any_of(tokens: Iterable[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def _talk(*roles: str) -> Messages:
    return [{"role": role, "content": text} for role, text in zip(roles, "abcde")]


def _shared(one: str, other: str) -> int:
    """The number of characters that two texts have in common at their beginning."""
    for i, (a, b) in enumerate(zip(one, other)):
        if a != b:
            return i
    return min(len(one), len(other))


def _pieces(text: str, learned: bool) -> Iterator[Piece]:
    kinds = {mark: kind for kind, mark in MARKS.items()}
    for part in re.split(f"([{''.join(kinds)}])", text):
        if part in kinds:
            yield Piece(kinds[part], f"<{kinds[part]}>")
        elif part:
            yield Piece("markup", part, learned)

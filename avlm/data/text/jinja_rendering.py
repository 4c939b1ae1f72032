"""A tokenizer's chat template, rendered, and where each answer stands in the rendering.

An answer is found by marks, Unicode noncharacters put around it before the template is rendered: no text may hold them,
and a template that does not look at them passes them on.
"""

import re
from dataclasses import dataclass, field
from itertools import product

from avlm.data.text.bounded_jinja import Bounded
from avlm.data.text.jinja_names import CLOSE, OPEN, Absent, Date, Generation, raise_exception, to_json
from avlm.data.text.pieces import MEDIA, Messages
from avlm.data.text.tokenizer import Tokenizer, one_line

ANSWER, ANSWER_END = "\ufdd0\ufdd1"
MARKS = dict(zip(MEDIA, "\ufdd2\ufdd3\ufdd4", strict=True))  # in place of media's tags
MARK = re.compile("[\ufdd0-\ufdd6]")
TAKEN_OUT = re.compile(f"([{ANSWER}{ANSWER_END}{OPEN}{CLOSE}])")
Span = tuple[int, int]


@dataclass
class Answer:
    """An assistant's turn in a rendering."""

    start: int | None  # of the answer's text; None: the template takes that apart
    end: int
    learned: list[Span] = field(default_factory=list)
    token: str | None = None  # that ends the turn
    closes: bool = True  # the template itself ends the turn with a token

    @property
    def learned_from(self) -> int:
        return self.learned[0][0]

    @property
    def learned_to(self) -> int:
        return self.learned[-1][1]


@dataclass
class Rendering:
    text: str  # without marks
    answers: list[Answer]
    blocks: list[Span]  # of {% generation %}

    @property
    def after_answers(self) -> str:
        return self.text[self.answers[-1].end :]


class Renderer:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.environment = Bounded(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
        )
        self.environment.filters["tojson"] = self.environment.bounded("tojson", to_json)
        self.environment.globals["raise_exception"] = raise_exception
        self._names = {name: Absent(name=name) for name in ("bos_token", "eos_token")}
        self._names["strftime_now"] = Date(name="strftime_now")
        self._names |= {**tokenizer.names, "tools": None, "documents": None}
        with one_line(f"the chat_template of {tokenizer.file.parent} is no Jinja template"):
            self.template = self.environment.from_string(tokenizer.chat_template)

    def render(self, messages: Messages, prompt: bool = False) -> str:
        """``prompt``: with the template's generation prompt."""
        return self._render_marked(messages, prompt)[0]

    def render_blocks(self, messages: Messages) -> tuple[str, list[Span]]:
        """The rendering and its generation blocks."""
        text, marks = self._render_marked(messages)
        places = [place for mark, place in marks if mark in (OPEN, CLOSE)]
        return text, list(zip(places[::2], places[1::2]))

    def find_answers(self, messages: Messages) -> Rendering | None:
        """The rendering with its answers, by marks that do not change it; None where no marks pass the template.

        Marks are put around each answer, or inside the blanks around it, which a template may cut off.
        """
        text, blocks = self.render_blocks(messages)
        number = sum(message["role"] == "assistant" for message in messages)
        tried = []
        for left, right in product(("outer", "inner", "none"), ("outer", "inner")):
            marked = [_with_marks(message, left, right) for message in messages]
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
                return Rendering(text, _between(marks), blocks)
        return None

    def _render_marked(self, messages: Messages, prompt: bool = False) -> tuple[str, list[tuple[str, int]]]:
        """(rendering, the marks that stood in it and where), except for those of media, which stay."""
        given = [{"role": message["role"], "content": message["content"]} for message in messages]
        with one_line("the tokenizer's chat_template fails"):
            rendered = self.template.render(messages=given, add_generation_prompt=prompt, **self._names)
        text, marks = "", []
        for part in TAKEN_OUT.split(rendered):
            if TAKEN_OUT.fullmatch(part):
                marks.append((part, len(text)))
            else:
                text += part
        return text, marks


def _with_marks(message: dict[str, str], left: str, right: str) -> dict[str, str]:
    """An assistant's message with marks around its text: outside of its blanks, inside of them, or none."""
    if message["role"] != "assistant":
        return message
    text = message["content"]
    core = text.strip()
    lead = text[: len(text) - len(text.lstrip())] if core else text
    trail = text[len(lead) + len(core) :]
    front = {"outer": ANSWER + lead, "inner": lead + ANSWER, "none": lead}
    back = {"outer": trail + ANSWER_END, "inner": ANSWER_END + trail}
    return {**message, "content": front[left] + core + back[right]}


def _between(marks: list[tuple[str, int]]) -> list[Answer]:
    answers = []
    start = None
    for mark, place in marks:
        if mark == ANSWER:
            start = place
        else:
            answers.append(Answer(start, place))
            start = None
    return answers

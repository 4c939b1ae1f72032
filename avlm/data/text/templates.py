"""The chat templates that we know without a tokenizer's own: one table, from which both the pieces of a conversation
and the Jinja text of an export are made.

llama3   <bos><|start_header_id|>ROLE<|end_header_id|>\\n\\nTEXT<|eot_id|>...       (Llama 3, text stripped)
chatml   <|im_start|>ROLE\\nTEXT<|im_end|>\\n...                                    (Qwen, SmolLM2)
mistral  <bos>[INST] TEXT [/INST] TEXT<eos>[INST] ...                               (LLaVA-NeXT, Mistral; text stripped)
smolvlm  <bos>User: TEXT<end_of_utterance>\\nAssistant: TEXT...                     (SmolVLM; no blank before an image)
llava    <bos>SYSTEM USER: TEXT ASSISTANT: TEXT<eos>USER: ...                       (LLaVA 1.5 and NeMo, text stripped)
paligemma  <image>...<bos>TEXT\\n TEXT<eos>   (PaliGemma: one question, after its images, and its answer; text stripped)
plain    <bos>TEXT TEXT<eos>...   no roles and nothing added between the turns      (captions for a base model)
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from avlm.config.values import shown
from avlm.data.text.jinja_rendering import MARKS
from avlm.data.text.pieces import MEDIA, ROLES, TAG, Messages, Piece, is_learned
from avlm.data.text.tokenizer import Tokenizer

CONTROL = r"<\|\w+\|>|<end_of_utterance>"
# {role}, {text}, {bos}, {eos}, {gap} (a blank, but nothing before an image), {images} (a text up to its last image) and
# {rest} (what follows it), and control tokens
FIELD = re.compile(rf"(\{{\w+\}}|{CONTROL})")


@dataclass(frozen=True)
class Turn:
    """A turn is header + text + end. An assistant's text is learned, and a prompt ends with an assistant's header."""

    header: str
    text: str
    end: str = ""


@dataclass(frozen=True)
class Template:
    """``strips``: blanks around a text are cut off; ``single``: a conversation is one question and its answer. A
    control token is one of the tokenizer's, or its {bos} or {eos}; a tokenizer without bos writes none."""

    opening: str
    turns: dict[str, Turn]  # by role
    strips: bool = False
    single: bool = False

    @property
    def control_tokens(self) -> list[str]:
        parts = "".join([self.opening, *(turn.header + turn.text for turn in self.turns.values())])
        return list(dict.fromkeys(re.findall(CONTROL, parts)))

    @property
    def end(self) -> str:
        """The control token that ends an answer."""
        return FIELD.findall(self.turns["assistant"].text)[-1]


def _same(turn: Turn) -> dict[str, Turn]:
    return dict.fromkeys(ROLES, turn)


SMOLVLM_TURNS = {role: Turn(f"{role.capitalize()}:", "{gap}{text}<end_of_utterance>", "\n") for role in ROLES}
LLAVA_TURNS = {
    "system": Turn("", "{text} "),
    "user": Turn("", "USER: {text} "),
    "assistant": Turn("ASSISTANT:", " {text}{eos}"),
}
MISTRAL_TURNS = {
    "system": Turn("", "<<SYS>>\n{text}\n<</SYS>>\n\n"),
    "user": Turn("", "[INST] {text} [/INST]"),
    "assistant": Turn("", " {text}{eos}"),
}
PLAIN_TURNS = {"system": Turn("", "{text}"), "user": Turn("", "{text}"), "assistant": Turn("", "{text}{eos}")}
PALIGEMMA_TURNS = {"user": Turn("", "{images}{bos}{rest}\n"), "assistant": Turn("", "{text}{eos}")}
TEMPLATES = {
    "llama3": Template(
        "<|begin_of_text|>",
        _same(Turn("<|start_header_id|>{role}<|end_header_id|>\n\n", "{text}<|eot_id|>")),
        strips=True,
    ),
    "chatml": Template("", _same(Turn("<|im_start|>{role}\n", "{text}<|im_end|>", "\n"))),
    "mistral": Template("{bos}", MISTRAL_TURNS, strips=True),
    "smolvlm": Template("{bos}", SMOLVLM_TURNS),
    "llava": Template("{bos}", LLAVA_TURNS, strips=True),
    "paligemma": Template("", PALIGEMMA_TURNS, strips=True, single=True),
    "plain": Template("{bos}", PLAIN_TURNS),
}


def pieces(template: Template, messages: Messages, prompt: bool, tokenizer: Tokenizer) -> Iterator[Piece]:
    roles = [message["role"] for message in messages]
    if template.single and roles not in (["user"], ["user", "assistant"]):
        raise ValueError(
            f"this template takes one question and its answer, not turns of {shown(', '.join(roles))}: give each "
            "question a sample of its own, or choose another data.template"
        )
    yield from _parts(template.opening, "", "", tokenizer)
    for message in messages:
        role, text = message["role"], message["content"]
        turn = template.turns[role]
        if template.strips:
            text = text.strip()
        yield from _parts(turn.header, role, text, tokenizer)
        yield from _parts(turn.text, role, text, tokenizer, is_learned(message))
        yield from _parts(turn.end, role, text, tokenizer)
    if prompt:
        yield from _parts(template.turns["assistant"].header, "assistant", "", tokenizer)


def _parts(pattern: str, role: str, text: str, tokenizer: Tokenizer, learned: bool = False) -> Iterator[Piece]:
    """The pieces of one part of a template, its fields filled in."""
    control = {"{bos}": tokenizer.bos, "{eos}": tokenizer.eos}
    for part in FIELD.split(pattern):
        if part == "{text}":
            yield from _content(text, learned)
        elif part in ("{images}", "{rest}"):
            images, tag, rest = text.rpartition("<image>")
            yield from _content(images + tag if part == "{images}" else rest.strip(), learned)
        elif part == "{gap}":
            if not text.startswith("<image>"):
                yield Piece("text", " ", learned)
        elif part == "{role}":
            yield Piece("text", role, learned)
        elif FIELD.fullmatch(part):
            token = control.get(part, part)
            if token:
                yield Piece("control", token, learned)
        elif part:
            yield Piece("text", part, learned)


def _content(text: str, learned: bool) -> Iterator[Piece]:
    """Text with its tags cut out."""
    for i, part in enumerate(TAG.split(text)):
        is_tag = i % 2 == 1
        yield Piece(part, f"<{part}>") if is_tag else Piece("text", part, learned)


JINJA = """\
{{- OPENING -}}
{%- for message in messages -%}
  {%- set role = message.role -%}
  {%- set text -%}
    {%- if message.content is string -%}
      {{- message.content REPLACED -}}
    {%- else -%}
      {%- for part in message.content -%}
        {%- if part.type == 'text' -%}
          {{- part.text -}}
        {%- elif part.type in MEDIA -%}
          {{- MEDIA[part.type] -}}
          {{- '\\n' if not loop.last and loop.nextitem.type == 'text' -}}
        {%- else -%}
          {{- raise_exception('this template knows no part of type ' ~ part.type) -}}
        {%- endif -%}
      {%- endfor -%}
    {%- endif -%}
  {%- endset -%}
  {{- TURN -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ QUESTION }}{% endif -%}
"""


def jinja(name: str, media: dict[str, str]) -> str:
    """A template of the table in Jinja. A turn's content is a text with tags, or a list of texts and media, in which a
    text that follows media begins a line. ``media``: kind -> the token of each that a list may hold."""
    template = TEMPLATES[name]
    question = template.turns["assistant"].header.replace("{role}", "assistant")
    tags = {kind: f"<{kind}>" for kind in MEDIA}
    images = [tags["image"], (tags | media)["image"], MARKS["image"]]  # the last where we render the template ourselves
    values = {
        "OPENING": _expression(template.opening, template.strips),
        "TURN": _turn_expression(template).replace("IMAGES", _tuple(images)),
        "QUESTION": _expression(question, template.strips),
        "MEDIA": json.dumps(media),
        " REPLACED": replaced_tags(media),
    }
    return re.sub("|".join(values), lambda found: values[found[0]], JINJA)


def replaced_tags(media: dict[str, str]) -> str:
    """Filters of Jinja that put what stands for each medium in place of its tag."""
    other = {f"<{kind}>": token for kind, token in media.items() if token != f"<{kind}>"}
    return "".join(f" | replace({json.dumps(tag)}, {json.dumps(token)})" for tag, token in other.items())


def _tuple(texts: list[str]) -> str:
    return f"({', '.join(map(json.dumps, dict.fromkeys(texts)))})"


def _turn_expression(template: Template) -> str:
    patterns = {role: turn.header + turn.text + turn.end for role, turn in template.turns.items()}
    found = {role: _expression(pattern, template.strips) for role, pattern in patterns.items()}
    no_place = "raise_exception('this template has no place for a turn of ' ~ role)"
    system, user, assistant = (found.get(role, no_place) for role in ROLES)
    if system == user == assistant:
        return user
    return f"{assistant} if role == 'assistant' else {user} if role == 'user' else {system}"


def _expression(pattern: str, strips: bool) -> str:
    """A part of a template as an expression of Jinja."""
    names = {"{bos}": "bos_token", "{eos}": "eos_token", "{role}": "role", "{text}": "text"}
    names["{gap}"] = "('' if text.startswith(IMAGES) else ' ')"
    names["{images}"] = "(text | trim).rpartition('<image>')[:2] | join"
    names["{rest}"] = "text.rpartition('<image>')[2] | trim"
    if strips:
        names["{text}"] = "text | trim"
    terms = []
    for part in re.split(r"(\{\w+\})", pattern):
        if part in names:
            terms.append(names[part])
        elif part:
            terms.append("'" + part.replace("\n", "\\n") + "'")
    return " + ".join(terms) or "''"

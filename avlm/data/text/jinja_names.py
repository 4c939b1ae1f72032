"""What transformers adds to Jinja for chat templates: names, the filter ``tojson``, generation blocks."""

import json
from typing import NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension

OPEN, CLOSE = "\ufdd5\ufdd6"  # around a generation block: Unicode noncharacters, which no text may hold


class Absent(jinja2.Undefined):
    """A special token that the tokenizer lacks: undefined, as in transformers, but empty when it is added to a text."""

    def __add__(self, other: str) -> str:
        return other

    __radd__ = __add__


class Date(jinja2.Undefined):
    """``strftime_now``: undefined for a template that tests whether it is defined, and ``Dated`` when it is called."""

    unsafe_callable = alters_data = jinja_pass_arg = None  # what Jinja asks before it calls

    def __call__(self, *args: object, **kwargs: object) -> "Dated":
        return Dated()


class Dated:
    """A text with the date in it: an error where it is written, but not in a system prompt that another replaces."""

    def __add__(self, other: str) -> "Dated":
        return self

    __radd__ = __add__

    def _fail(self, *args: object) -> NoReturn:
        raise jinja2.TemplateError(
            "it asks for the date, which would change a run from day to day: put it into data.system, or write the "
            "date into the template"
        )

    __str__ = __eq__ = __getattr__ = _fail
    __hash__ = None


class Generation(Extension):
    """``{% generation %} ... {% endgeneration %}``: the text of an assistant."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        return OPEN + caller() + CLOSE


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter ``tojson``, which escapes no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

"""Shapes of the command line: ``--shape lengths=4096x4+512,heads=32,kv_heads=8,head_dim=128,causal=1``."""

import dataclasses
from typing import Any


def parse_shape(kind: type[Any], text: str) -> Any:
    """A shape of a suite from NAME=VALUE pairs; what is not given has its default. Numbers of a list stand between
    plus signs, and 4096x4 is 4096 four times. ValueError says what there is."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values = {}
    for pair in text.split(","):
        name, equals, value = pair.partition("=")
        if not equals or name not in fields:
            raise ValueError(f"{pair!r} is none of {', '.join(f'{name}=...' for name in fields)}")
        try:
            values[name] = _value(fields[name].type, value)
        except ValueError as error:
            raise ValueError(f"{pair!r}: {error}") from None
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values]
    if missing:
        raise ValueError(f"{text!r} does not say {', '.join(missing)}")
    return kind(**values)


def _value(kind: Any, text: str) -> Any:
    if kind in (str, int, float):
        return kind(text)
    if kind is bool:
        return bool(int(text))
    numbers: list[int] = []
    for part in text.split("+"):
        number, _, times = part.partition("x")
        numbers += [int(number)] * int(times or 1)
    return tuple(numbers)

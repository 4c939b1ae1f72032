"""Rows of a table as samples: ``data.columns`` makes records of them, and their media are bytes.

    {image: "{image}", question: "What is it?", answer: "{ground_truth.gt_parse}"}

A text holds any number of {column}. What follows a point reaches into what the column holds: a key or a place of
structs, lists and JSON texts. A text that is a single {column} stands for what the row has there; under a key of text
any other value is written as JSON, and under messages, conversations and context a text is read as JSON.

A medium is bytes, {"bytes", "path"} or {"array", "sampling_rate"} in any place of a row. It is never decoded here; of a
path without bytes the file is read from ``data.media_root``, or the folder of the set.
"""

import json
import struct
from collections.abc import Callable
from string import Formatter
from typing import Any

import numpy

from avlm.config.values import shown
from avlm.data.pairs import form_of_pair, with_kind_of_file
from avlm.data.records import FORMS
from avlm.data.sample import Sample, load_json, parse
from avlm.data.text.pieces import MEDIA

# Keys of a record whose values are more than a text.
NOT_TEXT = {*FORMS, "answers", "answer_weights", "history", *MEDIA, *(f"{kind}s" for kind in MEDIA)}
Row = dict[str, Any]
Parts = list[tuple[str, str | None]]  # (literal text, the field that follows it) of a text with {column}


class Columns:
    """How the rows of one set are read.

    columns  the set's entry in ``data.columns``, or None
    names    of the columns that it has
    labels   column -> names of its numbers
    media    reads a file by its path
    """

    def __init__(
        self,
        columns: dict[str, str] | None,
        names: list[str],
        labels: dict[str, list[str]],
        media: Callable[[str], bytes],
    ) -> None:
        self.names = names
        self.labels = labels
        self.media = media
        self._texts: dict[str, Parts] | None = None
        if columns is None:
            self._check_names()
        else:
            self._texts = {key: self._parts(key, text) for key, text in columns.items()}

    @property
    def read(self) -> list[str]:
        """The columns that are read."""
        if self._texts is None:
            return self.names
        fields = {field for parts in self._texts.values() for _, field in parts if field is not None}
        return [name for name in self.names if name in {self._column(field) for field in fields}]

    def sample(self, row: Row, key: str) -> Sample:
        """ValueError for a row that is no record."""
        row = {column: self._named(column, value) for column, value in row.items()}
        record = row
        if self._texts is not None:
            record = {name: self._filled(name, parts, row) for name, parts in self._texts.items()}
        files: dict[str, bytes] = {}
        record = {name: _with_file_names(value, name, files) for name, value in record.items()}

        def read(name: str) -> bytes:
            return files[name] if name in files else self.media(name)

        try:
            return parse(record, read, key)
        except ValueError as error:
            hint = "" if self._texts is not None else " (data.columns can say which columns are read, and as what)"
            raise ValueError(f"{error}{hint}") from None

    def _check_names(self) -> None:
        """Columns that are taken as the keys of a record must be those of one."""
        record = with_kind_of_file(dict.fromkeys(self.names, "a.png"))
        if not any(name in FORMS for name in self.names) and form_of_pair(record) is None:
            raise ValueError(
                f"its columns are {shown(', '.join(self.names))}, which are no record: say what is what by "
                'data.columns, such as {NAME: {image: "{image}", question: What is it?, answer: "{text}"}}'
            )

    def _parts(self, key: str, text: str) -> Parts:
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"data.columns: {key}: {shown(text)} has braces that are no {{column}}: {error}") from None
        for _, field, form, conversion in parts:
            if form or conversion:
                raise ValueError(f"data.columns: {key}: {{{shown(field)}}} must hold a column and keys, nothing else")
            if field is not None and self._column(field) not in self.names:
                raise ValueError(
                    f"data.columns: {key}: there is no column {shown(field)!r}, only {shown(', '.join(self.names))}"
                )
        if text in self.names:
            raise ValueError(f"data.columns: {key}: {text} would be the same text in every sample: write {{{text}}}")
        return [(literal, field) for literal, field, _, _ in parts]

    def _column(self, field: str) -> str:
        """A column's name may hold points itself."""
        return field if field in self.names else field.partition(".")[0]

    def _named(self, column: str, value: Any) -> Any:
        """The name of a class in place of its number; -1 stands for none."""
        if column not in self.labels or not isinstance(value, int):
            return value
        names = self.labels[column]
        if value >= len(names):
            raise ValueError(f"column {column} holds {value}, and its classes are 0 to {len(names) - 1}")
        return names[value] if value >= 0 else None

    def _filled(self, key: str, parts: Parts, row: Row) -> Any:
        if len(parts) == 1 and not parts[0][0]:
            value = self._value(parts[0][1], row)
            if key in FORMS and isinstance(value, str):
                value = _from_json(value, key)
            return value if key in NOT_TEXT or value is None else _as_text(value, key)
        text = ""
        for literal, field in parts:
            text += literal
            if field is not None:
                value = self._value(field, row)
                if value is None:
                    raise ValueError(f"column {field} is empty")
                text += _as_text(value, field)
        return text

    def _value(self, field: str, row: Row) -> Any:
        """What a row has in a column, or in a place of what stands there."""
        column = self._column(field)
        value = row[column]
        rest = field.removeprefix(column).removeprefix(".")
        for key in rest.split(".") if rest else ():
            if isinstance(value, str):
                value = _from_json(value, f"column {column}")
            if isinstance(value, dict) and key in value:
                value = value[key]
            elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
                value = value[int(key)]
            else:
                raise ValueError(f"column {column} has nothing at {shown(field)}: {shown(value, 80)}")
        return value


def _from_json(text: str, where: str) -> Any:
    try:
        return load_json(text.encode())
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None


def _as_text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:
        raise ValueError(f"{where} cannot be a text: {shown(value, 80)}") from None


def _with_file_names(value: Any, place: str, files: dict[str, bytes]) -> Any:
    """A value with the place of each medium as its file name. Adds the bytes to ``files``."""
    if isinstance(value, list):
        return [_with_file_names(each, f"{place}.{i}", files) for i, each in enumerate(value)]
    content = value
    if isinstance(value, dict):
        keys = value.keys()
        if "bytes" in keys and keys <= {"bytes", "path"}:
            content = value["bytes"]
            if content is None:
                return value.get("path")
        elif {"array", "sampling_rate"} <= keys <= {"array", "sampling_rate", "path"}:
            content = _wav(value["array"], value["sampling_rate"])
        else:
            return {key: _with_file_names(each, f"{place}.{key}", files) for key, each in value.items()}
    if not isinstance(content, bytes):
        return value
    files[place] = content
    return place


def _wav(array: Any, sampling_rate: Any) -> bytes:
    """A mono WAV file of float32 samples."""
    if not isinstance(sampling_rate, int | float) or not 1 <= sampling_rate < 2**30:
        raise ValueError(f"an audio array needs its sampling_rate in Hz, not {shown(repr(sampling_rate))}")
    rate = round(sampling_rate)
    try:
        samples = numpy.asarray(array, dtype="<f4")
    except (TypeError, ValueError) as error:
        raise ValueError(f"an audio array must hold numbers: {error}") from None
    if samples.ndim != 1:
        raise ValueError(f"an audio array must have one axis, not the shape {samples.shape}: mix its channels")
    header = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, rate, 4 * rate, 4, 32)  # 3: floats
    data = struct.pack("<4sI", b"data", samples.nbytes) + samples.tobytes()
    return struct.pack("<4sI4s", b"RIFF", 4 + len(header) + len(data), b"WAVE") + header + data

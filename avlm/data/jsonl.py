"""Plain .json or .jsonl files with a media folder next to them: LLaVA's own format, no preparation step."""

import codecs
import json
import re
from array import array
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from avlm.config.run import DataConfig
from avlm.data.media_folder import MediaFolder
from avlm.data.sample import Sample, load_json, parse

BLOCK = 2**22  # bytes of a .json file that are read at once, or more where a record is longer
SPACE = re.compile(r"[ \t\n\r]*")  # between the tokens of JSON


class Records:
    """Records of a file, by number. They stay on disk: what is kept is where each of them lies."""

    def __init__(self, file: str | Path, data: DataConfig) -> None:
        self.file = Path(file)
        if not self.file.is_file():
            raise FileNotFoundError(f"no data file {self.file}")
        self.media = MediaFolder(self.file.parent, data)
        find = _lines_of if self.file.suffix == ".jsonl" else _elements_of
        with self.file.open("rb") as content:
            try:
                self._places = array("q", chain.from_iterable(find(content)))  # (start, length) of each, in bytes
            except ValueError:
                raise self._explained() from None
        if len(self) == 0:
            raise ValueError(f"{self.file} holds no records")

    def __len__(self) -> int:
        return len(self._places) // 2

    def __getitem__(self, number: int) -> dict:
        start, length = self._places[2 * number : 2 * number + 2]
        with self.file.open("rb") as content:
            content.seek(start)
            return self._load(content.read(length))

    def sample(self, number: int) -> Sample:
        return parse(self[number], self.media.read, self.key(number))

    def key(self, number: int) -> str:
        """Counted from 1, as editors count lines."""
        return f"{self.file.name}:{number + 1}"

    def _load(self, text: bytes) -> Any:
        try:
            return load_json(text)
        except ValueError as error:
            raise ValueError(f"{self.file} is not valid JSON: {error}") from None

    def _explained(self) -> ValueError:
        """Why a file is no array of records, in the words of a parser that has read all of it."""
        try:
            whole = self._load(self.file.read_bytes())
        except ValueError as error:
            return error
        if isinstance(whole, list):
            return ValueError(f"{self.file} is not in UTF-8: write it again in this encoding")
        return ValueError(f"{self.file} must hold a list of records, not {type(whole).__name__}")


def _lines_of(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """(start, length) of every line that is not blank; lines end with \\n, \\r\\n or \\r."""
    start = 0
    for line in file:
        parts = [line]
        if b"\r" in line[:-2]:  # strings in JSON hold no raw line break, so it ends a line
            parts = re.split(rb"(?<=\r)(?!\n)", line)
        for part in parts:
            if part.removeprefix(codecs.BOM_UTF8).strip():
                yield start, len(part)
            start += len(part)


def _elements_of(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """(start, length) of every element of the array that a file holds. ValueError if it is no JSON array in UTF-8."""
    scan = json.JSONDecoder().raw_decode
    decode = codecs.getincrementaldecoder("utf-8")("surrogatepass").decode  # as json.loads decodes
    if file.read(3) != codecs.BOM_UTF8:
        file.seek(0)
    delimiter = "["  # before the next element
    text, at, place = "", 0, file.tell()  # text[at:] is still to be read, and begins at this byte of the file
    block = b"not read yet"
    while block:
        block = file.read(max(BLOCK, len(text) - at))
        text, at = text[at:] + decode(block, final=not block), 0
        while text.startswith(delimiter, before := SPACE.match(text, at).end()):
            begin = SPACE.match(text, before + 1).end()
            try:
                _, end = scan(text, begin)
            except (ValueError, RecursionError):  # it continues in the next block, or is wrong
                break
            after = SPACE.match(text, end).end()
            if text[after : after + 1] not in (",", "]"):  # a number continues in the next block, or it is wrong
                break
            length = len(text[begin:end].encode("utf-8", "surrogatepass"))
            yield place + begin - at, length
            place += begin - at + length + after - end
            at, delimiter = after, ","
    if re.sub(SPACE, "", text[at:]) != ("]" if delimiter == "," else "[]"):
        raise ValueError("no array")

"""Plain .json or .jsonl files with a media folder next to them: LLaVA's own format, no preparation step."""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from avlm.config.run import DataConfig
from avlm.data.media_folder import MediaFolder
from avlm.data.sample import Sample, load_json, parse


class Records:
    """Records of a file, by number. Those of a .jsonl file stay on disk."""

    def __init__(self, file: str | Path, data: DataConfig) -> None:
        self.file = Path(file)
        if not self.file.is_file():
            raise FileNotFoundError(f"no data file {self.file}")
        self.media = MediaFolder(self.file.parent, data)
        self._records: list[dict] | None = None
        if self.file.suffix == ".jsonl":
            with self.file.open("rb") as lines:
                self._lines = list(_lines_of(lines))
        else:
            self._records = self._load(self.file.read_bytes())
            if not isinstance(self._records, list):
                raise ValueError(f"{self.file} must hold a list of records, not {type(self._records).__name__}")
        if len(self) == 0:
            raise ValueError(f"{self.file} holds no records")

    def __len__(self) -> int:
        return len(self._lines if self._records is None else self._records)

    def __getitem__(self, number: int) -> dict:
        if self._records is not None:
            return self._records[number]
        start, length = self._lines[number]
        with self.file.open("rb") as lines:
            lines.seek(start)
            return self._load(lines.read(length))

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

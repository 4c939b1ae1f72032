"""Plain .json or .jsonl files with a media folder next to them: LLaVA's own format, no preparation step.

Training reads an endless stream: epoch after epoch, each a permutation made from (seed, epoch). Slot s of S = world x
workers takes the positions s, s + S, s + 2S, ... of that stream, so every sample is read once an epoch for any number
of slots, and the number of samples drawn is a slot's whole state. Validation reads once, in the order of the file.
"""

import codecs
import errno
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.data.sample import Sample, load_json, parse
from avlm.data.stream import Drawn, Stream


class Records:
    """Records of a file, by number. Those of a .jsonl file stay on disk."""

    def __init__(self, file: str | Path, data: DataConfig) -> None:
        self.file = Path(file)
        if not self.file.is_file():
            raise FileNotFoundError(f"no data file {self.file}")
        self.media_root = Path(data.media_root) if data.media_root else self.file.parent
        self.max_media_bytes = data.max_media_bytes
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
        return parse(self[number], self.media, self.key(number))

    def key(self, number: int) -> str:
        """Counted from 1, as editors count lines."""
        return f"{self.file.name}:{number + 1}"

    def media(self, name: str) -> bytes:
        """A file of the media folder, by its name there or its absolute name, which may also lie in the folder of the
        JSON file. Names that lead out of both are refused; symbolic links inside them are followed."""
        path = self._inside(name)
        try:
            if not path.is_file():
                raise ValueError(f"no media file {shown(str(path))}")
            size = path.stat().st_size
            if size > self.max_media_bytes:
                raise ValueError(
                    f"{shown(str(path))} has {size} bytes, more than data.max_media_bytes={self.max_media_bytes}"
                )
            return path.read_bytes()
        except OSError as error:
            if error.errno not in (errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP):
                raise  # a failing disk is not the sample's fault
            raise ValueError(f"media file {shown(str(path))} cannot be read: {error.strerror}") from None

    def _inside(self, name: str) -> Path:
        if name.startswith("//"):  # POSIX keeps two slashes apart from one
            name = "/" + name.lstrip("/")
        path = Path(os.path.normpath(name))
        fix = ""
        if path.is_absolute():
            roots = [self.media_root, self.file.parent]
            # An absolute name may go through a link or past it.
            forms = [os.path.abspath(root) for root in roots] + [os.path.realpath(root) for root in roots]
            if not any(path.is_relative_to(form) for form in forms):
                fix = "set data.media_root to a folder that holds it"
        elif path.parts[:1] == ("..",):
            fix = "set data.media_root to a folder that holds all media, and write names relative to it, without .."
        if fix:
            raise ValueError(f"media name {shown(name)!r} leads out of {self.media_root}: {fix}")
        return self.media_root / path

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


def read_samples(file: str, data: DataConfig) -> Iterator[Sample]:
    records = Records(file, data)
    for number in range(len(records)):
        try:
            yield records.sample(number)
        except ValueError as error:
            raise ValueError(f"{records.key(number)}: {error}") from None


class JsonSamples:
    """The samples that one slot of a stream reads of a file, one by one."""

    def __init__(self, source: str, stream: Stream) -> None:
        self.records = Records(source, stream.data)
        self.stream = stream
        self.drawn = 0
        self._first = 0
        self._epoch = -1
        self._order = torch.empty(0)

    def __len__(self) -> int:
        return len(self.records)

    def start(self, slot: int, state: dict[str, Any]) -> None:
        """Continue a slot of this rank from a state."""
        self._first = self.stream.rank * self.stream.num_workers + slot
        self.drawn = state["drawn"]

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def draw(self) -> Drawn | None:
        """The next sample; None past the end of validation."""
        number = self._number(self._first + self.drawn * self.stream.world * self.stream.num_workers)
        if number is None:
            return None
        self.drawn += 1
        return self.again(number)

    def again(self, place: int) -> Drawn:
        """The sample of a record number."""
        key = self.records.key(place)
        try:
            return Drawn(key, place, self.records.sample(place))
        except ValueError as error:
            return Drawn(key, place, None, str(error))

    def _number(self, position: int) -> int | None:
        """Record at a position of the stream that all slots share; None past the end of validation."""
        epoch, offset = divmod(position, len(self.records))
        if not self.stream.train:
            return offset if epoch == 0 else None
        if epoch != self._epoch:
            # torch seeds with 32 bits and drops the rest: a checksum mixes both numbers into them.
            seed = zlib.crc32(f"{self.stream.seed} {epoch}".encode())
            self._epoch = epoch
            self._order = torch.randperm(len(self.records), generator=torch.Generator().manual_seed(seed))
        return self._order[offset].item()

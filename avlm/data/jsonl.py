"""Plain .json or .jsonl files with a media folder next to them: LLaVA's own format, no preparation step.

Training reads an endless stream: epoch after epoch, each a permutation made from (seed, epoch). Slot s of S = world x
workers takes the positions s, s + S, s + 2S, ... of that stream, so every sample is read once an epoch for any number
of slots. A slot's whole state is its place in the stream and the samples of the rows that it has planned but not yet
handed out. Validation reads once, in the order of the file.
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
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from avlm.config.model import shown
from avlm.config.run import DataConfig
from avlm.data.packing import pack, select
from avlm.data.sample import EncodedSample, Sample, SampleEncoder, load_json, parse
from avlm.data.stream import Stream
from avlm.data.text.tokenizer import Tokenizer
from avlm.models.batch import Batch
from avlm.process import worker

Row = list[tuple[int, EncodedSample]]  # samples that share a row, with their record numbers
Skipped = list[tuple[str, str]]  # (key, reason) of samples that cannot be used


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
        return f"{self.file.name}:{number}"

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


class JsonlLoader:
    """Packed rows of a file. Each iteration continues after the last row that was handed out; validation starts from
    the beginning."""

    def __init__(self, stream: Stream, state: dict[str, Any] | None = None) -> None:
        self.stream = stream
        self._rows = RowStream(stream)
        num_records = len(self._rows.records)
        if state is not None and state["records"] != num_records:
            raise ValueError(
                f"{stream.source} holds {num_records} records, but {state['records']} when the state was written"
            )
        self._turn = state["turn"] if state else 0
        self._slots = list(state["slots"]) if state else self._rows.slots

    def __iter__(self) -> Iterator[Batch]:
        if not self.stream.train:
            self._turn = 0
            self._slots = [START] * len(self._slots)
        self._rows.turn = self._turn
        self._rows.slots = self._slots
        loader = DataLoader(
            self._rows,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self.stream.data.num_workers,  # torch runs each with one thread
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # iter(DataLoader) would draw from the global one
            worker_init_fn=worker.start,
        )
        rows = iter(loader)
        try:
            for slot, batch, state in rows:
                if isinstance(batch, str):
                    raise ValueError(batch)
                self._slots[slot] = state
                self._turn = (slot + 1) % len(self._slots)
                yield batch
        finally:
            worker.end(rows)

    def state(self) -> dict[str, Any]:
        """Plain JSON: where the stream stands after the last row that was handed out."""
        position = {"records": len(self._rows.records), "turn": self._turn, "slots": list(self._slots)}
        return {**self.stream.identity(), **position}


START = {"place": 0, "rows": []}  # of a slot


class RowStream(IterableDataset):
    """What a worker process runs. Yields (slot, row, the slot's state after that row). A string in place of the row is
    an error that ends the run."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.records = Records(stream.source, stream.data)
        self.encoder = SampleEncoder(stream.model, stream.data, Tokenizer(stream.data.tokenizer))
        self.num_workers = max(1, stream.data.num_workers)
        self.turn = 0
        self.slots = [START] * self.num_workers
        self._epoch = -1
        self._order = torch.empty(0)

    def __iter__(self) -> Iterator[tuple[int, Batch | str, dict]]:
        # torch asks process 0 first: after a resume that process takes the slot whose turn it is.
        info = get_worker_info()
        process = info.id if info else 0
        slot = (process + self.turn) % len(self.slots)
        try:
            for batch, state in self._batches(slot, self.slots[slot]):
                yield slot, batch, state
        except ValueError as error:
            yield slot, str(error), {}

    def _batches(self, slot: int, state: dict) -> Iterator[tuple[Batch, dict]]:
        data = self.stream.data
        place = state["place"]
        rows, skipped = self._held(state["rows"])
        while True:
            read = 0
            if len(rows) <= self.stream.train:  # the last row of training is packed again, with what follows
                held = rows.pop() if rows else []
                buffer, bad, read = self._fill(held, slot, place)
                place += read
                skipped += bad
                if not read:
                    return
                lengths = [len(sample) for _, sample in buffer]
                rows = [[buffer[i] for i in row] for row in select(lengths, data.seq_length, data.packing)]
            row = rows.pop(0) if rows else []
            batch = pack([sample for _, sample in row], data.seq_length, self.stream.model, skipped, read)
            skipped = []
            yield batch, {"place": place, "rows": [_numbers(row) for row in rows]}

    def _held(self, numbers: list[list[int]]) -> tuple[list[Row], Skipped]:
        """The rows that a state had planned, and those of their samples that have gone bad since."""
        rows: list[Row] = []
        skipped: Skipped = []
        for row in numbers:
            encoded, bad = self._try(row)
            if encoded:
                rows.append(encoded)
            skipped += bad
        return rows, skipped

    def _try(self, numbers: list[int]) -> tuple[Row, Skipped]:
        """The samples of these numbers that can be used, and the others."""
        good: Row = []
        bad: Skipped = []
        for number in numbers:
            try:
                good.append((number, self.encoder.encode(self.records.sample(number))))
            except ValueError as error:
                bad.append((self.records.key(number), str(error)))
        return good, bad

    def _fill(self, held: Row, slot: int, place: int) -> tuple[Row, Skipped, int]:
        """A full packing buffer: the samples ``held`` back, then those from a place of the slot's stream. Returns
        (good samples, bad ones, how many were read)."""
        first = self.stream.rank * self.num_workers + slot
        num_slots = self.stream.world * self.num_workers
        buffer = list(held)
        skipped: Skipped = []
        read = 0
        while len(buffer) < self.stream.data.packing_buffer:
            number = self._number(first + (place + read) * num_slots)
            if number is None:
                break
            read += 1
            good, bad = self._try([number])
            buffer += good
            skipped += bad
            if self.stream.train and not buffer and len(skipped) >= len(self.records):
                key, reason = skipped[-1]
                raise ValueError(f"no sample of {self.records.file} can be used; {key}: {reason}")
        return buffer, skipped, read

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


def _numbers(row: Row) -> list[int]:
    return [number for number, _ in row]


def _unchanged(item: Any) -> Any:
    return item

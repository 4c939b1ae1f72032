"""Plain .json or .jsonl files with a media folder beside them: LLaVA's own format, no preparation step.

Training reads an endless stream: epoch after epoch, each a permutation made from (seed, epoch). Slot s of S = world x
workers takes the positions s, s + S, s + 2S, ... of that stream, so that every sample is read once an epoch however
many slots there are. A slot's whole state is its place in the stream and the samples of the rows that it has planned
but not yet handed out. Validation reads once, in the order of the file.
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

from avlm.config.model import ModelConfig, shown
from avlm.config.run import DataConfig
from avlm.data.packing import pack, select
from avlm.data.sample import EncodedSample, Sample, SampleEncoder, load_json, parse
from avlm.data.text.tokenizer import Tokenizer
from avlm.models.batch import Batch
from avlm.process import worker

Row = list[tuple[int, EncodedSample]]  # samples that share a row, with their record numbers
ROOT_FORMS = (os.path.abspath, os.path.realpath)  # a whole name may go through a link or past it


class Records:
    """Records of a file, by number; lines of a .jsonl file stay on disk."""

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
        return len(self._lines) if self._records is None else len(self._records)

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
        """A file of the media folder, by its name there or its whole name, which may also lie in the folder of the JSON
        file. Names that lead out of them are refused; symbolic links in them are followed."""
        path = Path(os.path.normpath(f"/{name.lstrip('/')}" if name.startswith("//") else name))
        if path.is_absolute():
            roots = [Path(form(root)) for root in (self.media_root, self.file.parent) for form in ROOT_FORMS]
            if not any(path.is_relative_to(root) for root in roots):
                raise ValueError(
                    f"media name {shown(name)!r} leads out of {self.media_root}: set data.media_root to a folder that "
                    "holds it"
                )
        elif path.parts[:1] == ("..",):
            raise ValueError(
                f"media name {shown(name)!r} leads out of {self.media_root}: set data.media_root to a folder that "
                "holds all media, and write names relative to it, without .."
            )
        path = self.media_root / path
        try:
            if not path.is_file():
                raise ValueError(f"no media file {shown(str(path))}")
            if (size := path.stat().st_size) > self.max_media_bytes:
                raise ValueError(
                    f"{shown(str(path))} has {size} bytes, more than data.max_media_bytes={self.max_media_bytes}"
                )
            return path.read_bytes()
        except OSError as error:
            if error.errno not in (errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP):
                raise  # a disk that fails is no fault of the sample
            raise ValueError(f"media file {shown(str(path))} cannot be read: {error.strerror}") from None

    def _load(self, text: bytes) -> Any:
        try:
            return load_json(text)
        except ValueError as error:
            raise ValueError(f"{self.file} is not valid JSON: {error}") from None


def _lines_of(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """(start, length) of every line that holds more than blanks; lines end with \\n, \\r\\n or \\r."""
    start = 0
    for line in file:
        # No text in JSON holds either of them as it is.
        for part in re.split(rb"(?<=\r)(?!\n)", line) if b"\r" in line[:-2] else [line]:
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
    """Packed rows of a file. Iterating goes on after the last row that was handed out; validation starts anew."""

    def __init__(
        self,
        file: str,
        data: DataConfig,
        model: ModelConfig,
        *,
        rank: int,
        identity: dict[str, Any],
        seed: int,
        train: bool,
        state: dict[str, Any] | None = None,
    ) -> None:
        workers = max(1, data.num_workers)
        records = Records(file, data)
        self.num_workers, self.train = data.num_workers, train
        self.identity = {**identity, "records": len(records)}
        if state is not None and state["records"] != len(records):
            raise ValueError(f"{file} holds {len(records)} records, but {state['records']} when the state was written")
        self._turn = state["turn"] if state else 0
        self._slots = [dict(slot) for slot in state["slots"]] if state else [dict(START) for _ in range(workers)]
        encoder = SampleEncoder(model, data, Tokenizer(data.tokenizer))
        first_slot, num_slots = rank * workers, identity["world"] * workers
        self._rows = RowStream(records, encoder, seed, train, first_slot, num_slots)

    def __iter__(self) -> Iterator[Batch]:
        if not self.train:
            self._turn, self._slots = 0, [dict(START) for _ in self._slots]
        self._rows.turn, self._rows.slots = self._turn, self._slots
        loader = DataLoader(
            self._rows,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.num_workers,  # torch runs each with one thread
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
        return {**self.identity, "turn": self._turn, "slots": [dict(slot) for slot in self._slots]}


START = {"place": 0, "rows": []}


class RowStream(IterableDataset):
    """What a worker process runs. Yields (worker, row, the worker's state after that row). A text in place of the row
    is an error that ends the run."""

    def __init__(
        self, records: Records, encoder: SampleEncoder, seed: int, train: bool, first_slot: int, num_slots: int
    ) -> None:
        self.records, self.encoder, self.seed, self.train = records, encoder, seed, train
        self.first_slot, self.num_slots = first_slot, num_slots
        self.turn, self.slots = 0, [START]
        self._epoch, self._order = -1, torch.empty(0)

    def __iter__(self) -> Iterator[tuple[int, Batch | str, dict]]:
        # torch asks process 0 first: after a resume that process plays the worker whose turn it is.
        info = get_worker_info()
        slot = ((info.id if info else 0) + self.turn) % len(self.slots)
        try:
            for batch, state in self._batches(self.first_slot + slot, self.slots[slot]):
                yield slot, batch, state
        except ValueError as error:
            yield slot, str(error), {}

    def _batches(self, slot: int, state: dict) -> Iterator[tuple[Batch, dict]]:
        data, model = self.encoder.data, self.encoder.model
        place = state["place"]
        rows, skipped = self._held(state["rows"])
        while True:
            read = 0
            if len(rows) <= self.train:  # the last row of training is packed again, with what follows
                held = rows.pop() if rows else []
                buffer, bad, read = self._fill(held, slot, place)
                place, skipped = place + read, skipped + bad
                if not read:
                    return
                lengths = [len(sample) for _, sample in buffer]
                rows = [[buffer[i] for i in row] for row in select(lengths, data.seq_length, data.packing)] or [[]]
            row = rows.pop(0)
            batch = pack([sample for _, sample in row], data.seq_length, model, skipped, read)
            skipped = []
            yield batch, {"place": place, "rows": [[number for number, _ in row] for row in rows]}

    def _held(self, numbers: list[list[int]]) -> tuple[list[Row], list[tuple[str, str]]]:
        """The rows that a state had planned, and (key, reason) of their samples that have gone bad since."""
        rows: list[Row] = []
        skipped: list[tuple[str, str]] = []
        for row in numbers:
            encoded, bad = self._try(row)
            rows += [encoded] if encoded else []
            skipped += bad
        return rows, skipped

    def _try(self, numbers: list[int]) -> tuple[Row, list[tuple[str, str]]]:
        """The samples of these numbers that can be used, and (key, reason) of the others."""
        good: Row = []
        bad: list[tuple[str, str]] = []
        for number in numbers:
            try:
                good.append((number, self.encoder.encode(self.records.sample(number))))
            except ValueError as error:
                bad.append((self.records.key(number), str(error)))
        return good, bad

    def _fill(self, held: Row, slot: int, place: int) -> tuple[Row, list[tuple[str, str]], int]:
        """(good samples, (key, reason) of the bad ones, how many were read) from a place of the slot's stream on; the
        samples ``held`` back go before them."""
        buffer = list(held)
        skipped: list[tuple[str, str]] = []
        read = 0
        while len(buffer) < self.encoder.data.packing_buffer:
            number = self._number(slot + (place + read) * self.num_slots)
            if number is None:
                break
            read += 1
            good, bad = self._try([number])
            buffer += good
            skipped += bad
            if self.train and not buffer and len(skipped) >= len(self.records):
                raise ValueError(f"no sample of {self.records.file} can be used; {skipped[-1][0]}: {skipped[-1][1]}")
        return buffer, skipped, read

    def _number(self, position: int) -> int | None:
        """Record at a position of the stream that all slots share; None past the end of validation."""
        epoch, offset = divmod(position, len(self.records))
        if not self.train:
            return offset if epoch == 0 else None
        if epoch != self._epoch:
            # torch seeds with 32 bits and drops the rest: a checksum mixes both numbers into them.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {epoch}".encode()))
            self._epoch, self._order = epoch, torch.randperm(len(self.records), generator=generator)
        return self._order[offset].item()


def _as_it_is(item: Any) -> Any:
    return item

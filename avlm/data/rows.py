"""Packed rows of JSON files, of hf:// sets and of blends: ``data.train: {a.jsonl: 3, b.jsonl: 1, shards: 2}``.

Slot s of S = world x workers draws samples one by one, packs them, and hands out their rows. Of a blend it draws each
sample from the source that is furthest behind its weight, so that the samples drawn have the shares asked for at any
moment, and samples of all sources share one packing buffer. A slot's whole state is how far it has read each source,
and the samples of the rows that it has planned but not yet handed out. After a resume with other ranks or workers a
worker may read several slots in turn (``avlm.data.redistribute``).
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from avlm.config.run import is_hf, is_json, shares
from avlm.data.captions import Encoder, encoder_of, row_of
from avlm.data.jsonl import Records
from avlm.data.numbered import NumberedSamples
from avlm.data.packing import select
from avlm.data.sample import EncodedSample
from avlm.data.stream import Drawn, Stream
from avlm.models.batch import Batch
from avlm.process import worker

GIVE_UP = 1000  # bad samples without a good one, of a set that does not say how many it has
Place = tuple[int, Any]  # number of the source, and the sample's place in it
Row = list[tuple[Place, EncodedSample]]  # samples that share a row
Skipped = list[tuple[str, str]]  # (key, reason) of samples that cannot be used


class RowLoader:
    """Each iteration continues after the last row that was handed out; validation starts from the beginning."""

    def __init__(self, stream: Stream, state: dict[str, Any] | None = None) -> None:
        if state is not None and "dealt" in state:
            first, end, count = state["dealt"]
            stream = replace(stream, dealt=(range(first, end), count))
        self.stream = stream
        self._rows = RowStream(stream)
        if state is not None:
            self._check_records(state["records"])
        self._turn = state["turn"] if state else 0
        self._slots = list(state["slots"]) if state else self._rows.slots

    def _check_records(self, were: list[int | None]) -> None:
        records = self._rows.num_records
        # A set that streams may say how many records it has at one start and not at another.
        known = [pair for pair in zip(records, were) if None not in pair]
        if len(records) != len(were) or any(now != before for now, before in known):
            counts, before = (" and ".join(map(str, each)) for each in (records, were))
            raise ValueError(f"{self._rows.names} holds {counts} records, but {before} when the state was written")

    def __iter__(self) -> Iterator[Batch]:
        if not self.stream.train:
            self._turn = 0
            self._slots = [self._rows.start] * len(self._slots)
        self._rows.turn = self._turn
        self._rows.slots = self._slots
        loader = DataLoader(
            self._rows,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=min(self.stream.data.num_workers, len(self._slots)),  # torch runs each with one thread
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
                self._turn += 1
                yield batch
        finally:
            worker.end(rows)

    def state(self) -> dict[str, Any]:
        """Plain JSON: where the stream stands after the last row that was handed out."""
        slots = self.stream.slots
        return {
            **self.stream.identity(),
            "records": self._rows.num_records,
            "divisible": self._rows.is_divisible,
            "dealt": [slots.start, slots.stop, self.stream.num_slots],
            "turn": self._turn,  # rows that were handed out
            "slots": list(self._slots),
        }


class RowStream(IterableDataset):
    """What a worker process runs. Yields (slot, row, the slot's state after that row). A string in place of the row is
    an error that ends the run."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.shares = list(shares(stream.source).values())
        self.names = ", ".join(shares(stream.source))
        self.samples = [open_samples_of(source, stream) for source in shares(stream.source)]
        self.num_records = [samples.num_samples for samples in self.samples]
        self.encoder = encoder_of(stream)
        self.start = {"sources": [{"drawn": 0} for _ in self.samples], "rows": []}  # the state of a new slot
        self.turn = 0
        self.slots = [self.start] * len(stream.slots)

    @property
    def is_divisible(self) -> bool:
        """Whether what is left to a slot can be divided between several."""
        return all(isinstance(samples, NumberedSamples) for samples in self.samples)

    def __iter__(self) -> Iterator[tuple[int, Batch | str, dict]]:
        info = get_worker_info()
        processes = info.num_workers if info else 1
        # Row r is of process r % processes. torch asks process 0 first: after a resume it takes the turn of another.
        row = self.turn + (info.id if info else 0)
        own = range(row % processes, len(self.slots), processes)
        slot = own[0]
        try:
            batches = {slot: self.begin(slot).batches(self.slots[slot]["rows"]) for slot in own}
            while True:
                slot = own[row // processes % len(own)]
                found = next(batches[slot], None)
                if found is None:
                    return
                yield slot, *found
                row += processes
        except ValueError as error:
            yield slot, str(error), {}

    def begin(self, slot: int) -> "SlotRows":
        """Continue a slot from its state."""
        own = [copy.copy(samples) for samples in self.samples]
        for samples, state in zip(own, self.slots[slot]["sources"], strict=True):
            samples.start(self.stream.slots[slot], state)
        return SlotRows(self, own)


class SlotRows:
    """The rows of one slot. ``samples``: its own, of each source."""

    def __init__(self, rows: RowStream, samples: list[Any]) -> None:
        self.stream = rows.stream
        self.shares = rows.shares
        self.names = rows.names
        self.num_records = rows.num_records
        self.encoder = rows.encoder
        self.samples = samples

    def draw(self) -> tuple[int, Drawn | None]:
        """The next sample and the number of its source, the one that is furthest behind its share. None past the end of
        validation."""
        total = 1 + sum(samples.drawn for samples in self.samples)
        behind = [share * total - samples.drawn for share, samples in zip(self.shares, self.samples)]
        source = behind.index(max(behind))
        return source, self.samples[source].draw()

    def batches(self, planned: list[list[Place]]) -> Iterator[tuple[Batch, dict]]:
        data = self.stream.data
        rows, skipped = self._held(planned)
        sources = [samples.state() for samples in self.samples]
        while True:
            read = 0
            if len(rows) <= self.stream.train:  # the last row of training is packed again, with what follows
                held = rows.pop() if rows else []
                buffer, bad, read = self._fill(held)
                sources = [samples.state() for samples in self.samples]
                skipped += bad
                if not read:
                    return
                lengths = [sample.room for _, sample in buffer]
                rows = [[buffer[i] for i in row] for row in select(lengths, data.seq_length, data.packing)]
            row = rows.pop(0) if rows else []
            batch = row_of([sample for _, sample in row], self.encoder, skipped, read)
            skipped = []
            yield batch, {"sources": sources, "rows": [_places(row) for row in rows]}

    def _held(self, planned: list[list[Place]]) -> tuple[list[Row], Skipped]:
        """The rows that a state had planned, and those of their samples that have gone bad since."""
        rows: list[Row] = []
        skipped: Skipped = []
        for places in planned:
            row: Row = []
            for source, place in places:
                self._take(source, self.samples[source].again(place), row, skipped)
            if row:
                rows.append(row)
        return rows, skipped

    def _take(self, source: int, drawn: Drawn, good: Row, bad: Skipped) -> None:
        """Encode a sample and add it to ``good``, or to ``bad`` if it cannot be used."""
        try:
            good.append(((source, drawn.place), encoded(drawn, self.encoder)))
        except ValueError as error:
            bad.append((drawn.key, str(error)))

    def _fill(self, held: Row) -> tuple[Row, Skipped, int]:
        """A full packing buffer: the samples ``held`` back, then new ones. Returns (good samples, bad ones, how many
        were read)."""
        buffer = list(held)
        skipped: Skipped = []
        read = 0
        while len(buffer) < self.stream.data.packing_buffer:
            source, drawn = self.draw()
            if drawn is None:
                break
            read += 1
            self._take(source, drawn, buffer, skipped)
            if self.stream.train and not buffer and len(skipped) >= sum(n or GIVE_UP for n in self.num_records):
                key, reason = skipped[-1]
                raise ValueError(f"no sample of {self.names} can be used; {key}: {reason}")
        return buffer, skipped, read


def encoded(drawn: Drawn, encoder: Encoder) -> EncodedSample:
    """ValueError if the sample cannot be used."""
    if drawn.sample is None:
        raise ValueError(drawn.reason)
    return encoder.encode(drawn.sample)


def open_samples_of(source: str, stream: Stream) -> Any:
    """The samples of a source for slots of a stream: ``start`` a copy for each, then ``draw``."""
    if is_json(source):
        return NumberedSamples(Records(source, stream.data), stream)
    if is_hf(source):
        from avlm.data.hf.samples import open_hf  # seconds to import

        return open_hf(source, stream)
    if source.startswith("synthetic"):
        raise ValueError("synthetic rows are whole rows, which no blend can take samples from: leave them out")
    from avlm.data.energon.samples import EnergonSamples  # seconds to import

    return EnergonSamples(source, stream)


def _places(row: Row) -> list[Place]:
    return [place for place, _ in row]


def _unchanged(item: Any) -> Any:
    return item

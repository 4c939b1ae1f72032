"""A set that is read where it lies, from its beginning on: ``streaming=true``.

Each of S slots has shards of its own (files, or parquet's row groups if there are fewer files than
slots), in an order made from (seed, epoch); where there are still fewer, slots share a shard and take every m-th row of
it. Training reads a block of ``data.shuffle_buffer`` rows, hands them out in random order, and reads the next block. So
a slot's state is where its block begins and how many rows of it are handed out, and a resume reads one block again.
"""

import zlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from pyarrow import ArrowException

from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.data.hf.columns import Row
from avlm.data.hf.source import Source, open_set
from avlm.data.hf.table import columns_of
from avlm.data.sample import Sample
from avlm.data.stream import Drawn, Stream

Place = list[int]  # [epoch, number of the shard among the slot's own, number of the slot's row in that shard]
Block = list[tuple[str, Row]]  # (key, row)


class Shards:
    """The shards of a set, and how their rows are read."""

    def __init__(self, source: Source, data: DataConfig, slots: int) -> None:
        self.source = source
        found = open_set(source)
        if found.num_shards < slots:
            found = found.reshard()
        split = (found.info.splits or {}).get(source.split or str(found.split))
        self.num_samples: int | None = split.num_examples if split else None
        self.columns = columns_of(source, found, data)
        found = found.select_columns(self.columns.read)
        self._set = found.decode(False) if found.features else found
        self.count = found.num_shards

    def rows(self, shard: int, first: int = 0, step: int = 1) -> Iterator[tuple[str, Row]]:
        """(key, row) of every ``step``-th row of a shard."""
        # iter() leaves it to us which rows a worker process reads.
        rows = self._set.shard(self.count, shard).skip(first).iter(batch_size=1)
        try:
            for number, row in enumerate(islice(rows, 0, None, step)):
                key = f"{self.source.label}:{shard + 1}:{first + number * step + 1}"
                yield key, {column: value for column, [value] in row.items()}
        except (OSError, HfHubHTTPError, ArrowException, ValueError) as error:
            raise ValueError(f"hf://{self.source.name} cannot be read: {shown(str(error))}") from None


def read_in_order(source: Source, data: DataConfig) -> Iterator[Sample]:
    shards = Shards(source, data, slots=1)
    for shard in range(shards.count):
        for key, row in shards.rows(shard):
            try:
                yield shards.columns.sample(row, key)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None


class StreamedSamples:
    """The samples that one slot of a stream reads, one by one."""

    def __init__(self, source: Source, stream: Stream) -> None:
        self.stream = stream
        self.slots = stream.num_slots
        self.shards = Shards(source, stream.data, self.slots)
        self.block_size = max(1, stream.data.shuffle_buffer) if stream.train else 1
        self.drawn = 0

    @property
    def num_samples(self) -> int | None:
        """None if the set does not say it."""
        return self.shards.num_samples

    def start(self, slot: int, state: dict[str, Any]) -> None:
        """Continue a slot from a state."""
        self.slot = slot
        self.drawn = state["drawn"]
        self._next: Place = state.get("at", [0, 0, 0])  # where the next block begins
        self._rows = self._rows_from(self._next)
        self._block: Block = []
        self._begin = self._next
        self._taken = 0
        self._kept: dict[tuple[int, ...], Block] = {}
        self._left_out = state.get("taken", 0)

    def state(self) -> dict[str, Any]:
        if self._taken == len(self._block):
            return {"drawn": self.drawn, "at": self._next, "taken": self._left_out}
        return {"drawn": self.drawn, "at": self._begin, "taken": self._taken}

    def draw(self) -> Drawn | None:
        """The next sample; None past the end of validation."""
        self._kept = {}
        while self._taken == len(self._block):
            if not self._read_block():
                return None
        number = self._order[self._taken]
        self._taken += 1
        self.drawn += 1
        return self._drawn(self._begin, self._block, number)

    def again(self, place: list) -> Drawn:
        """The sample at (where its block begins, its number there)."""
        begin, number = place
        block = self._kept.get(tuple(begin))
        if block is None:
            block = [row for _, row in self._block_of(self._rows_from(begin))]
            self._kept[tuple(begin)] = block
        return self._drawn(begin, block, number)

    def _drawn(self, begin: Place, block: Block, number: int) -> Drawn:
        key, row = block[number]
        try:
            return Drawn(key, [begin, number], self.shards.columns.sample(row, key))
        except ValueError as error:
            return Drawn(key, [begin, number], None, str(error))

    def _read_block(self) -> bool:
        """Read the next block; False past the end of validation."""
        rows = self._block_of(self._rows)
        self._begin = self._next
        self._block = [row for _, row in rows]
        self._taken, self._left_out = self._left_out, 0
        if rows:
            epoch, shard, number = rows[-1][0]
            self._next = [epoch, shard, number + 1]
            self._order = self._order_of_block()
            return True
        if not self.stream.train:
            return False
        epoch, *rest = self._next
        if not any(rest):
            raise ValueError(
                f"hf://{self.shards.source.name} has too few rows: one of {self.slots} workers (ranks x "
                "data.num_workers) has none"
            )
        self._next = [epoch + 1, 0, 0]
        self._rows = self._rows_from(self._next)
        return True

    def _block_of(self, rows: Iterator[tuple[Place, tuple[str, Any]]]) -> list[tuple[Place, tuple[str, Any]]]:
        """The next rows, up to the number and the bytes of a block."""
        block: list[tuple[Place, tuple[str, Any]]] = []
        held = 0
        while len(block) < self.block_size and held < self.stream.data.shuffle_buffer_bytes:
            row = next(rows, None)
            if row is None:
                break
            block.append(row)
            held += _num_bytes(row[1])
        return block

    def _order_of_block(self) -> list[int]:
        if not self.stream.train:
            return list(range(len(self._block)))
        generator = _generator(self.stream.seed, self.slot, *self._begin)
        return torch.randperm(len(self._block), generator=generator).tolist()

    def _rows_from(self, place: Place) -> Iterator[tuple[Place, tuple[str, Row]]]:
        """(place, (key, row)) of the slot's rows, from a place to the end of its epoch."""
        epoch, begin, number = place
        for own, (shard, first, step) in islice(enumerate(self._parts(epoch)), begin, None):
            for row in self.shards.rows(shard, first + number * step, step):
                yield [epoch, own, number], row
                number += 1
            number = 0

    def _parts(self, epoch: int) -> list[tuple[int, int, int]]:
        """(shard, first row, step) of what the slot reads in an epoch."""
        count = self.shards.count
        if count < self.slots:
            shard = self.slot % count
            return [(shard, self.slot // count, len(range(shard, self.slots, count)))]
        order = list(range(count))
        if self.stream.train:
            order = torch.randperm(count, generator=_generator(self.stream.seed, epoch)).tolist()
        return [(shard, 0, 1) for shard in order[self.slot :: self.slots]]


def _generator(*numbers: int) -> torch.Generator:
    """torch seeds with 32 bits and drops the rest: a checksum mixes all numbers into them."""
    return torch.Generator().manual_seed(zlib.crc32(" ".join(map(str, numbers)).encode()))


def _num_bytes(value: Any) -> int:
    """Of the texts and files in a row."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_num_bytes, value.values()))
    return sum(map(_num_bytes, value)) if isinstance(value, list | tuple) else 0

"""Samples of a source that finds each by its number: a file of records, or a table.

Training reads an endless stream: epoch after epoch, each a permutation made from (seed, epoch). Slot s of S takes the
positions s, s + S, s + 2S, ... of that stream, so every sample is read once an epoch for any number of slots, and its
next position is a slot's whole state. A slot can be divided: the positions that are left to it are dealt out to several
in turn. Validation reads once, in the order of the source.
"""

import zlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from avlm.data.sample import Sample
from avlm.data.stream import Drawn, Stream


class Numbered(Protocol):
    """``sample`` raises a one-line ValueError for one that cannot be read."""

    def __len__(self) -> int: ...
    def sample(self, number: int) -> Sample: ...
    def key(self, number: int) -> str: ...


def in_order(records: Numbered) -> Iterator[Sample]:
    for number in range(len(records)):
        try:
            yield records.sample(number)
        except ValueError as error:
            raise ValueError(f"{records.key(number)}: {error}") from None


def divided(state: dict[str, Any], slot: int, num_slots: int, parts: int) -> list[dict[str, Any]]:
    """The states of the slots that a slot of ``num_slots`` becomes: the same one, and those that are ``num_slots``,
    2 ``num_slots``, ... further of ``parts`` times as many."""
    begin = state.get("next", slot + state["drawn"] * num_slots)
    return [{"drawn": state["drawn"], "next": begin + part * num_slots} for part in range(parts)]


class NumberedSamples:
    """The samples that one slot of a stream reads, one by one."""

    def __init__(self, records: Numbered, stream: Stream) -> None:
        self.records = records
        self.stream = stream
        self.drawn = 0
        self._next = 0
        self._epoch = -1
        self._order = torch.empty(0)

    @property
    def num_samples(self) -> int:
        return len(self.records)

    def start(self, slot: int, state: dict[str, Any]) -> None:
        """Continue a slot from a state."""
        self.drawn = state["drawn"]
        self._next = state.get("next", slot + self.drawn * self.stream.num_slots)

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "next": self._next}

    def draw(self) -> Drawn | None:
        """The next sample; None past the end of validation."""
        number = self._number(self._next)
        if number is None:
            return None
        self.drawn += 1
        self._next += self.stream.num_slots
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

"""Packed rows on their way from the rank that loads them to the ranks that work on them.

Tokens, lengths and every index go to all ranks of the row, as 32-bit integers. Pixels and sound go from the rank that
loaded them to the rank that encodes them (``avlm.parallel.media``), and to no other. All of it goes over the host, by
communicators of its own: the rows of the next step are under way while this one computes.
"""

import functools
import io
import itertools
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from avlm.config.model import ModelConfig
from avlm.models.batch import Batch
from avlm.parallel.apply import own_part
from avlm.parallel.mesh import World
from avlm.parallel.pairs import joined

ALIGNMENT = 8  # bytes: tensors of any dtype begin at a multiple of it


@dataclass(frozen=True)
class Row:
    """A row of training, as one of its ranks has it.

    batch         the whole row; its media have no values but on the rank that loaded it
    part          what this rank works on
    loader_state  the state of the loader after this row; {} on other ranks than the one that loaded it
    """

    batch: Batch
    part: Batch
    loader_state: Callable[[], dict[str, Any]]


class TrainingRows(Iterator[Row]):
    """The rows of ``loader``, which is None on ranks that lead no row. Where ranks share them, ``ahead`` rows are
    fetched in a thread before they are asked for. Every rank asks for as many, so none waits for another in vain."""

    def __init__(self, loader: Any, model: ModelConfig, world: World, ahead: int) -> None:
        self.rows = _with_parts(loader, model, world)
        self.ahead = ahead
        self.watch = world.watch
        self.thread = None
        self.coming: deque[Future[Row | None]] = deque()
        if world.shares_rows:
            self.rows = _noted(self.rows)
            self.thread = world.thread("rows")

    def __next__(self) -> Row:
        if self.thread is None:
            return next(self.rows)
        while len(self.coming) <= self.ahead:
            self.coming.append(self.thread.submit(next, self.rows, None))
        row = self.watch.result(self.coming.popleft(), "rows")
        if row is None:
            raise StopIteration
        return row

    def settle(self) -> None:
        """Wait for the rows that are under way, so that other rows (of validation, of the next stage) may be sent over
        the same communicators: what two threads send would arrive mixed up. Raises what fetching them raised: other
        ranks wait for that row in vain until this one ends."""
        for row in self.coming:
            self.watch.result(row, "rows")


def _with_parts(loader: Any, model: ModelConfig, world: World) -> Iterator[Row]:
    for batch in share_rows(loader, world):
        yield Row(batch, own_part(batch, model, world), loader.state if world.leads_row else dict)


def _noted(rows: Iterator[Row]) -> Iterator[Row]:
    """The same rows with states taken at once: the loader has moved on when they are asked for."""
    for row in rows:
        state = row.loader_state()
        yield replace(row, loader_state=functools.partial(dict, state))


def of_a_step(parts: list[Batch], model: ModelConfig, world: World) -> list[Batch]:
    """The micro-batches of a rank as they are computed: those of a contrastive stage as one, which knows how many pairs
    each rank has. All ranks call this together."""
    if parts[0].pairs is None:
        return parts
    row = joined(parts, model)
    own = [0] * world.size
    own[world.rank] = len(row.target_R)
    counts = tuple(int(count) for count in world.sum(own))
    return [replace(row, pairs=replace(row.pairs, counts=counts))]


def share_rows(rows: Iterable[Batch] | None, world: World) -> Iterator[Batch]:
    """Hand the leading rank's rows to every rank that works on them; the others pass None, and get media without
    values."""
    own: Iterator[Batch | None] = iter(rows) if world.leads_row else itertools.repeat(None)
    while True:
        batch = next(own, None)
        if world.row_group is not None:
            batch = _broadcast(batch, world.row_group)
        if batch is None:
            return
        yield batch


def _broadcast(batch: Batch | None, group: dist.ProcessGroup) -> Batch | None:
    """What rank 0 of a group passes, on all its ranks, media values excepted."""
    if group.rank() > 0:
        sizes = torch.empty(2, dtype=torch.int64)
        dist.broadcast(sizes, group=group, group_src=0)
        message = torch.empty(int(sizes.sum()), dtype=torch.uint8)
        dist.broadcast(message, group=group, group_src=0)
        return _read(message, int(sizes[0]))
    message, start = _message(batch and _without_values(batch))
    dist.broadcast(torch.tensor([start, len(message) - start]), group=group, group_src=0)
    dist.broadcast(message, group=group, group_src=0)
    return batch


def _without_values(batch: Batch) -> Batch:
    return replace(batch, **{name: replace(media, values=media.values[:0]) for name, media in batch.media.items()})


class _Pickler(pickle.Pickler):
    """Leaves tensors out and collects them, each once."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self.places: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self.places:
            self.places[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self.places[id(value)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, place: int) -> Tensor:
        return self.tensors[place]


def _message(value: Any) -> tuple[Tensor, int]:
    """uint8: a value, then its tensors one after the other; and where these begin. int64 travels as int32: ids, rows
    and counts of a row fit."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    narrow = [tensor.int() if tensor.dtype == torch.int64 else tensor for tensor in pickler.tensors]
    facts = [(tensor.dtype, tensor.shape) for tensor in pickler.tensors]
    head = pickle.dumps((facts, file.getvalue()))
    pieces = [torch.frombuffer(bytearray(_padded(head)), dtype=torch.uint8)]
    for tensor in narrow:
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        pieces += [flat, torch.zeros(-len(flat) % ALIGNMENT, dtype=torch.uint8)]
    return torch.cat(pieces), len(pieces[0])


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % ALIGNMENT)


def _read(message: Tensor, start: int) -> Any:
    facts, value = pickle.loads(message[:start].numpy().tobytes())
    tensors = []
    for dtype, shape in facts:
        sent_as = torch.int32 if dtype == torch.int64 else dtype
        end = start + shape.numel() * sent_as.itemsize
        tensors.append(message[start:end].view(sent_as).view(shape).to(dtype))
        start = end + -end % ALIGNMENT
    return _Unpickler(io.BytesIO(value), tensors).load()

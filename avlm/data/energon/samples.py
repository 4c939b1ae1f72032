"""Samples of Megatron-Energon: sharded WebDatasets and blends of them.

A dataset is a folder that ``energon prepare`` or ``python -m avlm.data.shard`` prepared, of class CrudeWebdataset: a
sample is KEY.json, a record of one of the forms of ``sample.parse``, and the parts KEY.NAME that it names. A blend is a
MetadatasetV2 YAML of datasets. Samples reach us as bytes, no Python of a dataset folder is run, and state travels as
JSON, never as pickle.
"""

import gc
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    SavableDataset,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    errors,
    get_train_dataset,
    get_val_dataset,
    stateless,
)
from megatron.energon import Sample as EnergonSample
from megatron.energon.cache import NoCachePool
from megatron.energon.errors import FatalSampleError, reraise_exception
from megatron.energon.flavors import EmptyDatasetError
from megatron.energon.savable_loader import SimpleSavableDatasetWrapper

from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.data.energon.source import bytes_per_sample, check_source, count_samples, path_of
from avlm.data.energon.state import from_json, to_json
from avlm.data.sample import Sample, load_json, parse
from avlm.data.stream import Drawn, Stream

errors.print = lambda *texts, **options: None  # Energon prints what our handler raises

SAMPLES_PER_SLICE = 100  # samples that are read in sequence before the reader jumps to another place of the shards
# What Energon raises for damaged shards, indexes or blends.
DAMAGE = (ValueError, AssertionError, RuntimeError, LookupError, OSError, ArithmeticError, tarfile.TarError)
EMPTY = ("empty dataset", "all empty datasets", "no samples in any")  # what Energon says of a worker without samples


@edataclass
class Raw(EnergonSample):
    parts: dict[str, bytes]


@stateless
def cook(crude: dict) -> Raw:
    parts = {name: part for name, part in crude.items() if isinstance(part, bytes)}
    return Raw(**basic_sample_keys(crude), parts=parts)


def to_sample(raw: Raw) -> Sample:
    """ValueError if the record is broken or names a part that is not there."""
    return parse(load_json(_part(raw.parts, "json")), lambda name: _part(raw.parts, name), raw.__key__)


class RawEncoder(DefaultTaskEncoder):
    """Leaves samples as the shards hold them."""

    decoder = None  # raw bytes: Energon decodes nothing
    cookers = [Cooker(cook)]


def read_samples(source: str) -> Iterator[Sample]:
    """Every sample of a validation source, in order."""
    check_source(path_of(source))
    one_reader = WorkerConfig(rank=0, world_size=1, num_workers=0, global_error_handler=reraise_exception)
    samples = iter(_numbered(open_dataset(source, train=False, worker_config=one_reader, task_encoder=RawEncoder())))
    while True:
        try:
            _, _, raw = next(samples, (0, 0, None))
        except DAMAGE as error:
            raise ValueError(f"{source} is damaged: {shown(last_line(error))}") from None
        if raw is None:
            return
        try:
            yield to_sample(raw)
        except ValueError as error:
            raise ValueError(f"{source}, {raw.__key__}: {error}") from None


@dataclass(slots=True, kw_only=True, eq=False)
class SlotConfig(WorkerConfig):
    """Whose samples a process reads, whatever its own number is: Energon counts one rank with a worker for each slot of
    the run."""

    slot: int = 0

    def rank_worker_id(self) -> int:
        return self.slot

    def assert_worker(self) -> None:
        pass


class EnergonSamples:
    """The samples that one slot of a training stream reads, one by one, inside a worker process of ours. Copies are for
    other slots."""

    def __init__(self, source: str, stream: Stream) -> None:
        check_source(path_of(source))
        self.source = source
        self.stream = stream
        self.drawn = 0
        self._unused = [self._open()]  # by the first copy that is started

    @property
    def num_samples(self) -> int:
        return count_samples(path_of(self.source), "train")

    def start(self, slot: int, state: dict[str, Any]) -> None:
        """Continue a slot from a state."""
        self.drawn = state["drawn"]
        self._samples = self._unused.pop() if self._unused else self._open()
        self._samples.worker_config.slot = slot
        if "energon" in state:
            self._samples.restore_state(from_json(state["energon"]))
        self._rows = iter(self._samples)

    def state(self) -> dict[str, Any]:
        state = {"drawn": self.drawn}
        if self.drawn:
            state["energon"] = to_json(self._samples.save_state())
        return state

    def draw(self) -> Drawn:
        """The next sample of the endless stream."""
        try:
            _, _, raw = next(self._rows)
        except DAMAGE as error:
            raise self._explained(error) from error
        self.drawn += 1
        return _drawn(raw)

    def again(self, place: Any) -> Drawn:
        """The sample at a place."""
        try:
            return _drawn(self._samples.restore_sample(from_json(place)))
        except DAMAGE as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> Exception:
        return explained(error, self.source, self.stream) or error

    def _open(self) -> SimpleSavableDatasetWrapper:
        stream = self.stream
        slots = SlotConfig(
            rank=0,
            world_size=1,
            num_workers=stream.num_slots,
            seed_offset=stream.seed,
            global_error_handler=reraise_exception,
        )
        settings = options(stream) | {"worker_config": slots}
        return _numbered(open_dataset(self.source, **settings, task_encoder=RawEncoder()))


def _drawn(raw: Raw) -> Drawn:
    place = to_json(raw.__restore_key__)
    try:
        return Drawn(raw.__key__, place, to_sample(raw))
    except ValueError as error:
        return Drawn(raw.__key__, place, None, str(error))


def _numbered(dataset: SavableDataset) -> SimpleSavableDatasetWrapper:
    """The dataset read in this process: (worker, number, sample). It can save its state and restore a sample."""
    return SimpleSavableDatasetWrapper(dataset, dataset.worker_config, NoCachePool())


def shuffled_samples(source: str, data: DataConfig) -> int:
    """How many samples a worker shuffles: as many as ``data`` says, or those that fill its bytes."""
    bound = data.shuffle_buffer_bytes / max(bytes_per_sample(path_of(source), "train"), 1)
    return min(data.shuffle_buffer, max(int(bound), 1))


def options(stream: Stream) -> dict[str, Any]:
    """How Energon reads a stream."""
    workers = WorkerConfig(
        rank=stream.rank,
        world_size=stream.world,
        num_workers=stream.data.num_workers,
        seed_offset=stream.seed,
        global_error_handler=reraise_exception,
    )
    found: dict[str, Any] = {"train": stream.train, "worker_config": workers}
    if stream.train:
        found["shuffled"] = stream.data
        found["max_samples_per_sequence"] = SAMPLES_PER_SLICE
    return found


def open_dataset(source: str, *, train: bool, shuffled: DataConfig | None = None, **settings: Any) -> SavableDataset:
    """``shuffled``: whose buffers bound what training shuffles."""
    get_dataset = get_train_dataset if train else get_val_dataset
    try:
        if shuffled is not None:
            settings["shuffle_buffer_size"] = shuffled_samples(source, shuffled)
        dataset = get_dataset(source, batch_size=None, **settings)
    except (*DAMAGE, TypeError, AttributeError, EmptyDatasetError) as error:
        split = "train" if train else "val"
        fix = f"python -m avlm.data.shard FILE {source} --split {split} adds one"
        raise ValueError(
            f"{source} has no split {split!r} that Energon can read ({fix}): {shown(str(error))}"
        ) from error
    # Energon has caught an exception whose traceback keeps our callers' frames in a cycle. Unless it is collected here,
    # dropping a loader does not call __del__.
    gc.collect()
    return dataset


def explained(error: Exception, source: str, stream: Stream) -> ValueError | None:
    """One line for a fault of the data; None for a fault of the code, which Energon calls fatal."""
    if any(words in str(error) for words in EMPTY):
        return ValueError(
            f"{source} has too few samples: one of {stream.num_slots} workers (ranks x data.num_workers) has none"
        )
    if isinstance(error, FatalSampleError):
        return None
    if isinstance(error, ValueError):
        return ValueError(f"{source}: {last_line(error)}")
    if isinstance(error, LookupError | OSError | ArithmeticError | tarfile.TarError):
        return ValueError(f"{source} is damaged: {shown(last_line(error))}")
    return None


def _part(parts: dict[str, bytes], name: str) -> bytes:
    if name not in parts:
        raise ValueError(f"sample has no part {name!r}, only {', '.join(sorted(parts))}")
    return parts[name]


def last_line(error: Exception) -> str:
    """What went wrong. The text of a worker process's error holds that process's traceback."""
    text = str(error).strip()
    if not text.startswith("Caught "):
        return text
    _, _, message = text.splitlines()[-1].partition(": ")
    return message

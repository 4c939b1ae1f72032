"""Megatron-Energon: sharded WebDatasets and blends of them, with the same encoding and packing as for other sources.

A dataset is a folder that ``energon prepare`` prepared, of class CrudeWebdataset: a sample is KEY.json, a record of one
of the forms of ``sample.parse``, and the parts KEY.NAME that it names. A blend is a MetadatasetV2 YAML of datasets.
Samples reach us as bytes, no Python of a dataset folder is run, and state travels as JSON, never as pickle.

A bad sample is not dropped on the spot: a record of it travels through the packing buffer and is counted with the row
it ends up in, so that counts survive a resume.
"""

import functools
import gc
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    SavableDataLoader,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    get_train_dataset,
    get_val_dataset,
    stateless,
)
from megatron.energon import Sample as EnergonSample
from megatron.energon.errors import FatalSampleError, reraise_exception
from megatron.energon.flavors import EmptyDatasetError
from megatron.energon.wrappers.buffer import SavableSampleBuffer

from avlm.config.model import shown
from avlm.data.energon.source import check_source
from avlm.data.energon.state import from_json, to_json
from avlm.data.packing import pack, select
from avlm.data.sample import EncodedSample, Sample, SampleEncoder, load_json, parse
from avlm.data.stream import Stream
from avlm.data.text.tokenizer import Tokenizer
from avlm.models.batch import Batch
from avlm.process import worker

SAMPLES_PER_SLICE = 100  # samples that are read in sequence before the reader jumps to another place of the shards
# What Energon raises for damaged shards, indexes or blends.
DAMAGE = (ValueError, AssertionError, RuntimeError, LookupError, OSError, ArithmeticError, tarfile.TarError)
EMPTY = ("empty dataset", "all empty datasets", "no samples in any")  # what Energon says of a worker without samples


@edataclass
class Raw(EnergonSample):
    parts: dict[str, bytes]


@edataclass
class Encoded(EnergonSample):
    """A sample, or the reason why there is none."""

    sample: EncodedSample | None
    reason: str


@edataclass
class Packed(EnergonSample):
    batch: Batch


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
    check_source(Path(source))
    one_reader = WorkerConfig(rank=0, world_size=1, num_workers=0, global_error_handler=reraise_exception)
    samples = iter(_loader(source, train=False, worker_config=one_reader, task_encoder=RawEncoder()))
    while True:
        try:
            raw = next(samples, None)
        except DAMAGE as error:
            raise ValueError(f"{source} is damaged: {shown(_last_line(error))}") from None
        if raw is None:
            return
        try:
            yield to_sample(raw)
        except ValueError as error:
            raise ValueError(f"{source}, {raw.__key__}: {error}") from None


class TaskEncoder(RawEncoder):
    """Energon's hooks, in the order in which it calls them."""

    def __init__(self, encoder: SampleEncoder, train: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.train = train

    @stateless
    def encode_sample(self, raw: Raw) -> Encoded:
        sample = None
        reason = ""
        try:
            sample = self.encoder.encode(to_sample(raw))
        except ValueError as error:
            reason = str(error)
        return Encoded.derive_from(raw, sample=sample, reason=reason)

    def select_samples_to_pack(self, samples: list[Encoded]) -> list[list[Encoded]]:
        good = [entry for entry in samples if entry.sample is not None]
        bad = [entry for entry in samples if entry.sample is None]
        if self.train and not good:
            raise ValueError(f"none of {len(bad)} samples can be used; {bad[0].__key__}: {bad[0].reason}")
        lengths = [len(entry.sample) for entry in good]
        selected = select(lengths, self.encoder.data.seq_length, self.encoder.data.packing)
        rows = [[good[i] for i in row] for row in selected] or [[]]
        for i, entry in enumerate(bad):  # spread, so that no row seems to be mostly bad
            rows[i % len(rows)].append(entry)
        return rows

    @stateless
    def pack_selected_samples(self, samples: list[Encoded]) -> Packed:
        skipped = [(entry.__key__, entry.reason) for entry in samples if entry.sample is None]
        good = [entry.sample for entry in samples if entry.sample is not None]
        batch = pack(good, self.encoder.data.seq_length, self.encoder.model, skipped, read=len(samples))
        key = batch.keys[0] if batch.keys else ""
        return Packed(__key__=key, __restore_key__=(), batch=batch)

    def build_batch(self, dataset: Any, **options: Any) -> Any:
        # With batch_size=None this is Energon's PackingDataset.
        packing = super().build_batch(dataset, **options)
        fill = packing._fill_reading_buffer  # it draws a progress bar from every worker
        packing._fill_reading_buffer = lambda source, log_progress=False: fill(source)
        if self.train:
            packing.pre_packer = lambda samples: self._all_but_last(samples, packing._reading_buffer)
        return packing

    def _all_but_last(self, samples: list[Encoded], buffer: SavableSampleBuffer) -> list[list[Encoded]]:
        """The rows of ``samples``. The leftovers in the last of several rows go back, before the samples to come."""
        rows = self.select_samples_to_pack(samples)
        if len(rows) > 1:
            buffer.extend(rows.pop())
        return rows


class EnergonLoader:
    """Packed rows of a prepared folder or a blend. Training is endless; validation starts from the beginning with each
    iteration."""

    def __init__(self, stream: Stream, state: dict[str, Any] | None = None) -> None:
        self._loader: SavableDataLoader | None = None
        check_source(Path(stream.source))
        self.stream = stream
        encoder = SampleEncoder(stream.model, stream.data, Tokenizer(stream.data.tokenizer))
        self._encoder = TaskEncoder(encoder, stream.train)
        self._workers = WorkerConfig(
            rank=stream.rank,
            world_size=stream.world,
            num_workers=stream.data.num_workers,
            seed_offset=stream.seed,
            global_error_handler=reraise_exception,
        )
        self._loader = self._open()
        if state is not None:
            self._loader.restore_state_rank(from_json(state["energon"]))

    def __iter__(self) -> Iterator[Batch]:
        if not self.stream.train:
            self._loader = self._open()
        try:
            for packed in self._loader:
                yield packed.batch
        except DAMAGE as error:
            self._end_workers()
            explained = self._explained(error)
            if explained is None:
                raise
            raise explained from error
        finally:
            if not self.stream.train:
                self._end_workers()

    def __del__(self) -> None:
        self._end_workers()

    def _end_workers(self) -> None:
        """Energon's loader refers to itself, and torch takes 5 seconds to end each worker that the garbage collector
        finds."""
        if self._loader is not None:
            worker.end(self._loader._iterator)

    def _explained(self, error: Exception) -> ValueError | None:
        """One line for a fault of the data; None for a fault of the code, which Energon calls fatal."""
        source = self.stream.source
        if any(words in str(error) for words in EMPTY):
            workers = self._workers.world_size * max(1, self._workers.num_workers)
            return ValueError(
                f"{source} has too few samples: one of {workers} workers (ranks x data.num_workers) has none"
            )
        if isinstance(error, FatalSampleError):
            return None
        if isinstance(error, ValueError):
            return ValueError(f"{source}: {_last_line(error)}")
        if isinstance(error, LookupError | OSError | ArithmeticError | tarfile.TarError):
            return ValueError(f"{source} is damaged: {shown(_last_line(error))}")
        return None

    def state(self) -> dict[str, Any]:
        """Plain JSON: where the stream stands after the last row that was handed out."""
        return {**self.stream.identity(), "energon": to_json(self._loader.save_state_rank())}

    def _open(self) -> SavableDataLoader:
        data = self.stream.data
        options = {
            "worker_config": self._workers,
            "task_encoder": self._encoder,
            "packing_buffer_size": data.packing_buffer,
        }
        if self.stream.train:
            options["shuffle_buffer_size"] = data.shuffle_buffer
            options["max_samples_per_sequence"] = SAMPLES_PER_SLICE
        return _loader(self.stream.source, train=self.stream.train, **options)


def _loader(source: str, *, train: bool, **options: Any) -> SavableDataLoader:
    get_dataset = get_train_dataset if train else get_val_dataset
    try:
        dataset = get_dataset(source, batch_size=None, **options)
    except (*DAMAGE, TypeError, AttributeError, EmptyDatasetError) as error:
        split = "train" if train else "val"
        fix = "`energon prepare --split-parts` names one, and so does a blend"
        raise ValueError(
            f"{source} has no split {split!r} that Energon can read ({fix}): {shown(str(error))}"
        ) from error
    # Energon has caught an exception whose traceback keeps our callers' frames in a cycle. Unless it is collected here,
    # dropping an EnergonLoader does not call __del__.
    gc.collect()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'pin_memory' argument")  # Energon always asks for it, we decide below
        loader = get_savable_loader(
            dataset,
            # A state after every row, so that a resume computes no row twice.
            checkpoint_every_sec=0,
            checkpoint_every_min_n_samples=1,
            watchdog_timeout_seconds=None,
            gc_collect_every_n_steps=0,  # Python collects when it needs to
        )
    loader.generator = torch.Generator()  # iter(DataLoader) would draw from the global one
    loader.pin_memory = torch.cuda.is_available()
    loader.worker_init_fn = functools.partial(worker.start, then=loader.worker_init_fn)
    return loader


def _part(parts: dict[str, bytes], name: str) -> bytes:
    if name not in parts:
        raise ValueError(f"sample has no part {name!r}, only {', '.join(sorted(parts))}")
    return parts[name]


def _last_line(error: Exception) -> str:
    """What went wrong. The text of a worker process's error holds that process's traceback."""
    text = str(error).strip()
    if not text.startswith("Caught "):
        return text
    _, _, message = text.splitlines()[-1].partition(": ")
    return message

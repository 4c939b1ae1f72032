"""Packed rows of one Energon source, read and packed by Energon's own workers.

A bad sample is not dropped on the spot: a record of it travels through the packing buffer and is counted with the row
it ends up in, so that counts survive a resume.
"""

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from megatron.energon import Sample as EnergonSample
from megatron.energon import SavableDataLoader, edataclass, get_savable_loader, stateless
from megatron.energon.wrappers.buffer import SavableSampleBuffer

from avlm.data.captions import Encoder, encoder_of, row_of
from avlm.data.energon.samples import DAMAGE, Raw, RawEncoder, explained, open_dataset, options, to_sample
from avlm.data.energon.source import check_source, path_of
from avlm.data.energon.state import from_json, to_json
from avlm.data.packing import select
from avlm.data.sample import EncodedSample
from avlm.data.stream import Stream
from avlm.models.batch import Batch
from avlm.process import worker


@edataclass
class Encoded(EnergonSample):
    """A sample, or the reason why there is none."""

    sample: EncodedSample | None
    reason: str


@edataclass
class Packed(EnergonSample):
    batch: Batch


class TaskEncoder(RawEncoder):
    """Energon's hooks, in the order in which it calls them."""

    def __init__(self, encoder: Encoder, train: bool) -> None:
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
        lengths = [entry.sample.room for entry in good]
        selected = select(lengths, self.encoder.data.seq_length, self.encoder.data.packing)
        rows = [[good[i] for i in row] for row in selected] or [[]]
        for i, entry in enumerate(bad):  # spread, so that no row seems to be mostly bad
            rows[i % len(rows)].append(entry)
        return rows

    @stateless
    def pack_selected_samples(self, samples: list[Encoded]) -> Packed:
        skipped = [(entry.__key__, entry.reason) for entry in samples if entry.sample is None]
        good = [entry.sample for entry in samples if entry.sample is not None]
        batch = row_of(good, self.encoder, skipped, read=len(samples))
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
        check_source(path_of(stream.source))
        self.stream = stream
        self._encoder = TaskEncoder(encoder_of(stream), stream.train)
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
            in_one_line = explained(error, self.stream.source, self.stream)
            if in_one_line is None:
                raise
            raise in_one_line from error
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

    def state(self) -> dict[str, Any]:
        """Plain JSON: where the stream stands after the last row that was handed out."""
        return {**self.stream.identity(), "energon": to_json(self._loader.save_state_rank())}

    def _open(self) -> SavableDataLoader:
        packing = {"task_encoder": self._encoder, "packing_buffer_size": self.stream.data.packing_buffer}
        dataset = open_dataset(self.stream.source, **options(self.stream), **packing)
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

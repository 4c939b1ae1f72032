"""Samples in, packed rows out."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from avlm.config.run import DataConfig, is_hf, is_json
from avlm.data.jsonl import Records
from avlm.data.numbered import in_order
from avlm.data.rows import RowLoader
from avlm.data.sample import Sample
from avlm.data.stream import Stream
from avlm.data.synthetic import SyntheticLoader


def open_loader(stream: Stream, state: dict[str, Any] | None = None) -> Any:
    """A loader of packed rows: iterate it for Batch; ``state()`` is plain JSON.

    Training never ends. Validation ends when the rank's share does (continue with ``batch.empty_batch``) and starts
    from the beginning with each iteration. ``state`` is what ``state()`` returned after the last row that was used.
    ValueError if it belongs to another stream (``avlm.data.redistribute`` deals it out to another number of data
    ranks), or if the source has no usable sample.
    """
    if state is not None:
        stream = _with_workers_of(state, stream) if "energon" in state else stream
        stream.check_state(state)
    source = stream.source
    if isinstance(source, dict) or is_json(source) or is_hf(source):
        Loader = RowLoader
    elif source.partition(":")[0] == "synthetic":
        if stream.objective == "contrastive":
            raise ValueError("synthetic rows have no captions: give a contrastive stage a file or a folder")
        Loader = SyntheticLoader
    elif Path(source).suffix == ".yaml" or Path(source).is_dir() or "://" in source:
        from avlm.data.energon.loader import EnergonLoader as Loader  # seconds to import
    else:
        raise ValueError(
            f"data source {source!r} is no Energon folder or .yaml blend, .json or .jsonl, hf://NAME or synthetic"
        )
    try:
        return Loader(stream, state)
    except (LookupError, TypeError, AttributeError) as error:
        if state is None:
            raise
        raise ValueError(
            f"the loader state is not one of {source} ({error!r:.100}): start from scratch with resume=never"
        ) from error


def _with_workers_of(state: dict[str, Any], stream: Stream) -> Stream:
    """Energon's workers read a stream each, so there are as many as the state has streams."""
    wanted, workers = stream.data.num_workers, state.get("workers")
    if wanted == workers or not wanted or not workers:
        return stream
    if stream.rank == 0:
        print(f"data.num_workers={workers}, not {wanted}: Energon's streams have a worker each", file=sys.stderr)
    return replace(stream, data=replace(stream.data, num_workers=workers))


def open_samples(source: str, data: DataConfig) -> Iterator[Sample]:
    """Every sample of a validation source (Energon, .json, .jsonl or hf://), in order, media still encoded.

    ValueError for the first sample that cannot be read: an evaluation leaves nothing out.
    """
    if is_json(source):
        return in_order(Records(source, data))
    if is_hf(source):
        from avlm.data.hf.samples import read_samples as read_hf  # seconds to import

        return read_hf(source, data)
    from avlm.data.energon.samples import read_samples as read_energon  # seconds to import

    return read_energon(source)

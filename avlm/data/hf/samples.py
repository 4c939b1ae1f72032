"""Samples of an hf:// source: those that a slot of a stream reads, or all of them in order."""

from collections.abc import Iterator

from avlm.config.run import DataConfig
from avlm.data.hf.source import parse
from avlm.data.hf.streamed import StreamedSamples, read_in_order
from avlm.data.hf.table import Table
from avlm.data.numbered import NumberedSamples, in_order
from avlm.data.sample import Sample
from avlm.data.stream import Stream


def open_hf(source: str, stream: Stream) -> NumberedSamples | StreamedSamples:
    parsed = parse(source)
    if parsed.streaming:
        return StreamedSamples(parsed, stream)
    return NumberedSamples(Table(parsed, stream.data), stream)


def read_samples(source: str, data: DataConfig) -> Iterator[Sample]:
    """Every sample, in order. ValueError for the first that cannot be read."""
    parsed = parse(source)
    return read_in_order(parsed, data) if parsed.streaming else in_order(Table(parsed, data))

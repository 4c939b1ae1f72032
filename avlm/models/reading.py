"""Which rows are read by queries of other rows: those of an item by a resampler, those of media by the tokens of their
document (cross-attention). Index work on the host.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from avlm.config.connector import ResamplerConfig
from avlm.models.conformer import ADAPTER, relative_counts
from avlm.models.movable import Movable
from kernels.segments import Intervals, Segments


@dataclass(frozen=True)
class QuerySets(Movable):
    """The sets of queries of a resampler: one for each item, or for each window of its rows.

    queries           those of each set; without queries its rows
    rows              rows of the tower's output that each set reads
    order             int64: of these rows followed by all queries, set after set the rows and the queries
    rows_and_queries  the segments of that order
    counts            how often the parts of Conformer blocks compute
    """

    queries: Segments
    rows: Segments
    order: Tensor
    rows_and_queries: Segments
    counts: dict[str, int]

    @staticmethod
    def of(counts: list[int], resampler: ResamplerConfig) -> "QuerySets":
        """``counts``: rows of the tower's output of each item."""
        lengths = [length for count in counts for length in resampler.windows_of(count)]
        n, num_rows = resampler.num_queries, sum(counts)
        if resampler.type == "conformer":
            segments = Segments.of(lengths)
            counted = relative_counts(lengths, resampler.conv_kernel, ADAPTER)
            return QuerySets(segments, segments, torch.arange(0), segments, counted)
        starts = [0, *accumulate(lengths)]
        parts = [torch.arange(0)]
        for i, length in enumerate(lengths):
            parts += [torch.arange(length) + starts[i], torch.arange(n) + num_rows + i * n]
        both = Segments.of([length + n for length in lengths])
        return QuerySets(Segments.of([n] * len(lengths)), Segments.of(lengths), torch.cat(parts), both, {})


@dataclass(frozen=True)
class MediaRow(Movable):
    """The features of a row's media in a row of their own, which layers of cross-attention read: document after
    document, medium after medium.

    num_rows  features of all documents
    tokens    the tokens of each document, with intervals: which of its features each of them sees
    features  the features of each document
    order     int64: the features that ``features`` cut, of those of the whole row; None: all, in their order
    """

    num_rows: int
    tokens: Segments
    features: Segments
    order: Tensor | None = None

    @property
    def num_own(self) -> int:
        """Features that are written here; of a row that ranks share, a part of all."""
        return self.num_rows


def read_by(documents: Segments, places: list[int], counts: list[int], sees: str) -> MediaRow:
    """``places``: the token that stands for each item, ascending; ``counts``: its features. A token sees those of its
    document's items up to itself; with ``sees="last"`` those of the last medium among them, which is all items that
    stand side by side: frames of a video, windows of a clip."""
    num_tokens = int(documents.cu_seqlens[-1])
    place_I, count_I = (torch.tensor(given, dtype=torch.int64) for given in (places, counts))
    seen_T = torch.zeros(num_tokens + 1, dtype=torch.int64).index_add_(0, place_I + 1, count_I).cumsum(0)
    bound_N = seen_T[documents.cu_seqlens.long()]  # features of all items before each document, and of all
    begin_T = bound_N[:-1].repeat_interleave(documents.cu_seqlens.diff())
    last_T = seen_T[1:] - 1 - begin_T
    first_T = torch.zeros_like(last_T)
    if sees == "last" and places:
        begins_I = place_I.diff(prepend=place_I[:1] - 2) > 1
        before_I = (count_I.cumsum(0) - count_I).where(begins_I, 0).cummax(0).values  # the medium of each item
        item_T = torch.searchsorted(place_I, torch.arange(num_tokens), right=True) - 1
        first_T = (before_I[item_T.clamp(min=0)] - begin_T).clamp(min=0)
    features = Segments.of(bound_N.diff().tolist())
    tokens = replace(documents, intervals=Intervals.of(first_T, last_T, documents, features))
    return MediaRow(sum(counts), tokens, features)

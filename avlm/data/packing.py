"""Encoded samples -> one packed row: which samples share a row, and every index tensor of the Batch.

Samples follow each other without padding, each a segment of its own. The rest of the row is one more segment, without
targets. Letters as in batch.py.
"""

from bisect import bisect_left, bisect_right, insort
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.data.features import of_images, of_windows
from avlm.data.sample import EncodedSample, size_of
from avlm.models.batch import (
    IGNORE,
    KINDS,
    NEWLINE,
    PAD,
    PLACEHOLDERS,
    Batch,
    Features,
    Media,
    media_of,
    no_media,
    seen_segments,
    text_positions,
)
from avlm.models.codes import Codes
from avlm.models.patches import tower_layout
from avlm.models.reading import read_by
from kernels.segments import Segments


def select(lengths: list[int], seq_length: int, method: str) -> list[list[int]]:
    """Which samples share a row: lists of indices, each index once, each row at most ``seq_length`` long.

    knapsack   open a row with the first sample that is left, then add the largest that still fits, until none does
    first_fit  each sample, in order, goes to the first row that has room

    The oldest sample always goes into the first row, so none starves. The last row holds the leftovers; if there was
    more than one row, a caller may return them to the buffer and pack them with the next samples.
    """
    longest = max(lengths, default=0)
    if longest > seq_length:
        raise ValueError(f"a sample of {longest} tokens does not fit into seq_length={seq_length}")
    if method == "knapsack":
        return _knapsack(lengths, seq_length)
    return _first_fit(lengths, seq_length)


def tokens_of_rows(lengths: list[int], data: DataConfig) -> list[int]:
    """The tokens of each row that training makes of samples of these lengths; the last may have room left."""
    found: list[int] = []
    buffer: list[int] = []
    for length in lengths:
        buffer.append(length)
        if len(buffer) == data.packing_buffer:
            rows = _packed(buffer, data)
            buffer = rows.pop() if len(rows) > 1 else []
            found += map(sum, rows)
    return [*found, *map(sum, _packed(buffer, data))]


def _packed(lengths: list[int], data: DataConfig) -> list[list[int]]:
    rows = select(lengths, data.seq_length, data.packing)
    return [[lengths[i] for i in row] for row in rows]


def _knapsack(lengths: list[int], seq_length: int) -> list[list[int]]:
    left: list[tuple[int, int]] = []  # (length, -index), ascending: of equal lengths the earlier sample goes first
    for index, length in enumerate(lengths):
        insort(left, (length, -index))
    packed: list[list[int]] = []
    taken: set[int] = set()
    for index, length in enumerate(lengths):
        if index in taken:
            continue
        del left[bisect_left(left, (length, -index))]
        row = [index]
        room = seq_length - length
        while (place := bisect_right(left, (room, 0))) > 0:
            length, negated = left.pop(place - 1)
            row.append(-negated)
            room -= length
        taken.update(row)
        packed.append(row)
    return packed


def _first_fit(lengths: list[int], seq_length: int) -> list[list[int]]:
    packed: list[list[int]] = []
    rooms: list[int] = []
    for index, length in enumerate(lengths):
        place = next((i for i, room in enumerate(rooms) if room >= length), None)
        if place is None:
            packed.append([index])
            rooms.append(seq_length - length)
        else:
            packed[place].append(index)
            rooms[place] -= length
    return packed


def pack(
    samples: list[EncodedSample],
    seq_length: int,
    model: ModelConfig,
    skipped: list[tuple[str, str]] = (),
    read: int = 0,
) -> Batch:
    """One row of exactly ``seq_length`` tokens, of samples with any mix of modalities."""
    lengths = [len(sample) for sample in samples]
    room = seq_length - sum(lengths)
    assert room >= 0, f"samples of {sum(lengths)} tokens do not fit into a row of {seq_length}"
    if room:
        lengths.append(room)
    token_T = torch.cat([*(sample.token_T for sample in samples), torch.full((room,), PAD)])
    target_T = torch.cat([*(sample.target_T for sample in samples), torch.full((room,), IGNORE)])
    kinds = [torch.full((len(sample),), KINDS.index(sample.kind)) for sample in samples]
    kind_T = torch.cat([*kinds, torch.zeros(room, dtype=torch.int64)])
    positions = [text_positions(0, model.decoder)]
    for sample in samples:
        of_text = text_positions(len(sample), model.decoder)
        positions.append(of_text if sample.position_T is None else sample.position_T)
    positions.append(text_positions(room, model.decoder))
    documents = Segments.of(lengths)
    target_rows_R = (target_T != IGNORE).nonzero().flatten()
    return Batch(
        token_T=token_T,
        position_T=torch.cat(positions, dim=-1),
        **seen_segments(documents, token_T, target_rows_R, model.decoder),
        target_rows_R=target_rows_R,
        target_R=target_T[target_rows_R],
        kind_R=kind_T[target_rows_R],
        factor_R=_factors(samples, target_rows_R),
        codes=pack_codes(samples, model),
        **pack_media_row(pack_media(samples, token_T, model), documents, model),
        keys=[sample.key for sample in samples],
        skipped=list(skipped),
        read=read,
    )


def _factors(samples: list[EncodedSample], target_rows_R: Tensor) -> Tensor | None:
    """Of targets, float32 (R,); None if no sample has any."""
    if all(sample.factor_T is None for sample in samples):
        return None
    factor_T = [torch.ones(len(each)) if each.factor_T is None else each.factor_T for each in samples]
    return torch.cat(factor_T)[target_rows_R]


def pack_codes(samples: list[EncodedSample], model: ModelConfig) -> Codes | None:
    """The codes of speech of a row, at all tokens of the samples that have any."""
    parts = [Codes.none(model)]
    if parts == [None]:
        return None
    start = 0
    for sample in samples:
        if sample.code_TK is not None:
            first = sample.code_TK.new_full((1, sample.code_TK.shape[1]), model.codec.codebook_size)
            before = torch.cat([first, sample.code_TK[:-1]])
            parts.append(Codes(torch.arange(start, start + len(sample)), before, sample.code_TK))
        start += len(sample)
    return Codes(*(torch.cat([getattr(part, name) for part in parts]) for name in ("rows", "before_FK", "code_FK")))


def pack_media(samples: list[EncodedSample], token_T: Tensor, model: ModelConfig) -> dict[str, Media]:
    """The media of a row, by modality. The n-th feature goes to the n-th placeholder."""
    packed = no_media(model)
    for modality, name in model.modalities.items():
        tower = getattr(model, name)
        projector = getattr(model, f"{name}_projector")
        items = [item for sample in samples for item in sample.media.get(modality, ())]
        sizes = [size_of(modality, item, model) for item in items]
        if modality == "image":
            layouts = [tower_layout(grid, tower, projector.downsample) for grid in sizes]
            items = [item.flatten(0, 1)[at.order] for item, at in zip(items, layouts)]
            features = image_features(samples, model)
        else:
            outputs = [projector.outputs_of(tower.outputs_of(size)) for size in sizes]
            features = of_windows(outputs, projector.downsample)
        rows = feature_rows(samples, token_T, modality, projector.add)
        newlines = (token_T == NEWLINE).nonzero().flatten() if modality == "image" else None
        if model.cross is not None:
            rows, newlines = torch.full((len(features),), -1), rows  # rows: see pack_media_row
        packed[modality] = media_of(modality, items, sizes, model, features, rows, newlines)
    return packed


def feature_rows(samples: list[EncodedSample], token_T: Tensor, modality: str, adds: bool) -> Tensor:
    """Where features go, int64 (F,): to their placeholders; or, if they are added, to each token of the samples that
    have any."""
    if not adds:
        return (token_T == PLACEHOLDERS[modality]).nonzero().flatten()
    has_media_N = torch.tensor([bool(sample.media.get(modality)) for sample in samples], dtype=torch.bool)
    length_N = torch.tensor([len(sample) for sample in samples], dtype=torch.int64)
    return has_media_N.repeat_interleave(length_N).nonzero().flatten()


def pack_media_row(packed: dict[str, Media], documents: Segments, model: ModelConfig) -> dict[str, Any]:
    """The media and ``Batch.media_row`` of a model with cross-attention, in which the features of items stand in a row
    of their own, behind the tokens, in the order of the tokens that stand for the items."""
    if model.cross is None:
        return packed
    counts = {
        modality: torch.tensor([model.features_of(name, size) for size in packed[modality].sizes], dtype=torch.int64)
        for modality, name in model.modalities.items()
    }
    place_I = torch.cat([packed[modality].newlines for modality in counts])
    count_I = torch.cat(list(counts.values()))
    order = place_I.argsort()
    start_I = torch.empty_like(count_I)
    start_I[order] = count_I[order].cumsum(0) - count_I[order]
    starts = dict(zip(counts, start_I.split([len(count) for count in counts.values()])))
    found: dict[str, Any] = dict(packed)
    for modality, count in counts.items():
        in_item = torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)
        rows = documents.num_rows + starts[modality].repeat_interleave(count) + in_item
        found[modality] = replace(packed[modality], rows=rows)
    media_row = read_by(documents, place_I[order].tolist(), count_I[order].tolist(), model.cross.sees)
    return {**found, "media_row": media_row}


def image_features(samples: list[EncodedSample], model: ModelConfig) -> Features:
    """Of the images of several samples, one after the other."""
    of_sample = []
    output_counts = []
    for sample in samples:
        sizes = [size_of("image", item, model) for item in sample.media.get("image", ())]
        counts = [model.vision_projector.outputs_of(model.vision.outputs_of(size)) for size in sizes]
        output_counts.append(sum(counts))
        if not sample.groups:
            of_sample.append(of_images(sizes, model))
            continue
        of_groups = [0, *accumulate(group.num_items for group in sample.groups)]
        of_each = [sum(counts[start:end]) for start, end in pairwise(of_groups)]
        of_sample.append(Features.joined([group.features for group in sample.groups], of_each))
    return Features.joined([of_images([], model), *of_sample], [0, *output_counts])

"""Encoded samples -> one packed row: which samples share a row, and every index tensor of the Batch.

No padding inside: samples stand one after the other, each a segment of its own, and what is left at the end of the row
is one more segment without targets. Letters as in batch.py.
"""

from bisect import bisect_left, bisect_right, insort

import torch
from einops import rearrange
from torch import Tensor

from avlm.config.model import ModelConfig, VisionConfig
from avlm.data.media.audio import rows
from avlm.data.media.image import normalise
from avlm.data.sample import EncodedSample
from avlm.models.batch import AUDIO, IGNORE, IMAGE, KINDS, Batch
from avlm.models.log_mel import window_rows
from kernels.segments import Segments

PAD = 0  # token id after the last sample; nothing is learned from it


def select(lengths: list[int], seq_length: int, method: str) -> list[list[int]]:
    """Which samples share a row: lists of indices, each index once, each row at most ``seq_length`` long.

    knapsack   open a row with the first sample that is left, then add the largest that still fits, until none does
    first_fit  each sample, in order, goes to the first row that has room

    No sample waits for ever: the first one is in the first row. The last row holds what was left over; where more
    samples follow, those of several rows that are in the last may be packed again, before the new ones.
    """
    if max(lengths, default=0) > seq_length:
        raise ValueError(f"a sample of {max(lengths)} tokens does not fit into seq_length={seq_length}")
    return (_knapsack if method == "knapsack" else _first_fit)(lengths, seq_length)


def _knapsack(lengths: list[int], seq_length: int) -> list[list[int]]:
    left: list[tuple[int, int]] = []  # (length, -index), ascending: of equal lengths the earlier sample goes first
    for index, length in enumerate(lengths):
        insort(left, (length, -index))
    packed, taken = [], set()
    for index, length in enumerate(lengths):
        if index in taken:
            continue
        del left[bisect_left(left, (length, -index))]
        row, room = [index], seq_length - length
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
    """One row of exactly ``seq_length`` tokens. Any mix of modalities; no samples give an empty row."""
    lengths = [len(sample) for sample in samples]
    room = seq_length - sum(lengths)
    assert room >= 0, f"samples of {sum(lengths)} tokens do not fit into a row of {seq_length}"
    lengths += [room] if room else []
    token_T = torch.cat([*(sample.token_T for sample in samples), torch.full((room,), PAD)])
    target_T = torch.cat([*(sample.target_T for sample in samples), torch.full((room,), IGNORE)])
    kinds = [torch.full((len(sample),), KINDS.index(sample.kind)) for sample in samples]
    kind_T = torch.cat([*kinds, torch.zeros(room, dtype=torch.int64)])
    target_rows_R = (target_T != IGNORE).nonzero().flatten()
    return Batch(
        token_T=token_T,
        position_T=torch.cat([torch.arange(length) for length in lengths] or [torch.arange(0)]),
        segments=Segments.of(lengths),
        target_rows_R=target_rows_R,
        target_R=target_T[target_rows_R],
        kind_R=kind_T[target_rows_R],
        image_rows_F=(token_T == IMAGE).nonzero().flatten(),
        audio_rows_G=(token_T == AUDIO).nonzero().flatten(),
        **_images(samples, model),
        **_sound([mel for sample in samples for mel in sample.mels], model),
        keys=[sample.key for sample in samples],
        skipped=list(skipped),
        read=read,
    )


def empty_batch(seq_length: int, model: ModelConfig) -> Batch:
    """A row without targets and media: for a rank whose data ends before that of the others."""
    return pack([], seq_length, model)


def _images(samples: list[EncodedSample], model: ModelConfig) -> dict[str, Tensor | Segments]:
    vision = model.vision
    if vision is None:
        nothing = torch.empty(0, 1, dtype=torch.int64)
        return {"pixels": torch.empty(0, 3, 1, 1), "image_segments": Segments.of([]), "patch_rows_F": nothing}
    empty = torch.empty(0, 3, vision.image_size, vision.image_size, dtype=torch.uint8)
    pixels = torch.cat([empty, *(sample.pixels for sample in samples)])
    patches = vision.num_patches + vision.class_token
    return {
        "pixels": normalise(pixels, vision),
        "image_segments": Segments.of([patches] * len(pixels)),
        "patch_rows_F": patch_rows(len(pixels), vision, model.vision_projector.downsample),
    }


def patch_rows(num_images: int, vision: VisionConfig, downsample: int) -> Tensor:
    """Rows of the tower's output that make each image feature, (F, downsample^2): neighbouring patches, line by line
    (pixel shuffle). The class token of an image is its first row and belongs to none."""
    side = vision.patches_per_side
    patch = torch.arange(side * side) + vision.class_token
    pattern = "(y fy x fx) -> (y x) (fy fx)"
    of_one = rearrange(patch, pattern, fy=downsample, x=side // downsample, fx=downsample)
    first = torch.arange(num_images) * (side * side + vision.class_token)
    return (first[:, None, None] + of_one).flatten(0, 1)


def _sound(mels: list[Tensor], model: ModelConfig) -> dict[str, Tensor | Segments]:
    """Windows padded to the longest with exact zeros, the rows of them to keep, and the rows of each feature."""
    height = window_rows(model.audio) if model.audio else 1
    stack = model.audio_projector.downsample if model.audio else 1
    longest = max((mel.shape[1] for mel in mels), default=2)  # two frames: the shortest that the convolutions take
    mel = torch.zeros(len(mels), height, longest)
    for window, given in zip(mel, mels):
        window[:, : given.shape[1]] = given
    kept = [rows(given) for given in mels]
    segments = Segments.of(kept)
    starts = segments.cu_seqlens.tolist()
    mel_rows = [torch.arange(count) + i * (longest // 2) for i, count in enumerate(kept)]
    frame_rows = []
    for start, count in zip(starts, kept):
        features = -(-count // stack)
        stacked = torch.full((features * stack,), -1)
        stacked[:count] = torch.arange(start, start + count)
        frame_rows.append(stacked.view(features, stack))
    return {
        "mel": mel,
        "mel_rows_K": torch.cat([torch.arange(0), *mel_rows]),
        "audio_segments": segments,
        "frame_rows_G": torch.cat([torch.empty(0, stack, dtype=torch.int64), *frame_rows]),
    }

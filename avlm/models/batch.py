"""What the model sees: one packed row of tokens with its media. Every tensor is made in the loader, on the CPU.

T tokens of the row   R tokens that carry a target   I items: images, or windows of audio   F features of all items
S tower rows that make a feature   K rows kept after the stem   M mel bins   W frames of the longest window
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from avlm.config.model import TOWERS, AudioConfig, DecoderConfig, ModelConfig, VisionConfig
from kernels.segments import Segments

IGNORE = -100  # target: nothing is learned here
IMAGE = -200  # token: an image feature goes here
AUDIO = -300  # token: an audio feature goes here
PAD = 0  # token: fills the end of a row; nothing is learned from it

PLACEHOLDERS = {"image": IMAGE, "audio": AUDIO}  # of each modality
KINDS = ("text", "image", "audio", "video", "mixed")  # of samples; the loss is reported for each kind
FRAMES_PER_ROW = 2  # the stride of the convolutions of the audio tower

Part = TypeVar("Part", "Media", "Batch")


@dataclass(frozen=True)
class Media:
    """The items of one modality in a row.

    values    what the tower reads: uint8 pixels (I, 3, height, width), or float32 log-mel windows (I, M, W) whose
              frames past a clip are exactly 0
    segments  the rows of each item in the tower
    sources   int64 (F, S): rows of the tower's output that make each feature, -1: zeros
    rows      int64 (F,): where in token_T each feature is written
    kept      int64 (K,), for windows: which of the I * W / 2 rows after the convolutions belong to a clip.
              None for a modality whose items all have the same shape
    """

    values: Tensor
    segments: Segments
    sources: Tensor
    rows: Tensor
    kept: Tensor | None = None

    def __post_init__(self) -> None:
        assert len(self.segments) == len(self.values)
        assert self.sources.ndim == 2 and self.rows.shape == self.sources.shape[:1]
        assert self.kept is None or self.values.shape[2] % FRAMES_PER_ROW == 0

    @staticmethod
    def empty(tower: VisionConfig | AudioConfig | None, downsample: int = 1) -> "Media":
        """No items, with the shape and dtype that the tower reads, if there is one."""
        values = torch.empty(0)
        kept = None
        if isinstance(tower, VisionConfig):
            values = torch.empty(0, 3, tower.image_size, tower.image_size, dtype=torch.uint8)
        if isinstance(tower, AudioConfig):
            values = torch.empty(0, tower.num_mels, FRAMES_PER_ROW)
            kept = torch.arange(0)
        rows_per_feature = tower.rows_per_feature(downsample) if tower else 1
        sources = torch.empty(0, rows_per_feature, dtype=torch.int64)
        return Media(values, Segments.of([]), sources, torch.arange(0), kept)

    @property
    def lengths(self) -> list[int]:
        """Rows of each item in the tower."""
        return [length for _, length in self.segments.spans]

    def stack(self, items: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """``values`` and ``kept`` for other items of this modality. Windows are padded to the longest with zeros."""
        if self.kept is None:
            return torch.stack(items) if items else self.values[:0], None
        longest = max([FRAMES_PER_ROW, *(item.shape[1] for item in items)])  # a convolution refuses an empty window
        values = self.values.new_zeros(len(items), self.values.shape[1], longest)
        kept = [torch.arange(0)]
        for i, item in enumerate(items):
            num_frames = item.shape[1]
            values[i, :, :num_frames] = item
            kept.append(torch.arange(num_frames // FRAMES_PER_ROW) + i * (longest // FRAMES_PER_ROW))
        return values, torch.cat(kept)

    def items(self) -> list[Tensor]:
        """Each item without its padding."""
        if self.kept is None:
            return list(self.values)
        return [window[:, : FRAMES_PER_ROW * length] for window, length in zip(self.values, self.lengths)]

    def item_shape(self, num_rows: int) -> tuple[int, ...]:
        """Shape of an item that has ``num_rows`` rows in the tower."""
        if self.kept is None:
            return tuple(self.values.shape[1:])
        return self.values.shape[1], FRAMES_PER_ROW * num_rows

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Media":
        return _moved(self, device, non_blocking)

    def pin_memory(self) -> "Media":
        return _pinned(self)


@dataclass(frozen=True)
class Batch:
    """One packed row. Shapes are checked here, once.

    token_T        int64: vocabulary ids, and a placeholder (IMAGE, AUDIO) for every feature
    position_T     int64: position within the document, from 0; (3, T) for M-RoPE: time, line and column
    segments       documents
    windowed       the same for layers with a sliding window; None in a model without one
    target_rows_R  int64: where in token_T there is a target, ascending
    target_R       int64: the token that follows, at those places
    kind_R         int64: index into KINDS of the sample that the target belongs to
    image, audio   Media, whose features stand in the order of their placeholders
    keys           sample keys of the row; ``skipped``: (key, reason) of samples dropped since the last batch
    read           samples read since the last batch, the skipped ones included
    """

    token_T: Tensor
    position_T: Tensor
    segments: Segments
    target_rows_R: Tensor
    target_R: Tensor
    kind_R: Tensor
    image: Media
    audio: Media
    windowed: Segments | None = None
    keys: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    read: int = 0

    def __post_init__(self) -> None:
        assert self.position_T.shape[-1:] == self.token_T.shape
        assert self.target_rows_R.shape == self.target_R.shape == self.kind_R.shape

    @property
    def media(self) -> dict[str, Media]:
        """By modality."""
        return {name: getattr(self, name) for name in PLACEHOLDERS}

    @property
    def num_tokens(self) -> int:
        """Tokens of the samples, without those that fill the end of the row."""
        return int(self.segments.cu_seqlens[len(self.keys)])

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device, copied without waiting if its memory is pinned."""
        return _moved(self, device, non_blocking=True)

    def pin_memory(self) -> "Batch":
        return _pinned(self)


def no_media(model: ModelConfig) -> dict[str, Media]:
    """Empty ``Media`` for every modality."""
    found = {}
    for modality, tower in TOWERS.items():
        projector = getattr(model, f"{tower}_projector")
        downsample = projector.downsample if projector else 1
        found[modality] = Media.empty(getattr(model, tower), downsample)
    return found


def windowed_segments(segments: Segments, model: ModelConfig) -> Segments | None:
    """``Batch.windowed`` of documents."""
    window = model.decoder.sliding_window
    return None if window is None else segments.within(window)


def text_positions(length: int, decoder: DecoderConfig) -> Tensor:
    """Positions of a document without media: 0, 1, 2, ..., int64 (T,), or (3, T) for M-RoPE."""
    position_T = torch.arange(length)
    return position_T if decoder.mrope_sections is None else position_T.repeat(3, 1)


def empty_batch(seq_length: int, model: ModelConfig) -> Batch:
    """A row without targets and media, for a rank that runs out of data before the others."""
    nothing = torch.arange(0)
    segments = Segments.of([seq_length] if seq_length else [])
    media: dict[str, Any] = no_media(model)
    return Batch(
        token_T=torch.full((seq_length,), PAD),
        position_T=text_positions(seq_length, model.decoder),
        segments=segments,
        windowed=windowed_segments(segments, model),
        target_rows_R=nothing,
        target_R=nothing,
        kind_R=nothing,
        **media,
    )


def _moved(part: Part, device: torch.device | str, non_blocking: bool) -> Part:
    """A copy on a device. Fields that can move do, ``segments`` too when it is a ``ContextPlan``."""
    moved: dict[str, Any] = {}
    for entry in dataclasses.fields(part):
        value = getattr(part, entry.name)
        if hasattr(value, "to"):
            moved[entry.name] = value.to(device, non_blocking=non_blocking)
    return dataclasses.replace(part, **moved)


def _pinned(part: Part) -> Part:
    """A copy with its tensors in pinned memory, except boundaries of segments, which are too small to matter."""
    pinned: dict[str, Any] = {}
    for entry in dataclasses.fields(part):
        value = getattr(part, entry.name)
        if hasattr(value, "pin_memory"):
            pinned[entry.name] = value.pin_memory()
    return dataclasses.replace(part, **pinned)

"""What the model sees: one packed row of tokens with its media. Every tensor is made in the loader, on the CPU.

T tokens of the row   R tokens that carry a target   I items: images, or windows of audio   F features of all items
U projected rows   S tower rows that make one   P patches of all images, N numbers each   K rows kept after the stem of
the audio tower   M mel bins   W frames of the longest window
"""

from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from avlm.config.decoder import DecoderConfig
from avlm.config.model import TOWERS, AudioConfig, ModelConfig, VisionConfig
from avlm.models.codes import Codes
from avlm.models.conformer import relative_counts
from avlm.models.movable import Movable
from avlm.models.patches import Grid, PatchPlaces
from avlm.models.reading import MediaRow, QuerySets, read_by
from kernels.segments import Intervals, Segments

IGNORE = -100  # target: nothing is learned here
IMAGE = -200  # token: an image feature goes here
AUDIO = -300  # token: an audio feature goes here
NEWLINE = -201  # token: the learned row of the vision projector goes here
PAD = -1  # token: fills the end of a row; nothing is learned from it

PLACEHOLDERS = {"image": IMAGE, "audio": AUDIO}  # of each modality
KINDS = ("text", "image", "audio", "video", "mixed")  # of samples; the loss is reported for each kind

TAPS = 4  # projected rows that a weighted sum is made of; and the most such sums that a row is part of
Size = Grid | int  # of an item: lines and columns of patches of an image, frames of a clip in a window


@dataclass(frozen=True)
class WindowRows(Movable):
    """What the audio tower keeps of windows, of which its convolutions make as many rows each: W / 2 with stem=conv1d.

    kept    int64 (K,): which of the rows of all windows belong to a clip
    live    bool (I, W): frames of a clip, for convolutions that see nothing else; None if they see all
    pooled  int64 (K',): for each row of the output, which is the mean of two kept rows, the first of them, from 0 to
            K - 1; None if the kept rows are the output
    counts  how often the parts of the stem, and of Conformer blocks, compute, over all windows
    """

    kept: Tensor
    live: Tensor | None
    pooled: Tensor | None
    counts: dict[str, int]

    @staticmethod
    def of(sizes: list[Any], num_frames: int, audio: AudioConfig) -> "WindowRows":
        """``sizes``: frames of the clip in each window, which has ``num_frames``."""
        rows_per_window = audio.rows_of(num_frames)
        nothing = torch.arange(0)
        counts = [audio.rows_of(size) for size in sizes]
        kept = torch.cat([nothing, *(torch.arange(count) + i * rows_per_window for i, count in enumerate(counts))])
        live = pooled = None
        if audio.edge == "masked":
            frames = torch.tensor(sizes, dtype=torch.int64)
            live = torch.arange(num_frames) < frames[:, None]
        if audio.pool > 1:
            starts = [0, *accumulate(counts)]
            whole = [torch.arange(count // audio.pool) * audio.pool + start for count, start in zip(counts, starts)]
            pooled = torch.cat([nothing, *whole])
        convolved = sizes if audio.stem == "depthwise" else [num_frames] * len(sizes)
        found = dict.fromkeys(audio.stem_counts(0), 0)
        for size in convolved:
            found = {count: found[count] + number for count, number in audio.stem_counts(size).items()}
        if audio.block == "conformer":
            found |= relative_counts(counts, audio.conv_kernel)
        return WindowRows(kept, live, pooled, found)


@dataclass(frozen=True)
class Features(Movable):
    """What features are made of.

    sources  int64 (U, S): rows of the tower's output that the projector makes one row of, -1: none. A row of the tower
             is in at most one of them
    mix      int64 (F, 4): projected rows whose weighted sum is a feature; None if each of them is one, F = U
    weights  float32 (F, 4)
    """

    sources: Tensor
    mix: Tensor | None = None
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sources if self.mix is None else self.mix)

    @staticmethod
    def joined(parts: list["Features"], output_counts: list[int]) -> "Features":
        """Those of several parts of a row. ``output_counts``: rows of the tower's output that each part has."""
        starts = [0, *accumulate(output_counts)]
        sources = [torch.where(part.sources < 0, -1, part.sources + start) for part, start in zip(parts, starts)]
        if all(part.mix is None for part in parts):
            return Features(torch.cat(sources))
        firsts = [0, *accumulate(len(part.sources) for part in parts)]
        mixes = []
        weights = []
        for part, first in zip(parts, firsts):
            itself = torch.arange(len(part.sources))[:, None].expand(-1, TAPS)
            mixes.append((itself if part.mix is None else part.mix) + first)
            alone = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(len(part.sources), -1)
            weights.append(alone if part.weights is None else part.weights)
        return Features(torch.cat(sources), torch.cat(mixes), torch.cat(weights))


@dataclass(frozen=True)
class Media(Movable):
    """The items of one modality in a row. An item is a view of an image, the frames of a video that share patches, or a
    window of audio.

    values    what the tower reads: uint8 patches (P, N) of all images in the tower's order, or float32 log-mel windows
              (I, M, W); what is behind a window's own frames is exactly 0
    sizes     of each item
    segments  the rows of each item in the tower
    features  what they are made of
    rows      int64 (F,): where in token_T each feature is written; with cross-attention, in the row of media behind it
    newlines  int64: where in token_T the learned row of the projector is written
    windows   of windows: which rows the tower keeps of them
    places    of images of any grid: where their patches lie
    queries   of a projector with a resampler: what its queries read
    """

    values: Tensor
    sizes: list[Size]
    segments: Segments
    features: Features
    rows: Tensor
    newlines: Tensor
    windows: WindowRows | None = None
    places: PatchPlaces | None = None
    queries: QuerySets | None = None

    def __post_init__(self) -> None:
        assert len(self.segments) == len(self.sizes)
        assert self.features.sources.ndim == 2 and len(self.rows) == len(self.features)
        assert self.windows is None or self.values.shape[2] % 2 == 0

    @property
    def sources(self) -> Tensor:
        return self.features.sources

    @property
    def lengths(self) -> list[int]:
        """Rows of each item in the tower."""
        return [length for _, length in self.segments.spans]

    def items(self, tower: Any) -> list[Tensor]:
        """Each item without its padding. ``tower``: the config of theirs."""
        shapes = [tower.item_shape(size) for size in self.sizes]
        if self.windows is None:
            return list(self.values.split([num_patches for num_patches, _ in shapes]))
        return [window[:, :num_frames] for window, (_, num_frames) in zip(self.values, shapes)]


def no_media(model: ModelConfig) -> dict[str, Media]:
    """Empty ``Media`` for every modality."""
    return {modality: media_of(modality, [], [], model) for modality in TOWERS}


def media_of(
    modality: str,
    items: list[Tensor],
    sizes: list[Size],
    model: ModelConfig,
    features: Features | None = None,
    rows: Tensor | None = None,
    newlines: Tensor | None = None,
    segments: Segments | None = None,
) -> Media:
    """Items as ``Media``, with the shape and dtype that the tower reads, if there is one; without features, unless
    ``features`` and ``rows`` say where they are. ``segments``: those that know of more than the rows of each item."""
    name = TOWERS[modality]
    tower, projector = getattr(model, name), getattr(model, f"{name}_projector")
    downsample = projector.downsample if projector else 1
    values, windows, places = torch.empty(0), None, None
    if isinstance(tower, VisionConfig):
        values = torch.cat([torch.empty(0, tower.patch_numbers, dtype=torch.uint8), *items])
        places = PatchPlaces.of(sizes, tower, downsample) if tower.any_grid else None
    if isinstance(tower, AudioConfig):
        values = side_by_side(items, tower)
        windows = WindowRows.of(sizes, values.shape[2], tower)
    if segments is None:
        segments = Segments.of([tower.rows_of(size) for size in sizes])
    if features is None:
        features = Features(torch.empty(0, tower.rows_per_feature(projector) if tower else 1, dtype=torch.int64))
    nothing = torch.arange(0)
    rows, newlines = (nothing if given is None else given for given in (rows, newlines))
    queries = None
    if projector is not None and projector.resampler is not None:
        queries = QuerySets.of([tower.outputs_of(size) for size in sizes], projector.resampler)
    return Media(values, sizes, segments, features, rows, newlines, windows, places, queries)


def side_by_side(windows: list[Tensor], audio: AudioConfig) -> Tensor:
    """Windows (M, frames), padded with zeros to the longest and to a multiple of ``audio.frames_together``: float32
    (I, M, W)."""
    longest = max([1, *(window.shape[1] for window in windows)])  # a convolution refuses an empty window
    values = torch.zeros(len(windows), audio.num_mels, longest + -longest % audio.frames_together)
    for value, window in zip(values, windows):
        value[:, : window.shape[1]] = window
    return values


@dataclass(frozen=True)
class Pooled(Movable):
    """The rows of a tower that are pooled to embeddings of media.

    rows    int64 (K,): of the tower's output
    owner   int64 (K,): which medium each belongs to, ascending
    counts  int64 (M,): how many each medium has
    pairs   int64 (M,): the pair of each medium
    """

    rows: Tensor
    owner: Tensor
    counts: Tensor
    pairs: Tensor


@dataclass(frozen=True)
class Pairs(Movable):
    """Media and their captions, in a row of a contrastive stage: each document of the row is a caption, whose last
    token is its only target, and pair n is the medium of caption n.

    vision, audio  the media of each tower; None if they are not aligned
    counts         pairs of each rank of a step; () as long as the row belongs to none
    """

    vision: Pooled | None
    audio: Pooled | None
    counts: tuple[int, ...] = ()

    @property
    def media(self) -> dict[str, Pooled]:
        """By tower."""
        return {name: pooled for name in TOWERS.values() if (pooled := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Batch(Movable):
    """One packed row. Shapes are checked here, once.

    token_T        int64: vocabulary ids, and a placeholder (IMAGE, AUDIO, NEWLINE) for every row that media write;
                   features that are added have a vocabulary id at their row
    position_T     int64: position within the document, from 0; (3, T) for M-RoPE: time, line and column; float64 where
                   one is no whole number
    segments       documents, with intervals where tokens see what follows them
    windowed       the same for layers with a sliding window; None in a model without one
    target_rows_R  int64: where in token_T there is a target, ascending
    target_R       int64: the token that follows, at those places
    kind_R         int64: index into KINDS of the sample that the target belongs to
    image, audio   Media, whose features stand in the order of their placeholders
    factor_R       float32: the weight of each target in the loss; None: all are 1
    media_row      of a model with layers of cross-attention: which features each token sees
    pairs          what a contrastive stage compares; None in any other
    codes          of speech; None in a model without a codec
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
    factor_R: Tensor | None = None
    media_row: MediaRow | None = None
    pairs: Pairs | None = None
    codes: Codes | None = None
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
    def num_targets(self) -> float:
        """What the summed loss is divided by for its mean: the sum of the targets' weights."""
        return len(self.target_R) if self.factor_R is None else self.factor_R.double().sum().item()

    @property
    def num_tokens(self) -> int:
        """Tokens of the samples, without those that fill the end of the row."""
        return int(self.segments.cu_seqlens[len(self.keys)])


def seen_segments(
    documents: Segments, token_T: Tensor, target_rows_R: Tensor, decoder: DecoderConfig
) -> dict[str, Any]:
    """``Batch.segments`` and ``Batch.windowed``: what each token sees of its document.

    In every layer a token sees those up to itself, or up to ``last_T`` where the decoder looks ahead: with
    ``bidirectional: images`` up to the end of the image's features, which have no other token among them; with
    ``prefix`` the tokens up to the one that a document's first target follows see each other. A sliding window hides
    what lies before it from any token but those of a prefix.
    """
    window = decoder.sliding_window
    causal = {"segments": documents, "windowed": None if window is None else documents.within(window)}
    if decoder.bidirectional == "none":
        return causal
    start_T = documents.cu_seqlens[:-1].long().repeat_interleave(documents.cu_seqlens.diff())
    row_T = torch.arange(len(start_T)) - start_T
    is_prefix = decoder.bidirectional == "prefix"
    end_T = (_prefix_ends(documents, target_rows_R) if is_prefix else _image_ends(token_T, row_T)) - start_T
    last_T = torch.maximum(row_T, end_T)
    if last_T.equal(row_T):
        return causal
    segments = _seeing(documents, torch.zeros_like(last_T), last_T)
    if window is None or documents.max_length <= window:
        return {"segments": segments, "windowed": None if window is None else segments}
    first_T = row_T - window + 1
    if is_prefix:
        first_T = first_T.where(row_T > end_T, 0)
    return {"segments": segments, "windowed": _seeing(documents, first_T, last_T)}


def _seeing(documents: Segments, first_T: Tensor, last_T: Tensor) -> Segments:
    return replace(documents, intervals=Intervals.of(first_T, last_T, documents, documents))


def _image_ends(token_T: Tensor, row_T: Tensor) -> Tensor:
    """The last row of the features that each token stands among, int64 (T,), -1: none. ``row_T``: in its document."""
    is_image_T = (token_T == IMAGE) | (token_T == NEWLINE)
    is_end_T = torch.ones_like(is_image_T)
    is_end_T[:-1] = ~is_image_T[1:] | (row_T[1:] == 0)
    end_T = torch.where(is_end_T, torch.arange(len(row_T)), len(row_T)).flip(0).cummin(0).values.flip(0)
    return end_T.where(is_image_T, -1)


def _prefix_ends(documents: Segments, target_rows_R: Tensor) -> Tensor:
    """The row of the first target of each token's document, int64 (T,), -1: it has none."""
    length_N = documents.cu_seqlens.diff()
    end_N = documents.cu_seqlens[1:].long()
    first_N = torch.searchsorted(target_rows_R, end_N - length_N)
    row_N = torch.cat([target_rows_R, end_N[-1:]])[first_N.clamp(max=len(target_rows_R))]
    return row_N.where(row_N < end_N, -1).repeat_interleave(length_N)


def text_positions(length: int, decoder: DecoderConfig) -> Tensor:
    """Positions of a document without media: 0, 1, 2, ..., int64 (T,), or (3, T) for M-RoPE."""
    position_T = torch.arange(length)
    return position_T if decoder.mrope_sections is None else position_T.repeat(3, 1)


def empty_pairs(model: ModelConfig, ranks: int = 1) -> Batch:
    """A row of a contrastive stage without pairs, on each of so many ranks."""
    nothing = torch.arange(0)
    none = Pooled(nothing, nothing, nothing, nothing)
    pairs = Pairs(**{name: none if name in model.pools else None for name in TOWERS.values()}, counts=(0,) * ranks)
    media: dict[str, Any] = no_media(model)
    return Batch(nothing, nothing, Segments.of([]), nothing, nothing, nothing, **media, pairs=pairs)


def empty_batch(seq_length: int, model: ModelConfig) -> Batch:
    """A row without targets and media, for a rank that runs out of data before the others."""
    nothing = torch.arange(0)
    tokens = torch.full((seq_length,), PAD)
    segments = Segments.of([seq_length] if seq_length else [])
    media_row = None if model.cross is None else read_by(segments, [], [], model.cross.sees)
    media: dict[str, Any] = no_media(model)
    return Batch(
        token_T=tokens,
        position_T=text_positions(seq_length, model.decoder),
        **seen_segments(segments, tokens, nothing, model.decoder),
        target_rows_R=nothing,
        target_R=nothing,
        kind_R=nothing,
        media_row=media_row,
        codes=Codes.none(model),
        **media,
    )

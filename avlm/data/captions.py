"""Rows of contrastive stages: media with their captions.

A sample is one image, audio file or video; its caption is the last text of the assistant, whatever was asked before.
A row takes samples as long as their captions, and the features that the decoder would get of their media, fit into
``data.seq_length``, which so bounds the work of the towers as in other stages. It holds the tokens of captions alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avlm.config.model import TOWERS, ModelConfig
from avlm.config.run import DataConfig
from avlm.config.values import counted, shown
from avlm.data.media_reader import MediaReader, Room
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample, Sample, SampleEncoder, count_features, kind_of, size_of
from avlm.data.stream import Stream
from avlm.data.text.chat import check_vocabulary
from avlm.data.text.tokenizer import Tokenizer
from avlm.models.batch import IGNORE, KINDS, Batch, Media, Pairs, Pooled, media_of, no_media
from avlm.models.patches import tower_layout
from kernels.segments import Segments


@dataclass(frozen=True)
class EncodedPair(EncodedSample):
    """``token_T``: the caption, the last of whose tokens is the only target; ``media``: of one modality."""

    num_features: int = 0  # that the decoder would get of the medium

    def __len__(self) -> int:
        return self.token_T.shape[0] + self.num_features


class PairEncoder:
    """Encodes samples for a contrastive stage. A bad sample raises a one-line ValueError."""

    def __init__(self, model: ModelConfig, data: DataConfig, tokenizer: Tokenizer) -> None:
        assert model.text is not None
        check_vocabulary(tokenizer, model.text.vocab_size, "model.text.vocab_size")
        self.model = model
        self.data = data
        self.tokenizer = tokenizer
        self.reader = MediaReader(model, data)
        text = model.text
        for key in ("start_token", "end_token", "fill_token"):
            token = getattr(text, key)
            if token and token not in tokenizer.control_tokens:
                raise ValueError(f"model.text.{key}: {shown(token)!r} is no control token of {tokenizer.file}")
        ids = [[tokenizer.id_of(token)] if token else [] for token in (text.start_token, text.end_token)]
        self.start, self.end = ids
        self.fill = tokenizer.id_of(text.fill_token) if text.fill_token else None

    def encode(self, sample: Sample) -> EncodedPair:
        """Raises ValueError for a sample that is no pair, or does not fit."""
        files = {"image": sample.images, "audio": sample.audios, "video": sample.videos}
        kind, content = self._medium(files)
        token_T = torch.tensor(self._caption(sample))
        room = Room(self.data.seq_length, "data.seq_length", len(token_T), "its caption")
        runs = self.reader.read(kind, content, sample.key, room)
        modalities = {run.modality for run in runs}
        if len(modalities) > 1:
            raise ValueError("a video with its audio is two media: set data.video.audio=false for a contrastive stage")
        media = {modalities.pop(): [item for run in runs for item in run.items]}
        target_T = torch.full_like(token_T, IGNORE)
        target_T[-1] = token_T[-1]
        num_features = sum(len(run.tokens) for run in runs)
        if self.model.cross is not None:  # where one token stands for an item
            num_features = count_features(media, self.model)
        pair = EncodedPair(sample.key, kind_of(files), token_T, target_T, media, num_features=num_features)
        if len(pair) > self.data.seq_length:
            raise ValueError(
                f"a caption of {counted(len(token_T), 'token')} and {counted(num_features, 'feature')} of its {kind} "
                f"are more than data.seq_length={self.data.seq_length}"
            )
        return pair

    def _medium(self, files: dict[str, list[bytes]]) -> tuple[str, bytes]:
        found = [(kind, content) for kind, of_kind in files.items() for content in of_kind]
        if len(found) != 1:
            raise ValueError(f"a contrastive stage needs samples of one medium, and this one has {len(found)}")
        kind, content = found[0]
        tower = TOWERS.get(kind, "vision")
        if tower not in self.model.pools:
            raise ValueError(f"sample has 1 {kind}, and model.contrastive.{tower} aligns none")
        if len(content) > self.data.max_media_bytes:
            raise ValueError(f"{kind} of {len(content)} bytes exceeds data.max_media_bytes={self.data.max_media_bytes}")
        return kind, content

    def _caption(self, sample: Sample) -> list[int]:
        turn = sample.messages[-1] if sample.messages else {}
        text = turn.get("content") if turn.get("role") == "assistant" else None
        if not isinstance(text, str) or not text.strip():
            raise ValueError("sample has no caption: its last turn is no text of the assistant")
        most = self.model.text.max_position
        if len(text) > 16 * most * self.tokenizer.longest:  # it is not tokenised before it is refused
            raise ValueError(f"caption of {len(text):,} characters is longer than model.text.max_position={most}")
        ids = [*self.start, *self.tokenizer.encode(text), *self.end]
        if len(ids) > most:
            raise ValueError(f"caption takes {len(ids)} tokens, more than model.text.max_position={most}")
        return ids if self.fill is None else ids + [self.fill] * (most - len(ids))


Encoder = SampleEncoder | PairEncoder


def encoder_of(stream: Stream) -> Encoder:
    tokenizer = Tokenizer(stream.data.tokenizer)
    if stream.objective == "contrastive":
        return PairEncoder(stream.model, stream.data, tokenizer)
    return SampleEncoder(stream.model, stream.data, tokenizer)


def row_of(
    samples: list[EncodedSample], encoder: Encoder, skipped: Sequence[tuple[str, str]] = (), read: int = 0
) -> Batch:
    """A row of what an encoder made."""
    if isinstance(encoder, PairEncoder):
        return pack_pairs(samples, encoder.model, skipped, read)
    return pack(samples, encoder.data.seq_length, encoder.model, skipped, read)


def pack_pairs(
    samples: list[EncodedSample], model: ModelConfig, skipped: Sequence[tuple[str, str]] = (), read: int = 0
) -> Batch:
    """A row of captions and media, as long as the captions."""
    nothing = torch.arange(0)
    lengths = [len(sample.token_T) for sample in samples]
    ends_N = torch.tensor(lengths, dtype=torch.int64).cumsum(0) - 1
    token_T = torch.cat([nothing, *(sample.token_T for sample in samples)])
    media: dict[str, Media] = no_media(model)
    pooled: dict[str, Pooled | None] = dict.fromkeys(TOWERS.values())
    for modality, tower in model.modalities.items():
        items, of_medium, pairs = [], [], []
        for number, sample in enumerate(samples):
            found = sample.media.get(modality, [])
            if found:
                items += found
                of_medium.append(len(found))
                pairs.append(number)
        sizes = [size_of(modality, item, model) for item in items]
        media[modality] = media_of(modality, _in_order(modality, items, sizes, model), sizes, model)
        if tower in model.pools:
            pooled[tower] = pooled_rows(tower, sizes, of_medium, torch.tensor(pairs, dtype=torch.int64), model)
    return Batch(
        token_T=token_T,
        position_T=torch.cat([nothing, *(torch.arange(length) for length in lengths)]),
        segments=Segments.of(lengths),
        target_rows_R=ends_N,
        target_R=token_T[ends_N],
        kind_R=torch.tensor([KINDS.index(sample.kind) for sample in samples], dtype=torch.int64),
        **media,
        pairs=Pairs(**pooled, counts=(len(samples),)),
        keys=[sample.key for sample in samples],
        skipped=list(skipped),
        read=read,
    )


def _in_order(modality: str, items: list[Tensor], sizes: list, model: ModelConfig) -> list[Tensor]:
    """Patches in the tower's order; windows as they are."""
    if modality != "image":
        return items
    layouts = [tower_layout(grid, model.vision, model.vision_projector.downsample) for grid in sizes]
    return [item.flatten(0, 1)[at.order] for item, at in zip(items, layouts)]


def pooled_rows(tower: str, sizes: list, of_medium: list[int], pairs: Tensor, model: ModelConfig) -> Pooled:
    """``sizes``: of the items of all media, of which each has as many as ``of_medium`` says."""
    config, pool = getattr(model, tower), model.pools[tower]
    num_class = getattr(config, "class_token", 0)
    rows, counts = [torch.arange(0)], []
    start = 0
    for size in sizes:
        after = start + config.outputs_of(size)
        own = torch.arange(start, start + 1) if pool.pool == "class" else torch.arange(start + num_class, after)
        rows.append(own)
        counts.append(len(own))
        start = after
    of_items = torch.tensor(counts, dtype=torch.int64).split(of_medium)
    count_M = torch.tensor([int(each.sum()) for each in of_items], dtype=torch.int64)
    return Pooled(torch.cat(rows), torch.arange(len(count_M)).repeat_interleave(count_M), count_M, pairs)

"""A training step as a few numbers, where there are no data yet: a stage on a layout of GPUs, and a packed row of which
documents, media and targets are counted."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from avlm.config.model import TOWERS, ModelConfig, VisionConfig
from avlm.config.run import DataConfig
from avlm.models.batch import Size
from avlm.models.codes import code_counts
from avlm.models.conformer import ADAPTER, relative_counts
from avlm.models.costs import counts_of_sets
from avlm.models.patches import window_lengths
from avlm.parallel.context_attention import mode_of
from avlm.preflight import rates
from avlm.preflight.case import Case
from avlm.preflight.rates import Gpu
from avlm.training import flops

# Of a row whose media nobody has counted: an instruction set of images and speech with short answers.
DOCUMENT = 1024  # tokens
MEDIA_SHARE = 0.8  # of its tokens, in equal parts where the model has both modalities
TARGET_SHARE = 0.12
LARGEST_SIDE = 32  # features, of an image of any grid


@dataclass(frozen=True)
class Row:
    """Tokens of each document; images and windows of audio; tokens with a target."""

    documents: tuple[int, ...]
    items: dict[str, int]  # by modality
    targets: int

    @property
    def tokens(self) -> int:
        return sum(self.documents)


def equal_documents(tokens: int, number: int) -> tuple[int, ...]:
    return tuple(tokens * (i + 1) // number - tokens * i // number for i in range(number))


def typical_row(data: DataConfig, model: ModelConfig) -> Row:
    length = data.seq_length
    items = {}
    for modality in model.modalities:
        taken = MEDIA_SHARE * length / len(model.modalities)
        items[modality] = int(taken // _features(modality, model, data))
    documents = equal_documents(length, max(1, length // DOCUMENT))
    return Row(documents, items, int(TARGET_SHARE * length))


def item_size(modality: str, model: ModelConfig, data: DataConfig) -> Size:
    """A square image, of any grid as large as is allowed up to LARGEST_SIDE; a whole window of audio."""
    tower = getattr(model, TOWERS[modality])
    if not isinstance(tower, VisionConfig):
        return tower.window_frames
    if not tower.any_grid:
        return tower.patches_per_side, tower.patches_per_side
    downsample = model.vision_projector.downsample
    side = LARGEST_SIDE
    if tower.resize == "area":
        side = max(1, min(side, math.isqrt(int(data.image_tokens[1]))))
    return side * downsample, side * downsample


def _features(modality: str, model: ModelConfig, data: DataConfig) -> int:
    return max(1, model.features_of(TOWERS[modality], item_size(modality, model, data)))


def counts_of(row: Row, model: ModelConfig, data: DataConfig) -> dict[str, int]:
    """The counts of ``avlm.models.costs`` for such a row."""
    found = {
        "batches": 1,
        "tokens": row.tokens,
        "real_tokens": row.tokens,
        "token_pairs": _pairs(row, row.tokens, model, data),
        "targets": row.targets,
    }
    if model.codec is not None:
        found |= code_counts(row.tokens, model.codec.num_codebooks)
    if model.decoder.sliding_window is not None:
        found["window_pairs"] = _pairs(row, model.decoder.sliding_window, model, data)
    if model.cross is not None:
        found["features"] = sum(number * _features(modality, model, data) for modality, number in row.items.items())
        of_document = found["features"] / len(row.documents)  # which half of its tokens see, in the mean
        found["feature_pairs"] = int(row.tokens * of_document / 2)
    for modality, number in row.items.items():
        tower = getattr(model, TOWERS[modality])
        size = item_size(modality, model, data)
        rows = tower.rows_of(size)
        found[f"{modality}_rows"] = number * rows
        found[f"{modality}_pairs"] = number * rows**2
        found[f"{modality}_projected"] = number * _features(modality, model, data)
        projector = getattr(model, f"{TOWERS[modality]}_projector")
        if projector.resampler is not None:
            num_rows = tower.outputs_of(size)
            found |= counts_of_sets(modality, number * projector.resampler.sets_of(num_rows))
            found |= relative_counts([num_rows] * number, projector.resampler.conv_kernel, ADAPTER)
        if isinstance(size, int):
            found |= {count: number * times for count, times in tower.stem_counts(size).items()}
            if tower.block == "conformer":
                found |= relative_counts([rows] * number, tower.conv_kernel)
            continue
        found["patches"] = number * math.prod(size)
        if tower.window is not None:
            found[f"{modality}_window_pairs"] = number * sum(n**2 for n in window_lengths(size, tower.window))
    return found


def _pairs(row: Row, window: int, model: ModelConfig, data: DataConfig) -> int:
    """Of a query and a key that it sees, in one layer; the targets of a document stand in its end."""
    found = sum(_pairs_within(length, window) for length in row.documents)
    if model.decoder.bidirectional == "images":
        features = _features("image", model, data)
        found += row.items.get("image", 0) * (features * (features - 1) // 2)
    if model.decoder.bidirectional == "prefix":
        for length in row.documents:
            prefix = max(0, length - row.targets // len(row.documents))
            found += prefix**2 - _pairs_within(prefix, window)
    return found


def _pairs_within(length: int, window: int) -> int:
    seen = min(length, window)
    return seen * (seen + 1) // 2 + (length - seen) * window


def media_bytes(row: Row, model: ModelConfig, data: DataConfig) -> int:
    """Of the values of a row's media: uint8 pixels, float32 mel."""
    total = 0
    for modality, number in row.items.items():
        tower = getattr(model, TOWERS[modality])
        size = item_size(modality, model, data)
        itemsize = 4 if isinstance(size, int) else 1
        total += number * itemsize * math.prod(tower.item_shape(size))
    return total


@dataclass(frozen=True)
class Step:
    """A stage on a layout of GPUs, with such rows."""

    case: Case
    gpu: Gpu
    row: Row

    @cached_property
    def counts(self) -> dict[str, int]:
        return counts_of(self.row, self.case.model, self.case.stage.data)

    @cached_property
    def costs(self) -> flops.Costs:
        return flops.costs(self.case.model, self.case.stage, self.case.config.train.recompute)

    @property
    def tokens(self) -> int:
        """L."""
        return self.row.tokens // self.case.layout.context

    @property
    def num_together(self) -> int:
        """U."""
        layout = self.case.layout
        return mode_of(self.case.model.decoder, layout.context_mode, layout.context, layout.tensor)[1]

    @property
    def micro_batches(self) -> int:
        return self.case.config.train.micro_batches(self.case.layout.data_ranks)

    def item_size(self, modality: str) -> Size:
        return item_size(modality, self.case.model, self.case.stage.data)

    def share_of_items(self, modality: str) -> float:
        """Of the rank that encodes most of a row's."""
        number = self.row.items[modality]
        return math.ceil(number / self.case.layout.row_ranks) / max(number, 1)

    def peak(self, share: float) -> float:
        return share * self.gpu.card.tflops * 1e12

    @property
    def memory_rate(self) -> float:
        return rates.HBM * self.gpu.card.gb_per_s * 1e9


class Both(NamedTuple):
    """Seconds of a forward and of a backward with its recomputation."""

    forward: float = 0.0
    backward: float = 0.0

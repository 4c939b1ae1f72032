"""Random batches without files, for throughput work:  data.train: synthetic  or, for another mix,
synthetic:documents=4,images=2,clips=1,seconds=30

A row holds ``documents`` of equal length, with ``images`` and ``clips`` of audio (each of ``seconds``) dealt out to
them in turn. Every token that is no placeholder and follows another is a target. Row n of a rank depends on
(seed, rank, n). Images have the sizes of PHOTOS in turn where these matter: for a tower of any grid, and for tiles. A
sample has them one after the other, by ``data.image_tokens`` and ``data.image_layout``, without markers.
"""

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from avlm.config.model import ModelConfig
from avlm.data.image_layout import check_image_layout, runs_of_image
from avlm.data.media import audio
from avlm.data.media.area import Extent, of_image
from avlm.data.media.patches import cut_into_patches
from avlm.data.packing import pack
from avlm.data.positions import Placed, position_of
from avlm.data.runs import holding
from avlm.data.sample import EncodedSample, Items, groups_of, kind_of, placeholders
from avlm.data.stream import Stream
from avlm.models.batch import IGNORE, Batch

MIX = {"documents": 4, "images": 2, "clips": 1, "seconds": 10}
PHOTOS = ((480, 640), (640, 480), (720, 1280), (500, 375))  # height and width
VALIDATION_ROWS = 8


class SyntheticLoader:
    def __init__(self, stream: Stream, state: dict[str, Any] | None = None) -> None:
        check_image_layout(stream.model, stream.data)
        self.stream = stream
        self.mix = parse_mix(stream.source, stream.model)
        self._row = state["row"] if state else 0

    def __iter__(self) -> Iterator[Batch]:
        if not self.stream.train:
            self._row = 0
        while self.stream.train or self._row < VALIDATION_ROWS:
            self._row += 1
            yield self._batch(self._row - 1)

    def state(self) -> dict[str, Any]:
        return {**self.stream.identity(), "row": self._row}

    def _batch(self, row: int) -> Batch:
        # torch seeds with 32 bits and drops the rest: a checksum mixes all numbers into them.
        stream = self.stream
        name = f"{stream.seed} {stream.rank} {stream.train} {row}"
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        documents = self.mix["documents"]
        samples = []
        for i in range(documents):
            # Media i, i + documents, i + 2 documents, ... of the row.
            images = range(i, self.mix["images"], documents)
            num_clips = len(range(i, self.mix["clips"], documents))
            sample = self._sample(f"synthetic:{row}:{i}", images, num_clips, generator)
            samples.append(sample)
        return pack(samples, stream.data.seq_length, stream.model, read=documents)

    def _sample(self, key: str, images: range, num_clips: int, generator: torch.Generator) -> EncodedSample:
        model, data = self.stream.model, self.stream.data
        runs = []
        for number in images:
            extent = of_image(PHOTOS[number % len(PHOTOS)], model, data, alone=len(images) == 1)
            of_image_runs = runs_of_image(extent, 1, model, data)
            items = self._views(extent, generator)
            runs += holding(items, of_image_runs)
        media: Items = {
            "image": [item for run in runs for item in run.items],
            "audio": self._windows(num_clips, generator),
        }
        ids: list[int] = []
        placed = []
        for run in runs:
            if run.offsets is not None:
                placed.append(Placed(len(ids), run.offsets))
            ids += run.tokens
        if media["audio"]:
            ids += placeholders("audio", media["audio"], model)
        length = data.seq_length // self.mix["documents"]
        num_text = length - len(ids)
        if num_text <= 0:
            raise ValueError(
                f"{len(ids)} media features do not fit into a synthetic document of {length} tokens: lower the mix"
                + (" or data.image_tokens" if model.vision and model.vision.resize == "area" else "")
            )
        text_T = torch.randint(0, model.decoder.vocab_size, (num_text,), generator=generator)
        token_T = torch.cat([torch.tensor(ids, dtype=torch.int64), text_T])
        target_T = torch.cat([token_T[1:], token_T.new_full((1,), IGNORE)])
        target_T = torch.where(target_T >= 0, target_T, IGNORE)
        position_T = position_of(length, placed, model)
        return EncodedSample(key, kind_of(media), token_T, target_T, media, position_T, groups_of(runs, model))

    def _views(self, extent: Extent, generator: torch.Generator) -> list[Tensor]:
        vision = self.stream.model.vision
        if not vision.any_grid:
            shape = (extent.num_items, 3, vision.image_size, vision.image_size)
            pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            return [cut_into_patches(view[None], vision) for view in pixels]
        shape = (*extent.grid, vision.patch_numbers)
        return [torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)]

    def _windows(self, num_clips: int, generator: torch.Generator) -> list[Tensor]:
        windows = []
        for _ in range(num_clips):
            noise = torch.randn(self.mix["seconds"] * audio.SAMPLE_RATE, generator=generator)
            windows += audio.mels(noise, self.stream.model.audio)
        return windows


def parse_mix(source: str, model: ModelConfig) -> dict[str, int]:
    """The mix that a source asks for; by default without media that the model has no tower for."""
    mix = dict(MIX)
    if model.vision is None:
        mix["images"] = 0
    if model.audio is None:
        mix["clips"] = 0
    _, _, settings = source.partition(":")
    for part in settings.split(",") if settings else ():
        name, _, number = part.partition("=")
        if name not in MIX or not number.isdigit():
            known = ", ".join(f"{key}=N" for key in MIX)
            raise ValueError(f"{source!r}: {part!r} is none of {known}")
        mix[name] = int(number)
    if mix["documents"] < 1 or mix["seconds"] < 1:
        raise ValueError(f"{source!r}: documents and seconds must be at least 1")
    if mix["clips"] and model.audio_projector is not None and model.audio_projector.add:
        raise ValueError(
            f"{source!r}: a synthetic clip has no words for data.duplex: give synthetic:clips=0, or a file"
        )
    for media, tower in (("images", model.vision), ("clips", model.audio)):
        if mix[media] and tower is None:
            raise ValueError(f"{source!r} asks for {media} that the model has no tower for")
    return mix

"""One file of a sample -> its items, with the text and the markers that stand around them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.data.media import area, audio, image, video
from avlm.data.media.area import Extent
from avlm.data.media.patches import cut_into_patches


@dataclass(frozen=True)
class Run:
    """Items of one modality whose features follow each other.

    text     that stands before them
    markers  control tokens before and after them, "" for none
    step     of M-RoPE's time from one to the next
    """

    modality: str
    items: list[Tensor]
    text: str = ""
    markers: Sequence[str] = ("", "")
    step: float = 1.0


@dataclass(frozen=True)
class Room:
    """How many tokens a sample may have, by which setting, and how many its media have so far."""

    most: int
    setting: str
    taken: int = 0


class MediaReader:
    """Reads files for the towers of a model. ValueError for a file that cannot be used, or has no room."""

    def __init__(self, model: ModelConfig, data: DataConfig) -> None:
        self.model = model
        self.data = data

    def read(self, kind: str, content: bytes, key: str, room: Room) -> list[Run]:
        """``key``: of the sample, for warnings. An image or video that has no room is refused before it is decoded. A
        video gives its frames and then, if that is asked for and it has any, its audio."""
        if kind == "image":
            return [self._image(content, room)]
        if kind == "video":
            runs = self._video(content, room)
            has_sound = self.data.video.sound and video.has_audio(content)
            return [*runs, self._audio(content, f"video of {key}")] if has_sound else runs
        return [self._audio(content, f"audio of {key}")]

    def extent(self, kind: str, content: bytes) -> Extent:
        """Of an image or a video, which is not decoded."""
        if kind == "image":
            file = image.ImageFile(content, self.data.max_image_pixels)
            return area.of_image(file.size, self.model, self.data)
        with video.open_video(content, self.data.max_image_pixels) as file:
            return area.of_video(file.size, file.seconds, file.rate, self.model, self.data)

    def _image(self, content: bytes, room: Room) -> Run:
        file = image.ImageFile(content, self.data.max_image_pixels)
        extent = area.of_image(file.size, self.model, self.data)
        self._check_room(extent, room)
        item = next(self._patches([self._fitted(file.decode(), extent)]))
        return Run("image", [item], markers=self._markers("image"))

    def _video(self, content: bytes, room: Room) -> list[Run]:
        config, vision = self.data.video, self.model.vision
        with video.open_video(content, self.data.max_image_pixels) as file:
            extent = area.of_video(file.size, file.seconds, file.rate, self.model, self.data)
            self._check_room(extent, room)
            frames = [self._fitted(frame, extent) for frame, _ in file.shown(extent.times, config)]
        items = list(self._patches(frames))
        markers = self._markers("video")
        if not config.timestamps:
            per_second = vision.tokens_per_second
            step = 1.0 if per_second is None else per_second * extent.patch_seconds
            return [Run("image", items, markers=markers, step=step)]
        times = area.patch_times(extent.times, vision.frames_per_patch)
        return [Run("image", [item], f"<{time:.1f} seconds>", markers) for item, time in zip(items, times, strict=True)]

    def _audio(self, content: bytes, name: str) -> Run:
        waveform = audio.decode(content, self.data.max_audio_seconds, name)
        return Run("audio", audio.mels(waveform, self.model.audio), markers=self._markers("audio"))

    def _fitted(self, frame: Tensor, extent: Extent) -> Tensor:
        vision = self.model.vision
        return image.resized(frame, extent.size, vision) if vision.any_grid else image.fit(frame, vision)

    def _patches(self, frames: list[Tensor]) -> Iterator[Tensor]:
        """The items of frames. The last one is repeated to fill the last item: an image counts as equal frames."""
        count = self.model.vision.frames_per_patch
        for start in range(0, len(frames), count):
            together = frames[start : start + count]
            together += [frames[-1]] * (count - len(together))
            yield cut_into_patches(torch.stack(together), self.model.vision)

    def _markers(self, kind: str) -> Sequence[str]:
        return self.data.markers.get(kind, ("", ""))

    def _check_room(self, extent: Extent, room: Room) -> None:
        if room.taken + extent.features <= room.most:
            return
        before = f", after {room.taken:,} of other media" if room.taken else ""
        raise ValueError(
            f"{extent} takes {extent.features:,} tokens{before}, more than {room.setting}={room.most}: "
            f"{self._fix(extent.is_video)}"
        )

    def _fix(self, is_video: bool) -> str:
        """Which settings give fewer features."""
        config = self.data.video
        settings = []
        if self.model.vision.any_grid:
            name, (least, most) = self._bounds(is_video)
            settings.append(f"{name}=[{least:g}, {most:g}]")
        if is_video:
            settings.append(
                f"data.video.num_frames={config.num_frames}"
                if config.fps is None
                else f"data.video.max_frames={config.max_frames}"
            )
        return f"lower {' or '.join(settings)}" if settings else "raise it"

    def _bounds(self, is_video: bool) -> tuple[str, list[float]]:
        """The setting that bounds the features of an image or a video."""
        config = self.data.video
        if is_video and config.tokens is not None:
            return "data.video.tokens", config.tokens
        if is_video and config.frame_tokens is not None:
            return "data.video.frame_tokens", config.frame_tokens
        return "data.image_tokens", self.data.image_tokens

"""One file of a sample -> its items, with the text and the markers that stand around them."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.data.image_layout import check_image_layout, markers_of, run_of_frames, runs_of_image, runs_of_video
from avlm.data.media import area, audio, image, video
from avlm.data.media.area import Extent
from avlm.data.media.patches import cut_into_patches
from avlm.data.media.tiles import views, whole_view
from avlm.data.positions import of_text
from avlm.data.runs import Run, holding
from avlm.models.batch import AUDIO


@dataclass(frozen=True)
class Room:
    """How many tokens a sample may have, by which setting, and how many its media have so far."""

    most: int
    setting: str
    taken: int = 0
    taken_by: str = "other media"


class MediaReader:
    """Reads files for the towers of a model. ValueError for a file that cannot be used, or has no room."""

    def __init__(self, model: ModelConfig, data: DataConfig) -> None:
        check_image_layout(model, data)
        self.model = model
        self.data = data

    def read(self, kind: str, content: bytes, key: str, room: Room, number: int = 1, count: int = 1) -> list[Run]:
        """``key``: of the sample, for warnings; ``number``: of the file among those of its kind, which are ``count``.
        An image or video that has no room is refused before it is decoded. A video gives its frames and, if that is
        asked for and it has any, its audio."""
        if kind == "image":
            return self._image(content, room, number, count == 1)
        if kind == "audio":
            return [self._audio(content, f"audio of {key}", number)]
        config = self.data.video
        extent, items, runs = self._frames(content, room, number)
        if not (config.audio and video.has_audio(content)):
            return runs
        if config.audio == "after":
            return [*runs, self._audio(content, f"video of {key}", number)]
        heard = self._audio(content, f"video of {key}", number, video.seconds_to_audio(content))
        if config.audio == "merged":
            return self._merged(extent, items, heard, number)
        return self._interleaved(extent, items, heard, number)

    def laid_out(self, kind: str, content: bytes, count: int = 1) -> tuple[Extent, list[Run]]:
        """An image or a video, which is not decoded, and its runs without items. ``count``: how many of its kind the
        sample has."""
        if kind == "image":
            file = image.ImageFile(content, self.data.max_image_pixels)
            extent = area.of_image(file.size, self.model, self.data, count == 1)
            return extent, runs_of_image(extent, 1, self.model, self.data)
        with video.open_video(content, self.data.max_image_pixels) as file:
            extent = area.of_video(file.size, file.seconds, file.rate, self.model, self.data)
            return extent, runs_of_video(extent, 1, self.model, self.data)

    def _image(self, content: bytes, room: Room, number: int, alone: bool) -> list[Run]:
        file = image.ImageFile(content, self.data.max_image_pixels)
        extent = area.of_image(file.size, self.model, self.data, alone)
        runs = runs_of_image(extent, number, self.model, self.data)
        self._check_room(extent, runs, room)
        items = []
        for view in self._views(file.decode(), extent):
            items += self._patches([view])
        return holding(items, runs)

    def _frames(self, content: bytes, room: Room, number: int) -> tuple[Extent, list[Tensor], list[Run]]:
        """The items of a video, and the runs that hold them."""
        with video.open_video(content, self.data.max_image_pixels) as file:
            extent = area.of_video(file.size, file.seconds, file.rate, self.model, self.data)
            runs = runs_of_video(extent, number, self.model, self.data)
            self._check_room(extent, runs, room)
            frames = [self._fitted(frame, extent) for frame, _ in file.shown(extent.times, self.data.video)]
        items = list(self._patches(frames))
        return extent, items, holding(items, runs)

    def _audio(self, content: bytes, name: str, number: int, delay: float = 0.0) -> Run:
        """``delay``: seconds of silence before it."""
        longest = self.data.max_audio_seconds
        waveform = audio.delayed(audio.decode(content, longest, name), delay, longest)
        items = audio.mels(waveform, self.model.audio)
        if not items:
            seconds = len(waveform) / audio.SAMPLE_RATE
            raise ValueError(
                f"audio of {seconds:.4f} s is too short for the audio tower to make a row of: leave it out"
            )
        count = sum(self._features_of(item) for item in items)
        return Run("audio", [AUDIO] * count, items, markers=markers_of("audio", number, self.data))

    def _features_of(self, window: Tensor) -> int:
        return self.model.tokens_of("audio", audio.num_frames(window, self.model.audio))

    def _interleaved(self, extent: Extent, items: list[Tensor], heard: Run, number: int) -> list[Run]:
        """What is seen and heard in each stretch of ``data.video.chunk_seconds``, frames first. Both begin at the same
        position; the markers of the video and of its audio stand around all of it, abreast."""
        seconds = self.data.video.chunk_seconds
        seen = [_chunk_of(i * extent.patch_seconds, seconds) for i in range(len(items))]
        sounds = [_chunk_of(time, seconds) for time in self._times_of(heard.items)]
        runs = self._in_turns(extent, items, heard, seen, sounds)
        (before, end), (before_audio, end_audio) = markers_of("video", number, self.data), heard.markers
        runs[0] = replace(runs[0], markers=(before + before_audio, ""), abreast=True)
        runs[-1] = replace(runs[-1], markers=(runs[-1].markers[0], end_audio + end), abreast=True)
        return runs

    def _merged(self, extent: Extent, items: list[Tensor], heard: Run, number: int) -> list[Run]:
        """Each patch of frames before the first feature of audio that is not earlier, by their positions on the axis of
        time, or in seconds where the decoder has one position for each token. Both begin at the same position; the
        markers stand around all of it."""
        vision = self.model.vision
        step, times = extent.patch_seconds, list(self._times_of(heard.items))
        if self.model.decoder.mrope_sections is not None:
            step = 1.0 if vision.tokens_per_second is None else step * vision.tokens_per_second
            times = list(range(len(times)))
        seen = list(range(1, len(items) + 1))
        starts = [i * step - 1e-6 for i in range(len(items))]  # the margin is for rounding
        sounds = [bisect_left(starts, time) for time in times]
        runs = self._in_turns(extent, items, heard, seen, sounds)
        (before, end), (before_audio, end_audio) = markers_of("video", number, self.data), heard.markers
        runs[0] = replace(runs[0], markers=(before + before_audio, ""))
        runs[-1] = replace(runs[-1], markers=(runs[-1].markers[0], end_audio + end))
        return runs

    def _in_turns(
        self, extent: Extent, items: list[Tensor], heard: Run, seen: list[int], sounds: list[int]
    ) -> list[Run]:
        """``seen`` and ``sounds``: the turn of each patch of frames and of each feature of audio, ascending; frames
        come first within a turn."""
        runs: list[Run] = []
        waiting = heard.items  # all windows come with the first of their features
        for chunk in sorted({*seen, *sounds}):
            first, after = bisect_left(seen, chunk), bisect_left(seen, chunk + 1)
            if first < after:
                seen_now = run_of_frames(extent, first, after - first, self.model)
                runs.append(replace(seen_now, items=items[first:after], continues=bool(runs)))
            first, after = bisect_left(sounds, chunk), bisect_left(sounds, chunk + 1)
            if first < after:
                has_positions = self.model.decoder.mrope_sections is not None
                offsets = of_text(first, after - first) if has_positions else None
                tokens = [AUDIO] * (after - first)
                runs.append(Run("audio", tokens, waiting, offsets=offsets, continues=bool(runs)))
                waiting = []
        return runs

    def _times_of(self, windows: list[Tensor]) -> Iterator[float]:
        """The second of a clip at which each of its features begins."""
        config = self.model.audio
        step = config.seconds_per_row * config.pool * self.model.audio_projector.downsample
        for number, window in enumerate(windows):
            start = number * config.max_positions * config.seconds_per_row
            yield from (start + feature * step for feature in range(self._features_of(window)))

    def _views(self, picture: Tensor, extent: Extent) -> list[Tensor]:
        if self.data.image_layout.tiles == "none":
            return [self._fitted(picture, extent)]
        return views(picture, extent.tiling, self.model.vision, self.data.image_layout)

    def _fitted(self, frame: Tensor, extent: Extent) -> Tensor:
        vision = self.model.vision
        if vision.any_grid:
            return image.resized(frame, extent.size, vision)
        return whole_view(frame, vision, self.data.image_layout)

    def _patches(self, frames: list[Tensor]) -> Iterator[Tensor]:
        """The items of frames. The last one is repeated to fill the last item: an image counts as equal frames."""
        count = self.model.vision.frames_per_patch
        for start in range(0, len(frames), count):
            together = frames[start : start + count]
            together += [frames[-1]] * (count - len(together))
            yield cut_into_patches(torch.stack(together), self.model.vision)

    def _check_room(self, extent: Extent, runs: list[Run], room: Room) -> None:
        count = sum(len(run.tokens) for run in runs)
        if room.taken + count <= room.most:
            return
        before = f", after {room.taken:,} of {room.taken_by}" if room.taken else ""
        raise ValueError(
            f"{extent} takes {count:,} tokens{before}, more than {room.setting}={room.most}: "
            f"{self._fix(extent.is_video)}"
        )

    def _fix(self, is_video: bool) -> str:
        """Which settings give fewer features."""
        config, layout = self.data.video, self.data.image_layout
        settings = []
        if layout.tiles == "pinpoints" and not is_video and len(layout.grids) > 1:
            return f"leave out the largest grids of data.image_layout.grids={shown(layout.grids)}"
        if self.model.vision.resize == "area":
            name, (least, most) = self._bounds(is_video)
            settings.append(f"{name}=[{least:g}, {most:g}]")
        elif self.model.vision.any_grid or (layout.tiles == "long_edge" and not is_video):
            settings.append(f"data.image_layout.longest_edge={layout.longest_edge}")
        elif layout.tiles == "aspect" and not is_video:
            settings.append(f"data.image_layout.max_tiles={layout.max_tiles}")
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


def _chunk_of(time: float, seconds: float) -> int:
    """The number of the chunk of so many seconds in which something begins; the margin is for rounding."""
    return int(time / seconds + 1e-6)

"""How large an image or a video becomes, and which frames of it are seen: arithmetic on what its header says.

The numbers are those of the processors that ship with Qwen2-VL, Qwen2.5-VL, Qwen3-VL and SmolVLM2, down to how Python
rounds halves (to even), so that a model sees what it was trained on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy
import torch

from avlm.config.media import VideoConfig
from avlm.config.model import ModelConfig, VisionConfig
from avlm.config.run import DataConfig
from avlm.config.values import counted
from avlm.data.media.tiles import Size, Tiling, tiling_of

MAX_RATIO = 200  # of the sides of an image: thinner ones are refused

Rate = Fraction | int  # frames a second


@dataclass(frozen=True)
class Extent:
    """What the vision tower gets of an image or a video. All items of one have one size.

    source           the size that its file has, upright
    size             the size of an item
    grid             lines and columns of patches of an item
    features_a_side  lines and columns of features of an item that stands for itself
    tiling           of an image that is cut into tiles
    times            seconds at which the frames of a video are seen; () for an image
    seconds          of a video
    patch_seconds    how much of a video an item stands for
    """

    source: Size
    size: Size
    grid: tuple[int, int]
    features_a_side: tuple[int, int]
    num_items: int = 1
    tiling: Tiling = field(default_factory=Tiling)
    times: Sequence[float] = ()
    seconds: float = 0.0
    patch_seconds: float = 0.0

    @property
    def item_features(self) -> int:
        return math.prod(self.features_a_side)

    def __str__(self) -> str:
        height, width = self.source
        size = f"{width} x {height} pixels"
        return f"video of {counted(len(self.times), 'frame')} of {size}" if self.is_video else f"image of {size}"

    @property
    def is_video(self) -> bool:
        return bool(self.times)


def of_image(source: Size, model: ModelConfig, data: DataConfig, alone: bool = True) -> Extent:
    """``alone``: the only image of its sample. ValueError for an image that is too thin."""
    vision, downsample = model.vision, model.vision_projector.downsample
    tiling = tiling_of(source, vision, data.image_layout, alone)
    size = _square(vision)
    if vision.resize == "area":
        size = resized("image", source, vision.patch_size * downsample, data.image_tokens)
    elif vision.resize == "longest":
        size = within_longest(source, vision.patch_size * downsample, data.image_layout.longest_edge)
    grid = _grid(size, vision)
    return Extent(source, size, grid, tokens_a_side(grid, model), tiling.num_views, tiling)


def of_video(source: Size, seconds: float, rate: Rate, model: ModelConfig, data: DataConfig) -> Extent:
    """ValueError for a video that is too thin."""
    vision, downsample = model.vision, model.vision_projector.downsample
    factor, together = vision.patch_size * downsample, vision.frames_per_patch
    times = frame_times(seconds, rate, data.video, together)
    size = _square(vision)
    if vision.resize == "longest":
        size = within_longest(source, factor, data.image_layout.longest_edge)
    elif vision.any_grid and data.video.tokens is not None:
        size = resized_together(source, factor, data.video.tokens, len(times), together)
    elif vision.any_grid:
        size = resized("video", source, factor, data.video.frame_tokens or data.image_tokens)
    grid = _grid(size, vision)
    return Extent(
        source,
        size,
        grid,
        halved(tokens_a_side(grid, model), model),
        num_items=math.ceil(len(times) / together),
        times=times,
        seconds=seconds,
        patch_seconds=float(together * num_frames(seconds, rate) / Fraction(rate) / len(times)),
    )


def halved(features_a_side: tuple[int, int], model: ModelConfig) -> tuple[int, int]:
    """Lines and columns of features of a frame, of those that it has without ``halve_frames``."""
    lines, columns = features_a_side
    how = model.vision_projector.halve_frames
    if how == "none":
        return lines, columns
    if how == "mean":
        return lines // 2, columns // 2
    return math.ceil(lines / 2), math.ceil(columns / 2)


def within_longest(source: Size, factor: int, longest_edge: int) -> Size:
    """In whole squares of ``factor`` pixels a side, with about the source's shape and no side of more pixels than
    ``longest_edge`` before they are filled up (Pixtral)."""
    ratio = max(side / longest_edge for side in source)
    height, width = (math.floor(side / ratio) if ratio > 1 else side for side in source)
    return max(1, math.ceil(height / factor)) * factor, max(1, math.ceil(width / factor)) * factor


def resized(
    kind: str, source: Size, factor: int, tokens: Sequence[float], count: int = 1, frames_per_patch: int = 1
) -> Size:
    """The size in whole squares of ``factor`` pixels a side that is nearest to the source's; or, where that has fewer
    or more squares than ``tokens`` allow, one of about its shape within them. The squares of ``count`` frames are
    counted together, those of a patch as one. As in the processors, sides are whole squares, at least one: a thin
    image, or one between bounds that are close to each other, may exceed the most."""
    height, width = source
    if max(source) > MAX_RATIO * min(source):
        raise ValueError(f"{kind} of {width} x {height} pixels is thinner than 1 to {MAX_RATIO}: cut it into pieces")
    least, most = (max(1, round(bound * factor**2)) * frames_per_patch for bound in tokens)
    lines, columns = round(height / factor), round(width / factor)
    area = round(count / frames_per_patch) * frames_per_patch * lines * columns * factor**2
    if area > most:
        scale = math.sqrt(count * height * width / most)
        lines, columns = (max(1, math.floor(side / scale / factor)) for side in source)
    elif area < least:
        scale = math.sqrt(least / (count * height * width))
        lines, columns = (math.ceil(side * scale / factor) for side in source)
    return lines * factor, columns * factor


def resized_together(source: Size, factor: int, tokens: Sequence[float], count: int, frames_per_patch: int) -> Size:
    """The size of each of ``count`` frames of a video whose squares share the bounds. Frames that are smaller than a
    square are counted as if they were scaled up to one."""
    height, width = source
    if min(source) < factor:
        scale = max(factor / height, factor / width)
        source = int(height * scale), int(width * scale)
    return resized("video", source, factor, tokens, max(count, frames_per_patch), frames_per_patch)


def num_frames(seconds: float, rate: Rate) -> int:
    """Frames in a video's file."""
    return max(1, round(seconds * rate))


def frame_times(seconds: float, rate: Rate, video: VideoConfig, frames_per_patch: int) -> list[float]:
    """Seconds of the frames that are seen, by ``video.spread``; at least one."""
    if video.spread == "middles":
        return _middles(seconds, video)
    total = num_frames(seconds, rate)
    wanted = total / float(rate) * video.fps if video.fps is not None else video.num_frames
    if video.spread == "inner":
        indices = _inner(total, seconds, rate, video)
    elif video.spread in ("starts", "middle_frames"):
        indices = _starts(total, wanted, video, frames_per_patch)
    else:
        count = int(wanted)
        if video.fps is not None:
            count = min(max(count, video.min_frames), video.max_frames, total)
        indices = numpy.linspace(0, total - 1, max(1, count)).round().astype(int).tolist()
    return [index / float(rate) for index in indices]


def patch_times(times: Sequence[float], frames_per_patch: int) -> list[float]:
    """The mean of the first and the last frame of each patch. The last frame is repeated to fill the last patch."""
    last = len(times) - 1
    starts = range(0, len(times), frames_per_patch)
    return [(times[start] + times[min(start + frames_per_patch - 1, last)]) / 2 for start in starts]


def _middles(seconds: float, video: VideoConfig) -> list[float]:
    count = video.num_frames
    if video.fps is not None:
        steps = max(1, round(seconds * video.fps))
        count = min(max(steps, video.min_frames), video.max_frames)
        if count == steps:
            return [i / video.fps for i in range(steps)]
    return [(i + 0.5) * seconds / count for i in range(count)]


def _starts(total: int, wanted: float, video: VideoConfig, multiple: int) -> list[int]:
    """Indices among ``total`` frames, those of ``middle_frames`` half a part later. A video with fewer frames than a
    patch shows some twice."""
    count = round(wanted / multiple)
    if video.fps is not None:
        most = math.floor(min(video.max_frames, total) / multiple) * multiple
        count = math.floor(min(max(wanted, video.min_frames), most, total) / multiple)
    count = max(1, count) * multiple
    # In float32, as the processors count: a product that is short of a whole number there gives the frame before.
    first = total / count / 2 if video.spread == "middle_frames" else 0.0
    return torch.arange(first, total, total / count)[:count].int().tolist()


def _inner(total: int, seconds: float, rate: Rate, video: VideoConfig) -> list[int]:
    """Indices among ``total`` frames. As in the processor of SmolVLM2, a video is long if it has two seconds more than
    ``max_frames * fps``, and fractions of indices are cut off."""
    count = max(min(round(video.fps * seconds), video.max_frames), video.min_frames)
    first, last = 0, total - 1
    if seconds - 2 > video.max_frames * video.fps:
        first, last = int(rate), min(int(total - rate), last)
    return sorted(set(numpy.linspace(first, last, count).astype(int).tolist()))


def _square(vision: VisionConfig) -> Size:
    return vision.image_size or 0, vision.image_size or 0


def tokens_a_side(grid: tuple[int, int], model: ModelConfig) -> tuple[int, int]:
    """Lines and columns of what stands for an image among the tokens; of queries of a resampler there is one line."""
    downsample = model.vision_projector.downsample
    if model.cross is not None or model.vision_projector.resampler is not None:
        return 1, model.tokens_of("vision", grid)
    return grid[0] // downsample, grid[1] // downsample


def _grid(size: Size, vision: VisionConfig) -> tuple[int, int]:
    height, width = size
    return height // vision.patch_size, width // vision.patch_size

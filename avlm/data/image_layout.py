"""How the features of an image and of a video stand in a sample, by ``data.image_layout`` and ``data.video``: runs of
placeholders with markers and text around them. All of it follows from sizes, so that tokens are counted before a file
is decoded.
"""

import datetime
from dataclasses import replace

from torch import Tensor

from avlm.config.media import ImageLayout
from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.data.features import Group, of_frame, of_tiles
from avlm.data.media import area
from avlm.data.media.area import Extent
from avlm.data.positions import of_grid
from avlm.data.runs import Run, within
from avlm.data.text.numbers import in_words
from avlm.models.batch import IMAGE, NEWLINE


def check_image_layout(model: ModelConfig, data: DataConfig) -> None:
    """ValueError for a layout that the model cannot have."""
    vision, layout = model.vision, data.image_layout
    if vision is None:
        return
    if layout.tiles != "none" and vision.any_grid:
        raise ValueError(
            f"data.image_layout.tiles={layout.tiles} cuts images for a tower of squares, and model.vision.resize="
            f"{vision.resize} gives it any grid: set tiles to none"
        )
    if vision.resize == "longest" and layout.longest_edge is None:
        raise ValueError("model.vision.resize=longest needs data.image_layout.longest_edge, in pixels")
    has_newline = model.vision_projector.newline
    if data.video.newline and not has_newline:
        raise ValueError("data.video.newline needs model.vision_projector.newline=true")
    plain = ImageLayout(longest_edge=layout.longest_edge)
    if model.cross is not None or model.vision_projector.resampler is not None:
        what = "cross" if model.cross is not None else "vision_projector.resampler"
        if layout != plain:
            raise ValueError(f"model.{what} takes whole images and frames: leave out data.image_layout")
    if data.video.audio in ("interleaved", "merged") and (
        model.cross is not None or (model.audio_projector is not None and model.audio_projector.resampler is not None)
    ):
        raise ValueError(
            f"data.video.audio={data.video.audio} needs features that each have a time, which a resampler and "
            "cross-attention do not leave: set it to after"
        )
    if model.decoder.mrope_sections is not None and (has_newline or layout != plain):
        raise ValueError(
            "M-RoPE (model.decoder.mrope_sections) knows the places of features of whole images only: leave out "
            "data.image_layout and model.vision_projector.newline"
        )


def runs_of_image(extent: Extent, number: int, model: ModelConfig, data: DataConfig) -> list[Run]:
    """Without items. ``number``: of the image in its sample, from 1 on."""
    layout, tiling = data.image_layout, extent.tiling
    newline = [NEWLINE] * model.vision_projector.newline
    if layout.joins and tiling.num_tiles:
        features, (lines, columns) = of_tiles(extent.source, tiling, extent.grid, model)
        num_whole = len(features) - lines * columns
        tokens = [IMAGE] * num_whole + ([IMAGE] * columns + newline) * lines
        runs = [Run("image", tokens, groups=[Group(tiling.num_views, features)])]
    elif tiling.num_tiles:
        runs = _views(extent, data)
    else:
        runs = _whole(extent, model, data)
        last = runs[-1]
        runs[-1] = replace(last, tokens=last.tokens + newline)
    return within(runs, *markers_of("image", number, data))


def _views(extent: Extent, data: DataConfig) -> list[Run]:
    """The tiles of an image, line by line, and the whole image before or after them."""
    layout, tiling = data.image_layout, extent.tiling
    tokens = [IMAGE] * extent.item_features
    [whole] = within([Run("image", tokens)], *layout.whole_markers)
    tiles = []
    for line in range(1, tiling.lines + 1):
        for column in range(1, tiling.columns + 1):
            marks = [mark.replace("{line}", str(line)) for mark in layout.tile_markers]
            before, after = (mark.replace("{column}", str(column)) for mark in marks)
            line_end = layout.line_end if line > 1 and column == 1 else ""
            tiles.append(Run("image", tokens, markers=(line_end + before, after)))
    end = layout.line_end + layout.tiles_end
    if tiling.whole_first:
        return [whole, *within(tiles, "", end)]
    return [*tiles, *within([whole], end, "")]


def _whole(extent: Extent, model: ModelConfig, data: DataConfig) -> list[Run]:
    """An image of one view."""
    layout = data.image_layout
    if layout.line_break:
        lines, columns = extent.features_a_side
        runs = [Run("image", [IMAGE] * columns, markers=("", layout.line_break)) for _ in range(lines - 1)]
        runs.append(Run("image", [IMAGE] * columns))
    else:
        runs = [Run("image", [IMAGE] * extent.item_features, offsets=_offsets(extent, 0, 1, model))]
    return within(runs, *layout.whole_markers)


def runs_of_video(extent: Extent, number: int, model: ModelConfig, data: DataConfig) -> list[Run]:
    """Without items. ``number``: of the video in its sample, from 1 on."""
    text, (before, after) = data.video.text, markers_of("video", number, data)
    if text.of_frames:
        runs = []
        times = area.patch_times(extent.times, model.vision.frames_per_patch)
        for i, time in enumerate(times):
            frame = _written(text.frame, extent, n=i + 1, time=f"{time:.1f}", clock=_clock(time))
            between = _written(text.between, extent) if i else ""
            runs += within([run_of_frames(extent, 0, 1, model)], between + frame + before, after)
    else:
        runs = within([run_of_frames(extent, 0, extent.num_items, model)], before, after)
    if data.video.newline:
        runs[-1] = replace(runs[-1], tokens=[*runs[-1].tokens, NEWLINE])
    return within(runs, _written(text.before, extent), _written(text.after, extent))


def run_of_frames(extent: Extent, first: int, count: int, model: ModelConfig) -> Run:
    """``count`` patches of frames of a video from the number ``first`` on."""
    groups = []
    if model.vision_projector.halve_frames != "none":
        groups = [Group(1, of_frame(extent.grid, model))] * count
    tokens = [IMAGE] * (count * extent.item_features)
    return Run("image", tokens, groups=groups, offsets=_offsets(extent, first, count, model))


def markers_of(kind: str, number: int, data: DataConfig) -> tuple[str, str]:
    """Around the medium of a kind with this number in its sample."""
    before, after = (marker.replace("{n}", str(number)) for marker in data.markers.get(kind, ("", "")))
    return before, after


def _offsets(extent: Extent, first: int, count: int, model: ModelConfig) -> Tensor | None:
    """Positions for M-RoPE."""
    if model.decoder.mrope_sections is None:
        return None
    per_second = model.vision.tokens_per_second
    step = 1.0 if per_second is None or not extent.is_video else per_second * extent.patch_seconds
    is_fractional = extent.is_video and model.vision.fractional_time
    return of_grid(range(first, first + count), *extent.features_a_side, step, is_fractional)


def _written(text: str, extent: Extent, **of_frame: str | int) -> str:
    duration = datetime.timedelta(seconds=int(extent.seconds))
    count = extent.num_items
    return text.format(count=count, count_in_words=in_words(count), duration=duration, **of_frame)


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60):02}:{int(seconds % 60):02}"

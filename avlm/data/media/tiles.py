"""How an image is cut into squares for a tower of squares, by ``data.image_layout``: arithmetic on sizes, then pixels.

Sizes, grids and pixels are those of the processors that ship with LLaVA-NeXT and LLaVA-OneVision (pinpoints), InternVL
(aspect), Idefics3 and SmolVLM (long_edge).
"""

import functools
import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torchvision.transforms.v2.functional import pad

from avlm.config.media import ImageLayout
from avlm.config.model import VisionConfig
from avlm.data.media.image import fit, resized

Size = tuple[int, int]  # height and width, in pixels

MOST_PIXELS = 4096  # of a side, however large the longest edge is
MIN_STRETCH = 1.1  # joined grids that exceed stretch_above_tiles by a smaller factor, in length, stay as they are


@dataclass(frozen=True)
class Tiling:
    """The views of an image: a grid of tiles, line by line, before or after the whole image. An image that is not cut,
    or of which one tile would show all, has no lines and no columns: the whole image is its only view."""

    lines: int = 0
    columns: int = 0
    whole_first: bool = False

    @property
    def num_tiles(self) -> int:
        return self.lines * self.columns

    @property
    def num_views(self) -> int:
        return self.num_tiles + 1


def tiling_of(source: Size, vision: VisionConfig, layout: ImageLayout, alone: bool = True) -> Tiling:
    """Of an image of ``source`` pixels, upright; ``alone``: the only one of its sample."""
    if layout.tiles == "none" or (layout.only_alone and not alone):
        return Tiling()
    if layout.tiles == "pinpoints":
        lines, columns = _nearest_pinpoint(source, vision.image_size, layout)
        return Tiling(lines, columns, whole_first=True)
    if layout.tiles == "aspect":
        lines, columns = _nearest_aspect(source, vision.image_size, layout)
    else:
        lines, columns = (side // vision.image_size for side in _long_edge_sizes(source, vision, layout)[-1])
    return Tiling() if lines * columns == 1 else Tiling(lines, columns)


def views(image: Tensor, tiling: Tiling, vision: VisionConfig, layout: ImageLayout) -> list[Tensor]:
    """uint8 (3, H, W) -> uint8 (3, S, S) of each view, in order, for a layout with tiles. An image that is not cut
    because it is not alone is padded to a square, with the colour that the tower's normalisation makes 0."""
    source, side = (image.shape[1], image.shape[2]), vision.image_size
    if layout.tiles == "long_edge":
        for size in _long_edge_sizes(source, vision, layout):
            image = resized(image, size, vision)
    elif not tiling.num_tiles and layout.only_alone:
        image = _padded(image, (max(source), max(source)), [int(255 * mean) for mean in vision.mean])
    whole = resized(image, (side, side), vision)
    if not tiling.num_tiles:
        return [whole]
    joined = (tiling.lines * side, tiling.columns * side)
    if layout.tiles == "pinpoints":
        image = _padded(resized(image, _within(source, joined), vision), joined, [0, 0, 0])
    else:
        image = resized(image, joined, vision)
    tiles = list(rearrange(image, "c (l y) (k x) -> (l k) c y x", y=side, x=side))
    return [whole, *tiles] if tiling.whole_first else [*tiles, whole]


def whole_view(image: Tensor, vision: VisionConfig, layout: ImageLayout) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, S, S) of a frame, or of an image for a layout without tiles."""
    if layout.longest_edge is not None:
        image = resized(image, _long_edge_size((image.shape[1], image.shape[2]), layout), vision)
    return fit(image, vision)


def shown_part(source: Size, lines: int, columns: int) -> tuple[int, int, int, int]:
    """What pinpoints keep of the joined grid of ``lines`` x ``columns`` features, of which the rest shows padding only:
    the first line, the last line + 1, the first column, the last column + 1."""
    height, width = source
    if width / height > columns / lines:
        # Rounded before it is cut off: 26.999999999 is 27 lines.
        shown = int(round(height * (columns / width), 7))
        first = (lines - shown) // 2
        return first, lines - first, 0, columns
    shown = int(round(width * (lines / height), 7))
    first = (columns - shown) // 2
    return 0, lines, first, columns - first


def stretched_grid(lines: int, columns: int, side: int, most: float | None) -> tuple[int, int]:
    """The lines and columns that a joined grid is stretched to: its own unless it has clearly more features than
    ``most`` tiles, of ``side`` x ``side`` features each."""
    if most is None:
        return lines, columns
    ratio = math.sqrt(lines * columns / (most * side**2))
    if ratio <= MIN_STRETCH:
        return lines, columns
    return max(1, int(lines // ratio)), max(1, int(columns // ratio))


def bilinear_taps(lines: int, columns: int, into: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """int64 (F, 4) and float32 (F, 4): which features of a grid are weighted how to give the F = L x K features of one
    of ``into`` = (L, K), both line by line. As ``torch.nn.functional.interpolate`` does without aligned corners and
    without antialiasing."""
    lower_L, upper_L, share_L = _taps(lines, into[0])
    lower_K, upper_K, share_K = _taps(columns, into[1])
    lines_L2 = torch.stack([lower_L, upper_L], dim=1)
    columns_K2 = torch.stack([lower_K, upper_K], dim=1)
    of_lines_L2 = torch.stack([1 - share_L, share_L], dim=1)
    of_columns_K2 = torch.stack([1 - share_K, share_K], dim=1)
    sources = columns * lines_L2[:, None, :, None] + columns_K2[None, :, None, :]
    weights = of_lines_L2[:, None, :, None] * of_columns_K2[None, :, None, :]
    return sources.reshape(-1, 4), weights.reshape(-1, 4)


def _taps(count: int, into: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of ``into`` places along an axis of ``count``: the places before and after it, and the share of the
    latter. In float32, as PyTorch computes them."""
    scale = torch.tensor(count, dtype=torch.float32) / into
    place = (scale * (torch.arange(into) + 0.5) - 0.5).clamp(min=0)
    lower = place.long().clamp(max=count - 1)
    return lower, (lower + 1).clamp(max=count - 1), (place - lower).clamp(0, 1)


def _nearest_pinpoint(source: Size, side: int, layout: ImageLayout) -> tuple[int, int]:
    """The grid that shows most of the source's pixels and, among those that show equally many, wastes fewest."""
    height, width = source
    best, most_shown, least_wasted = (0, 0), -1, math.inf
    for lines, columns in layout.grids:
        scale = min(columns * side / width, lines * side / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        wasted = lines * columns * side**2 - shown
        if shown > most_shown or (shown == most_shown and wasted < least_wasted):
            best, most_shown, least_wasted = (lines, columns), shown, wasted
    return best


def _nearest_aspect(source: Size, side: int, layout: ImageLayout) -> tuple[int, int]:
    """The grid whose shape is nearest to the source's; of several the largest of which the source fills more than half,
    or else the smallest."""
    height, width = source
    best, least = (0, 0), math.inf
    for lines, columns in _grids_by_size(layout.min_tiles, layout.max_tiles):
        distance = abs(width / height - columns / lines)
        fills = width * height > 0.5 * lines * columns * side**2
        if distance < least or (distance == least and fills):
            best, least = (lines, columns), distance
    return best


@functools.cache
def _grids_by_size(least: int, most: int) -> list[tuple[int, int]]:
    """Lines and columns of all grids of ``least`` to ``most`` tiles, the smallest first, then the narrowest."""
    sides = range(1, most + 1)
    grids = [(lines, columns) for columns in sides for lines in sides if least <= lines * columns <= most]
    return sorted(grids, key=math.prod)


def _long_edge_sizes(source: Size, vision: VisionConfig, layout: ImageLayout) -> tuple[Size, Size]:
    """The two sizes that long_edge gives an image, one after the other: by its longest edge, and in whole tiles."""
    side = vision.image_size
    first = _long_edge_size(source, layout)
    height, width = _with_long_side(first, math.ceil(max(first) / side) * side, multiple=side)
    return first, (height, width)


def _long_edge_size(source: Size, layout: ImageLayout) -> Size:
    """With a long side of ``longest_edge`` pixels and an even short one."""
    size = _with_long_side(source, layout.longest_edge, multiple=2)
    return _with_long_side(size, MOST_PIXELS) if max(size) > MOST_PIXELS else size


def _with_long_side(size: Size, pixels: int, multiple: int = 1) -> Size:
    """With the short side in proportion, cut off to a whole pixel and then filled up to a multiple."""
    height, width = size
    ratio = width / height
    if width >= height:
        return max(1, math.ceil(int(pixels / ratio) / multiple) * multiple), pixels
    return pixels, max(1, math.ceil(int(pixels * ratio) / multiple) * multiple)


def _within(source: Size, bounds: Size) -> Size:
    """The largest size of about the source's shape within bounds."""
    (height, width), (most_height, most_width) = source, bounds
    if most_width / width < most_height / height:
        return min(math.ceil(height * (most_width / width)), most_height), most_width
    return most_height, min(math.ceil(width * (most_height / height)), most_width)


def _padded(image: Tensor, size: Size, colour: list[int]) -> Tensor:
    """In the middle of a larger size; an odd pixel goes to the right or below."""
    down, across = size[0] - image.shape[1], size[1] - image.shape[2]
    top, left = down // 2, across // 2
    return pad(image, [left, top, across - left, down - top], fill=colour)

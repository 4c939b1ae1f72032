"""Images of any grid of patches: the order of their rows in the vision tower, and what the tower has to know of each.

    order    window after window, from the top left; in a window, feature after feature; in a feature its n x n patches

Windows tile the image from its corner; those at its right and lower edge may be smaller. In this order full layers and
layers with windows differ in nothing but their segments. Everything follows from the grids alone, on the host.

G grid (lines, columns)   P patches of all images   n patches a side of a feature
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from avlm.config.model import VisionConfig
from avlm.models.movable import Movable
from kernels.segments import Segments

Grid = tuple[int, int]  # lines and columns of patches


@dataclass(frozen=True)
class PatchPlaces(Movable):
    """Where the patches of a row's images lie, in the tower's order.

    yx           int32 (P, 2): line and column
    windows      the windows of the images, one after the other; None without windows
    tap_rows     int64 (P, n): rows of the position table whose weighted sum is a patch's position; None without a table
    tap_weights  float32 (P, n); n is 4, or 1 where a patch takes one row
    """

    yx: Tensor
    windows: Segments | None
    tap_rows: Tensor | None
    tap_weights: Tensor | None

    @staticmethod
    def of(grids: list[Any], vision: VisionConfig, downsample: int) -> "PatchPlaces":
        layouts = [tower_layout(grid, vision, downsample) for grid in grids]
        nothing = torch.empty(0, 2, dtype=torch.int32)
        yx = torch.cat(
            [nothing, *(torch.stack([at.order // g[1], at.order % g[1]], 1) for at, g in zip(layouts, grids))]
        )
        windows = tap_rows = tap_weights = None
        if vision.window is not None:
            windows = Segments.of([length for at in layouts for length in at.windows])
        side = vision.patches_per_side
        if side:
            of_grid = table_taps if vision.position_table == "bilinear" else table_buckets
            taps = [of_grid((1, 1), side), *(of_grid(grid, side) for grid in grids)]  # the first for a row of no image
            orders = [torch.arange(0), *(at.order for at in layouts)]
            tap_rows = torch.cat([rows[order] for (rows, _), order in zip(taps, orders)])
            tap_weights = torch.cat([weights[order] for (_, weights), order in zip(taps, orders)])
        return PatchPlaces(yx.int(), windows, tap_rows, tap_weights)


@dataclass(frozen=True)
class Layout:
    """The rows of one image in the tower.

    order     int64 (lines * columns,): the patch of each row, counted line by line
    sources   int64 (F, n * n): the rows that make each feature; features count line by line
    windows   rows of each window; without windows the image is one
    """

    order: Tensor
    sources: Tensor
    windows: list[int]


def tower_layout(grid: Grid, vision: VisionConfig, downsample: int) -> Layout:
    """Square images stand line by line, as one window of single patches does."""
    return _layout(grid, downsample, vision.window, downsample if vision.any_grid else 1)


@lru_cache(maxsize=64)  # each takes up to 4 MB
def _layout(grid: Grid, downsample: int, window: int | None, together: int) -> Layout:
    """``together``: the side of the groups of patches whose rows follow each other."""
    lines, columns = grid
    side = window or max(grid)
    y, x = torch.arange(lines)[:, None], torch.arange(columns)
    window_of = y // side * columns + x // side
    group_of = y // together * columns + x // together
    order = (window_of * lines * columns + group_of).flatten().argsort(stable=True)
    row = torch.empty_like(order)
    row[order] = torch.arange(len(order))
    sources = rearrange(row.view(lines, columns), "(y i) (x j) -> (y x) (i j)", i=downsample, j=downsample)
    return Layout(order, sources, window_lengths(grid, side))


def window_lengths(grid: Grid, side: int) -> list[int]:
    """Rows of each window of so many patches a side."""
    heights, widths = ([min(side, count - start) for start in range(0, count, side)] for count in grid)
    return [height * width for height in heights for width in widths]


@lru_cache(maxsize=64)  # each takes up to 4 MB
def table_taps(grid: Grid, side: int) -> tuple[Tensor, Tensor]:
    """Rows of a position table of side x side and their weights, each (lines * columns, 4), line by line: the table
    stretched bilinearly over the image, corner on corner."""
    lines, columns = (_between(torch.linspace(0, side - 1, count), side) for count in grid)
    rows = [y[:, None] * side + x for y, _ in lines for x, _ in columns]
    weights = [y[:, None] * x for _, y in lines for _, x in columns]
    return torch.stack(rows, -1).flatten(0, 1), torch.stack(weights, -1).flatten(0, 1)


@lru_cache(maxsize=64)
def table_buckets(grid: Grid, side: int) -> tuple[Tensor, Tensor]:
    """The row of a position table of side x side that each patch takes, and its weight 1, each (lines * columns, 1):
    patch i of n along a side takes row floor(i / n * side) of the table's."""
    y, x = (torch.arange(count) * side // count for count in grid)
    rows = (y[:, None] * side + x).flatten()[:, None]
    return rows, torch.ones(rows.shape)


def _between(place: Tensor, side: int) -> list[tuple[Tensor, Tensor]]:
    """The neighbours of places on a line of ``side`` points, the lower and the upper, and their weights."""
    lower = place.long()
    share = place - lower
    return [(lower, 1 - share), ((lower + 1).clamp(max=side - 1), share)]

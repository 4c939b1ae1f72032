import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from transformers import (
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    SmolVLMImageProcessor,
    SmolVLMVideoProcessor,
)
from transformers.models.llava_next.modeling_llava_next import unpad_image
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from avlm.config.media import ImageLayout
from avlm.data.media.tiles import bilinear_taps, shown_part, stretched_grid, tiling_of, views, whole_view
from tests.data.small_files import VISION, photo

SIDE = 56
TOWER = dataclasses.replace(VISION, image_size=SIDE, resize="stretch")
NEXT = ImageLayout(tiles="pinpoints", grids=[[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]])
ONE_TO_SIX = [[lines, columns] for lines in range(1, 7) for columns in range(1, 7)]
ONEVISION = ImageLayout(tiles="pinpoints", grids=ONE_TO_SIX, only_alone=True)
INTERN = ImageLayout(tiles="aspect")
IDEFICS = ImageLayout(tiles="long_edge", longest_edge=4 * SIDE)
SMOL = ImageLayout(tiles="long_edge", longest_edge=200)  # neither a multiple of the tile nor below it

# Heights and widths. 56 x 112 fits several of InternVL's grids equally well, and fills them less than half or more.
SIZES = [(1, 150), (150, 1), (3, 3), (48, 64), (56, 112), (113, 57), (160, 320), (97, 1000), (777, 501), (600, 800)]
RAW = {"do_rescale": False, "do_normalize": False}
SQUARE = {"height": SIDE, "width": SIDE}
PINPOINTS = {
    name: [[SIDE * side for side in grid] for grid in layout.grids]
    for name, layout in {"next": NEXT, "onevision": ONEVISION}.items()
}
LONGEST = {"max_image_size": {"longest_edge": SIDE}, "return_row_col_info": True}
PROCESSORS = {
    "LLaVA-NeXT": (
        NEXT,
        LlavaNextImageProcessor(
            size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS["next"], **RAW
        ),
    ),
    "LLaVA-OneVision": (
        ONEVISION,
        LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS["onevision"], **RAW),
    ),
    "InternVL": (INTERN, GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, **RAW)),
    "Idefics3": (IDEFICS, Idefics3ImageProcessor(size={"longest_edge": 4 * SIDE}, resample=3, **LONGEST, **RAW)),
    "SmolVLM": (SMOL, SmolVLMImageProcessor(size={"longest_edge": 200}, resample=3, **LONGEST, **RAW)),
    # With the filter of the published folders, which torchvision has from 0.27 on.
    "SmolVLM by Pillow": (SMOL, SmolVLMImageProcessorPil(size={"longest_edge": 200}, resample=1, **LONGEST, **RAW)),
}


def pixels(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.array(photo(width, height, seed=height))).permute(2, 0, 1)


@pytest.mark.parametrize("family", PROCESSORS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_views_equal_those_of_the_processor(family, size):
    layout, processor = PROCESSORS[family]
    image = pixels(*size)
    theirs = processor(image, return_tensors="pt")
    tower = dataclasses.replace(TOWER, resample="lanczos" if processor.resample == 1 else "bicubic")
    tiling = tiling_of(size, tower, layout)
    ours = torch.stack(views(image, tiling, tower, layout))
    assert torch.equal(ours, theirs["pixel_values"].reshape(-1, 3, SIDE, SIDE).to(torch.uint8))
    assert len(ours) == tiling.num_views
    if "rows" in theirs:
        assert (tiling.lines, tiling.columns) == (theirs["rows"][0][0], theirs["cols"][0][0])


def test_the_sizes_above_cut_images_in_many_ways():
    """So that the test above compares more than whole images."""
    for family, (layout, _) in PROCESSORS.items():
        found = {tiling_of(size, TOWER, layout) for size in SIZES}
        assert len(found) >= 4, family


@pytest.mark.parametrize("size", [(3, 3), (48, 64), (200, 97)], ids=str)
def test_an_image_that_is_not_alone_is_padded_where_only_images_alone_are_cut(size):
    layout, processor = PROCESSORS["LLaVA-OneVision"]
    image = pixels(*size)
    theirs = processor([[image, image]], return_tensors="pt")["pixel_values"][0]
    tiling = tiling_of(size, TOWER, layout, alone=False)
    assert tiling.num_tiles == 0
    assert torch.equal(torch.stack(views(image, tiling, TOWER, layout)), theirs.to(torch.uint8))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_is_seen_whole_gets_its_longest_edge_before_it_becomes_a_square(size):
    """A frame, and an image that is not to be cut."""
    layout = ImageLayout(longest_edge=200)
    image = pixels(*size)
    for resample, by_pillow in (("bicubic", False), ("lanczos", True)):
        kind = SmolVLMImageProcessorPil if by_pillow else SmolVLMImageProcessor
        processor = kind(size={"longest_edge": 200}, do_image_splitting=False, **LONGEST, **RAW)
        theirs = processor(image, return_tensors="pt", resample=1 if by_pillow else 3)["pixel_values"].flatten(0, 1)
        ours = whole_view(image, dataclasses.replace(TOWER, resample=resample), layout)
        assert torch.equal(ours[None], theirs.to(torch.uint8))
    processor = SmolVLMVideoProcessor(
        size={"longest_edge": 200}, max_image_size={"longest_edge": SIDE}, resample=3, **RAW
    )
    frames = torch.stack([image, image.flip(1)])
    theirs = processor([frames], return_tensors="pt")["pixel_values"][0]
    ours = torch.stack([whole_view(frame, TOWER, SMOL) for frame in frames])
    assert torch.equal(ours, theirs.to(torch.uint8))


def test_an_image_of_one_tile_is_seen_once():
    for layout in (INTERN, dataclasses.replace(SMOL, longest_edge=SIDE)):
        assert tiling_of((SIDE, SIDE), TOWER, layout).num_views == 1


def test_equal_shapes_give_the_grid_that_the_image_fills_more_than_half():
    """1 x 2, 2 x 4 tiles and no tile in between have the shape of an image twice as wide as it is high."""
    small, large = (tiling_of((height, 2 * height), TOWER, INTERN) for height in (SIDE, 2 * SIDE))
    assert (small.lines, small.columns) == (1, 2)
    assert (large.lines, large.columns) == (2, 4)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_joined_grids_lose_their_padding_as_in_the_model(size):
    tiling = tiling_of(size, TOWER, ONEVISION)
    for side in (7, 8, 27):
        lines, columns = tiling.lines * side, tiling.columns * side
        joined = torch.arange(lines * columns).reshape(1, lines, columns)
        top, bottom, left, right = shown_part(size, lines, columns)
        assert torch.equal(joined[:, top:bottom, left:right], unpad_image(joined, size))


@pytest.mark.parametrize("size", [*SIZES, (1500, 1600), (3000, 200)], ids=str)
def test_features_are_counted_as_by_the_processors(size):
    for layout, max_tiles, processor in ((NEXT, None, LlavaNextProcessor), (ONEVISION, 9, LlavaOnevisionProcessor)):
        counting = _counting(processor, layout)
        tiling = tiling_of(size, TOWER, layout)
        top, bottom, left, right = shown_part(size, tiling.lines * 8, tiling.columns * 8)
        lines, columns = stretched_grid(bottom - top, right - left, 8, max_tiles)
        assert 8 * 8 + lines * columns + lines == counting._get_number_of_features(*size, SIDE, SIDE)


def test_a_thin_grid_that_is_stretched_keeps_a_line():
    assert stretched_grid(1, 64, 4, most=1) == (1, 32)
    assert stretched_grid(64, 1, 4, most=1) == (32, 1)


def _counting(kind: type, layout: ImageLayout):
    """A processor that counts, without a tokenizer."""
    processor = object.__new__(kind)
    name = "next" if layout is NEXT else "onevision"
    processor.image_processor = LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS[name])
    processor.patch_size, processor.num_additional_image_tokens = 7, 0
    processor.num_image_tokens, processor.vision_aspect_ratio = 64, "anyres_max_9"
    return processor


@pytest.mark.parametrize("grids", [((27, 27), (14, 14)), ((162, 100), (81, 50)), ((1, 5), (3, 2)), ((5, 3), (5, 3))])
def test_taps_weigh_features_as_interpolation_does(grids):
    (lines, columns), into = grids
    features = torch.randn(lines * columns, 6)
    sources, weights = bilinear_taps(lines, columns, into)
    ours = torch.einsum("fs,fsd->fd", weights, features[sources])
    as_image = features.T.reshape(1, 6, lines, columns)
    theirs = interpolate(as_image, size=into, mode="bilinear")[0].flatten(1).T
    torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=0)
    assert sources.dtype == torch.int64 and weights.dtype == torch.float32

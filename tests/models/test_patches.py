"""Images of any grid: the order of their rows, their windows and their positions, worked out patch by patch."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

from avlm.config.model import VisionConfig
from avlm.models.patches import PatchPlaces, table_buckets, table_taps, tower_layout
from tests.models.handmade import build_tower, images_of

GRIDS = [(8, 12), (2, 2), (4, 18), (10, 6)]
ANY = VisionConfig(
    **{"hidden_size": 16, "intermediate_size": 16, "num_layers": 2, "num_heads": 2, "patch_size": 4},
    **{"resize": "area", "class_token": False, "axial_rope": True, "feature_layer": -1},
)


@pytest.mark.parametrize("window", [None, 4, 8])
@pytest.mark.parametrize("grid", GRIDS)
def test_rows_stand_window_by_window_and_in_it_feature_by_feature(grid, window):
    at = tower_layout(grid, dataclasses.replace(ANY, window=window), 2)
    side = window or max(grid)
    patches = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    expected = sorted(patches, key=lambda p: (p[0] // side, p[1] // side, p[0] // 2, p[1] // 2, p[0] % 2, p[1] % 2))
    assert [divmod(n, grid[1]) for n in at.order.tolist()] == expected
    windows = [(y // side, x // side) for y, x in expected]
    assert at.windows == [windows.count(each) for each in dict.fromkeys(windows)]


@pytest.mark.parametrize("window", [None, 4])
def test_features_count_line_by_line_whatever_the_order_of_rows(window):
    at = tower_layout((8, 12), dataclasses.replace(ANY, window=window), 2)
    for feature, rows in enumerate(at.sources):
        y, x = divmod(feature, 6)
        corner = 24 * y + 2 * x
        assert at.order[rows].tolist() == [corner, corner + 1, corner + 12, corner + 13]


def test_a_table_is_stretched_corner_on_corner_as_pytorch_does():
    table_RD = torch.randn(5 * 5, 3)
    for grid in [*GRIDS, (1, 7), (5, 5)]:
        rows_P4, weights_P4 = table_taps(grid, 5)
        found_PD = (table_RD[rows_P4] * weights_P4[..., None]).sum(1)
        stretched = F.interpolate(table_RD.T.view(1, 3, 5, 5), grid, mode="bilinear", align_corners=True)
        assert (found_PD - stretched[0].flatten(1).T).abs().max() < 1e-5


@pytest.mark.parametrize("side", [26, 27, 32])  # those of Idefics3, SmolVLM2 2.2B and SmolVLM2 256M
def test_patches_take_the_rows_of_a_table_that_those_of_smolvlm_take(side):
    """Of images of any grid up to that of the table, padded to its size there; in squares each patch takes its own."""
    config = SmolVLMVisionConfig(hidden_size=4, image_size=2 * side, patch_size=2, num_attention_heads=1)
    theirs = SmolVLMVisionEmbeddings(config)
    theirs.patch_embedding.requires_grad_(False).weight.zero_()
    theirs.patch_embedding.bias.zero_()
    own = torch.arange(side * side)
    assert table_buckets((side, side), side)[0].flatten().equal(own)
    grids = [(side, side), (1, 1), (side, 1), (3, side), *((count, side - count + 1) for count in range(1, side + 1))]
    mask = torch.zeros(len(grids), side, side, dtype=torch.bool)
    for i, (lines, columns) in enumerate(grids):
        mask[i, :lines, :columns] = True
    found = theirs(torch.zeros(len(grids), 3, 2 * side, 2 * side), mask).unflatten(1, (side, side))
    for i, (lines, columns) in enumerate(grids):
        rows, weights = table_buckets((lines, columns), side)
        assert weights.equal(torch.ones(lines * columns, 1))
        expected = theirs.position_embedding.weight[rows[:, 0]]
        assert found[i, :lines, :columns].flatten(0, 1).equal(expected)


def test_the_gradient_of_a_table_in_bf16_is_that_of_float32_whatever_the_number_of_patches():
    """A sum in bf16 would end at a few hundred times its terms."""
    vision = dataclasses.replace(ANY, image_size=8)
    images = images_of(vision, [torch.randint(256, (1, 3, 256, 256), dtype=torch.uint8)], downsample=2)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        tower = build_tower(vision).to(dtype)
        tower(images).sum().backward()
        found.append(tower.position.grad.float())
    exact, rounded = found
    assert (rounded - exact).norm() <= 0.05 * exact.norm()


def test_places_of_several_images_follow_each_other():
    vision = dataclasses.replace(ANY, window=4, image_size=20)
    together = PatchPlaces.of(GRIDS, vision, 2)
    alone = [PatchPlaces.of([grid], vision, 2) for grid in GRIDS]
    for name in ("yx", "tap_rows", "tap_weights"):
        assert getattr(together, name).equal(torch.cat([getattr(each, name) for each in alone]))
    assert together.windows.cu_seqlens.diff().tolist() == [n for each in alone for n in each.windows.cu_seqlens.diff()]
    nothing = PatchPlaces.of([], vision, 2)
    assert nothing.yx.shape == (0, 2) and nothing.tap_rows.shape == (0, 4) and len(nothing.windows) == 0


def test_a_config_of_any_grid_is_checked():
    for change, message in {
        "axial_rope": ({"resize": "crop", "image_size": 16}, "axial_rope=True needs resize=area"),
        "class": ({"class_token": True}, "resize=area goes with class_token=false"),
        "full": ({"full_layers": [1]}, "full_layers needs a window"),
        "deep": ({"deepstack_layers": [2]}, "must ascend and lie below the 2 layers that are built"),
        "heads": ({"num_heads": 8}, "axial_rope needs heads of a multiple of 4"),
        "side": ({"resize": "stretch", "axial_rope": False}, "resize=stretch needs the image_size"),
    }.values():
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(ANY, **change)

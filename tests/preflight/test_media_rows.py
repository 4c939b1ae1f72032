"""How many rows of a tower preflight counts for a row of tokens that is full of images."""

from dataclasses import replace

import pytest

from avlm.data.image_layout import runs_of_image
from avlm.data.media.area import of_image
from avlm.preflight.layout import layout_of
from avlm.preflight.media_rows import media_rows
from tests.preflight.test_activations import of_any_grid
from tests.preflight.test_memory import GATED, TREE, make_config


def test_a_row_full_of_images_of_any_grid_has_as_many_patches_as_its_features_take():
    """64 features of 2 x 2 patches; on two ranks two of three images of 21, or the only one of 64."""
    rows = lambda cfg, world: media_rows("vision", cfg.model, cfg.stages[0].data, layout_of(cfg, world).row_ranks)[0]
    two, one = (of_any_grid(GATED, image_tokens=[4, most]) for most in (32, 10_000))
    assert rows(two, 1) == rows(one, 1) == 4 * 64
    in_context = [replace(cfg, parallel=replace(cfg.parallel, context=2)) for cfg in (two, one)]
    assert [rows(cfg, 2) for cfg in in_context] == [4 * 42, 4 * 64]


def test_no_image_that_is_cut_into_tiles_has_many_more_views_for_its_tokens_than_preflight_counts():
    cut = {"tiles": "pinpoints", "grids": [[lines, columns] for lines in range(1, 5) for columns in range(1, 5)]}
    joined = {"newline": True, "stretch_above_tiles": 4}
    model = {**TREE["model"], "vision_projector": joined}
    cfg = make_config(model=model, data={"train": "synthetic", "seq_length": 2**13, "image_layout": cut})
    data = cfg.stages[0].data
    rows, projected = media_rows("vision", cfg.model, data, 1)
    found = []
    for height in range(5, 100, 7):
        for width in range(height // 3 + 1, 3 * height, 11):
            extent = of_image((height, width), cfg.model, data)
            tokens = sum(len(run.tokens) for run in runs_of_image(extent, 1, cfg.model, data))
            found.append(extent.num_items / tokens)
    assert max(found) * data.seq_length * 17 == pytest.approx(rows, rel=0.1)
    assert projected == pytest.approx(rows * 16 / 17, rel=0.01)


def test_images_that_no_row_can_hold_are_not_counted():
    """A view has 16 features; those of an image of 2 x 1 tiles take at least 32 more."""
    cut = {"tiles": "pinpoints", "grids": [[1, 2], [2, 1], [4, 4]]}
    model = {**TREE["model"], "vision_projector": {"newline": True}}
    for length, views in ((20, 1), (60, 3)):
        cfg = make_config(model=model, data={"train": "synthetic", "seq_length": length, "image_layout": cut})
        rows, _ = media_rows("vision", cfg.model, cfg.stages[0].data, 1)
        assert rows == views * 17


def test_a_row_has_as_many_items_with_cross_attention_as_with_features_among_its_tokens():
    found = []
    for cross in (None, {"every": 1}):
        cfg = make_config(model={**TREE["model"], "cross": cross})
        found.append(media_rows("vision", cfg.model, cfg.stages[0].data, 1))
    assert found[0] == found[1]

"""How many rows a tower and its projector have for a row of tokens that is full of one modality: of images or frames of
videos, whichever have more, or of whole windows of audio."""

import math

from avlm.config.model import ModelConfig, VisionConfig
from avlm.config.run import DataConfig
from avlm.data.image_layout import runs_of_image
from avlm.data.media.area import halved, of_image, tokens_a_side

# Shapes of photographs and pages that are looked at, width to height, and their sizes in tiles.
SHAPES = [2 ** (step / 4) for step in range(-8, 9)]
SIZES = (1, 4, 16, 36)


def media_rows(name: str, model: ModelConfig, data: DataConfig, ranks: int) -> tuple[int, int]:
    """(rows of the tower, rows that its projector makes) on the rank with most of ``ranks`` that share a row, which
    has no more features than tokens. A rank encodes whole items, so we take the number of them that divides worst among
    the ranks."""
    tower, projector = getattr(model, name), getattr(model, f"{name}_projector")
    length = data.seq_length
    if projector.resampler is not None and isinstance(tower, VisionConfig) and tower.any_grid:
        num_items = math.ceil(max(1, length // projector.resampler.num_queries) / ranks)
        return num_items * _largest_image(model, data), math.ceil(length / ranks)
    if isinstance(tower, VisionConfig) and tower.any_grid:
        fewest = math.ceil(length / _largest_image(model, data))
        num_features = max(math.ceil(count / ranks) * (length // count) for count in range(fewest, fewest + ranks))
        return num_features * projector.downsample**2, math.ceil(length / ranks)
    of_item = _features_of_item(name, model)
    views, tokens = 1, of_item
    if isinstance(tower, VisionConfig) and model.cross is None:
        fitting = [(count, taken) for count, taken in _images(model, data) if taken <= length]
        views, tokens = max(fitting, key=lambda image: image[0] / image[1], default=(views, tokens))
    num_items = views * (length // tokens)
    projected = math.ceil(length / ranks)
    if projector.stretches:
        projected = max(projected, math.ceil(num_items * of_item / ranks))
    return math.ceil(num_items / ranks) * tower.num_rows, projected


def _features_of_item(name: str, model: ModelConfig) -> int:
    tower = getattr(model, name)
    return model.features_of(name, (tower.patches_per_side,) * 2 if name == "vision" else tower.window_frames)


def _images(model: ModelConfig, data: DataConfig) -> list[tuple[int, int]]:
    """(views, tokens) of images of many shapes and sizes, and of a frame of a video."""
    vision = model.vision
    found = [(1, math.prod(halved(tokens_a_side((vision.patches_per_side,) * 2, model), model)))]
    for shape in SHAPES if data.image_layout.tiles == "pinpoints" else [1.0]:
        for size in SIZES:
            height = vision.image_size * math.sqrt(size / shape)
            extent = of_image((round(height), round(height * shape)), model, data)
            found.append((extent.num_items, sum(len(run.tokens) for run in runs_of_image(extent, 1, model, data))))
    return found


def _largest_image(model: ModelConfig, data: DataConfig) -> int:
    """Features of an image of any grid, or of a patch of frames, at most."""
    if model.vision.resize == "longest":
        longest = data.image_layout.longest_edge or 0
        side = math.ceil(longest / (model.vision.patch_size * model.vision_projector.downsample))
        most = [side**2]
    else:
        bounds = (data.image_tokens, data.video.frame_tokens, data.video.tokens)
        most = [int(most) for _, most in filter(None, bounds)]
    return max(1, min(data.seq_length, max(most)))

"""The vision tower against transformers' CLIP and SigLIP."""

import dataclasses

import pytest
import torch
import transformers

from avlm.config.model import VisionConfig
from avlm.families import clip as clip_family
from avlm.families.door import hugging_face_name
from avlm.models.vit import VisionTower
from avlm.weights.folder import read_config
from tests.models.handmade import (
    assert_gradients_close,
    build_tower,
    images_of,
    load_tower,
    normalised,
    pixels_of,
    save,
)

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}


def clip():
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES))


def siglip():
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES))


def patches(tower: VisionTower, pixels: torch.Tensor) -> torch.Tensor:
    """Features of the patches alone, (I, N, D)."""
    images = images_of(tower.config, pixels)
    x_TD = tower(images)
    return x_TD[images.sources].view(len(pixels), -1, x_TD.shape[1])


def hidden_states(theirs, pixels: torch.Tensor, config: VisionConfig, layer: int = -2) -> torch.Tensor:
    """Features of the patches alone after a layer of a transformers tower."""
    states = theirs(normalised(pixels, config), output_hidden_states=True).hidden_states[layer]
    return states[:, int(config.class_token) :]


@pytest.mark.parametrize("make", [clip, siglip])
@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_features_of_a_layer_equal_those_of_transformers(make, layer, tmp_path):
    theirs = make()
    save(theirs, tmp_path)
    config = dataclasses.replace(read_config(tmp_path), feature_layer=layer)
    tower, report = load_tower(config, tmp_path)
    pixels = pixels_of(2, 24)
    with torch.no_grad():
        features = patches(tower, pixels)
        expected = hidden_states(theirs, pixels, config, layer)
    error = (features - expected).abs().max().item()
    print(f"parity {make.__name__} {layer}: {error:.2e} of {expected.abs().max():.2f}")
    assert features.shape == (2, 9, 32) and error <= 1e-4
    assert len(tower.blocks) == 4 + layer
    above = report.skipped.get("layers above feature_layer", 0)
    assert above == 16 * (-1 - layer) and len(report.names) + sum(report.skipped.values()) == report.total


def test_the_last_features_of_siglip_can_be_normalised(tmp_path):
    theirs = siglip()
    save(theirs, tmp_path)
    config = dataclasses.replace(read_config(tmp_path), feature_layer=-1, post_norm=True)
    tower, report = load_tower(config, tmp_path)
    pixels = pixels_of(2, 24)
    with torch.no_grad():
        error = (patches(tower, pixels) - theirs(normalised(pixels, config)).last_hidden_state).abs().max().item()
    print(f"parity siglip post-norm: {error:.2e}")
    assert error <= 1e-4
    assert set(report.skipped) == {"attention-pooling head"}


@pytest.mark.parametrize("make", [clip, siglip])
def test_pixels_past_the_last_whole_patch_are_cut_as_by_transformers(make, tmp_path, monkeypatch):
    """As in SigLIP so400m-patch14-384: 27 x 27 patches of 14 pixels, and 6 pixels that no patch has."""
    monkeypatch.setitem(SIZES, "image_size", 30)
    monkeypatch.setitem(SIZES, "patch_size", 7)
    theirs = make()
    save(theirs, tmp_path)
    config = read_config(tmp_path)
    assert (config.image_size, config.patches_per_side) == (30, 4)
    tower, _ = load_tower(config, tmp_path)
    pixels = pixels_of(2, 30).float().requires_grad_()
    features = patches(tower, pixels)
    expected = hidden_states(theirs, pixels, config)
    assert features.shape == (2, 16, 32) and (features - expected).abs().max() <= 1e-4
    features.sum().backward()
    assert not pixels.grad[:, :, 28:].any() and not pixels.grad[:, :, :, 28:].any() and pixels.grad[:, :, 27, 27].any()


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_the_tower_of_a_whole_two_tower_model_is_found(family, tmp_path):
    config_class, model_class = (getattr(transformers, f"{family}{part}") for part in ("Config", "Model"))
    text = dict(TEXT, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    theirs = model_class(config_class(vision_config=SIZES, text_config=text))
    save(theirs, tmp_path)
    config = read_config(tmp_path)
    tower, report = load_tower(config, tmp_path)
    pixels = pixels_of(1, 24)
    with torch.no_grad():
        expected = hidden_states(theirs.vision_model, pixels, config)
        assert (patches(tower, pixels) - expected).abs().max() <= 1e-4
    assert report.skipped["text tower and its projections"] > 10


@pytest.mark.parametrize("make", [clip, siglip])
def test_gradients_equal_those_of_transformers(make, tmp_path):
    theirs = make()
    save(theirs, tmp_path)
    config = read_config(tmp_path)
    tower, _ = load_tower(config, tmp_path)
    pixels, weights = pixels_of(2, 24), torch.randn(2, 9, 32)
    (patches(tower, pixels) * weights).sum().backward()
    hidden = hidden_states(theirs, pixels, config)
    (hidden * weights).sum().backward()
    theirs_by_name = {key.removeprefix("vision_model."): p.grad for key, p in theirs.named_parameters()}
    ours = {hugging_face_name(clip_family, "vision", key): p.grad for key, p in tower.named_parameters()}
    assert_gradients_close(ours, {key: theirs_by_name[key] for key in ours})


CONFIG = VisionConfig(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, image_size=16, patch_size=8)


def test_images_do_not_see_each_other():
    tower = build_tower(CONFIG)
    pixels = pixels_of(3, 16)
    with torch.no_grad():
        together = tower(images_of(CONFIG, pixels))
        alone = torch.cat([tower(images_of(CONFIG, image[None])) for image in pixels])
    assert (together - alone).abs().max() <= 1e-5


def test_zero_images_give_exactly_zero_gradients():
    tower = build_tower(CONFIG)
    features = tower(images_of(CONFIG, None))
    assert features.shape == (0, 32)
    features.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in tower.parameters())

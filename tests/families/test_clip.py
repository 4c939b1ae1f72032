"""Config and processor keys of CLIP and SigLIP, in and out."""

import dataclasses

import pytest
import transformers

from avlm.config.model import VisionConfig
from avlm.families import clip, door

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_heads": 2, "image_size": 24, "patch_size": 8}
CLIP = VisionConfig(**SIZES, feature_layer=-1)
SIGLIP = VisionConfig(
    **SIZES,
    **{"class_token": False, "pre_norm": False, "patch_bias": True, "activation": "gelu_tanh", "norm_eps": 1e-6},
    **{"mean": [0.5] * 3, "std": [0.5] * 3, "resize": "stretch", "resample": "bilinear"},
    feature_layer=-1,
)
TOWERS = {"clip": CLIP, "siglip": SIGLIP}
CLASSES = {"clip_vision_model": transformers.CLIPVisionConfig, "siglip_vision_model": transformers.SiglipVisionConfig}


@pytest.mark.parametrize("name", TOWERS)
def test_our_config_comes_back_from_their_keys(name):
    keys = clip.write(TOWERS[name])
    processor = {"preprocessor_config.json": clip.write_processor(TOWERS[name])}
    assert clip.read(keys, processor, feature_layer=-1) == TOWERS[name]
    theirs = CLASSES[keys["model_type"]](**keys).to_dict()
    assert clip.read(theirs, processor, feature_layer=-1) == TOWERS[name]


@pytest.mark.parametrize("model_type", CLASSES)
def test_their_keys_come_back_from_our_config(model_type):
    keys = CLASSES[model_type](num_hidden_layers=5).to_dict()
    written = clip.write(clip.read(keys, {}, feature_layer=-1))
    assert {key: written[key] for key in clip.FIELDS.values()} == {key: keys[key] for key in clip.FIELDS.values()}
    assert written["model_type"] == model_type


@pytest.mark.parametrize("model_type", CLASSES)
def test_absent_keys_have_the_defaults_of_their_class(model_type):
    assert clip.read({"model_type": model_type}, {}) == clip.read(CLASSES[model_type]().to_dict(), {})


@pytest.mark.parametrize("name", TOWERS)
def test_layers_above_the_feature_layer_do_not_go_out(name):
    keys = clip.write(dataclasses.replace(TOWERS[name], feature_layer=-2))
    assert keys["num_hidden_layers"] == 2
    tower = clip.read(keys, {}, feature_layer=-1)
    assert door.skip_reason(clip, "vision", "encoder.layers.2.mlp.fc1.weight", range(tower.num_blocks, 3))
    assert not door.skip_reason(clip, "vision", "encoder.layers.1.mlp.fc1.weight", range(tower.num_blocks, 3))


def test_a_tower_that_is_neither_is_refused():
    with pytest.raises(ValueError, match="a CLIP or a SigLIP tower"):
        clip.write(dataclasses.replace(CLIP, patch_bias=True))

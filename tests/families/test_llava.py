"""Config and processor keys of LLaVA, in and out."""

import dataclasses

import pytest
import transformers

from avlm.config.model import ModelConfig, ProjectorConfig
from avlm.families import llava
from tests.families.test_clip import TOWERS
from tests.families.test_llama import DECODERS


def model(decoder: str, tower: str) -> ModelConfig:
    projector = ProjectorConfig(bias=tower == "clip")
    return ModelConfig(decoder=DECODERS[decoder], vision=TOWERS[tower], vision_projector=projector)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_our_config_comes_back_from_their_keys(decoder, tower):
    config = model(decoder, tower)
    keys, files = llava.config_json(config, {llava.IMAGE: 64}), llava.processor_json(config, None)
    processor = {"preprocessor_config.json": files["preprocessor_config.json"]}
    assert llava.read(keys, processor) == config
    theirs = transformers.LlavaConfig(**keys).to_dict()
    assert theirs["image_token_index"] == 64
    assert llava.read(theirs, processor) == config


def test_a_feature_layer_counts_from_either_end():
    """hidden_states[0] is the input of the first layer."""
    keys = transformers.LlavaConfig(vision_config={"model_type": "clip_vision_model", "num_hidden_layers": 5}).to_dict()
    for theirs, ours in ((-2, -2), (5, -1), (4, -2), (1, -5)):
        assert llava.read({**keys, "vision_feature_layer": theirs}, {}).vision.feature_layer == ours


def test_what_the_format_cannot_hold_is_refused():
    config = model("llama", "clip")
    projector = dataclasses.replace(config.vision_projector, hidden_size=40)
    with pytest.raises(ValueError, match=r"vision_projector\.hidden_size=40"):
        llava.config_json(dataclasses.replace(config, vision_projector=projector), {llava.IMAGE: 64})
    vision = dataclasses.replace(config.vision, post_norm=True)
    with pytest.raises(ValueError, match="no post_norm"):
        llava.config_json(dataclasses.replace(config, vision=vision), {llava.IMAGE: 64})
    with pytest.raises(ValueError, match="with a vision tower"):
        llava.config_json(ModelConfig(decoder=DECODERS["llama"]), {llava.IMAGE: 64})

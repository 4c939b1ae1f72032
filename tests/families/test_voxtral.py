"""Config keys of Voxtral, in and out."""

import dataclasses

import pytest
import transformers

from avlm.config.model import AudioConfig, ModelConfig, ProjectorConfig
from avlm.families import voxtral
from tests.families.test_llama import DECODERS

AUDIO = AudioConfig(
    **{"hidden_size": 24, "intermediate_size": 96, "num_layers": 2, "num_heads": 2},
    **{"num_mels": 128, "max_positions": 100, "window": "fixed"},
)


@pytest.mark.parametrize("decoder", DECODERS)
def test_our_config_comes_back_from_their_keys(decoder):
    untied = dataclasses.replace(DECODERS[decoder], tie_embedding=False)
    projector = ProjectorConfig(downsample=4, bias=False)
    config = ModelConfig(decoder=untied, audio=AUDIO, audio_projector=projector)
    keys = voxtral.config_json(config, {voxtral.AUDIO: 64})
    assert voxtral.read(keys, {}) == config
    theirs = transformers.VoxtralConfig(**keys).to_dict()
    assert theirs["audio_token_id"] == 64
    assert voxtral.read(theirs, {}) == config


def test_absent_keys_have_the_defaults_of_their_classes():
    assert voxtral.read({"model_type": "voxtral"}, {}) == voxtral.read(transformers.VoxtralConfig().to_dict(), {})


def test_a_tied_head_goes_out_as_a_head_of_its_own():
    tied = dataclasses.replace(DECODERS["llama"], tie_embedding=True)
    projector = ProjectorConfig(downsample=4, bias=False)
    keys = voxtral.config_json(ModelConfig(decoder=tied, audio=AUDIO, audio_projector=projector), {voxtral.AUDIO: 64})
    assert keys["text_config"]["tie_word_embeddings"] is False and not voxtral.TIES_HEAD

"""Config keys of Voxtral, in and out, and what it hears of long clips."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import transformers

from avlm.config.model import AudioConfig, ModelConfig, ProjectorConfig
from avlm.families import voxtral
from avlm.models.log_mel import windows
from avlm.models.whisper import sinusoids
from avlm.weights.folder import read_config
from tests.families.measured import close
from tests.families.test_audio_families import noise
from tests.families.test_llama import DECODERS
from tests.models.handmade import loaded, save, windows_of

AUDIO = AudioConfig(
    **{"hidden_size": 24, "intermediate_size": 96, "num_layers": 2, "num_heads": 2},
    **{"num_mels": 128, "max_positions": 100, "window": "fixed", "log_mel": "clip"},
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


@torch.no_grad()
def test_clips_of_any_length_have_the_features_that_transformers_has(tmp_path):
    """Its log-mel has the maximum of the whole clip, which grows louder here, in every window of 30 s."""
    audio = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text |= {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": 61, "model_type": "llama"}
    keys = {"audio_config": {**audio, "num_mel_bins": 16}, "text_config": text, "audio_token_id": 60}
    theirs = transformers.VoxtralForConditionalGeneration(transformers.VoxtralConfig(**keys))
    table = theirs.model.audio_tower.embed_positions.weight
    table.data = sinusoids(torch.arange(len(table)), table.shape[1])
    config = read_config(save(theirs, tmp_path))
    ours = loaded(config, all=tmp_path)
    part = SimpleNamespace(feature_extractor=transformers.WhisperFeatureExtractor(feature_size=16))
    options = {"sampling_rate": 16_000, "padding": True, "truncation": False, "pad_to_multiple_of": 480_000}
    for seconds in (0.1, 12.34, 30.0, 47.11, 95.0):
        clip = noise(seconds)
        features = transformers.VoxtralProcessor._retrieve_input_features(
            part, [clip.numpy()], max_source_positions=3000, return_tensors="pt", **options
        )
        made = windows(clip, config.audio)
        close(torch.stack(made), features, f"voxtral log-mel of {seconds} s")
        media = windows_of(config.audio, made, config.audio_projector.downsample)
        into = torch.zeros(len(media.rows), 32)
        found, _ = ours.audio_projector(into, media, ours.audio(media))
        close(found, theirs.get_audio_features(features).pooler_output, f"voxtral features of {seconds} s")

"""Config keys of Whisper in, its feature extractor out."""

import transformers

from avlm.families import whisper
from avlm.models import log_mel


def test_absent_keys_have_the_defaults_of_their_class():
    keys = transformers.WhisperConfig().to_dict()
    assert whisper.read({"model_type": "whisper"}, {}) == whisper.read(keys, {})


def test_each_size_is_read_from_its_own_key():
    keys = {"d_model": 48, "encoder_ffn_dim": 96, "encoder_layers": 3, "encoder_attention_heads": 2}
    keys |= {"num_mel_bins": 128, "max_source_positions": 750}
    config = whisper.read(transformers.WhisperConfig(**keys).to_dict(), {})
    assert {key: getattr(config, field) for field, key in whisper.FIELDS.items()} == keys


def test_the_feature_extractor_that_goes_out_is_theirs_and_our_front_end():
    config = whisper.read({"num_mel_bins": 128}, {})
    written = whisper.write_processor(config, 3000)
    theirs = transformers.WhisperFeatureExtractor(feature_size=128).to_dict()
    for key, value in written.items():
        assert theirs[key] == value, key
    assert (whisper.SAMPLE_RATE, whisper.HOP, whisper.FFT) == (log_mel.SAMPLE_RATE, log_mel.HOP, log_mel.FFT)

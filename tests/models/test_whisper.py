"""The audio tower against transformers' Whisper encoder."""

import pytest
import torch
import transformers

from avlm.config.model import AudioConfig
from avlm.families import whisper as family
from avlm.families.door import hugging_face_name
from avlm.weights.folder import read_config
from tests.models.handmade import assert_gradients_close, build_tower, load_tower, save, windows_of


def whisper(num_mels: int, whole: bool = True):
    config = transformers.WhisperConfig(
        vocab_size=64,
        num_mel_bins=num_mels,
        d_model=32,
        encoder_layers=3,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=48,
        max_source_positions=50,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return (transformers.WhisperForConditionalGeneration if whole else transformers.WhisperModel)(config)


@pytest.mark.parametrize(("num_mels", "whole"), [(80, True), (128, False)])
def test_features_of_full_windows_equal_those_of_transformers(num_mels, whole, tmp_path):
    theirs = whisper(num_mels, whole)
    save(theirs, tmp_path)
    tower, report = load_tower(read_config(tmp_path), tmp_path)
    mel = torch.randn(2, num_mels, 100)
    with torch.no_grad():
        features = tower(windows_of(tower.config, list(mel)))
        expected = theirs.get_encoder()(mel).last_hidden_state.flatten(0, 1)
    error = (features - expected).abs().max().item()
    print(f"parity whisper {num_mels}: {error:.2e} of {expected.abs().max():.2f}")
    assert error <= 1e-4
    assert set(report.skipped) == {"fixed sinusoids, computed", "Whisper's decoder"}
    assert len(report.names) + sum(report.skipped.values()) == report.total


def test_gradients_equal_those_of_transformers(tmp_path):
    theirs = whisper(80)
    save(theirs, tmp_path)
    tower, _ = load_tower(read_config(tmp_path), tmp_path)
    mel, weights = torch.randn(2, 80, 100), torch.randn(100, 32)
    (tower(windows_of(tower.config, list(mel))) * weights).sum().backward()
    (theirs.get_encoder()(mel).last_hidden_state.flatten(0, 1) * weights).sum().backward()
    expected = dict(theirs.get_encoder().named_parameters())
    ours = {hugging_face_name(family, "audio", key): p.grad for key, p in tower.named_parameters()}
    assert_gradients_close(ours, {key: expected[key].grad for key in ours})


def test_positions_that_are_not_the_sinusoids_are_refused(tmp_path):
    theirs = whisper(80)
    with torch.no_grad():
        theirs.get_encoder().embed_positions.weight[3] += 0.1
    save(theirs, tmp_path)
    with pytest.raises(ValueError, match="embed_positions"):
        load_tower(read_config(tmp_path), tmp_path)


CONFIG = AudioConfig(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, num_mels=8, max_positions=50)


def test_a_clip_has_the_same_features_alone_and_beside_longer_clips():
    tower = build_tower(CONFIG)
    clips = [torch.randn(8, frames) for frames in (12, 60, 2)]
    with torch.no_grad():
        together = tower(windows_of(CONFIG, clips))
        alone = [tower(windows_of(CONFIG, [clip])) for clip in clips]
    assert (together - torch.cat(alone)).abs().max() <= 1e-5


def test_zero_clips_give_exactly_zero_gradients():
    tower = build_tower(CONFIG)
    features = tower(windows_of(CONFIG, []))
    assert features.shape == (0, 32)
    features.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in tower.parameters())

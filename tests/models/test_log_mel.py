"""Log-mel windows of clips of every length are Whisper's."""

import dataclasses

import pytest
import torch
from transformers import WhisperFeatureExtractor

from avlm.models import log_mel
from avlm.models.batch import empty_batch
from tests.data.small_files import AUDIO, model

# Shorter than a frame, than its transform, one sample more than a frame; odd and even counts of frames; up to 30 s.
SAMPLES = [1, 159, 161, 399, 16_000, 16_001, 40_079, 479_701, 480_000]


def clips() -> list[torch.Tensor]:
    """Of every length: noise, quiet noise, silence, noise that ends in silence, silence that ends in a click."""
    found = []
    for n in SAMPLES:
        noise, click = 0.1 * torch.randn(n), torch.zeros(n)
        click[-1] = 0.5
        ends_in_silence = torch.cat([noise[: n // 2], torch.zeros(n - n // 2)])
        found += [noise, noise * 1e-4, torch.zeros(n), ends_in_silence, click]
    return found


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("window", ["true", "fixed"])
def test_windows_equal_whispers_extractor(window, num_mels):
    tower = dataclasses.replace(AUDIO, window=window, num_mels=num_mels)
    whisper = WhisperFeatureExtractor(feature_size=num_mels)
    for clip in clips():
        covered = -(-len(clip) // 160)
        compared = covered if window == "true" else 3000
        mel_MW = log_mel.window(clip, tower)
        assert mel_MW.shape == (num_mels, covered + covered % 2 if window == "true" else 3000)
        features = whisper(clip.numpy(), sampling_rate=16_000, return_tensors="pt").input_features
        torch.testing.assert_close(mel_MW[:, :compared], features[0, :, :compared], atol=1e-4, rtol=0)
        assert window == "fixed" or (mel_MW[:, covered:] == 0).all(), "exactly 0 past a clip"


def test_a_row_without_audio_has_zero_windows_that_the_tower_takes():
    assert empty_batch(12, model()).audio.values.shape == (0, 80, 2)

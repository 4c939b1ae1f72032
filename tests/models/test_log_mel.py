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


EDGES = {"zeros": {}, "silence": {"edge": "silence"}, "masked": {"edge": "masked"}, "fixed": {"window": "fixed"}}


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("edge", EDGES)
def test_windows_equal_whispers_extractor(edge, num_mels):
    tower = dataclasses.replace(AUDIO, num_mels=num_mels, **EDGES[edge])
    whisper = WhisperFeatureExtractor(feature_size=num_mels)
    for clip in clips():
        covered = -(-len(clip) // 160)
        even = covered + covered % 2
        width = {"zeros": even, "silence": even + 2, "masked": covered, "fixed": 3000}[edge]
        [mel_MW] = log_mel.windows(clip, tower)
        assert mel_MW.shape == tower.item_shape(covered if edge == "masked" else even if edge != "fixed" else 3000)
        assert mel_MW.shape == (num_mels, width)
        compared = covered if edge == "zeros" else min(3000, width)
        padding = {"max_length": 600_000} if edge == "masked" else {}  # a recording that may go on, as Qwen2.5-Omni's
        features = whisper(clip.numpy(), sampling_rate=16_000, return_tensors="pt", **padding).input_features
        torch.testing.assert_close(mel_MW[:, :compared], features[0, :, :compared], atol=1e-4, rtol=0)
        assert not mel_MW[:, compared:].any(), "exactly 0 past what the convolutions are to see"


@pytest.mark.parametrize("tower", [{"window": "fixed"}, {"edge": "masked", "max_positions": 100}], ids=str)
def test_a_clip_whose_log_mel_is_made_before_it_is_cut_equals_whispers_extractor(tower):
    config = dataclasses.replace(AUDIO, log_mel="clip", **tower)
    whisper = WhisperFeatureExtractor(feature_size=80)
    clip = torch.randn(35 * 16_000) * torch.linspace(1e-6, 0.2, 35 * 16_000)  # its windows have maxima of their own
    longer = {"truncation": False, "padding": True, "pad_to_multiple_of": 480_000, "return_tensors": "pt"}
    features = whisper(clip.numpy(), sampling_rate=16_000, **longer).input_features[0]
    together_MW = torch.cat(log_mel.windows(clip, config), 1)
    assert together_MW.shape[1] == (3500 if config.edge == "masked" else 6000)
    torch.testing.assert_close(together_MW, features[:, : together_MW.shape[1]], atol=1e-4, rtol=0)


def test_a_row_without_audio_has_zero_windows_that_the_tower_takes():
    assert empty_batch(12, model()).audio.values.shape == (0, 80, 2)

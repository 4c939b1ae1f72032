"""Windows made of a row's samples before the tower are those that the workers make, and Whisper's."""

import dataclasses

import pytest
import torch
from transformers import WhisperFeatureExtractor

from avlm.data.media import audio
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample, placeholders
from avlm.models import log_mel
from avlm.models.batch import IGNORE, empty_batch
from tests.data.small_files import AUDIO, model

# Shorter than a frame, than its transform, one sample more than a frame; odd and even counts of frames; 30 s and more.
SAMPLES = [1, 159, 161, 399, 16_000, 16_001, 40_079, 479_701, 480_000, 480_001, 720_000]


def clips() -> list[torch.Tensor]:
    """Of every length: noise, quiet noise, silence, noise that ends in silence, silence that ends in a click."""
    found = []
    for n in SAMPLES:
        noise, click = 0.1 * torch.randn(n), torch.zeros(n)
        click[-1] = 0.5
        found += [noise, noise * 1e-4, torch.zeros(n), torch.cat([noise[: n // 2], torch.zeros(n - n // 2)]), click]
    return found


def row(waveforms: list[torch.Tensor], tower, stack: int = 1):
    """The clips as samples of one packed row."""
    config, samples = model(audio=tower, stack=stack), []
    for waveform in waveforms:
        mels = audio.mels(waveform, tower)
        ids = torch.tensor(placeholders("audio", mels, config))
        samples.append(EncodedSample("a", "audio", ids, torch.full_like(ids, IGNORE), {"audio": mels}))
    return pack(samples, sum(map(len, samples)) + 1, config)


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("window", ["true", "fixed"])
def test_a_rows_windows_made_together_are_those_of_the_workers(window, num_mels):
    of_worker = dataclasses.replace(AUDIO, window=window, num_mels=num_mels)
    of_device = dataclasses.replace(of_worker, log_mel="device")
    waveforms = clips()
    expected, found = row(waveforms, of_worker, stack=2), row(waveforms, of_device, stack=2)
    assert torch.equal(found.token_T, expected.token_T)
    for name in ("kept", "sources", "rows"):
        assert torch.equal(getattr(found.audio, name), getattr(expected.audio, name)), name
    mel_CMW = log_mel.at_tower(found.audio.values, of_device)
    expected_CMW = expected.audio.values
    torch.testing.assert_close(mel_CMW, expected_CMW, atol=1e-5, rtol=0)
    assert torch.equal(mel_CMW == 0, expected_CMW == 0), "exactly 0 past a clip"
    assert log_mel.at_tower(expected_CMW, of_worker) is expected_CMW


@pytest.mark.parametrize("window", ["true", "fixed"])
def test_a_rows_windows_equal_whispers_extractor(window):
    tower = dataclasses.replace(AUDIO, window=window, log_mel="device")
    waveforms = [waveform for waveform in clips() if len(waveform) <= 480_000]
    mel_CMW = log_mel.at_tower(row(waveforms, tower).audio.values, tower)
    for mel_MW, waveform in zip(mel_CMW, waveforms, strict=True):
        covered = -(-len(waveform) // 160) if window == "true" else 3000
        features = WhisperFeatureExtractor()(waveform.numpy(), sampling_rate=16_000, return_tensors="pt").input_features
        torch.testing.assert_close(mel_MW[:, :covered], features[0, :, :covered], atol=1e-4, rtol=0)


def test_a_row_without_sound_has_zero_windows_that_the_tower_takes():
    tower = dataclasses.replace(AUDIO, log_mel="device")
    batch = empty_batch(12, model(audio=tower))
    assert batch.audio.values.shape == (0, log_mel.window_rows(tower), 2)
    assert log_mel.at_tower(batch.audio.values, tower).shape == (0, 80, 2)

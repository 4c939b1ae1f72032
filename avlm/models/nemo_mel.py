"""Log-mel frames equal to those of NeMo's preprocessor, as Parakeet's feature extractor has them.

    y_t     = x_t - 0.97 x_(t-1), y_0 = x_0
    power   = |FFT of 512 samples, of which a Hann window of 400 keeps the middle|^2 every 10 ms, zeros around the clip
    log_mel = ln(filters @ power + 2^-24)
    frame   = (log_mel - mean) / (std + 1e-5), mean and std (n - 1) of each bin over the clip

A frame begins every 160 samples and the last, incomplete one is dropped: there are samples // 160. A single frame has
no std: it is 0 here, as one without variance would be.

M mel bins   B frequencies   W frames
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_RATE = 16_000  # Hz
FFT, WINDOW, HOP = 512, 400, 160  # samples
PREEMPHASIS = 0.97
FLOOR = 2**-24  # of powers
BLOCK = 3000  # frames that are transformed at a time


def num_frames(num_samples: int) -> int:
    return num_samples // HOP


def log_mel(clip: Tensor, num_mels: int) -> Tensor:
    """float32 (samples,) -> (M, frames)."""
    frames = num_frames(len(clip))
    emphasised = torch.cat([clip[:1], clip[1:] - PREEMPHASIS * clip[:-1]])
    padded = F.pad(emphasised, (FFT // 2, FFT // 2))
    # One frame more, of zeros: so sums are rounded as those of the original. Silence has rounding errors for its std.
    log_MW = torch.zeros(num_mels, frames + 1)
    for start in range(0, frames, BLOCK):
        end = min(frames, start + BLOCK)
        samples = padded[start * HOP : (end - 1) * HOP + FFT]
        spectrum_BW = torch.stft(samples, FFT, HOP, WINDOW, _hann(), center=False, return_complex=True)
        power_BW = torch.view_as_real(spectrum_BW).pow(2).sum(-1).sqrt().pow(2)
        log_MW[:, start:end] = (_filters(num_mels) @ power_BW).add_(FLOOR).log_()
    away_MW = log_MW - log_MW.sum(1, keepdim=True) / max(frames, 1)
    away_MW[:, frames:] = 0
    std_M1 = (away_MW.square().sum(1, keepdim=True) / max(frames - 1, 1)).sqrt()
    return (away_MW / (std_M1 + 1e-5))[:, :frames]


@lru_cache
def _hann() -> Tensor:
    return torch.hann_window(WINDOW, periodic=False)


@lru_cache
def _filters(num_mels: int) -> Tensor:
    """Slaney's mel filters, of area 1, float32 (M, FFT / 2 + 1). Made in float64, as quiet audio, whose frames hardly
    differ, shows the errors of float32: below 1 kHz a mel is 200 / 3 Hz, above 27 mels are a factor of 6.4."""
    highest = 15 + 27 * math.log(8) / math.log(6.4)  # of 8 kHz, where 15 mels are 1 kHz
    mel = torch.linspace(0, highest, num_mels + 2, dtype=torch.float64)
    hz = torch.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))
    distance_B = torch.linspace(0, SAMPLE_RATE / 2, FFT // 2 + 1, dtype=torch.float64) - hz[:, None]
    rising_MB = distance_B[:-2] / hz.diff()[:-1, None]
    falling_MB = -distance_B[2:] / hz.diff()[1:, None]
    area_M = 2 / (hz[2:] - hz[:-2])
    return (torch.minimum(rising_MB, falling_MB).clamp(min=0).float() * area_M[:, None]).float()

"""Log-mel windows equal to those of Whisper's feature extractor; the loader's workers make them.

    power   = |FFT of 25 ms|^2 every 10 ms, the clip reflected at its start and followed by zeros
    log_mel = (max(log10(filters @ power), window's maximum - 8) + 4) / 4

M mel bins   B frequencies   W frames
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio.functional import melscale_fbanks

from avlm.config.model import AudioConfig

SAMPLE_RATE = 16_000  # Hz
FFT = 400  # samples: 25 ms
HOP = 160  # samples: 10 ms


def window(clip: Tensor, audio: AudioConfig) -> Tensor:
    """float32 (samples,), at most 30 s -> float32 (M, W) with W even, exactly 0 past the clip; with
    ``audio.window: fixed`` W is 30 s, and silence follows the clip.

    Frames that touch nothing but padding have power 0, the floor of the logarithm, and cannot be the maximum, so
    they need no Fourier transform.
    """
    covered = math.ceil(clip.shape[0] / HOP)  # frames whose centre lies in the clip
    width = covered + covered % 2
    whole = 2 * audio.max_positions
    frames = min(whole, width + math.ceil(FFT / HOP))
    padded = F.pad(clip[None], (0, frames * HOP - clip.shape[0]))
    spectrum_BW = torch.stft(padded, FFT, HOP, window=_hann(), return_complex=True)[0, :, :-1]
    power_BW = spectrum_BW.real.square() + spectrum_BW.imag.square()
    log_MW = (_filters(audio.num_mels) @ power_BW).clamp_(min=1e-10).log10_()
    floor = log_MW.max() - 8.0
    log_MW = log_MW.maximum(floor).add_(4.0).div_(4.0)
    if audio.window == "true":
        log_MW[:, covered:width] = 0.0
        return log_MW[:, :width]
    silence = (floor.clamp(min=-10.0) + 4.0) / 4.0
    return torch.cat([log_MW, silence.expand(audio.num_mels, whole - frames)], 1)


@lru_cache
def _hann() -> Tensor:
    return torch.hann_window(FFT)


@lru_cache
def _filters(num_mels: int) -> Tensor:
    """float32 (M, FFT / 2 + 1)."""
    filters = melscale_fbanks(FFT // 2 + 1, 0.0, 8000.0, num_mels, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    return filters.T.contiguous()

"""Log-mel windows equal to those of Whisper's feature extractor.

    power   = |FFT of 25 ms|^2 every 10 ms, the clip reflected at its start and followed by zeros
    log_mel = (max(log10(filters @ power), window's maximum - 8) + 4) / 4

A worker makes them clip by clip. With ``audio.log_mel: device`` it sends the samples, a column for each frame, and the
tower makes the windows of a row together. There are as many columns as frames, so padding, counting and sharing of
windows work for both.

C windows   N rows of a column: whether its frame is of the clip (1 or 0), then 10 ms of samples   S samples
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
    """A window as a worker sends it, float32 (M, W) or (N, W) with W even, of float32 (samples,), at most 30 s."""
    covered = math.ceil(clip.shape[0] / HOP)  # frames whose centre lies in the clip
    width = covered + covered % 2
    if audio.log_mel == "worker":
        is_covered_W = torch.arange(width) < covered
        return _log_mel(clip[None], is_covered_W[None], audio)[0]
    if audio.window == "fixed":
        width = 2 * audio.max_positions
    columns_NW = clip.new_zeros(1 + HOP, width)
    columns_NW[0, :covered] = 1
    padded = F.pad(clip, (0, covered * HOP - clip.shape[0]))
    columns_NW[1:, :covered] = padded.view(covered, HOP).T
    return columns_NW


def at_tower(windows_CNW: Tensor, audio: AudioConfig) -> Tensor:
    """float32 (C, M, W) of a row's windows as they come from the workers."""
    if audio.log_mel == "worker":
        return windows_CNW
    if len(windows_CNW) == 0:  # torch.stft wants at least one
        return windows_CNW.new_zeros(0, audio.num_mels, windows_CNW.shape[2])
    waveform_CS = windows_CNW[:, 1:].transpose(1, 2).flatten(1)
    return _log_mel(waveform_CS, windows_CNW[:, 0] > 0, audio)


def window_rows(audio: AudioConfig) -> int:
    """M or N: rows of a window as it comes from the workers."""
    return 1 + HOP if audio.log_mel == "device" else audio.num_mels


def _log_mel(waveform_CS: Tensor, is_covered_CW: Tensor, audio: AudioConfig) -> Tensor:
    """float32 (C, S), S <= W * HOP -> (C, M, W), exactly 0 past each clip; (C, M, 30 s) with ``audio.window: fixed``.

    Frames that touch nothing but padding have power 0, the floor of the logarithm, and cannot be the maximum: after the
    longest clip they need no Fourier transform.
    """
    width, whole = is_covered_CW.shape[1], 2 * audio.max_positions
    frames = min(whole, width + math.ceil(FFT / HOP))
    waveform_CS = F.pad(waveform_CS, (0, frames * HOP - waveform_CS.shape[1]))
    hann, filters_MB = _hann(waveform_CS.device), _filters(audio.num_mels, waveform_CS.device)
    spectrum_CBW = torch.stft(waveform_CS, FFT, HOP, window=hann, return_complex=True)[:, :, :-1]
    power_CBW = spectrum_CBW.real.square() + spectrum_CBW.imag.square()
    log_CMW = (filters_MB @ power_CBW).clamp_(min=1e-10).log10_()
    floor_C11 = log_CMW.amax((1, 2), keepdim=True) - 8.0
    log_CMW = log_CMW.maximum(floor_C11).add_(4.0).div_(4.0)
    if audio.window == "true":
        return log_CMW[:, :, :width].masked_fill_(~is_covered_CW[:, None], 0.0)
    silence_C11 = (floor_C11.clamp(min=-10.0) + 4.0) / 4.0
    return torch.cat([log_CMW, silence_C11.expand(-1, audio.num_mels, whole - frames)], 2)


@lru_cache
def _hann(device: torch.device) -> Tensor:
    return torch.hann_window(FFT).to(device)


@lru_cache
def _filters(num_mels: int, device: torch.device) -> Tensor:
    """float32 (M, FFT / 2 + 1)."""
    filters = melscale_fbanks(FFT // 2 + 1, 0.0, 8000.0, num_mels, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    return filters.T.contiguous().to(device)

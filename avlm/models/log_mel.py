"""Log-mel windows equal to those of Whisper's feature extractor, or, with mel=nemo, cut of NeMo's frames
(``avlm.models.nemo_mel``); the loader's workers make them.

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
from avlm.models import nemo_mel

SAMPLE_RATE = 16_000  # Hz
FFT = 400  # samples: 25 ms
HOP = 160  # samples: 10 ms
BLOCK = 3000  # frames that are transformed at a time: spectra and powers take six times the memory of the samples


def windows(clip: Tensor, audio: AudioConfig) -> list[Tensor]:
    """float32 (samples,) -> windows (M, frames), each ``audio.item_shape``: the frames of the clip, and what its
    convolutions see behind them. With edge=zeros a window has an even number of frames."""
    whole = audio.window_frames
    parts = clip.split(whole * HOP) if audio.log_mel == "window" else [clip]
    found = []
    if audio.mel == "nemo":
        for part in parts:
            log_MW = nemo_mel.log_mel(part, audio.num_mels)
            found += [window for window in log_MW.split(whole, 1) if window.shape[1]]
        return found
    for part in parts:
        covered = math.ceil(part.shape[0] / HOP)  # frames whose centre lies in the clip
        log_MW, silence = _log_mel(part, audio)
        for start in range(0, covered, whole):
            found.append(_window(log_MW[:, start:], silence, min(whole, covered - start), audio))
    return found


def _log_mel(clip: Tensor, audio: AudioConfig) -> tuple[Tensor, Tensor]:
    """Normalised log-mel of a clip and of the few frames behind it that touch it; and the value of those that do not,
    whose power is 0, the floor of the logarithm: they cannot be the maximum, and need no Fourier transform."""
    whole = audio.window_frames
    covered = math.ceil(clip.shape[0] / HOP)
    frames = covered + covered % 2 + math.ceil(FFT / HOP)
    if audio.edge != "masked":  # else more of the recording might follow
        frames = min(frames, math.ceil(covered / whole) * whole)
    padded = F.pad(clip[None], (0, frames * HOP - clip.shape[0]))
    padded = F.pad(padded, (FFT // 2, FFT // 2), mode="reflect")[0]
    log_MW = torch.empty(audio.num_mels, frames)
    for start in range(0, frames, BLOCK):
        end = min(frames, start + BLOCK)
        samples = padded[start * HOP : (end - 1) * HOP + FFT]
        spectrum_BW = torch.stft(samples, FFT, HOP, window=_hann(), center=False, return_complex=True)
        power_BW = spectrum_BW.real.square() + spectrum_BW.imag.square()
        log_MW[:, start:end] = (_filters(audio.num_mels) @ power_BW).clamp_(min=1e-10).log10_()
    floor = log_MW.max() - 8.0
    return log_MW.clamp_(min=floor).add_(4.0).div_(4.0), (floor.clamp(min=-10.0) + 4.0) / 4.0


def _window(log_MW: Tensor, silence: Tensor, covered: int, audio: AudioConfig) -> Tensor:
    """The first ``covered`` frames of a clip's, or of what is left of them, as a window."""
    whole = audio.window_frames
    if audio.window == "fixed":
        return _followed_by_silence(log_MW, silence, whole)
    if audio.edge == "masked":
        return log_MW[:, :covered]
    width = covered + covered % 2
    if audio.edge == "silence":
        _, width = audio.item_shape(covered)
        shown = min(whole, width)  # nothing stands behind a full window
        log_MW = _followed_by_silence(log_MW, silence, shown)
        return F.pad(log_MW, (0, width - shown))
    return F.pad(log_MW[:, :covered], (0, width - covered))


def _followed_by_silence(log_MW: Tensor, silence: Tensor, width: int) -> Tensor:
    missing = max(0, width - log_MW.shape[1])
    return torch.cat([log_MW[:, :width], silence.expand(len(log_MW), missing)], 1)


@lru_cache
def _hann() -> Tensor:
    return torch.hann_window(FFT)


@lru_cache
def _filters(num_mels: int) -> Tensor:
    """float32 (M, FFT / 2 + 1)."""
    filters = melscale_fbanks(FFT // 2 + 1, 0.0, 8000.0, num_mels, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    return filters.T.contiguous()

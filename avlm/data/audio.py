"""Sound: bytes of any container -> log-mel windows, equal to Whisper's feature extractor.

decode  bytes -> float32 (samples,), mono, 16 kHz
mels    -> a list of windows (M, frames): M mel bins, one frame each 10 ms; or the columns of samples that they are
           made of (log_mel.py)

A window is 2 * max_positions frames (30 s). A longer clip becomes several windows and nothing is cut. With
``audio.window: true`` a window ends with its clip, at an even number of frames (the tower's second convolution halves
them); frames past the clip are exactly 0 after normalisation, which is also what the convolution pads with: so no row
of a clip depends on what stands beside it in a batch.
"""

import io
import math
from functools import lru_cache

import av
import numpy
import torch
from torch import Tensor
from torchaudio.transforms import Resample

from avlm.data.log_mel import HOP, SAMPLE_RATE, window
from avlm.model_config import AudioConfig

SAMPLES_PER_ROW = 2 * HOP  # the tower's convolutions halve the frames
MAX_RESAMPLE_KERNEL = 2**24  # floats; rates without a small ratio to 16 kHz would need gigabytes


def decode(data: bytes, max_seconds: float) -> Tensor:
    """Mean over the channels of the first audio stream. ValueError if it is missing, empty, broken or too long."""
    try:
        with open_container(data) as container:
            if not container.streams.audio:
                raise ValueError("file has no audio stream")
            rate, waveform = _read(container, max_seconds)
    except av.FFmpegError as error:
        raise ValueError(f"audio cannot be decoded: {error.strerror}") from None
    return _resampler(rate)(waveform) if rate != SAMPLE_RATE else waveform


def open_container(data: bytes) -> av.container.InputContainer:
    """A file in memory. FFmpeg may open nothing beside it: playlists name other files, and a sample is not trusted."""
    return av.open(io.BytesIO(data), options={"protocol_whitelist": "pipe"})


def mels(waveform: Tensor, audio: AudioConfig) -> list[Tensor]:
    """float32 (M, frames) of every window, in order; or its columns, as many."""
    return [window(clip, audio) for clip in waveform.split(audio.max_positions * SAMPLES_PER_ROW)]


def rows(mel: Tensor) -> int:
    """Rows that the tower keeps of a window."""
    return mel.shape[1] // 2


def _read(container: av.container.InputContainer, max_seconds: float) -> tuple[int, Tensor]:
    """(sample rate, mono waveform). The channels are averaged second by second, which bounds the memory."""
    stream = container.streams.audio[0]
    rate = stream.codec_context.sample_rate
    chunks, frames, total, mixed = [], [], 0, 0
    for frame in container.decode(stream):
        frames.append(_channels(frame))
        total += frame.samples
        if total > max_seconds * rate:
            raise ValueError(f"audio is longer than data.max_audio_seconds={max_seconds:g}")
        if total - mixed >= rate:
            chunks.append(_mono(frames))
            frames, mixed = [], total
    if total == 0:
        raise ValueError("audio is empty")
    return rate, torch.from_numpy(numpy.concatenate([*chunks, *([_mono(frames)] if frames else [])]))


def _channels(frame: av.AudioFrame) -> numpy.ndarray:
    """(channels, samples): planar frames are so, in others the channels of a sample stand side by side."""
    samples = frame.to_ndarray()
    return samples if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels).T


def _mono(frames: list[numpy.ndarray]) -> numpy.ndarray:
    """float32 (samples,) in -1..1 from any sample format."""
    samples = numpy.concatenate(frames, axis=1)
    if samples.dtype == numpy.uint8:
        samples = (samples.astype(numpy.float32) - 128) / 128
    elif samples.dtype.kind == "i":
        samples = samples.astype(numpy.float32) / -float(numpy.iinfo(samples.dtype).min)
    return samples.mean(0, dtype=numpy.float32)


@lru_cache(maxsize=8)  # rates come from the data, and a kernel may have 64 MB
def _resampler(rate: int) -> Resample:
    divisor = math.gcd(rate, SAMPLE_RATE)
    if (rate // divisor) * (SAMPLE_RATE // divisor) > MAX_RESAMPLE_KERNEL:
        raise ValueError(f"sample rate of {rate} Hz has no small ratio to {SAMPLE_RATE} Hz: convert the file")
    return Resample(rate, SAMPLE_RATE)

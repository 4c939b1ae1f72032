"""Audio: bytes of any container -> log-mel windows, equal to Whisper's feature extractor.

decode  bytes -> float32 (samples,), mono, 16 kHz
delayed -> the same, heard later
mels    -> a list of windows (M, frames): M mel bins, one frame each 10 ms

A window is ``AudioConfig.window_frames`` frames (Whisper's: 30 s). Longer audio becomes several clips, each with a
window of its own, and nothing is lost. With ``audio.window: true`` a window ends with its clip, at an even number of
frames (the second convolution of ``stem: conv1d`` halves them). Frames past the clip are exactly 0 after normalisation,
which is also what the convolution pads with, so no tower row depends on the other clips of a batch. ``audio.edge`` and
``audio.log_mel`` have other ways.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from operator import itemgetter

import av
import numpy
import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio.transforms import Resample

from avlm.config.model import AudioConfig
from avlm.data.media.container import FAULTS, Decoder, open_container, reason, say_once
from avlm.models.log_mel import HOP, SAMPLE_RATE, windows

SAMPLES_PER_ROW = 2 * HOP  # the tower's convolutions halve the frames
DTYPES = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}  # of FFmpeg's sample formats
MAX_AMPLITUDE = 1e4  # where full scale is 1; integers written as floats, and garbage, exceed it
MAX_RATE = 768_000  # Hz
MAX_RESAMPLE_KERNEL = 2**24  # floats; rates without a small ratio to 16 kHz would need gigabytes
# For up to 10 minutes; a larger data.max_audio_seconds raises both in proportion.
MAX_SAMPLES = 2**29  # of all channels: 10 minutes of 8 channels at 96 kHz, or of 2 at 384 kHz
MAX_RESAMPLE_WORK = 6 * 10**10  # products: some seconds of computing, and 14 times what 10 minutes at 44.1 kHz take
BLOCK = 2**20  # samples that are mixed and resampled at a time


def decode(data: bytes, max_seconds: float, name: str = "audio") -> Tensor:
    """float32 (samples,): the mean over the channels of the first audio stream that is not empty. ValueError if there
    is none, or if it cannot be decoded, is too long or holds impossible values.

    Packets that cannot be decoded are left out, as ffmpeg does; a line on stderr says so, with the ``name``.
    """
    try:
        samples, decoder = _first_stream(data, max_seconds)
        faults = decoder.faults()
        if not len(samples) and faults:
            raise faults[0]
    except FAULTS as error:
        raise ValueError(f"audio cannot be decoded: {reason(error, data)}") from None
    if not len(samples):
        raise ValueError("audio is empty")
    if decoder.errors:
        say_once(f"{name}: {len(decoder.errors)} of {decoder.packets} packets of audio cannot be decoded, left out")
    if decoder.stopped:
        say_once(f"{name}: cannot be read past {decoder.reached:.1f} s: {reason(decoder.stopped, data)}")
    return torch.from_numpy(samples)


def _first_stream(data: bytes, max_seconds: float) -> tuple[numpy.ndarray, Decoder]:
    """float32 (samples,) of the first audio stream that holds packets, and its decoder."""
    index = 0
    while True:
        with open_container(data) as container:
            streams = container.streams.audio
            if not streams:
                raise ValueError("file has no audio stream")
            if index == len(streams):
                raise ValueError("audio is empty")
            decoder = Decoder(container, streams[index])
            blocks = _mono(_bounded(decoder.frames(), max_seconds))
            parts = [numpy.empty(0, numpy.float32), *_at_16_khz(blocks)]
        if decoder.packets:
            return numpy.concatenate(parts), decoder
        index += 1


def mels(waveform: Tensor, audio: AudioConfig) -> list[Tensor]:
    """float32 (M, frames) of every window that the tower makes a row of, in order."""
    return [mel for mel in windows(waveform, audio) if audio.outputs_of(num_frames(mel, audio)) > 0]


def delayed(waveform: Tensor, seconds: float, max_seconds: float) -> Tensor:
    """With silence before it, or, for negative seconds, without its beginning. ValueError if it gets too long, or if
    nothing is left."""
    if seconds + len(waveform) / SAMPLE_RATE > max_seconds * (1 + 1e-9):
        raise ValueError(
            f"audio that begins after {seconds:.1f} s is longer than data.max_audio_seconds={max_seconds:g}"
        )
    samples = round(seconds * SAMPLE_RATE)
    if samples + len(waveform) <= 0:
        raise ValueError("audio of the video ends before its first frame")
    return F.pad(waveform, (samples, 0)) if samples > 0 else waveform[-samples:]


def num_frames(mel: Tensor, audio: AudioConfig) -> int:
    """Frames of the clip in a window, rounded up to an even number except with edge=masked."""
    return mel.shape[1] - 2 if audio.edge == "silence" else mel.shape[1]


def _bounded(frames: Iterator[av.AudioFrame], max_seconds: float) -> Iterator[av.AudioFrame]:
    """The frames that hold samples. ValueError once they exceed a bound of length, memory or time."""
    seconds = 0.0
    num_samples = 0
    work = 0
    last_rate = SAMPLE_RATE
    scale = max(1.0, max_seconds / 600)
    for frame in frames:
        if not frame.samples:
            continue
        rate = frame.sample_rate
        if not 0 < rate <= MAX_RATE:
            raise ValueError(f"audio has a sample rate of {rate} Hz, not of 1 to {MAX_RATE}: convert the file")
        seconds += frame.samples / rate
        if seconds > max_seconds * (1 + 1e-9):  # the margin is for rounding
            raise ValueError(f"audio is longer than data.max_audio_seconds={max_seconds:g}")
        num_samples += frame.samples * frame.layout.nb_channels
        if num_samples > MAX_SAMPLES * scale:
            raise ValueError(f"audio has more than {num_samples} samples in all of its channels: convert the file")
        if rate != SAMPLE_RATE:
            before, after = _ratio(rate)
            work += after * frame.samples
            if rate != last_rate:
                work += after * before
        if work > MAX_RESAMPLE_WORK * scale:
            raise ValueError(f"audio at {rate} Hz takes too long to resample to {SAMPLE_RATE} Hz: convert the file")
        last_rate = rate
        yield frame


def _mono(frames: Iterator[av.AudioFrame]) -> Iterator[tuple[int, numpy.ndarray]]:
    """(sample rate, float32 (samples,) in -1..1) of blocks of frames. A stream may change its format, and a block has
    one."""
    for (rate, _, _, _), alike in groupby(frames, _format):
        block: list[numpy.ndarray] = []
        size = 0
        for frame in alike:
            if size >= BLOCK:
                yield rate, _mix(numpy.concatenate(block, axis=1))
                block = []
                size = 0
            samples = _samples(frame)
            block.append(samples)
            size += samples.size
        yield rate, _mix(numpy.concatenate(block, axis=1))


def _format(frame: av.AudioFrame) -> tuple[int, str, bool, int]:
    kind = frame.format.packed.name
    if kind not in DTYPES:
        raise ValueError(f"audio has samples of the form {kind}, which is not read: convert the file")
    return frame.sample_rate, kind, frame.format.is_planar, frame.layout.nb_channels


def _samples(frame: av.AudioFrame) -> numpy.ndarray:
    """(channels, samples) in the frame's own type."""
    _, kind, is_planar, num_channels = _format(frame)
    if is_planar:
        planes = [numpy.frombuffer(plane, DTYPES[kind], frame.samples) for plane in frame.planes]
        return numpy.stack(planes)
    interleaved = numpy.frombuffer(frame.planes[0], DTYPES[kind], frame.samples * num_channels)
    return interleaved.reshape(-1, num_channels).T


def _mix(samples: numpy.ndarray) -> numpy.ndarray:
    """(channels, samples) of any type -> float32 (samples,). ValueError for values that no recording has."""
    if samples.dtype == numpy.uint8:
        samples = (samples.astype(numpy.float32) - 128) / 128
    elif samples.dtype.kind == "i":
        samples = samples.astype(numpy.float32) / -float(numpy.iinfo(samples.dtype).min)
    with numpy.errstate(all="ignore"):  # overflow of float32, which is checked below
        samples = samples.mean(0, dtype=numpy.float32)
    loudest = numpy.abs(samples).max()
    if not numpy.isfinite(loudest):
        raise ValueError("audio holds values that are not finite")
    if loudest > MAX_AMPLITUDE:
        raise ValueError(f"audio has values up to {loudest:.3g}, where full scale is 1: scale it")
    return samples


def _at_16_khz(blocks: Iterator[tuple[int, numpy.ndarray]]) -> Iterator[numpy.ndarray]:
    for rate, stretch in groupby(blocks, itemgetter(0)):
        samples = (block for _, block in stretch)
        yield from samples if rate == SAMPLE_RATE else _resampled(samples, rate)


def _resampled(blocks: Iterator[numpy.ndarray], rate: int) -> Iterator[numpy.ndarray]:
    """A stretch of one sample rate at 16 kHz: the same as if it were resampled at once, but a block at a time, which
    bounds the memory."""
    before, after = _ratio(rate)
    resampler = _resampler(rate)
    context = -(-resampler.width // before) * before  # samples on either side that an output sample sees
    held = numpy.empty(0, numpy.float32)
    lead = 0  # samples of ``held`` that are context only: their output was yielded before
    waiting: list[numpy.ndarray] = []
    for block in blocks:
        waiting.append(block)
        if len(held) + sum(map(len, waiting)) < BLOCK:
            continue
        held = numpy.concatenate([held, *waiting])
        waiting = []
        num_periods = (len(held) - lead - context) // before
        yield _without_lead(resampler, held, lead // before * after)[: num_periods * after]
        held = held[lead + num_periods * before - context :]
        lead = context
    yield _without_lead(resampler, numpy.concatenate([held, *waiting]), lead // before * after)


def _without_lead(resampler: Resample, samples: numpy.ndarray, lead: int) -> numpy.ndarray:
    return resampler(torch.from_numpy(samples)).numpy()[lead:]


def _ratio(rate: int) -> tuple[int, int]:
    """(samples before resampling, samples after it), in lowest terms."""
    divisor = math.gcd(rate, SAMPLE_RATE)
    return rate // divisor, SAMPLE_RATE // divisor


@lru_cache(maxsize=8)  # rates come from the data, and a kernel may take 64 MB
def _resampler(rate: int) -> Resample:
    if math.prod(_ratio(rate)) > MAX_RESAMPLE_KERNEL:
        raise ValueError(f"sample rate of {rate} Hz has no small ratio to {SAMPLE_RATE} Hz: convert the file")
    return Resample(rate, SAMPLE_RATE)

"""Sound: bytes of any container -> log-mel windows, equal to Whisper's feature extractor.

decode  bytes -> float32 (samples,), mono, 16 kHz
mels    -> a list of windows (M, frames): M mel bins, one frame each 10 ms; or the columns of samples that they are
           made of (log_mel.py)

A window is 2 * max_positions frames (30 s). A longer clip becomes several windows and nothing is cut. With
``audio.window: true`` a window ends with its clip, at an even number of frames (the tower's second convolution halves
them); frames past the clip are exactly 0 after normalisation, which is also what the convolution pads with: so no row
of a clip depends on what stands beside it in a batch.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain, count, groupby
from operator import itemgetter

import av
import numpy
import torch
from torch import Tensor
from torchaudio.transforms import Resample

from avlm.config.model import AudioConfig
from avlm.data.media.container import FAULTS, Decoder, open_container, reason, say_once
from avlm.models.log_mel import HOP, SAMPLE_RATE, window

SAMPLES_PER_ROW = 2 * HOP  # the tower's convolutions halve the frames
DTYPES = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}  # of FFmpeg's sample formats
MAX_AMPLITUDE = 1e4  # where full scale is 1; integers written as floats, and garbage, are above it
MAX_RATE = 768_000  # Hz
MAX_RESAMPLE_KERNEL = 2**24  # floats; rates without a small ratio to 16 kHz would need gigabytes
# In 10 minutes, or in data.max_audio_seconds where that is more:
MAX_SAMPLES = 2**29  # of all channels: 10 minutes of 8 channels at 96 kHz, or of 2 at 384 kHz
MAX_RESAMPLE_WORK = 6 * 10**10  # products: some seconds of computing, and 14 times what 10 minutes at 44.1 kHz take
BLOCK = 2**20  # samples that are mixed and resampled at a time


def decode(data: bytes, max_seconds: float, name: str = "audio") -> Tensor:
    """Mean over the channels of the first audio stream that is not empty. ValueError if there is none, or it cannot be
    decoded, is too long, or holds values that are no sound.

    What cannot be decoded between the rest is left out, as ffmpeg does; stderr says so of ``name``.
    """
    try:
        for index in count():
            with open_container(data) as container:
                streams = container.streams.audio
                if index == len(streams):
                    raise ValueError("audio is empty" if streams else "file has no audio stream")
                decoder = Decoder(container, streams[index])
                parts = [numpy.empty(0, numpy.float32), *_at_16_khz(_mono(_bounded(decoder.frames(), max_seconds)))]
            if decoder.packets:
                break
        clip = torch.from_numpy(numpy.concatenate(parts))
        if not len(clip) and (faults := decoder.faults()):
            raise faults[0]
    except FAULTS as error:
        raise ValueError(f"audio cannot be decoded: {reason(error, data)}") from None
    if not len(clip):
        raise ValueError("audio is empty")
    if decoder.errors:
        say_once(f"{name}: {len(decoder.errors)} of {decoder.packets} packets of sound cannot be decoded, left out")
    if decoder.stopped:
        say_once(f"{name}: cannot be read past {decoder.reached:.1f} s: {reason(decoder.stopped, data)}")
    return clip


def mels(waveform: Tensor, audio: AudioConfig) -> list[Tensor]:
    """float32 (M, frames) of every window, in order; or its columns, as many."""
    return [window(clip, audio) for clip in waveform.split(audio.max_positions * SAMPLES_PER_ROW)]


def num_rows(mel: Tensor) -> int:
    """Rows that the tower keeps of a window."""
    return mel.shape[1] // 2


def _bounded(frames: Iterator[av.AudioFrame], max_seconds: float) -> Iterator[av.AudioFrame]:
    """The frames that hold samples, up to the bounds of length, memory and time."""
    seconds, samples, work, last, scale = 0.0, 0, 0, SAMPLE_RATE, max(1.0, max_seconds / 600)
    for frame in frames:
        if not frame.samples:
            continue
        rate = frame.sample_rate
        if not 0 < rate <= MAX_RATE:
            raise ValueError(f"audio has a sample rate of {rate} Hz, not of 1 to {MAX_RATE}: convert the file")
        seconds += frame.samples / rate
        if seconds > max_seconds * (1 + 1e-9):  # the margin is for rounding
            raise ValueError(f"audio is longer than data.max_audio_seconds={max_seconds:g}")
        samples += frame.samples * frame.layout.nb_channels
        if samples > MAX_SAMPLES * scale:
            raise ValueError(f"audio has more than {samples} samples in all of its channels: convert the file")
        if rate != SAMPLE_RATE:
            before, after = _ratio(rate)
            work += after * (frame.samples + before * (rate != last))
        if work > MAX_RESAMPLE_WORK * scale:
            raise ValueError(f"audio at {rate} Hz takes too long to resample to {SAMPLE_RATE} Hz: convert the file")
        last = rate
        yield frame


def _mono(frames: Iterator[av.AudioFrame]) -> Iterator[tuple[int, numpy.ndarray]]:
    """(sample rate, float32 (samples,) in -1..1) of a block of frames of one form. A stream may change it under way."""
    for (rate, kind, planar, channels), alike in groupby(frames, _form):
        held, values = [], 0
        for frame in chain(alike, [None]):
            if held and (frame is None or values >= BLOCK):
                yield rate, _mix(numpy.concatenate(held, axis=1))
                held, values = [], 0
            if frame is not None:
                size = frame.samples * (1 if planar else channels)
                planes = numpy.stack([numpy.frombuffer(plane, DTYPES[kind], size) for plane in frame.planes])
                held.append(planes if planar else planes.reshape(-1, channels).T)
                values += held[-1].size


def _form(frame: av.AudioFrame) -> tuple[int, str, bool, int]:
    kind = frame.format.packed.name
    if kind not in DTYPES:
        raise ValueError(f"audio has samples of the form {kind}, which is not read: convert the file")
    return frame.sample_rate, kind, frame.format.is_planar, frame.layout.nb_channels


def _mix(samples: numpy.ndarray) -> numpy.ndarray:
    """float32 (samples,) of (channels, samples) of any of the types. ValueError for values that are no sound."""
    if samples.dtype == numpy.uint8:
        samples = (samples.astype(numpy.float32) - 128) / 128
    elif samples.dtype.kind == "i":
        samples = samples.astype(numpy.float32) / -float(numpy.iinfo(samples.dtype).min)
    with numpy.errstate(all="ignore"):  # of float32, which is checked
        samples = samples.mean(0, dtype=numpy.float32)
    loudest = numpy.abs(samples).max()
    if not numpy.isfinite(loudest):
        raise ValueError("audio holds values that are not finite")
    if loudest > MAX_AMPLITUDE:
        raise ValueError(f"audio has values up to {loudest:.3g}, where full scale is 1: scale it")
    return samples


def _at_16_khz(blocks: Iterator[tuple[int, numpy.ndarray]]) -> Iterator[numpy.ndarray]:
    """Each stretch of one rate is resampled for itself: as a whole, but a block at a time, which bounds the memory."""
    for rate, stretch in groupby(blocks, itemgetter(0)):
        if rate == SAMPLE_RATE:
            yield from (samples for _, samples in stretch)
            continue
        (before, after), resampler = _ratio(rate), _resampler(rate)
        context = -(-resampler.width // before) * before  # samples on either side that an output sample sees
        held, lead = [], 0
        for _, samples in chain(stretch, [(rate, None)]):
            held += [samples] if samples is not None else []
            if samples is not None and sum(map(len, held)) < BLOCK:
                continue
            whole = numpy.concatenate(held)
            resampled = resampler(torch.from_numpy(whole)).numpy()[lead // before * after :]
            if samples is None:
                yield resampled
                break
            periods = (len(whole) - lead - context) // before
            yield resampled[: periods * after]
            held, lead = [whole[lead + periods * before - context :]], context


def _ratio(rate: int) -> tuple[int, int]:
    """(samples before, samples after) resampling, as small as they can be."""
    divisor = math.gcd(rate, SAMPLE_RATE)
    return rate // divisor, SAMPLE_RATE // divisor


@lru_cache(maxsize=8)  # rates come from the data, and a kernel may have 64 MB
def _resampler(rate: int) -> Resample:
    if math.prod(_ratio(rate)) > MAX_RESAMPLE_KERNEL:
        raise ValueError(f"sample rate of {rate} Hz has no small ratio to {SAMPLE_RATE} Hz: convert the file")
    return Resample(rate, SAMPLE_RATE)

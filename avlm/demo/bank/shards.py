"""Samples as files: images become PNG, clips WAV, videos MKV, and a range of samples one WebDataset tar."""

import io
import json
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from avlm.demo.bank.bank import SAMPLE_RATE, load
from avlm.demo.bank.tasks import FRAME_RATE, Video, compose


def write_shard(path: Path, task: str, split: str, indices: range, seed: int) -> list[dict]:
    """Writes KEY.json and KEY.<part> of every sample, the same bytes each time, and returns the JSON objects."""
    records = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in indices:
            record, media = compose(task, split, index, load(), seed)
            records.append(record)
            parts = {"json": json.dumps(record).encode()} | {name: encode(item) for name, item in media.items()}
            for name, data in parts.items():
                member = tarfile.TarInfo(f"{task}_{split}_{index:06d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return records


def encode(media: np.ndarray | Video) -> bytes:
    """Takes what `compose` returns: uint8 (H, W), int16 (samples,) or a Video."""
    if isinstance(media, Video):
        return encode_video(media)
    return encode_picture(media) if media.ndim == 2 else encode_sound(media)


def encode_picture(pixels_HW: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW).save(buffer, "png")
    return buffer.getvalue()


def encode_sound(wave: np.ndarray) -> bytes:
    """ADPCM WAV, a quarter of the size of 16 bits: its error stands 27 dB below the words, and up to 0.13 s of near
    silence fills the last block."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", "wav", options={"fflags": "+bitexact"}) as container:
        mux_sound(container, container.add_stream("adpcm_ima_wav", SAMPLE_RATE, layout="mono", format="s16p"), wave)
    return buffer.getvalue()


def encode_video(video: Video) -> bytes:
    """Both tracks are lossless: grey FFV1 frames and FLAC if the video has audio."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", "matroska", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("ffv1", FRAME_RATE, {"level": "1", "threads": "1"}, pix_fmt="gray")
        stream.height, stream.width = video.frames_FHW.shape[1:]
        if video.sound is not None:  # every stream is declared before the first packet
            sound_stream = container.add_stream("flac", SAMPLE_RATE, layout="mono", format="s16")
        for number, pixels_HW in enumerate(video.frames_FHW):
            frame = av.VideoFrame.from_ndarray(pixels_HW, format="gray")
            frame.pts, frame.time_base = number, Fraction(1, FRAME_RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if video.sound is not None:
            mux_sound(container, sound_stream, video.sound)
    return buffer.getvalue()


def mux_sound(container: av.container.OutputContainer, stream: av.AudioStream, wave: np.ndarray) -> None:
    frame = av.AudioFrame.from_ndarray(wave[None], format=stream.format.name, layout="mono")
    frame.sample_rate, frame.pts = SAMPLE_RATE, 0
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))

"""Media as data URIs that every browser shows, encoded again and small: for pages that need no other file."""

import base64
import io
from fractions import Fraction

import av
import numpy
from PIL import Image
from torch import Tensor

from avlm.config.media import VideoConfig
from avlm.config.run import DataConfig
from avlm.data.media import audio, image, video

SIDE = 320  # pixels of the longer side; larger images and videos are reduced
SMALL = 96  # pixels: up to here an image stays without loss
SMALL_IMAGE = "image/png"  # the media type of these
SECONDS = 30  # of sound; what is longer is cut
FRAMES = VideoConfig(num_frames=None, fps=8.0, max_frames=64)  # of a video; from 8 seconds on they spread over it
RATE = 16_000  # Hz, of what ``audio.decode`` gives
MILLISECOND = Fraction(1, 1000)
VIDEO_OPTIONS = {"crf": "12", "b": "1M", "deadline": "realtime"}


def image_uri(data: bytes, limits: DataConfig) -> str:
    """ValueError for what cannot be decoded, as of the following two."""
    decoded = image.decode(data, limits.max_image_pixels)
    is_small = max(decoded.shape) <= SMALL
    content = io.BytesIO()
    _reduced(decoded).save(content, "PNG" if is_small else "JPEG", quality=80)
    return data_uri(content.getvalue(), SMALL_IMAGE if is_small else "image/jpeg")


def audio_uri(data: bytes, limits: DataConfig) -> str:
    sound = audio.decode(data, limits.max_audio_seconds)
    content = io.BytesIO()
    with av.open(content, "w", format="webm") as container:
        _write_sound(sound, container, _sound_stream(container))
    return data_uri(content.getvalue(), "audio/webm")


def video_uri(data: bytes, limits: DataConfig) -> str:
    """The frames of FRAMES at their times, with the video's own sound."""
    frames = [(_reduced(frame), time) for frame, time in video.decode(data, FRAMES, limits.max_image_pixels)]
    sound = audio.decode(data, limits.max_audio_seconds) if video.has_audio(data) else None
    width, height = (size + size % 2 for size in frames[0][0].size)
    if max(width, height) <= SMALL:  # few pixels, whose colours would blur
        enlarged = 2 * SMALL // max(width, height)
        width, height = enlarged * width, enlarged * height
    content = io.BytesIO()
    with av.open(content, "w", format="webm") as container:
        pictures = container.add_stream("libvpx", rate=30, options=VIDEO_OPTIONS)
        pictures.width, pictures.height, pictures.pix_fmt = width, height, "yuv420p"
        pictures.time_base = pictures.codec_context.time_base = MILLISECOND
        voice = _sound_stream(container) if sound is not None else None  # all streams come before the first packet
        for picture, seconds in frames:
            frame = av.VideoFrame.from_image(picture.resize((width, height), Image.Resampling.NEAREST))
            frame.pts, frame.time_base = round(1000 * seconds), MILLISECOND
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode())
        if sound is not None:
            _write_sound(sound, container, voice)
    return data_uri(content.getvalue(), "video/webm")


def _reduced(pixels_3HW: Tensor) -> Image.Image:
    picture = Image.fromarray(pixels_3HW.permute(1, 2, 0).numpy())
    picture.thumbnail((SIDE, SIDE))
    return picture


def _sound_stream(container: av.container.OutputContainer) -> av.AudioStream:
    return container.add_stream("libopus", rate=48_000, layout="mono", options={"b": "24k"})


def _write_sound(sound: Tensor, container: av.container.OutputContainer, stream: av.AudioStream) -> None:
    samples = (sound[: SECONDS * RATE].clamp(-1, 1).numpy() * 32767).astype(numpy.int16)
    frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
    container.mux(stream.encode(frame))
    container.mux(stream.encode())


def data_uri(content: bytes, kind: str) -> str:
    """``kind``: its media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"

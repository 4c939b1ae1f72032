"""Films: bytes -> frames spread over the film, each a picture, with their times.

Frames are looked up by time: those that ``num_frames`` or ``fps`` ask for, never more than ``max_frames``. Between
distant times the film is seeked, so that an hour costs little more than a minute.
"""

from collections.abc import Iterator
from fractions import Fraction

import av
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from avlm.config import VideoConfig
from avlm.data.container import open_container

SEEK_SECONDS = 4.0  # a gap that is worth a seek: nearer frames are decoded on the way


def decode(data: bytes, video: VideoConfig, max_pixels: int) -> Iterator[tuple[Tensor, float]]:
    """Frames uint8 (3, H, W) with their times in seconds, one at a time. ValueError without a readable video stream."""
    count = 0
    try:
        with open_container(data) as container:
            if not container.streams.video:
                raise ValueError("file has no video stream")
            stream = container.streams.video[0]
            width, height = stream.codec_context.width, stream.codec_context.height
            _check_size(width, height, max_pixels)
            stream.codec_context.thread_count = (
                1  # the loader's workers are the parallelism; threads cost small films most
            )
            convert = VideoReformatter()  # one for all frames: it keeps its tables
            for frame in _frames_at(container, stream, times(_seconds(container, stream), video)):
                count += 1
                _check_size(frame.width, frame.height, max_pixels)  # a stream may change it under way
                yield _rgb(frame, convert), _time(frame, stream)
    except av.FFmpegError as error:
        raise ValueError(f"film cannot be decoded: {error.strerror}") from None
    if count == 0:
        raise ValueError("film has no frame")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ValueError(f"film of {width} x {height} pixels exceeds data.max_image_pixels={max_pixels}")


def has_sound(data: bytes) -> bool:
    with open_container(data) as container:
        return bool(container.streams.audio)


def times(seconds: float, video: VideoConfig) -> list[float]:
    """Times of the frames: the middles of ``num_frames`` equal parts; or every 1 / fps, and where that gives more than
    ``max_frames``, the middles of that many parts."""
    count = video.num_frames
    if video.fps is not None:
        if (steps := max(1, round(seconds * video.fps))) <= video.max_frames:
            return [i / video.fps for i in range(steps)]
        count = video.max_frames
    return [(i + 0.5) * seconds / count for i in range(count)]


def _seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Duration: of the stream, of the container, or (streamed files know neither) up to the end of the last packet."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None:
        return container.duration / av.time_base
    ends = [packet.pts + (packet.duration or 0) for packet in container.demux(stream) if packet.pts is not None]
    container.seek(0)
    return float(max(ends, default=0) * stream.time_base)


def _frames_at(
    container: av.container.InputContainer, stream: av.VideoStream, wanted: list[float]
) -> Iterator[av.VideoFrame]:
    """The frame on screen at each time (ascending): the last that starts at or before it."""
    decoder = container.decode(stream)
    start = (stream.start_time or 0) * stream.time_base
    shown, following = None, next(decoder, None)
    for seconds in wanted:
        if following is not None and seconds - _time(following, stream) > SEEK_SECONDS:
            container.seek(int((Fraction(seconds) + start) / stream.time_base), stream=stream)  # to a key frame before
            decoder = container.decode(stream)
            following = next(decoder, None)
        while following is not None and (shown is None or _time(following, stream) <= seconds):
            shown, following = following, next(decoder, None)
        if shown is not None:
            yield shown


def _time(frame: av.VideoFrame, stream: av.VideoStream) -> float:
    """Seconds since the start of the stream."""
    return float(((frame.pts or 0) - (stream.start_time or 0)) * stream.time_base)


def _rgb(frame: av.VideoFrame, convert: VideoReformatter) -> Tensor:
    """uint8 (3, H, W), upright: telephones film sideways and say so in the metadata."""
    image = torch.from_numpy(convert.reformat(frame, format="rgb24", threads=1).to_ndarray()).permute(2, 0, 1)
    return torch.rot90(image, k=round(frame.rotation / 90), dims=(1, 2)).contiguous()

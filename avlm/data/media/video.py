"""Videos: bytes -> frames spread over the video, each an image, with their times.

Frames are looked up by time: those of ``avlm.data.media.area.frame_times``. Times count from the first frame to the end
of the last one, whatever the file claims as its length and however long its audio is.
Between distant times the decoder seeks, so that an hour costs little more than a minute.
"""

import contextlib
import math
import struct
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy
import torch
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from torch import Tensor

from avlm.config.media import VideoConfig
from avlm.data.media.area import frame_times
from avlm.data.media.container import FAULTS, Decoder, has_packets, open_container, reason

SEEK_SECONDS = 4.0  # a gap that is worth a seek: nearer frames are decoded on the way
SEEK_MARGIN = 1  # seconds before the end: the last packet of the file need not be the last on screen
MAX_SEEKS = 4  # for one time; each looks twice as far before it as the last
MAX_WASTED = 3  # seeks that went back: the video's key frames are further apart than the frames asked for
MAX_FRAME_PIXELS = 2**25  # 8K; no decoder is given more, as some hold 17 frames
MAX_FRAME_BITS = 24 * MAX_FRAME_PIXELS
MAX_TIME = 2**63 - 1  # that FFmpeg can count to, in units of the stream
IN_STEP = 0.1  # seconds that audio may be early or late: encoders delay it by some hundredths, and nobody sees that
USUAL_RATE = 25  # frames a second, where the file gives none

TimedFrame = tuple[float, av.VideoFrame]  # seconds from the first frame


def decode(data: bytes, video: VideoConfig, max_pixels: int) -> Iterator[tuple[Tensor, float]]:
    """Frames uint8 (3, H, W) with their times in seconds, one at a time. ValueError as from ``open_video``."""
    with open_video(data, max_pixels) as opened:
        yield from opened.shown(frame_times(opened.seconds, opened.rate, video, frames_per_patch=1), video)


@contextlib.contextmanager
def open_video(data: bytes, max_pixels: int) -> Iterator["VideoFile"]:
    """ValueError without a readable video stream, for frames of too many pixels, and for whatever is found to be
    damaged while it is read."""
    try:
        with VideoFile(data, max_pixels) as opened:
            yield opened
    except FAULTS as error:
        raise ValueError(f"video cannot be decoded: {reason(error, data)}") from None


def has_audio(data: bytes) -> bool:
    """Whether there is an audio track that is not empty. False for a video that cannot be read: ``decode`` says why."""
    try:
        with open_container(data) as container:
            return has_packets(container, container.streams.audio)
    except FAULTS:
        return False


def seconds_to_audio(data: bytes) -> float:
    """How long after the first frame the audio begins; negative if it begins earlier, 0 where the file does not tell or
    the eye does not."""
    with open_container(data) as container:
        frames, tracks = _stream(container), container.streams.audio
        begins = [
            track.start_time * track.time_base for track in tracks if None not in (track.start_time, track.time_base)
        ]
        if not begins or frames.start_time is None:
            return 0.0
        seconds = float(begins[0] - frames.start_time * frames.time_base)
    return seconds if abs(seconds) > IN_STEP else 0.0


class VideoFile:
    """An open file: its length in ``seconds``, the ``rate`` of its frames a second, and its frames by their times. Its
    first frame has been decoded, which tells when it begins and which side is up."""

    def __init__(self, data: bytes, max_pixels: int) -> None:
        self.data = data
        self.max_pixels = max_pixels
        self.container: av.container.InputContainer | None = None
        self.seekable = True
        self.num_wasted = 0
        self.start: int | None = None  # time of the first frame, in the stream's time base
        self.timed: bool | None = None  # whether the packets have times; None until that is looked for
        self.delay: int | None = None  # of an AVI, whose time base is a frame: frames that its decoder holds back
        self.frames: Iterator[TimedFrame] = iter(())
        self.following: TimedFrame | None = None

    def __enter__(self) -> "VideoFile":
        with contextlib.ExitStack() as on_error:
            on_error.push(self.__exit__)
            self._restart()
            self.following = next(self.frames, None)
            if self.following is None:
                raise next(iter(self.decoder.faults()), ValueError("video has no frame"))
            self.seconds = self._length()
            on_error.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        # The generator holds this object, and so the whole file.
        self.frames = iter(())
        self.following = None
        if self.container is not None:
            self.container.close()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the first frame, upright."""
        first = self.following[1]
        _, turned, _ = _turns(first)
        return (first.width, first.height) if turned else (first.height, first.width)

    def shown(self, times: list[float], video: VideoConfig) -> Iterator[tuple[Tensor, float]]:
        """The frame on screen at each time (ascending), uint8 (3, H, W), and when it came up. Where ``video`` counts
        frames, files may round their times by up to half a frame."""
        early = 0.0 if video.spread == "middles" else 0.5 / float(self.rate)
        convert = VideoReformatter()  # one for all frames: it keeps its tables
        for seconds, frame in self._frames_at([time + early for time in times]):
            yield _rgb(frame, convert), seconds

    def _frames_at(self, wanted: list[float]) -> Iterator[TimedFrame]:
        """The frame on screen at each time: the last that starts at or before it."""
        on_screen = None
        for seconds in wanted:
            if self.seekable and self.following is not None and seconds - self.following[0] > SEEK_SECONDS:
                self._seek(seconds)
            while self.following is not None and (on_screen is None or self.following[0] <= seconds):
                on_screen = self.following
                self.following = next(self.frames, None)
            if on_screen is not None:
                yield on_screen

    def _restart(self) -> None:
        """Open the file at its first frame, which no seek reaches reliably."""
        if self.container is not None:
            self.container.close()
        self.container = open_container(self.data)
        stream = _stream(self.container)
        self.decoder = Decoder(self.container, stream)
        if not stream.time_base:
            raise ValueError("video cannot be decoded: its times have no unit")
        self._check_size(stream.codec_context)
        # The loader's workers are the parallelism; threads make small videos slower.
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # a stream may change its size
        self.time_base = stream.time_base
        self.rate = stream.average_rate or USUAL_RATE
        self.frames = self._timed(self.decoder.frames())

    def _timed(self, frames: Iterator[av.VideoFrame]) -> Iterator[TimedFrame]:
        """Frames with their times. Frames of bare streams have none: each is shown when the last one ends. In files
        with times, the first frames may lack one: they lie before time 0, for others to refer to, and are not shown."""
        ended = None
        for frame in frames:
            self._check_size(frame)  # a stream may change its size
            time = self._time(frame)
            if time is not None:
                if self.start is None:
                    self.start = time
                seconds = float((time - self.start) * self.time_base)
            elif ended is not None:
                seconds = ended
            elif self._has_times():
                continue
            else:
                self.seekable = False
                seconds = 0.0
            yield seconds, frame
            lasts = frame.duration * self.time_base if frame.duration else 1 / self.rate
            ended = seconds + float(lasts)

    def _time(self, frame: av.VideoFrame) -> int | None:
        """When a frame is shown, in the stream's time base. AVI only says when packets are decoded, which is before
        their frames are shown, by the delay of the first frame."""
        if self.container.format.name != "avi" or frame.dts is None:
            return frame.pts
        if self.delay is None:
            self.delay = self.decoder.packets - 1
        return frame.dts - self.delay

    def _has_times(self) -> bool:
        """Whether any packet says when it is shown."""
        if self.timed is None:
            with open_container(self.data) as container:
                packets = self._decoder_of(container).demux()
                self.timed = any(packet.pts is not None for packet in packets)
        return self.timed

    def _decoder_of(self, container: av.container.InputContainer) -> Decoder:
        """For the same stream of the file, opened once more."""
        return Decoder(container, container.streams[self.decoder.stream.index])

    def _seek(self, seconds: float) -> None:
        """To a frame at or before the time, from which on everything can be decoded. A seek may land anywhere, so the
        result is checked. If no seek helps, the video is decoded from its start, without seeking again."""
        before = self.following[0]
        back = 0.0
        for _ in range(MAX_SEEKS):
            if seconds - back <= before or not self.seekable:
                break
            try:
                self._jump(Fraction(seconds - back) / self.time_base + self.start)
                self.following = next(self.frames, None)
            except FAULTS:
                break
            if self.following is not None and self.following[0] <= seconds:
                self.num_wasted += self.following[0] <= before
                self.seekable = self.seekable and self.num_wasted < MAX_WASTED
                return
            back = 2 * back or SEEK_SECONDS
        self.seekable = False
        self._restart()
        self.following = next(self.frames, None)

    def _jump(self, target: Fraction) -> None:
        """To about a time of the stream. Frames before the key frame are left out: they lack what they refer to."""
        self.container.seek(_clamped(int(target)), stream=self.decoder.stream)
        frames = self.decoder.frames(from_key=True)
        whole = (frame for frame in frames if frame.pts is None or frame.pts >= self.decoder.key_time)
        self.frames = self._timed(whole)

    def _length(self) -> float:
        """Seconds from the first frame to the end of the last packet.

        A file may claim the length of its audio, a length from before it was cut, or none. So the last packet is looked
        for near the claimed end, or else in the whole file; a claim that is right to within a frame counts.
        """
        stream = self.decoder.stream
        claimed = Fraction(self.container.duration or 0, av.time_base)
        if stream.duration:
            claimed = stream.duration * self.time_base
        end = None
        if self.container.format.name != "mpeg":  # its times are guesses from where reading began
            target = (stream.start_time or 0) + int((claimed - SEEK_MARGIN) / self.time_base)
            with contextlib.suppress(*FAULTS):  # of files that cannot be seeked
                end = self._last_end(_clamped(target))
                if end is not None and end < target:  # only the last packet was seen
                    earlier = self._last_end(end - int(SEEK_MARGIN / self.time_base))
                    end = max(end, earlier or end)
        if end is None:
            end = self._last_end(None)
        found = ((end or 0) - (self.start or 0)) * self.time_base
        if abs(claimed - found) <= 1 / self.rate:
            return float(claimed)
        return float(max(0, found))

    def _last_end(self, seek_to: int | None) -> int | None:
        """End of the last packet after a seek to a time, or of all packets. None if no packet has a time there."""
        untimed = 0
        latest = before = None
        length = 0
        with open_container(self.data) as container:
            decoder = self._decoder_of(container)
            if seek_to is not None:
                container.seek(seek_to, stream=decoder.stream)
            for packet in decoder.demux():
                if not packet.size or packet.is_discard:
                    continue
                time = packet.dts if packet.pts is None else packet.pts
                if time is None:
                    untimed += packet.duration or 0
                elif latest is None or time > latest:
                    before = latest
                    latest = time
                    length = packet.duration
        if latest is None:
            return untimed if untimed and seek_to is None else None
        if length:
            return latest + length
        if before is not None:
            return latest + (latest - before)
        return latest + int(1 / (self.time_base * self.rate))

    def _check_size(self, source: av.VideoCodecContext | av.VideoFrame) -> None:
        num_pixels = source.width * source.height
        size = f"video of {source.width} x {source.height} pixels"
        if num_pixels > self.max_pixels:
            raise ValueError(f"{size} exceeds data.max_image_pixels={self.max_pixels}")
        bits = source.format.padded_bits_per_pixel if source.format else 0
        if num_pixels * max(24, bits) > MAX_FRAME_BITS:
            raise ValueError(f"{size} would take too much memory to decode: scale it down to 8K, or to fewer bits")


def _clamped(time: int) -> int:
    return max(-MAX_TIME, min(MAX_TIME, time))


def _stream(container: av.container.InputContainer) -> av.VideoStream:
    """The first stream that is not the cover of a recording."""
    streams = container.streams.video
    if not streams:
        raise ValueError("file has no video stream")
    for stream in streams:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    return streams[0]


def _rgb(frame: av.VideoFrame, convert: VideoReformatter) -> Tensor:
    """uint8 (3, H, W), upright: phones record sideways or mirrored, and say so in the metadata."""
    image = torch.from_numpy(_on_white(frame, convert)).permute(2, 0, 1)
    across, turned, down = _turns(frame)
    if turned:
        image = image.transpose(1, 2)
    flips = [dim for dim, scale in ((1, down), (2, across)) if scale < 0]
    return image.flip(flips) if flips else image


def _turns(frame: av.VideoFrame) -> tuple[float, bool, float]:
    """(scale across, whether lines and columns change places, scale down) that bring a frame upright."""
    across_x, down_x, across_y, down_y = _matrix(frame)
    turned = abs(down_x) + abs(across_y) > abs(across_x) + abs(down_y)
    return (across_y, turned, down_x) if turned else (across_x, turned, down_y)


def _on_white(frame: av.VideoFrame, convert: VideoReformatter) -> numpy.ndarray:
    """uint8 (H, W, 3), as an image is decoded: what is transparent shows white, and not the colour hidden there."""
    may_be_transparent = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
    if not may_be_transparent:
        return convert.reformat(frame, format="rgb24", threads=1).to_ndarray()
    pixels = convert.reformat(frame, format="rgba", threads=1).to_ndarray().astype(numpy.uint16)
    alpha = pixels[:, :, 3:]
    return ((pixels[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(numpy.uint8)


def _matrix(frame: av.VideoFrame) -> tuple[float, float, float, float]:
    """How the display matrix scales: x to across and down, then y to across and down."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV has no name for another piece of side data, but still knows the angle
        turn = math.radians(-frame.rotation)
        return math.cos(turn), math.sin(turn), -math.sin(turn), math.cos(turn)
    if matrix is None:
        return 1, 0, 0, 1
    values = struct.unpack("=9i", bytes(matrix))
    return values[0], values[1], values[3], values[4]

"""Films: bytes -> frames spread over the film, each a picture, with their times.

Frames are looked up by time: those that ``num_frames`` or ``fps`` ask for, never more than ``max_frames``. Times count
from the first frame to the end of the last one, whatever the file says of its length or its sound does before and
after. Between distant times the film is seeked, so that an hour costs little more than a minute.
"""

import contextlib
import math
import struct
from collections.abc import Iterator
from fractions import Fraction

import av
import torch
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from torch import Tensor

from avlm.config.run import VideoConfig
from avlm.data.media.container import FAULTS, Decoder, has_packets, open_container, reason

SEEK_SECONDS = 4.0  # a gap that is worth a seek: nearer frames are decoded on the way
SEEK_MARGIN = 1  # seconds before the end: the packet that is shown last need not be the last packet
MAX_SEEKS = 4  # for one time, each twice as far before it as the one that landed after it
MAX_WASTED = 3  # seeks in a film that went back: its key frames are further apart than the frames asked for
MAX_FRAME_PIXELS = 2**25  # 8K, more than which no decoder is given: some hold 17 frames
MAX_FRAME_BITS = 24 * MAX_FRAME_PIXELS
FURTHEST = 2**63 - 1  # time that FFmpeg can count to


def decode(data: bytes, video: VideoConfig, max_pixels: int) -> Iterator[tuple[Tensor, float]]:
    """Frames uint8 (3, H, W) with their times in seconds, one at a time. ValueError without a readable video stream."""
    try:
        with _Film(data, max_pixels) as film:
            convert = VideoReformatter()  # one for all frames: it keeps its tables
            for seconds, frame in film.frames_at(times(film.seconds, video)):
                yield _rgb(frame, convert), seconds
    except FAULTS as error:
        raise ValueError(f"film cannot be decoded: {reason(error, data)}") from None


def has_audio(data: bytes) -> bool:
    """Whether it has a sound track that is not empty. ``decode`` says what is wrong with a film that cannot be read."""
    try:
        with open_container(data) as container:
            return has_packets(container, container.streams.audio)
    except FAULTS:
        return False


def times(seconds: float, video: VideoConfig) -> list[float]:
    """Times of the frames: the middles of ``num_frames`` equal parts; or every 1 / fps, and where that gives more than
    ``max_frames``, the middles of that many parts."""
    count = video.num_frames
    if video.fps is not None:
        if (steps := max(1, round(seconds * video.fps))) <= video.max_frames:
            return [i / video.fps for i in range(steps)]
        count = video.max_frames
    return [(i + 0.5) * seconds / count for i in range(count)]


class _Film:
    """Frames by their times in ``seconds``, its length."""

    def __init__(self, data: bytes, max_pixels: int) -> None:
        self.data, self.max_pixels = data, max_pixels
        self.container: av.container.InputContainer | None = None
        self.seekable, self.wasted = True, 0
        self.start: int | None = None  # time of the first frame, in the stream's time base
        self.timed: bool | None = None  # whether its packets have times, where that was looked for
        self.delay: int | None = None  # of an AVI, whose time base is a frame: frames that its decoder holds back
        self.frames: Iterator[tuple[float, av.VideoFrame]] = iter(())
        self.following: tuple[float, av.VideoFrame] | None = None

    def __enter__(self) -> "_Film":
        with contextlib.ExitStack() as unless_all_is_well:
            unless_all_is_well.push(self.__exit__)
            self._restart()
            self.following = next(self.frames, None)
            if self.following is None:
                raise next(iter(self.decoder.faults()), ValueError("film has no frame"))
            self.seconds = self._length()
            unless_all_is_well.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self.frames = self.following = None  # a generator that holds this object, and so the whole file
        if self.container is not None:
            self.container.close()

    def frames_at(self, wanted: list[float]) -> Iterator[tuple[float, av.VideoFrame]]:
        """The frame on screen at each time (ascending): the last that starts at or before it."""
        shown = None
        for seconds in wanted:
            if self.seekable and self.following is not None and seconds - self.following[0] > SEEK_SECONDS:
                self._seek(seconds)
            while self.following is not None and (shown is None or self.following[0] <= seconds):
                shown, self.following = self.following, next(self.frames, None)
            if shown is not None:
                yield shown

    def _restart(self) -> None:
        """At the first frame, where no seek leads for sure."""
        if self.container is not None:
            self.container.close()
        self.container = open_container(self.data)
        stream = _stream(self.container)
        self.decoder = Decoder(self.container, stream)
        if not stream.time_base:
            raise ValueError("film cannot be decoded: its times have no unit")
        self._check_size(stream.codec_context)
        # The loader's workers are the parallelism; threads cost small films most.
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # of frames that grow under way
        self.time_base, self.rate = stream.time_base, stream.average_rate
        self.frames = self._timed(self.decoder.frames())

    def _timed(self, frames: Iterator[av.VideoFrame]) -> Iterator[tuple[float, av.VideoFrame]]:
        """With the time of each. Frames of bare streams have none: they follow each other, each for as long as it
        lasts. In files with times, frames without one that come first are before time 0, for others to refer to, and
        not shown. AVI knows only when packets are decoded, which delays each frame as much as the first one."""
        ended = None
        for frame in frames:
            self._check_size(frame)  # a stream may change it under way
            shown_at = frame.pts
            if self.container.format.name == "avi" and frame.dts is not None:
                self.delay = self.decoder.packets - 1 if self.delay is None else self.delay
                shown_at = frame.dts - self.delay
            if shown_at is not None:
                self.start = shown_at if self.start is None else self.start
                seconds = float((shown_at - self.start) * self.time_base)
            elif ended is not None:
                seconds = ended
            elif self._has_times():
                continue
            else:
                self.seekable, seconds = False, 0.0
            yield seconds, frame
            ended = seconds + float(frame.duration * self.time_base if frame.duration else 1 / (self.rate or 25))

    def _has_times(self) -> bool:
        """Whether any packet says when it is shown."""
        if self.timed is None:
            with open_container(self.data) as container:
                decoder = Decoder(container, container.streams[self.decoder.stream.index])
                self.timed = any(packet.pts is not None for packet in decoder.demux())
        return self.timed

    def _seek(self, seconds: float) -> None:
        """To a frame at or before the time, from which on all can be decoded. A seek may land anywhere: what it found
        is looked at, and where none helps the film is decoded from its start, without another seek."""
        before, back = self.following[0], 0.0
        for _ in range(MAX_SEEKS):
            if seconds - back <= before or not self.seekable:
                break
            try:
                self._jump(Fraction(seconds - back) / self.time_base + self.start)
                self.following = next(self.frames, None)
            except FAULTS:
                break
            if self.following is not None and self.following[0] <= seconds:
                self.wasted += self.following[0] <= before
                self.seekable = self.seekable and self.wasted < MAX_WASTED
                return
            back = 2 * back or SEEK_SECONDS
        self.seekable = False
        self._restart()
        self.following = next(self.frames, None)

    def _jump(self, target: Fraction) -> None:
        """To about a time of the stream. Frames before the key frame, which lack what they refer to, are left out."""
        self.container.seek(max(-FURTHEST, min(FURTHEST, int(target))), stream=self.decoder.stream)
        frames = self.decoder.frames(from_key=True)
        whole = (frame for frame in frames if frame.pts is None or frame.pts >= self.decoder.key_time)
        self.frames = self._timed(whole)

    def _length(self) -> float:
        """From the first frame to the end of the last packet, which is looked for near the end that the file claims, or
        else in all of it: files claim the length of their sound, what was cut off since, or nothing. A claim that is
        right to within a frame counts."""
        stream = self.decoder.stream
        claimed = Fraction(self.container.duration or 0, av.time_base)
        if stream.duration:
            claimed = stream.duration * self.time_base
        end = None
        if self.container.format.name != "mpeg":  # whose times are guesses from where reading began
            target = (stream.start_time or 0) + int((claimed - SEEK_MARGIN) / self.time_base)
            with contextlib.suppress(*FAULTS):  # of files that cannot be seeked
                end = self._last_end(max(-FURTHEST, min(FURTHEST, target)))
                if end is not None and end < target:  # only the last packet was seen
                    end = max(end, self._last_end(end - int(SEEK_MARGIN / self.time_base)) or end)
        if end is None:
            end = self._last_end(None)
        found = ((end or 0) - (self.start or 0)) * self.time_base
        return float(claimed if abs(claimed - found) <= 1 / (self.rate or 25) else max(0, found))

    def _last_end(self, seek_to: int | None) -> int | None:
        """End of the last packet, of those from a place to which the stream is seeked, or of all."""
        untimed, latest, before, length = 0, None, None, 0
        with open_container(self.data) as container:
            decoder = Decoder(container, container.streams[self.decoder.stream.index])
            if seek_to is not None:
                container.seek(seek_to, stream=decoder.stream)
            for packet in decoder.demux():
                shown_at = packet.pts if packet.pts is not None else packet.dts
                if not packet.size or packet.is_discard:
                    continue
                if shown_at is None:
                    untimed += packet.duration or 0
                elif latest is None or shown_at > latest:
                    before, latest, length = latest, shown_at, packet.duration
        if latest is None:
            return untimed if untimed and seek_to is None else None
        period = int(1 / (self.time_base * (self.rate or 25)))
        return latest + (length or (latest - before if before is not None else period))

    def _check_size(self, of: av.VideoCodecContext | av.VideoFrame) -> None:
        size, pixels = f"film of {of.width} x {of.height} pixels", of.width * of.height
        if pixels > self.max_pixels:
            raise ValueError(f"{size} exceeds data.max_image_pixels={self.max_pixels}")
        if pixels * max(24, of.format.padded_bits_per_pixel if of.format else 0) > MAX_FRAME_BITS:
            raise ValueError(f"{size} would take too much memory to decode: scale it down to 8K, or to fewer bits")


def _stream(container: av.container.InputContainer) -> av.VideoStream:
    """The first that is not the cover of a recording."""
    streams = container.streams.video
    if not streams:
        raise ValueError("file has no video stream")
    return next((stream for stream in streams if not stream.disposition & Disposition.attached_pic), streams[0])


def _rgb(frame: av.VideoFrame, convert: VideoReformatter) -> Tensor:
    """uint8 (3, H, W), upright: telephones film sideways or mirrored and say so in the metadata."""
    image = torch.from_numpy(convert.reformat(frame, format="rgb24", threads=1).to_ndarray()).permute(2, 0, 1)
    across_x, down_x, across_y, down_y = _matrix(frame)
    turned = abs(down_x) + abs(across_y) > abs(across_x) + abs(down_y)
    if turned:
        image, across_x, down_y = image.transpose(1, 2), across_y, down_x
    flips = [dim for dim, scale in ((1, down_y), (2, across_x)) if scale < 0]
    return image.flip(flips) if flips else image


def _matrix(frame: av.VideoFrame) -> tuple[float, float, float, float]:
    """How the display matrix scales: x to across and down, then y to across and down."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # next to it there is data of a kind that PyAV has no name for: it still knows the angle
        turn = math.radians(-frame.rotation)
        return math.cos(turn), math.sin(turn), -math.sin(turn), math.cos(turn)
    if matrix is None:
        return 1, 0, 0, 1
    values = struct.unpack("=9i", bytes(matrix))
    return values[0], values[1], values[3], values[4]

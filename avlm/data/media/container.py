"""Audio and video files in memory, opened and decoded as ffmpeg does: packets that no decoder takes are left out."""

import io
import sys
from collections.abc import Iterator

import av

from avlm.data.media import signature

MAX_LINES = 10
MAX_RETRIES = 100  # of reads, which FFmpeg asks for where a stream is damaged
SAID: set[str] = set()  # lines of this process
STREAMED = ("mpeg", "mpegts")  # formats in which FFmpeg guesses the time of a packet that has no position of its own
FAULTS = (av.FFmpegError, UnicodeError)  # UnicodeError: PyAV decodes names in the file strictly


def open_container(data: bytes) -> av.container.InputContainer:
    """FFmpeg may open no other file: playlists name some, and a sample is not trusted."""
    return av.open(io.BytesIO(data), options={"protocol_whitelist": "pipe"}, metadata_errors="replace")


def reason(error: Exception, data: bytes) -> str:
    """FFmpeg's words for an error, and the kind of file if its first bytes tell."""
    said = getattr(error, "strerror", None) or "it is damaged"
    kind = signature.name(data)
    return f"{said} (the file is {kind})" if kind else said


class Decoder:
    """Frames of one stream.

    packets   how many were read
    errors    of packets that gave no frames
    stopped   why the file cannot be read any further, past ``reached`` seconds
    key_time  of the key frame after a seek, in the stream's time base
    """

    def __init__(self, container: av.container.InputContainer, stream: av.stream.Stream) -> None:
        if stream.codec_context is None:
            raise ValueError(f"{stream.type} stream has a codec that FFmpeg does not know: convert the file")
        self.container = container
        self.stream = stream
        self.packets = 0
        self.errors: list[Exception] = []
        self.stopped: Exception | None = None
        self.reached = 0.0
        self.key_time: int | None = None

    def frames(self, from_key: bool = False) -> Iterator[av.frame.Frame]:
        """From the container's position, in the order in which they are shown. With ``from_key``, after a seek, from
        the next packet that needs no other; its time becomes ``key_time``."""
        may_guess = self.container.format.name in STREAMED
        for packet in self.demux():
            if from_key and packet.size:
                is_guessed = may_guess and packet.pos is None
                if not packet.is_keyframe or packet.pts is None or is_guessed:
                    continue
                self.key_time = packet.pts
                from_key = False
            self.packets += packet.size > 0
            try:
                frames = packet.decode()
            except FAULTS as error:
                self.errors.append(error)
                continue
            yield from frames

    def faults(self) -> list[Exception]:
        """Why frames are missing."""
        if self.stopped is None:
            return self.errors
        return [*self.errors, self.stopped]

    def demux(self) -> Iterator[av.Packet]:
        """Packets up to the end, or up to the place past which the file cannot be read. ValueError if FFmpeg lacks a
        feature to read on: nothing is wrong with the rest of such a file."""
        packets = _demux(self.container, [self.stream])
        retries = 0
        while True:
            try:
                packet = next(packets, None)
            except av.PatchWelcomeError:
                raise ValueError(
                    f"file changes its form at {self.reached:.1f} s in a way that FFmpeg does not read: "
                    "convert or split it"
                ) from None
            except FAULTS as error:
                if isinstance(error, av.BlockingIOError) and retries < MAX_RETRIES:
                    packets = _demux(self.container, [self.stream])
                    retries += 1
                    continue
                self.stopped = error
                packet = av.Packet()
                packet.stream = self.stream  # an empty packet makes the decoder give the frames that it holds
                yield packet
                return
            if packet is None:
                return
            if packet.pts is not None and packet.time_base:
                end = packet.pts + (packet.duration or 0) - (self.stream.start_time or 0)
                self.reached = max(self.reached, float(end * packet.time_base))
            yield packet


def has_packets(container: av.container.InputContainer, streams: list[av.stream.Stream]) -> bool:
    """Whether one of the streams holds anything: screen recorders leave tracks empty."""
    return bool(streams) and any(packet.size for packet in _demux(container, streams))


def _demux(container: av.container.InputContainer, streams: list[av.stream.Stream]) -> Iterator[av.Packet]:
    try:
        yield from container.demux(*streams)
    except IndexError:  # PyAV's own, at the end of a file that has gained a stream
        return


def say_once(line: str) -> None:
    """Print a line on stderr, once in a process, as a file is read again in each epoch; at most MAX_LINES in all."""
    if line in SAID or len(SAID) == MAX_LINES:
        return
    SAID.add(line)
    if len(SAID) == MAX_LINES:
        line += "; further files are not named"
    print(line, file=sys.stderr, flush=True)

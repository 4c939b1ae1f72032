"""Files of sound and video in memory, opened and decoded as ffmpeg does: packets that no decoder takes are left out."""

import io
import sys
from collections.abc import Iterator

import av

from avlm.data.media import signature

MAX_LINES = 10
MAX_RETRIES = 100  # of reads for which FFmpeg asks where a stream is damaged
SAID: set[str] = set()  # lines of this process
STREAMED = ("mpeg", "mpegts")  # where a packet without a place of its own has no time of its own: FFmpeg guesses one
FAULTS = (av.FFmpegError, UnicodeError)  # UnicodeError: names in the file that PyAV decodes strictly


def open_container(data: bytes) -> av.container.InputContainer:
    """FFmpeg may open nothing else: playlists name other files, and a sample is not trusted."""
    return av.open(io.BytesIO(data), options={"protocol_whitelist": "pipe"}, metadata_errors="replace")


def reason(error: Exception, data: bytes) -> str:
    """FFmpeg's words for an error, and what the file is where its first bytes say so."""
    kind = signature.name(data)
    return (getattr(error, "strerror", None) or "it is damaged") + (f" (the file is {kind})" if kind else "")


class Decoder:
    """Frames of one stream. ``packets`` were read, ``errors`` holds why some of them gave none, and ``stopped`` why the
    file cannot be read past ``reached`` seconds."""

    def __init__(self, container: av.container.InputContainer, stream: av.stream.Stream) -> None:
        if stream.codec_context is None:
            raise ValueError(f"{stream.type} stream has a codec that FFmpeg does not know: convert the file")
        self.container, self.stream = container, stream
        self.packets = 0
        self.errors: list[Exception] = []
        self.stopped: Exception | None = None
        self.reached = 0.0
        self.key_time: int | None = None

    def frames(self, from_key: bool = False) -> Iterator[av.frame.Frame]:
        """From where the container stands, in the order in which they are shown. With ``from_key``, after a seek, from
        the next packet that needs no other: its time becomes ``key_time``."""
        guessed = self.container.format.name in STREAMED
        for packet in self.demux():
            if from_key and packet.size:
                if not packet.is_keyframe or packet.pts is None or (guessed and packet.pos is None):
                    continue
                self.key_time, from_key = packet.pts, False
            self.packets += packet.size > 0
            try:
                frames = packet.decode()
            except FAULTS as error:
                self.errors.append(error)
                continue
            yield from frames

    def faults(self) -> list[Exception]:
        """Why frames are missing."""
        return self.errors + ([self.stopped] if self.stopped else [])

    def demux(self) -> Iterator[av.Packet]:
        """Packets up to the end, or up to where the file cannot be read any further. ValueError where that is for want
        of a feature, as then nothing is wrong with the rest of the file."""
        packets, retries = _demux(self.container, [self.stream]), 0
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
                    packets, retries = _demux(self.container, [self.stream]), retries + 1
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
    except IndexError:  # PyAV's own, at the end of a file that has gained a stream under way
        return


def say_once(line: str) -> None:
    """On stderr, once in a process: a file is read again in each epoch. There are at most MAX_LINES of them."""
    if line not in SAID and len(SAID) < MAX_LINES:
        SAID.add(line)
        print(line + "; further files are not named" * (len(SAID) == MAX_LINES), file=sys.stderr, flush=True)

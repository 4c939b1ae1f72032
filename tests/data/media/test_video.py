import gc
import io
import math
import struct
import weakref
from fractions import Fraction
from functools import cache

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image

from avlm.config.media import VideoConfig
from avlm.data.media import video
from avlm.data.media.container import Decoder
from tests.data.small_files import video_file

LIMIT = 1_000_000


def brightness(data: bytes, config: VideoConfig) -> tuple[list[float], list[float]]:
    frames = list(video.decode(data, config, LIMIT))
    return [frame.float().mean().item() for frame, _ in frames], [seconds for _, seconds in frames]


def test_frames_are_spread_evenly_and_show_what_is_on_screen_then():
    shown, times = brightness(video_file(8), VideoConfig(num_frames=4))
    assert times == [1.0, 3.0, 5.0, 7.0]
    assert shown == pytest.approx([16, 48, 80, 112], abs=4)  # frame n is of brightness 2 n, 8 frames a second


def test_a_long_video_is_seeked_and_gives_the_same_frames():
    shown, times = brightness(video_file(15), VideoConfig(num_frames=2))  # times further apart than SEEK_SECONDS
    assert times == [3.75, 11.25]
    assert shown == pytest.approx([60, 180], abs=4)


def test_little_of_a_long_video_is_decoded(monkeypatch):
    data, decoded, frames = video_file(120, rate=4), [], Decoder.frames

    def counting(self, *arguments, **options):
        for frame in frames(self, *arguments, **options):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(Decoder, "frames", counting)
    assert len(list(video.decode(data, VideoConfig(num_frames=3), LIMIT))) == 3
    assert len(decoded) < 60  # of 480


# Container, codec and their options. Those whose seeks land late, or whose times are those of decoding, come with
# images out of order; those of MPEG-1 and -2 have no rate below 23.976.
FORMS = {
    "mp4": ("mp4", "libx264", {"bf": "2"}),
    "mov": ("mov", "mpeg4", {}),
    "3gp": ("3gp", "mpeg4", {}),
    "mkv": ("matroska", "libx264", {"bf": "2"}),
    "webm, VP8": ("webm", "libvpx", {"deadline": "realtime", "cpu-used": "8"}),
    "webm, VP9": ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "ts": ("mpegts", "libx264", {"bf": "2", "x264-params": "open-gop=1"}),
    "ts, MPEG-2": ("mpegts", "mpeg2video", {"bf": "2"}),
    "ts, MPEG-4": ("mpegts", "mpeg4", {}),
    "ts without key frames": ("mpegts", "libx264", {"x264-params": "intra-refresh=1"}),
    "m2ts": ("mpegts", "libx264", {"mpegts_m2ts_mode": "1"}),
    "mpg": ("mpeg", "mpeg1video", {}),
    "vob": ("vob", "mpeg2video", {"bf": "2"}),
    "avi": ("avi", "mpeg4", {"bf": "2"}),
    "avi, H.264": ("avi", "libx264", {"bf": "2"}),
    "flv": ("flv", "flv1", {}),
    "wmv": ("asf", "wmv2", {}),
    "nut": ("nut", "mpeg4", {"bf": "2"}),
    "gif": ("gif", "gif", {}),
    "one key frame": ("matroska", "libx264", {"x264-params": "keyint=100000:scenecut=0"}),
    "bare H.264": ("h264", "libx264", {"bf": "2"}),
}
COLOURS = {"gif": "rgb8"}


@cache
def rising(form: str, seconds: float = 20, late: float = 0, sound: float | None = None, **container_options) -> bytes:
    """A video whose brightness at t seconds is 10 t."""
    container, codec, options = FORMS[form]
    rate, buffer = 25 if "video" in codec else 10, io.BytesIO()
    with av.open(buffer, "w", container, container_options=container_options) as file:
        images = file.add_stream(codec, rate=rate, options={"b": "2M"} | options)
        images.width, images.height, images.pix_fmt = 64, 48, COLOURS.get(codec, "yuv420p")
        images.codec_context.gop_size = 25
        track = file.add_stream("libmp3lame", rate=44_100, layout="mono") if sound else None
        for n in range(round(seconds * rate)):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * n / rate, np.uint8), format="rgb24")
            frame.pts, frame.time_base = n + round(late * rate), Fraction(1, rate)
            file.mux(images.encode(frame))
        file.mux(images.encode(None))
        if track:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, round(sound * 44_100)), np.float32), "fltp", "mono")
            silence.sample_rate, silence.pts = 44_100, 0
            for part in av.AudioResampler("fltp", "mono", 44_100, frame_size=1152).resample(silence):
                file.mux(track.encode(part))
            file.mux(track.encode(None))
    return buffer.getvalue()


def check_brightness(data: bytes, seconds: float = 20.0, counts: tuple[int, ...] = (3, 8)) -> None:
    for count in counts:
        wanted = [(i + 0.5) * seconds / count for i in range(count)]
        shown, found = brightness(data, VideoConfig(num_frames=count))
        assert found == pytest.approx(wanted, abs=0.121)
        assert shown == pytest.approx([10 * at for at in found], abs=2.6)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "gif"])
def test_frames_are_those_on_screen_at_their_times(form):
    check_brightness(rising(form))


@pytest.mark.parametrize("form", FORMS)
def test_a_video_that_is_seeked_gives_the_frames_of_one_that_is_not(form, monkeypatch):
    data, config = rising(form), VideoConfig(num_frames=5)
    seeked = list(video.decode(data, config, LIMIT))
    monkeypatch.setattr(video, "SEEK_SECONDS", math.inf)
    for (frame, at), (expected, expected_at) in zip(seeked, video.decode(data, config, LIMIT), strict=True):
        assert at == pytest.approx(expected_at, abs=1e-3)
        assert (frame.int() - expected.int()).abs().max() <= (2 if "without" in form else 0)


@pytest.mark.parametrize("form", ["mp4", "mov", "mkv", "ts", "mpg", "avi", "wmv"])
def test_a_video_is_as_long_as_its_images_whatever_its_sound(form):
    check_brightness(rising(form, seconds=12, sound=31), 12.0, (4,))
    check_brightness(rising(form, seconds=12, late=5, sound=14), 12.0, (4,))


def test_a_video_ends_with_the_frame_that_is_shown_last_which_need_not_be_the_last_packet():
    every_frame = VideoConfig(num_frames=None, fps=25.0, max_frames=1000)
    assert len(brightness(rising("ts, MPEG-2", seconds=12, sound=40), every_frame)[0]) == 300


def test_frames_before_time_0_are_not_shown():
    cut = rising("mkv", seconds=12, late=-1.5, avoid_negative_ts="disabled")  # as ffmpeg -ss leaves it
    shown, found = brightness(cut, VideoConfig(num_frames=8))
    assert found == pytest.approx([(i + 0.5) * 10.5 / 8 for i in range(8)], abs=0.121)
    assert shown == pytest.approx([10 * at + 15 for at in found], abs=2.6)


def test_a_video_without_an_index_or_a_length_is_as_long_as_its_packets():
    check_brightness(rising("webm, VP8", live="1"))
    check_brightness(rising("mkv", seconds=12, sound=25, live="1"), 12.0)
    cut = with_its_index_first(rising("mp4"))
    index = cut.index(b"mdat")
    _, found = brightness(cut[: (index + len(cut)) // 2], VideoConfig(num_frames=4))
    assert found == sorted(set(found)) and found[-1] < 12


def with_its_index_first(data: bytes) -> bytes:
    """An MP4 as servers have it: ftyp, moov, mdat."""
    at = data.index(b"moov") - 4
    media = data.index(b"mdat") - 4
    moov = bytearray(data[at:])
    offsets = moov.index(b"stco") + 12
    for i in range(offsets, offsets + 4 * int.from_bytes(moov[offsets - 4 : offsets]), 4):
        moov[i : i + 4] = (int.from_bytes(moov[i : i + 4]) + len(moov)).to_bytes(4)
    return data[:media] + bytes(moov) + data[media:at]


TURNS = {  # matrix (x to across and down, y to across and down) -> what it does to (H, W, 3)
    (1, 0, 0, 1): lambda image: image,
    (-1, 0, 0, 1): lambda image: image[:, ::-1],
    (1, 0, 0, -1): lambda image: image[::-1],
    (-1, 0, 0, -1): lambda image: image[::-1, ::-1],
    (0, 1, -1, 0): lambda image: np.rot90(image, -1),
    (0, -1, 1, 0): lambda image: np.rot90(image),
    (0, 1, 1, 0): lambda image: image.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda image: np.rot90(image, 2).transpose(1, 0, 2),
}


@pytest.mark.parametrize("matrix", TURNS)
def test_videos_are_turned_and_mirrored_as_their_matrix_says(matrix):
    buffer = io.BytesIO()
    with av.open(buffer, "w", "mp4") as file:
        images = file.add_stream("libx264rgb", rate=8, options={"qp": "0"})
        images.width, images.height, images.pix_fmt = 64, 48, "rgb24"
        stored = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        file.mux(images.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
        file.mux(images.encode(None))
    data = bytearray(buffer.getvalue())
    across_x, down_x, across_y, down_y = (value << 16 for value in matrix)
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", across_x, down_x, 0, across_y, down_y, 0, 0, 0, 1 << 30)
    [(frame, _)] = video.decode(bytes(data), VideoConfig(num_frames=1), LIMIT)
    assert np.array_equal(frame.permute(1, 2, 0).numpy(), TURNS[matrix](stored))


def test_damaged_packets_are_left_out():
    data = bytearray(rising("ts, MPEG-2"))
    for at in range(40_000, 120_000, 10_000):
        data[at : at + 300] = bytes(300)
    shown, found = brightness(bytes(data), VideoConfig(num_frames=8))
    assert shown == pytest.approx([10 * at for at in found], abs=8)


def test_fps_sets_the_times_and_max_frames_bounds_them():
    _, times = brightness(video_file(4), VideoConfig(num_frames=None, fps=2.0))
    assert times == [i / 2 for i in range(8)]
    _, times = brightness(video_file(4), VideoConfig(num_frames=None, fps=2.0, max_frames=4))
    assert times == [0.5, 1.5, 2.5, 3.5]


def test_a_video_shorter_than_the_frames_asked_for_repeats_them():
    shown, _ = brightness(video_file(0.25), VideoConfig(num_frames=8))
    assert len(shown) == 8


@pytest.mark.parametrize("container", ["matroska", "mp4", "avi", "mpegts"])
def test_containers_are_read(container):
    shown, _ = brightness(video_file(4, container=container), VideoConfig(num_frames=4))
    assert shown == pytest.approx([8, 24, 40, 56], abs=6)


def test_frames_are_bytes_between_0_and_255_like_images():
    [(frame, _)] = list(video.decode(video_file(30, rate=4), VideoConfig(num_frames=1), LIMIT))
    assert frame.dtype.is_floating_point is False and frame.shape == (3, 48, 64)


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_what_is_transparent_is_white_as_in_an_image(form):
    first, second = (Image.new("RGBA", (8, 8), (200, 0, 0, 0)) for _ in range(2))
    for number, each in enumerate((first, second)):
        each.paste((0, 0, 255, 255), (2 * number, 0, 2 * number + 2, 2))
    buffer = io.BytesIO()
    first.save(buffer, form, save_all=True, append_images=[second], duration=200, disposal=2)
    for frame, _ in video.decode(buffer.getvalue(), VideoConfig(num_frames=2), 10**6):
        assert frame[:, 7, 7].tolist() == [255] * 3 and (frame == torch.tensor([0, 0, 255])[:, None, None]).all(0).any()
    half = av.VideoFrame.from_ndarray(np.full((8, 8, 4), [0, 100, 200, 51], np.uint8), format="rgba")
    assert video._on_white(half, VideoReformatter())[0, 0].tolist() == [204, 224, 244]


def test_sound_tracks_are_found():
    assert video.has_audio(video_file(1, sound=True)) and not video.has_audio(video_file(1))
    assert not video.has_audio(video_file(1, sound=0.0)), "a track without packets"
    assert not video.has_audio(b"no video")


def test_what_is_no_video_is_refused():
    with pytest.raises(ValueError, match="cannot be decoded"):
        list(video.decode(b"no video", VideoConfig(), LIMIT))
    with pytest.raises(ValueError, match=r"64 x 48 pixels exceeds data\.max_image_pixels=100"):
        list(video.decode(video_file(1), VideoConfig(), 100))
    header = b"YUV4MPEG2 W8200 H8200 F25:1 C420jpeg\nFRAME\n"
    with pytest.raises(ValueError, match="8200 x 8200 pixels would take too much memory"):
        list(video.decode(header + bytes(8200 * 8200 * 3 // 2), VideoConfig(), 10**9))
    with pytest.raises(ValueError, match="video stream has a codec that FFmpeg does not know"):
        list(video.decode(video_file(1).replace(b"V_MPEG4/ISO/ASP", b"V_XPEG4/XSO/XSP"), VideoConfig(), LIMIT))


def test_times_that_no_file_can_hold_are_not_believed():
    data = bytearray(video_file(1))
    scale, length = data.index(b"\x2a\xd7\xb1\x83"), data.index(b"\x44\x89\x88")
    data[scale : scale + 7] = b"\x2a\xd7\xb1\x83\x00\x00\x01"  # a time base of 1 ns
    data[length + 3 : length + 11] = struct.pack(">d", 9e21)
    for config in (VideoConfig(num_frames=4), VideoConfig(num_frames=None, fps=2.0)):
        assert all(0 <= seconds < 1e-5 for _, seconds in video.decode(bytes(data), config, LIMIT))


def test_a_truncated_video_gives_frames_or_a_clear_error():
    data = video_file(4)
    try:
        frames = list(video.decode(data[: len(data) // 2], VideoConfig(num_frames=4), LIMIT))
        assert np.all([frame.shape == (3, 48, 64) for frame, _ in frames])
    except ValueError as error:
        assert "video" in str(error)


def stream(side: int, first: int, count: int) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mpegts") as container:
        images = container.add_stream("mpeg2video", rate=25, width=side, height=side, pix_fmt="yuv420p")
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(np.zeros((side, side, 3), np.uint8), format="rgb24")
            frame.pts = first + i
            container.mux(images.encode(frame))
        container.mux(images.encode())
    return buffer.getvalue()


def test_frames_that_grow_under_way_are_bounded_too():
    growing = stream(64, 0, 150) + stream(256, 150, 150)
    assert len(list(video.decode(growing, VideoConfig(num_frames=8), 256 * 256))) == 8
    with pytest.raises(ValueError, match="video of 256 x 256 pixels exceeds"):
        list(video.decode(growing, VideoConfig(num_frames=8), 10_000))


def test_a_video_is_let_go_of_when_its_last_frame_was_taken(monkeypatch):
    """Without waiting for Python's collector of cycles: a video may have hundreds of megabytes."""
    videos = weakref.WeakSet()
    opened = video.VideoFile.__enter__
    monkeypatch.setattr(video.VideoFile, "__enter__", lambda video: (videos.add(video), opened(video))[1])
    gc.disable()
    try:
        list(video.decode(video_file(2.0), VideoConfig(), 10**8))
        with pytest.raises(ValueError, match="exceeds"):
            list(video.decode(video_file(2.0), VideoConfig(), 100))
        assert not videos
    finally:
        gc.enable()

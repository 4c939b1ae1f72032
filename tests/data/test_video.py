import io

import av
import numpy as np
import pytest

from avlm.config import VideoConfig
from avlm.data import video
from tests.data.media import film

LIMIT = 1_000_000


def brightness(data: bytes, config: VideoConfig) -> tuple[list[float], list[float]]:
    frames = list(video.decode(data, config, LIMIT))
    return [frame.float().mean().item() for frame, _ in frames], [seconds for _, seconds in frames]


def test_frames_are_spread_evenly_and_show_what_is_on_screen_then():
    shown, times = brightness(film(8), VideoConfig(num_frames=4))
    assert times == [1.0, 3.0, 5.0, 7.0]
    assert shown == pytest.approx([16, 48, 80, 112], abs=4)  # frame n is of brightness 2 n, 8 frames a second


def test_a_long_film_is_seeked_and_gives_the_same_frames():
    shown, times = brightness(film(15), VideoConfig(num_frames=2))  # times further apart than SEEK_SECONDS
    assert times == [3.75, 11.25]
    assert shown == pytest.approx([60, 180], abs=4)


def test_little_of_a_long_film_is_decoded():
    data, decoded = film(120, rate=4), 0
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]

        def counting(packets):
            nonlocal decoded
            for frame in packets:
                decoded += 1
                yield frame

        class Counted:
            seek = container.seek
            decode = staticmethod(lambda stream: counting(container.decode(stream)))

        assert len(list(video._frames_at(Counted, stream, [10.0, 60.0, 110.0]))) == 3
    assert decoded < 60  # of 480


def test_fps_sets_the_times_and_max_frames_bounds_them():
    _, times = brightness(film(4), VideoConfig(num_frames=None, fps=2.0))
    assert times == [i / 2 for i in range(8)]
    _, times = brightness(film(4), VideoConfig(num_frames=None, fps=2.0, max_frames=4))
    assert times == [0.5, 1.5, 2.5, 3.5]


def test_a_film_shorter_than_the_frames_asked_for_repeats_them():
    shown, _ = brightness(film(0.25), VideoConfig(num_frames=8))
    assert len(shown) == 8


@pytest.mark.parametrize("container", ["matroska", "mp4", "avi", "mpegts"])
def test_containers_are_read(container):
    shown, _ = brightness(film(4, container=container), VideoConfig(num_frames=4))
    assert shown == pytest.approx([8, 24, 40, 56], abs=6)


def test_frames_are_bytes_between_0_and_255_like_pictures():
    [(frame, _)] = list(video.decode(film(30, rate=4), VideoConfig(num_frames=1), LIMIT))
    assert frame.dtype.is_floating_point is False and frame.shape == (3, 48, 64)


def test_sound_tracks_are_found():
    assert video.has_sound(film(1, sound=True)) and not video.has_sound(film(1))


def test_what_is_no_film_is_refused():
    with pytest.raises(ValueError, match="cannot be decoded"):
        list(video.decode(b"no film", VideoConfig(), LIMIT))
    with pytest.raises(ValueError, match="64 x 48 pixels exceeds"):
        list(video.decode(film(1), VideoConfig(), 100))


def test_a_truncated_film_gives_frames_or_a_clear_error():
    data = film(4)
    try:
        frames = list(video.decode(data[: len(data) // 2], VideoConfig(num_frames=4), LIMIT))
        assert np.all([frame.shape == (3, 48, 64) for frame, _ in frames])
    except ValueError as error:
        assert "film" in str(error)


def stream(side: int, first: int, count: int) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mpegts") as container:
        pictures = container.add_stream("mpeg2video", rate=25, width=side, height=side, pix_fmt="yuv420p")
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(np.zeros((side, side, 3), np.uint8), format="rgb24")
            frame.pts = first + i
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode())
    return buffer.getvalue()


def test_frames_that_grow_under_way_are_bounded_too():
    growing = stream(64, 0, 150) + stream(256, 150, 150)
    assert len(list(video.decode(growing, VideoConfig(num_frames=8), 256 * 256))) == 8
    with pytest.raises(ValueError, match="film of 256 x 256 pixels exceeds"):
        list(video.decode(growing, VideoConfig(num_frames=8), 10_000))

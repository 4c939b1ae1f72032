import dataclasses
import io
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    InternVLVideoProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMVideoProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as qwen2_vl_smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as qwen3_vl_smart_resize
from transformers.video_utils import VideoMetadata

from avlm.config.media import TIMESTAMP, VideoConfig, VideoText
from avlm.config.model import VisionConfig
from avlm.config.run import DataConfig
from avlm.data.media import area, image
from avlm.data.media_reader import MediaReader, Room
from avlm.models.vit import normalise
from tests.data.small_files import ANY_GRID, image_file, model, photo, video_file

SIZES = [
    (1, 150),
    (150, 1),
    (480, 640),
    (30, 40),
    (42, 70),
    (3000, 200),
    (97, 2000),
    (777, 501),
    (28, 28),
    (2400, 3200),
]
ROOM = Room(10**6, "data.seq_length")
QWEN3 = dataclasses.replace(ANY_GRID, patch_size=16, mean=[0.5] * 3, std=[0.5] * 3)


def reader(vision: VisionConfig, **changes) -> MediaReader:
    config = dataclasses.replace(model(downsample=2), vision=vision)
    return MediaReader(config, DataConfig(train="x", **changes))


def as_published(item: torch.Tensor, vision: VisionConfig) -> torch.Tensor:
    """An item's patches in the order of the processors: block after block of 2 x 2; normalised, float32."""
    return normalise(rearrange(item, "(y i) (x j) n -> (y x i j) n", i=2, j=2), vision)


@pytest.mark.parametrize("vision", [ANY_GRID, QWEN3], ids=["Qwen2-VL", "Qwen3-VL"])
def test_grids_and_pixels_equal_those_of_qwens_processor(vision):
    factor = 2 * vision.patch_size
    least, most = 56 * 56, 28 * 28 * 1280
    processor = Qwen2VLImageProcessor(
        patch_size=vision.patch_size,
        image_mean=vision.mean,
        image_std=vision.std,
        size={"shortest_edge": least, "longest_edge": most},
    )
    read = reader(vision, image_tokens=[least / factor**2, most / factor**2])
    for height, width in SIZES:
        picture = photo(width, height)
        theirs = processor(picture, return_tensors="pt")
        data = image_file(picture, "WEBP" if height > 2000 else "PNG", lossless=True, method=0)
        extent, _ = read.laid_out("image", data)
        [run] = read.read("image", data, "", ROOM)
        assert [1, *extent.grid] == theirs["image_grid_thw"][0].tolist() == [1, *run.items[0].shape[:2]]
        assert extent.item_features == theirs["image_grid_thw"].prod() // 4
        torch.testing.assert_close(as_published(run.items[0], vision), theirs["pixel_values"], atol=1e-6, rtol=1e-6)


def test_bytes_equal_those_that_the_processor_normalises():
    """Not a bit is lost or moved between the file and the tower's normalisation."""
    processor = Qwen2VLImageProcessor(do_normalize=False, do_rescale=False)
    [run] = reader(ANY_GRID, image_tokens=[4, 1280]).read("image", image_file(photo(333, 201)), "", ROOM)
    theirs = processor(photo(333, 201), return_tensors="pt")["pixel_values"]
    assert torch.equal(rearrange(run.items[0], "(y i) (x j) n -> (y x i j) n", i=2, j=2).float(), theirs.float())


def test_the_size_of_a_png_whose_orientation_comes_last_is_known_before_its_pixels(monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 8
    data = image_file(photo(40, 30), exif=exif)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4])
    late = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    expected = image.decode(data, 10**6)
    assert torch.equal(image.decode(late, 10**6), expected)
    monkeypatch.setattr(Image.core, "zip_decoder", None)  # of Pillow, for the pixels of a PNG
    assert image.ImageFile(late, 10**6).size == (40, 30)


LENGTHS = [(1, 8), (2, 8), (3, 8), (8, 8), (15, 30), (31, 30), (75, 25), (200, 24), (901, 30), (2400, 60)]


@pytest.mark.parametrize("least, most, fps", [(4, 768, 2), (4, 10, 2), (2, 7, 0.5)])
def test_frames_are_those_that_the_processors_of_qwen_choose(least, most, fps):
    ends = Qwen3VLVideoProcessor(min_frames=least, max_frames=most, fps=fps)
    starts = Qwen2VLVideoProcessor(min_frames=least, max_frames=most, fps=fps)
    for total, rate in LENGTHS:
        metadata = VideoMetadata(total_num_frames=total, fps=float(rate))
        video = VideoConfig(num_frames=None, fps=float(fps), min_frames=least, max_frames=most, spread="first_to_last")
        found = area.frame_times(total / rate, rate, video, 2)
        assert [round(time * rate) for time in found] == ends.sample_frames(metadata).tolist()
        if total == 1:  # which Qwen2-VL's processor does not take
            continue
        found = area.frame_times(total / rate, rate, dataclasses.replace(video, spread="starts"), 2)
        assert [round(time * rate) for time in found] == starts.sample_frames(metadata).tolist()


def test_a_number_of_frames_is_chosen_as_the_processors_do():
    metadata = VideoMetadata(total_num_frames=50, fps=25.0)
    processors = {"first_to_last": (Qwen3VLVideoProcessor(), 2), "starts": (Qwen2VLVideoProcessor(), 2)}
    processors["middle_frames"] = (InternVLVideoProcessor(), 1)
    for count in (2, 5, 8):
        for spread, (processor, frames_per_patch) in processors.items():
            found = area.frame_times(2.0, 25, VideoConfig(num_frames=count, spread=spread), frames_per_patch)
            expected = processor.sample_frames(metadata, num_frames=count)
            assert [round(time * 25) for time in found] == expected.tolist()


def test_frames_in_the_middle_of_equal_parts_are_those_that_the_processor_of_internvl_chooses():
    for fps in (2, 0.7, 7.9):
        video = VideoConfig(num_frames=None, fps=float(fps), max_frames=2**20, spread="middle_frames")
        for total, rate in LENGTHS:
            if total / rate * fps < 1:  # which theirs does not take
                continue
            expected = InternVLVideoProcessor().sample_frames(VideoMetadata(total, float(rate)), fps=fps)
            found = area.frame_times(total / rate, rate, video, 1)
            assert [round(time * rate) for time in found] == expected.tolist()


@pytest.mark.parametrize("most, fps", [(64, 1), (8, 1), (5, 0.5), (3, 30), (500, 50)])
def test_inner_frames_are_those_that_the_processor_of_smolvlm_chooses(most, fps):
    processor = SmolVLMVideoProcessor(num_frames=most, fps=fps)
    video = VideoConfig(num_frames=None, fps=float(fps), max_frames=most, spread="inner")
    skipped = 0
    for total, rate in [*LENGTHS, (1, 30), (3000, 30), (1800, Fraction(30000, 1001)), (70, Fraction(1, 2))]:
        seconds = float(total / Fraction(rate))
        metadata = VideoMetadata(total_num_frames=total, fps=float(rate), duration=seconds)
        found = [round(time * rate) for time in area.frame_times(seconds, rate, video, 1)]
        assert found == processor.sample_frames(metadata).tolist()
        skipped += found[0] > 0
    assert (skipped > 0) == (most * fps < 95), "no video was long enough for its first second to be left out"


def test_inner_frames_are_some_of_each_second():
    with pytest.raises(ValueError, match="spread=inner needs fps"):
        VideoConfig(spread="inner")


def every_frame(data: bytes) -> np.ndarray:
    """Every frame of a video, (N, H, W, 3)."""
    with av.open(io.BytesIO(data)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


@pytest.mark.parametrize("seconds, rate", [(3.5, 8), (5.0, 30), (0.9, 30)])
def test_videos_equal_those_of_qwens_processors(seconds, rate):
    data = video_file(seconds, rate)
    frames = every_frame(data)
    metadata = VideoMetadata(total_num_frames=len(frames), fps=float(rate), duration=seconds)
    size = {"shortest_edge": 10 * 28 * 28, "longest_edge": 20 * 28 * 28}
    theirs = Qwen2VLVideoProcessor(size=size, fps=2, do_sample_frames=True, cap_pixels_per_frame=False)(
        videos=[frames], video_metadata=[metadata], return_tensors="pt"
    )
    video = VideoConfig(num_frames=None, fps=2.0, min_frames=4, max_frames=768, spread="starts", frame_tokens=[10, 20])
    [run] = reader(ANY_GRID, video=video).read("video", data, "", ROOM)
    assert [len(run.items), *run.items[0].shape[:2]] == theirs["video_grid_thw"][0].tolist()
    ours = torch.cat([as_published(item, ANY_GRID) for item in run.items])
    torch.testing.assert_close(ours, theirs["pixel_values_videos"], atol=1e-6, rtol=1e-6)

    metadata = VideoMetadata(total_num_frames=len(frames), fps=float(rate), duration=seconds)
    size = {"shortest_edge": 20 * 32 * 32, "longest_edge": 60 * 32 * 32}
    theirs = Qwen3VLVideoProcessor(
        size=size, fps=2, image_mean=[0.5] * 3, image_std=[0.5] * 3, cap_pixels_per_frame=False
    )(videos=[frames], video_metadata=[metadata], return_tensors="pt")
    video = dataclasses.replace(
        video, spread="first_to_last", frame_tokens=None, tokens=[10, 30], text=VideoText(frame=TIMESTAMP)
    )
    runs = reader(QWEN3, video=video).read("video", data, "", ROOM)
    items = [item for run in runs for item in run.items]
    assert [len(items), *items[0].shape[:2]] == theirs["video_grid_thw"][0].tolist()
    ours = torch.cat([as_published(item, QWEN3) for item in items])
    torch.testing.assert_close(ours, theirs["pixel_values_videos"], atol=1e-6, rtol=1e-6)


SIDES = st.integers(1, 6000)
TOKENS = st.integers(1, 2000)


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, TOKENS, TOKENS, st.integers(2, 40))
def test_sizes_equal_those_of_qwens_processors(height, width, one, other, count):
    tokens = sorted((one, other))
    pixels = {"min_pixels": tokens[0] * 28**2, "max_pixels": tokens[1] * 28**2}
    together = {"min_pixels": 2 * tokens[0] * 32**2, "max_pixels": 2 * tokens[1] * 32**2}
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="is thinner than 1 to 200"):
            area.resized("image", (height, width), 28, tokens)
        return
    assume(max(height, width) < 190 * min(height, width))  # Qwen3-VL's may round thin frames to more than 1 to 200
    theirs = qwen2_vl_smart_resize(height, width, 28, **pixels)
    assert area.resized("image", (height, width), 28, tokens) == theirs
    theirs = qwen3_vl_smart_resize(count, height, width, 2, 32, **together)
    assert area.resized_together((height, width), 32, tokens, count, 2) == theirs


def test_a_video_of_one_frame_fills_a_patch_with_it():
    for spread in ("middles", "starts", "middle_frames", "first_to_last"):
        video = VideoConfig(num_frames=None, fps=2.0, spread=spread)
        [run] = reader(ANY_GRID, video=video).read("video", video_file(1 / 8), "", ROOM)
        [item] = run.items
        first, second = item.unflatten(-1, (3, 2, -1)).unbind(-2)
        assert torch.equal(first, second)


def test_what_no_setting_makes_fit_is_one_line_before_anything_is_decoded(monkeypatch):
    monkeypatch.setattr(image.ImageFile, "decode", lambda self: pytest.fail("decoded"))
    room = Room(1000, "data.seq_length")
    read = reader(ANY_GRID)
    with pytest.raises(ValueError, match="image of 3000 x 10 pixels is thinner than 1 to 200"):
        read.read("image", image_file(photo(3000, 10)), "", room)
    expected = (
        r"image of 1400 x 1400 pixels takes 2,500 tokens, more than data\.seq_length=1000: "
        r"lower data\.image_tokens=\[4, 16384\]"
    )
    with pytest.raises(ValueError, match=expected):
        read.read("image", image_file(photo(1400, 1400)), "", room)
    with pytest.raises(ValueError, match="takes 300 tokens, after 701 of other media, more than"):
        read.read("image", image_file(photo(20 * 28, 15 * 28)), "", dataclasses.replace(room, taken=701))
    videos = reader(ANY_GRID, video=VideoConfig(frame_tokens=[500, 600]))
    expected = (
        r"video of 8 frames of 64 x 48 pixels takes .* tokens, more than data\.seq_length=1000: "
        r"lower data\.video\.frame_tokens=\[500, 600\] or data\.video\.num_frames=8"
    )
    with pytest.raises(ValueError, match=expected):
        videos.read("video", video_file(2), "", room)


def test_a_video_without_frames_is_one_line():
    content = io.BytesIO()
    with av.open(content, "w", "avi") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        file.start_encoding()
    with pytest.raises(ValueError, match=r"^video has no frame$"):
        reader(ANY_GRID).read("video", content.getvalue(), "", ROOM)


@pytest.mark.parametrize(
    "bounds, message",
    [([9, 4], "image_tokens=.*: the least is above the most"), ([0.1, 0.5], "at most 0.5 features leave no room")],
)
def test_bounds_that_no_grid_meets_are_refused(bounds, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(train="x", image_tokens=bounds)
    with pytest.raises(ValueError, match=message.replace("image_tokens", "tokens")):
        VideoConfig(tokens=bounds)


def test_the_seconds_of_a_patch_are_those_of_its_frames():
    config = dataclasses.replace(model(downsample=2), vision=ANY_GRID)
    video = VideoConfig(num_frames=None, fps=2.0, min_frames=4, max_frames=8, spread="starts")
    data = DataConfig(train="x", video=video)
    for seconds, expected in ((3.0, 1.0), (16.0, 4.0), (1.0, 0.5)):
        assert area.of_video((48, 64), seconds, Fraction(30000, 1001), config, data).patch_seconds == pytest.approx(
            expected, rel=0.02
        )
    assert area.of_video((48, 64), 3.0, 8, config, data).patch_seconds == 1.0

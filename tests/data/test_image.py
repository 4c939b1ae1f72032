import dataclasses
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import CLIPImageProcessor, SiglipImageProcessor

from avlm.data import image
from tests.data.media import VISION, image_file, picture

CLIP = dataclasses.replace(VISION, image_size=224, patch_size=14)
LIMIT = 100_000_000


def clip_processor(normalise: bool) -> CLIPImageProcessor:
    return CLIPImageProcessor(
        size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}, do_normalize=normalise
    )


@pytest.mark.parametrize("size", [(640, 480), (481, 333), (37, 100), (224, 224), (225, 224), (1000, 50), (20_000, 100)])
def test_pixels_equal_those_of_clips_processor(size):
    original = picture(*size)
    ours = image.fit(image.decode(image_file(original), LIMIT), CLIP)
    theirs = clip_processor(False)(original, return_tensors="pt")["pixel_values"][0]
    assert (ours / 255 - theirs).abs().max() <= 1 / 255
    normalised = clip_processor(True)(original, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(image.normalise(ours[None], CLIP)[0], normalised, atol=1e-5, rtol=0)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_stretched_pixels_equal_those_of_siglips_processor(resample):
    stretch = dataclasses.replace(CLIP, resize="stretch", resample=resample, mean=[0.5] * 3, std=[0.5] * 3)
    original = picture(301, 177)
    ours = image.normalise(image.fit(image.decode(image_file(original), LIMIT), stretch)[None], stretch)
    processor = SiglipImageProcessor(size={"height": 224, "width": 224}, resample=Image.Resampling[resample.upper()])
    theirs = processor(original, return_tensors="pt")["pixel_values"]
    assert (ours - theirs).abs().max() <= 2 / 255


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "RGB", "CMYK"])
def test_every_colour_mode_becomes_rgb(mode):
    file_format = "JPEG" if mode == "CMYK" else "PNG"
    data = image_file(picture(50, 40).convert(mode), file_format)
    with Image.open(io.BytesIO(data)) as reference:
        expected = torch.from_numpy(np.array(reference.convert("RGB"))).permute(2, 0, 1)
    decoded = image.decode(data, LIMIT)
    assert decoded.dtype == torch.uint8
    assert (decoded.int() - expected.int()).abs().max() <= 1


def test_sixteen_bits_keep_their_brightness():
    deep = Image.fromarray((np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16).astype(np.uint16))
    decoded = image.decode(image_file(deep), LIMIT)
    assert decoded.dtype == torch.uint8
    assert decoded[0, 0, 0] == 0 and decoded[0, -1, -1] == 255


def test_webp_is_read():
    data = image_file(picture(40, 30), "WEBP", lossless=True)
    assert torch.equal(image.decode(data, LIMIT), image.decode(image_file(picture(40, 30)), LIMIT))


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_picture_taken_sideways_stands_upright(orientation):
    original = picture(64, 40)
    exif = original.getexif()
    exif[0x0112] = orientation
    data = image_file(original, "JPEG", exif=exif, quality=95)
    with Image.open(io.BytesIO(data)) as file:
        upright = np.array(ImageOps.exif_transpose(file).convert("RGB"))
    difference = image.decode(data, LIMIT).int() - torch.from_numpy(upright).permute(2, 0, 1).int()
    assert difference.abs().max() <= 3


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (20_000, 30), (3, 2)])
def test_odd_sizes_give_a_full_picture(size):
    fitted = image.fit(image.decode(image_file(picture(*size)), LIMIT), CLIP)
    assert fitted.shape == (3, 224, 224)


def test_only_the_middle_of_a_very_wide_picture_is_kept():
    wide = np.zeros((10, 2000, 3), np.uint8)
    wide[:, 990:1010] = 200  # twice the height: the crop sees nothing else
    fitted = image.fit(image.decode(image_file(Image.fromarray(wide)), LIMIT), CLIP)
    assert (fitted == 200).all()


def test_a_truncated_picture_is_refused():
    data = image_file(picture(200, 200), "JPEG")
    with pytest.raises(ValueError, match="cannot be decoded"):
        image.decode(data[: len(data) // 2], LIMIT)


def test_what_is_no_picture_is_refused():
    for data in (b"", b"hello", b"\xff\xd8\xff"):
        with pytest.raises(ValueError, match="not a picture"):
            image.decode(data, LIMIT)
    with pytest.raises(ValueError, match="GIF, which is not read"):
        image.decode(image_file(picture(20, 20), "GIF"), LIMIT)


def test_a_small_file_that_claims_a_huge_picture_is_refused_before_decoding():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match=r"too large|max_image_pixels"):
        image.decode(bomb, LIMIT)
    with pytest.raises(ValueError, match=r"50 x 40 pixels exceeds data\.max_image_pixels=1999"):
        image.decode(image_file(picture(50, 40)), 1999)


def test_denormalised_pixels_are_the_pixels():
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(image.denormalise(image.normalise(pixels, CLIP), CLIP), pixels)

import dataclasses
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import InterpolationMode, resize
from transformers import CLIPImageProcessor, SiglipImageProcessor

from avlm.data.media import image
from avlm.data.media.patches import cut_into_patches
from avlm.models.vit import normalise
from tests.data.small_files import VISION, image_file, photo, video_file

CLIP = dataclasses.replace(VISION, image_size=224, patch_size=14)
LIMIT = 100_000_000


def clip_processor(normalise: bool) -> CLIPImageProcessor:
    return CLIPImageProcessor(
        size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}, do_normalize=normalise
    )


@pytest.mark.parametrize("size", [(640, 480), (481, 333), (37, 100), (224, 224), (225, 224), (1000, 50), (20_000, 100)])
def test_pixels_equal_those_of_clips_processor(size):
    original = photo(*size)
    ours = image.fit(image.decode(image_file(original), LIMIT), CLIP)
    theirs = clip_processor(False)(original, return_tensors="pt")["pixel_values"][0]
    assert (ours / 255 - theirs).abs().max() <= 1 / 255
    normalised = clip_processor(True)(original, return_tensors="pt")["pixel_values"][0]
    both = [cut_into_patches(pixels[None], CLIP) for pixels in (ours, normalised)]
    torch.testing.assert_close(normalise(both[0], CLIP), both[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(2021, 101), (101, 2021), (450, 10_000), (3, 500), (1000, 47)])
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_the_middle_of_a_very_long_image_lies_on_the_grid_of_the_whole(size, resample):
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *size), dtype=np.uint8))
    scaled = [int(224 * side / min(size)) for side in size]
    top, left = ((side - 224) // 2 for side in scaled)
    whole = resize(noise, scaled, InterpolationMode(resample), antialias=True)[:, top : top + 224, left : left + 224]
    fitted = image.fit(noise, dataclasses.replace(CLIP, resample=resample))
    assert (fitted.int() - whole.int()).abs().max() <= 2


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_stretched_pixels_equal_those_of_siglips_processor(resample):
    stretch = dataclasses.replace(CLIP, resize="stretch", resample=resample, mean=[0.5] * 3, std=[0.5] * 3)
    original = photo(301, 177)
    ours = image.fit(image.decode(image_file(original), LIMIT), stretch)[None]
    processor = SiglipImageProcessor(size={"height": 224, "width": 224}, resample=Image.Resampling[resample.upper()])
    theirs = processor(original, return_tensors="pt")["pixel_values"]
    both = normalise(cut_into_patches(ours, stretch), stretch), cut_into_patches(theirs, stretch)
    assert (both[0] - both[1]).abs().max() <= 2 / 255


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "RGB", "CMYK"])
def test_every_colour_mode_becomes_rgb(mode):
    file_format = "JPEG" if mode == "CMYK" else "PNG"
    data = image_file(photo(50, 40).convert(mode), file_format)
    with Image.open(io.BytesIO(data)) as reference:
        expected = torch.from_numpy(np.array(reference.convert("RGB"))).permute(2, 0, 1)
    decoded = image.decode(data, LIMIT)
    assert decoded.dtype == torch.uint8
    assert (decoded.int() - expected.int()).abs().max() <= 1


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of a mode that Pillow does not write. Each row starts with a 0, for no filter."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in body)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def values(data: bytes) -> list:
    """(H, W, 3)"""
    return image.decode(data, LIMIT).permute(1, 2, 0).tolist()


def test_sixteen_bits_keep_their_brightness():
    deep = Image.fromarray((np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16).astype(np.uint16))
    decoded = image.decode(image_file(deep), LIMIT)
    assert decoded.dtype == torch.uint8
    assert decoded[0, 0, 0] == 0 and decoded[0, -1, -1] == 255
    assert values(png(2, 1, 16, 2, b"\0" + bytes(range(12)))) == [[[0, 2, 4], [6, 8, 10]]]
    assert values(png(2, 1, 16, 4, b"\0" + b"\x12\x34\xff\xff\x12\x34\0\0")) == [[[0x12] * 3, [255] * 3]]


WHITE, RED = [255] * 3, [200, 0, 0]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (image_file(Image.new("RGBA", (1, 1), (200, 0, 0, 0))), WHITE),
        (image_file(Image.new("RGBA", (1, 1), (200, 0, 0, 255))), RED),
        (image_file(Image.new("RGBA", (1, 1), (0, 100, 200, 51))), [204, 224, 244]),
        (image_file(Image.new("RGBA", (1, 1), (200, 0, 0, 0)), "WEBP", lossless=True, exact=True), WHITE),
        (image_file(Image.new("LA", (1, 1), (7, 0))), WHITE),
        (image_file(Image.new("L", (1, 1), 7), transparency=7), WHITE),
        (image_file(Image.new("L", (1, 1), 8), transparency=7), [8] * 3),
        (image_file(Image.new("1", (1, 1), 0), transparency=0), WHITE),
        (image_file(Image.new("RGB", (1, 1), (200, 0, 0)), transparency=(200, 0, 0)), WHITE),
        (image_file(Image.new("RGB", (1, 1), (200, 0, 0)).convert("P"), transparency=b"\0" * 256), WHITE),
        (png(1, 1, 16, 0, b"\0\x12\x34", (b"tRNS", b"\x12\x34")), WHITE),
        (png(1, 1, 16, 0, b"\0\x12\x35", (b"tRNS", b"\x12\x34")), [0x12] * 3),
        (png(1, 1, 4, 0, b"\0\xa0", (b"tRNS", b"\0\x0a")), WHITE),
        (png(1, 1, 16, 2, b"\0" + bytes(range(6)), (b"tRNS", bytes(range(6)))), WHITE),
    ],
)
def test_what_is_transparent_is_white_and_shows_no_hidden_colour(data, expected):
    assert values(data) == [[expected]]


def test_webp_is_read():
    data = image_file(photo(40, 30), "WEBP", lossless=True)
    assert torch.equal(image.decode(data, LIMIT), image.decode(image_file(photo(40, 30)), LIMIT))


XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" %s/></rdf:RDF></x:xmpmeta>'
)


PNG_EXIF, PNG_XMP = b"Raw profile type exif\0", b"XML:com.adobe.xmp\0"


def app1(body: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


def with_orientation(orientation: int, original: Image.Image) -> dict[str, bytes]:
    """Files of every kind that keeps an orientation, by the place where it does."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif = exif.tobytes()
    packet = (XMP % f'tiff:Orientation="{orientation}"').encode()
    xmp, extension = (b"http://ns.adobe.com/" + name for name in (b"xap/1.0/\0", b"xmp/extension/\0"))
    raw = f"\nexif\n{len(exif):8}\n{exif.hex()}\n".encode()
    jpeg, plain = image_file(original, "JPEG", quality=95), image_file(original)
    in_jpeg = lambda *bodies: jpeg[:20] + b"".join(map(app1, bodies)) + jpeg[20:]  # after JFIF's 18 bytes
    in_png = lambda kind, body: plain[:33] + png_chunk(kind, body) + plain[33:]
    phone = io.BytesIO()
    original.save(phone, "MPO", save_all=True, append_images=[original.resize((8, 8))], exif=exif)
    return {
        "JPEG, EXIF first": jpeg[:2] + app1(exif) + jpeg[2:],
        "JPEG, EXIF after XMP": in_jpeg(xmp + (XMP % "").encode(), exif),
        "JPEG, EXIF after an extension of XMP": in_jpeg(extension + b"x" * 99, exif),
        "JPEG, XMP": in_jpeg(xmp + packet),
        "MPO": phone.getvalue(),
        "WebP, EXIF": image_file(original, "WEBP", lossless=True, exif=exif),
        "WebP, XMP": image_file(original, "WEBP", lossless=True, xmp=packet),
        "PNG, eXIf": in_png(b"eXIf", exif[6:]),
        "PNG, eXIf after the pixels": plain[:-12] + png_chunk(b"eXIf", exif[6:]) + plain[-12:],
        "PNG, zTXt": in_png(b"zTXt", PNG_EXIF + b"\0" + zlib.compress(raw)),
        "PNG, tEXt": in_png(b"tEXt", PNG_EXIF + raw),
        "PNG, iTXt": in_png(b"iTXt", PNG_EXIF + b"\0\0\0\0" + raw),
        "PNG, XMP": in_png(b"iTXt", PNG_XMP + b"\0\0\0\0" + packet),
        "PNG, XMP that is packed": in_png(b"iTXt", PNG_XMP + b"\1\0\0\0" + zlib.compress(packet)),
    }


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_stands_as_pillow_stands_it_wherever_its_file_says_how(orientation):
    for where, data in with_orientation(orientation, photo(64, 40)).items():
        with Image.open(io.BytesIO(data)) as file:
            upright = np.array(ImageOps.exif_transpose(file).convert("RGB"))
        assert upright.shape == ((64, 40, 3) if orientation > 4 else (40, 64, 3)), where
        file = image.ImageFile(data, LIMIT)
        assert file.size == upright.shape[:2], f"{where}, before it is decoded"
        assert np.array_equal(file.decode().permute(1, 2, 0).numpy(), upright), where


def test_damage_in_metadata_ends_nothing_and_damage_in_pixels_is_noticed():
    original = photo(64, 40)
    jpeg, plain = image_file(original, "JPEG"), image_file(original)
    bad_exif = b"Exif\0\0II*\0\xff\xff\xff\xff"
    good = [
        jpeg[:20] + app1(bad_exif) + jpeg[20:],
        jpeg[:20] + b"junk" + b"\xff" * 5 + jpeg[20:],
        jpeg[:20] + b"\xff\xe2\0\x16MPF\0" + b"MM\0*\0\0\0\x08" + b"\xff" * 8 + jpeg[20:],
        plain[:33] + png_chunk(b"eXIf", bad_exif[6:]) + plain[33:],
        plain[:33] + png_chunk(b"tEXt", b"Comment\0damaged")[:-1] + b"?" + plain[33:],
        plain[:33] + png_chunk(b"tEXt", b"transparency\0x") + plain[33:],
        plain[:33] + png_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n8\nxyz") + plain[33:],
        plain[:33] + png_chunk(b"zTXt", PNG_EXIF + b"\0" + zlib.compress(bytes(2**21))) + plain[33:],
        plain[:-12] + png_chunk(b"iTXt", PNG_XMP + b"\1\0\0\0" + zlib.compress(bytes(2**21))) + plain[-12:],
        plain[:33] + png_chunk(b"iTXt", PNG_XMP + b"\1\0\0\0" + zlib.compress(bytes(2**20))) * 65 + plain[33:],
        plain[:33] + png_chunk(b"iCCP", b"large\0\0" + zlib.compress(bytes(2**21))) + plain[33:],
    ]
    for data in good:
        expected = jpeg if data[:2] == jpeg[:2] else plain
        assert torch.equal(image.decode(data, LIMIT), image.decode(expected, LIMIT))
    with pytest.raises(ValueError, match="it has no palette"):
        image.decode(png(1, 1, 8, 3, b"\0\0"), LIMIT)
    at = plain.index(b"IDAT") + 100
    with pytest.raises(ValueError, match="chunk IDAT is damaged"):
        image.decode(plain[:at] + bytes([plain[at] ^ 1]) + plain[at + 1 :], LIMIT)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (20_000, 30), (3, 2)])
def test_odd_sizes_give_a_full_image(size):
    fitted = image.fit(image.decode(image_file(photo(*size)), LIMIT), CLIP)
    assert fitted.shape == (3, 224, 224)


def test_only_the_middle_of_a_very_wide_image_is_kept():
    wide = np.zeros((10, 2000, 3), np.uint8)
    wide[:, 990:1010] = 200  # twice the height: the crop sees nothing else
    fitted = image.fit(image.decode(image_file(Image.fromarray(wide)), LIMIT), CLIP)
    assert (fitted == 200).all()


@pytest.mark.parametrize("form", [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})])
def test_a_truncated_image_is_refused(form):
    data = image_file(photo(200, 200), form[0], **form[1])
    with pytest.raises(ValueError, match=r"cannot be decoded|header is damaged"):
        image.decode(data[: len(data) // 2], LIMIT)


def test_what_is_no_image_is_refused():
    for data in (b"", b"hello", b"\xff\xd8\xff"):
        with pytest.raises(ValueError, match="not an image"):
            image.decode(data, LIMIT)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (image_file(photo(20, 20), "GIF"), "GIF"),
        (image_file(photo(20, 20), "BMP"), "BMP"),
        (image_file(photo(20, 20), "TIFF"), "TIFF"),
        (image_file(photo(20, 20), "ICO"), "ICO"),
        (image_file(photo(20, 20), "PCX"), "PCX"),
        (image_file(photo(20, 20), "TGA"), "TGA"),
        (image_file(photo(20, 20).convert("P"), "TGA", compression="tga_rle"), "TGA"),
        (image_file(photo(20, 20), "JPEG2000"), "JPEG 2000"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\xff\x0a\x00", "JPEG XL"),
        (b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"%PDF-1.7", "PDF"),
        (b"\n<!DOCTYPE html><html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (video_file(0.2), "Matroska or WebM"),
        (bytes(100), "nothing but zeros"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_what_is_not_read_is_named_for_what_it_is(data, kind):
    with pytest.raises(ValueError, match=f"image is {kind}.*, which is not read: convert it to JPEG, PNG, WEBP"):
        image.decode(data, LIMIT)


def test_a_small_file_that_claims_a_huge_image_is_refused_before_decoding():
    with pytest.raises(ValueError, match=r"too large|max_image_pixels"):
        image.decode(png(60_000, 60_000, 8, 2, b""), LIMIT)
    with pytest.raises(ValueError, match=r"50 x 40 pixels exceeds data\.max_image_pixels=1999"):
        image.decode(image_file(photo(50, 40)), 1999)


def test_an_image_that_would_take_too_much_memory_or_time_is_refused_before_decoding():
    jpeg = image_file(photo(20, 20), "JPEG", progressive=True)
    size = jpeg.index(b"\xff\xc2") + 5
    vast = jpeg[:size] + struct.pack(">HH", 12_000, 10_000) + jpeg[size + 4 :]
    last_scan = vast[vast.rindex(b"\xff\xda") : -2]
    with pytest.raises(ValueError, match="12000 pixels has 22 scans, too many"):
        image.decode(vast[:-2] + last_scan * 12 + vast[-2:], 2 * LIMIT)
    assert image.decode(jpeg + b"\xff\xda" * 10**4, LIMIT).equal(image.decode(jpeg, LIMIT)), "appended by a telephone"
    with pytest.raises(ValueError, match="more than 65536 JPEG segments"):
        image.decode(b"\xff\xd8" + b"\xff" * 70_000 + jpeg[2:], LIMIT)
    webp = image_file(photo(20, 20), "WEBP")
    vast = webp[:26] + struct.pack("<HH", 9_000, 9_000) + webp[30:]
    with pytest.raises(ValueError, match="9000 x 9000 pixels would take 1313 MiB to decode as WEBP"):
        image.decode(vast, LIMIT)
    with pytest.raises(ValueError, match="1 x 50000000 pixels would take 1097 MiB to decode as PNG"):
        image.decode(png(1, 50_000_000, 8, 2, b""), LIMIT)

"""Pictures: bytes -> what the vision tower sees.

decode  JPEG, PNG or WebP bytes -> uint8 RGB (3, H, W)
fit     -> uint8 (3, S, S), S = image_size, the way the tower was trained (CLIP: crop, SigLIP: stretch)

The numbers are those of transformers' CLIPImageProcessor, with antialiasing on bytes. Pictures stay bytes until the
tower normalises them, so that buffers, ranks and devices are sent a quarter of the memory. What is transparent is shown
on white, so that colours that its author never saw do not appear.
"""

import io
import math
import re
import warnings
import zlib

import numpy
import torch
from PIL import Image
from PIL.PngImagePlugin import MAX_TEXT_CHUNK, MAX_TEXT_MEMORY
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, resize

from avlm.config.model import VisionConfig
from avlm.data.media import signature

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_ASPECT = 20  # beyond it only what the crop keeps is resized
MAX_BYTES = 2**30  # that decoding a picture may take
BYTES_PER_PIXEL = 10  # that decoding may take where data.max_image_pixels is so large that it exceeds MAX_BYTES
BYTES_PER_ROW = 16  # more for a PNG, whose rows Pillow keeps one by one: those of a narrow one hold few pixels
MAX_SCAN_PIXELS = 2 * 10**9  # pixels times scans of a JPEG: 10 scans are usual, and each passes over all pixels
MAX_PNG_CHUNKS, MAX_JPEG_SEGMENTS = 2**20, 2**16
STRIP = 2**21  # pixels that are converted at a time
PLAIN = 2**22  # pixels up to which a picture that needs no change is not cut into strips

ORIENTATION = 0x0112  # the EXIF tag
# Orientation -> whether rows and columns change places, and whether what results is upside down and mirrored.
UPRIGHT = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
JPEG_METADATA = [bytes([marker]) for marker in (*range(0xE0, 0xF0), 0xFE)]  # APP0 to APP15 and comments
JPEG_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")  # but those without a segment, and what pixels may look like
JPEG_ORIENTATION = (b"\xe0", b"\xe1", b"\xee")  # JFIF, EXIF or XMP, and Adobe's, which says how colours are stored
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")
PNG_DEPTH = 24  # the byte of a PNG that holds the bits of a channel
PNG_TEXTS = (b"exif", b"Raw profile type exif", b"XML:com.adobe.xmp", b"xmp")  # where Pillow looks for orientation

# Blocks of 16 MiB that Pillow keeps for the next picture, as fresh pages cost large ones a third of their time. The
# documented way, an environment variable, is read before we are imported.
Image.core.set_blocks_max(4)


def decode(data: bytes, max_pixels: int) -> Tensor:
    """uint8 (3, H, W), upright by its metadata, on white where transparent. ValueError for what is no whole picture.

    Size and memory are read from the header before anything is decoded: a small file can hold a huge picture. Of an
    animation it is the first frame.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's on size, which is bounded here, and on damaged metadata
        image, scans = _open(data)
        _check_size(image, scans, max_pixels)
        try:
            image.load()
        except Exception as error:  # Pillow promises no type for damaged files
            raise ValueError(f"picture cannot be decoded: {_line(error)}") from None
        if image.mode == "P" and image.palette is None:
            raise ValueError("picture cannot be decoded: it has no palette")
        if image.format == "PNG":
            _scale_key(image, data[PNG_DEPTH])
        return _rgb(image, _orientation(image))


def fit(image: Tensor, vision: VisionConfig) -> Tensor:
    """uint8 (3, H, W) of any size -> uint8 (3, S, S)."""
    size, mode = vision.image_size, InterpolationMode(vision.resample)
    if vision.resize == "stretch":
        return resize(image, [size, size], mode, antialias=True)
    height, width = image.shape[1:]
    # CLIP: the short side becomes S and the long side int(S * long / short), then the middle is kept.
    scaled = [int(size * height / width), size] if width <= height else [size, int(size * width / height)]
    top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    if max(height, width) > MAX_ASPECT * min(height, width):
        return _middle(image, max(scaled), vision)
    image = resize(image, scaled, mode, antialias=True)
    return image[:, top : top + size, left : left + size]


def _middle(image: Tensor, scaled: int, vision: VisionConfig) -> Tensor:
    """As ``fit`` would crop it with its long side resized to ``scaled``, without what the crop does not keep."""
    size, sides = vision.image_size, list(image.shape[1:])
    short, long = sorted(sides)
    dim, start, margin = sides.index(long), (scaled - size) // 2, 2 * size + 4  # a bicubic filter sees no further
    steps = math.gcd(long, scaled)  # at which pixels before and after resizing start together
    before, after = long // steps, scaled // steps
    if before > MAX_ASPECT * short:
        return _resize_box(image, dim + 1, start * long / scaled, (start + size) * long / scaled, vision)
    first, last = max(0, (start - margin) // after), min(steps, -(-(start + size + margin) // after))
    part = image.narrow(dim + 1, first * before, (last - first) * before)
    resized = [size, size]
    resized[dim] = (last - first) * after
    part = resize(part, resized, InterpolationMode(vision.resample), antialias=True)
    return part.narrow(dim + 1, start - first * after, size)


def _resize_box(image: Tensor, dim: int, start: float, end: float, vision: VisionConfig) -> Tensor:
    """uint8 (3, S, S) of what is between two places along a dimension, which may cut pixels; the filter sees what is
    beside it too. It is Pillow that resizes boxes, up to 2 of 255 from torch."""
    size, margin = vision.image_size, 2 * min(image.shape[1:]) + 4
    first = max(0, int(start) - margin)
    part = image.narrow(dim, first, min(image.shape[dim], int(end) + margin) - first).permute(1, 2, 0).contiguous()
    height, width = part.shape[:2]
    box = [(0, height), (0, width)]
    box[dim - 1] = (start - first, min(end - first, part.shape[dim - 1]))
    (top, bottom), (left, right) = box
    mode = Image.Resampling[vision.resample.upper()]
    # In two passes, the first one along rows, as torch does: values are rounded and clipped between them.
    resized = Image.fromarray(part.numpy()).resize((size, height), mode, (left, 0, right, height))
    resized = resized.resize((size, size), mode, (0, top, size, bottom))
    return torch.from_numpy(numpy.array(resized)).permute(2, 0, 1).contiguous()


def _open(data: bytes) -> tuple[Image.Image, int]:
    """The picture with its header read and nothing decoded; and the number of its scans, 1 but in JPEGs."""
    kind = signature.name(data)
    if kind not in ("JPEG", "PNG", "WebP"):
        if kind is None:
            raise ValueError(f"{len(data)} bytes are not a picture: give {', '.join(FORMATS)}")
        raise ValueError(f"picture is {kind}, which is not read: convert it to {', '.join(FORMATS)}")
    needed = {"JPEG": _needed_of_jpeg, "PNG": _needed_of_png, "WebP": bytes}[kind](data)
    scans = _scans(needed, 2)[0] if kind == "JPEG" else 1
    try:
        return Image.open(io.BytesIO(needed), formats=FORMATS), scans
    except Image.DecompressionBombError as error:
        raise ValueError(f"picture is too large: {error}") from None
    except Exception:  # Pillow promises no type for damaged files
        raise ValueError(f"{len(data)} bytes are not a picture: their {kind} header is damaged") from None


def _needed_of_jpeg(data: bytes) -> bytes:
    """A JPEG's first picture without the metadata that says nothing of its pixels and orientation: Pillow refuses some
    pictures for damage there, and takes a telephone's file of several for another format."""
    kept, at = [data[:2]], 2
    for _ in range(MAX_JPEG_SEGMENTS):
        at = data.find(b"\xff", at)
        marker = data[at + 1 : at + 2] if at >= 0 else b""
        if marker in (b"\xff", b"\0"):  # fill, and what is no marker
            at += 1
        elif marker in JPEG_METADATA or b"\xc0" <= marker < b"\xd0" or b"\xda" < marker <= b"\xfe":
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
            if marker in JPEG_ORIENTATION or marker not in JPEG_METADATA:
                kept.append(data[at:end])
            at = end
        else:  # the pixels, or nothing; what is appended (telephones: a video) is another matter
            return b"".join([*kept, data[at : _scans(data, at)[1]] if marker else b""])
    raise ValueError(f"picture cannot be decoded: it has more than {MAX_JPEG_SEGMENTS} JPEG segments")


def _scans(data: bytes, at: int) -> tuple[int, int]:
    """How many scans a JPEG has from a place on, and where it ends."""
    count = 0
    while found := JPEG_MARKER.search(data, at):
        marker, at = found[0][1], found.end()
        if marker == 0xD9:
            return count, at
        count += marker == 0xDA
        at += int.from_bytes(data[at : at + 2])  # of its segment; coded pixels follow, in which no marker is found
    return count, len(data)


def _needed_of_png(data: bytes) -> bytes:
    """The chunks of pixels, palette and orientation: Pillow refuses pictures with long texts or colour profiles, and
    for damage in what is not needed, but does not notice any in the pixels."""
    kept, at, count, characters = [PNG_START], 8, 0, 0
    while len(head := data[at : at + 8]) == 8:
        kind, end = head[4:], at + 12 + int.from_bytes(head[:4])
        text = kind in (b"tEXt", b"zTXt", b"iTXt") and data[at + 8 : at + 88].split(b"\0")[0] in PNG_TEXTS
        if kind in PNG_CHUNKS or text:
            chunk = memoryview(data)[at:end]
            whole = len(chunk) == end - at and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
            if not whole and kind in (b"IHDR", b"PLTE", b"IDAT"):
                raise ValueError(f"picture cannot be decoded: its PNG chunk {kind.decode()} is damaged or cut")
            if text and whole:
                size = _characters(kind, bytes(chunk[8:-4]))
                whole = characters + size <= MAX_TEXT_MEMORY
                characters += size if whole else 0
            kept += [chunk] if whole else []
        at, count = end, count + 1
        if kind == b"IEND":
            break
        if count > MAX_PNG_CHUNKS:
            raise ValueError(f"picture cannot be decoded: it has more than {MAX_PNG_CHUNKS} PNG chunks")
    return b"".join(kept)


def _characters(kind: bytes, body: bytes) -> int:
    """How long a text of a PNG is when it is unpacked; where Pillow would not unpack it, longer than all may be."""
    value = body.partition(b"\0")[2]
    if kind == b"zTXt":
        packed = value[1:]
    elif kind == b"iTXt" and value[:1] == b"\1":
        packed = value[2:].split(b"\0", 2)[-1]
    else:
        return len(value)
    unpacking = zlib.decompressobj()
    try:
        length = len(unpacking.decompress(packed, MAX_TEXT_CHUNK))
    except zlib.error:
        return 0  # which Pillow leaves out
    return MAX_TEXT_MEMORY + 1 if unpacking.unconsumed_tail else length


def _check_size(image: Image.Image, scans: int, max_pixels: int) -> None:
    """ValueError for what decoding would cost too much memory or time."""
    (width, height), layers = image.size, getattr(image, "layer", [])
    size, pixels = f"picture of {width} x {height} pixels", width * height
    if pixels > max_pixels:
        raise ValueError(f"{size} exceeds data.max_image_pixels={max_pixels}")
    kind = "JPEG" if image.format == "MPO" else image.format
    if scans * pixels > MAX_SCAN_PIXELS:
        raise ValueError(f"{size} has {scans} scans, too many to decode: save it as a baseline JPEG")
    # Pillow's image and ours; libjpeg has 2 bytes for each coefficient of a picture in scans, libwebp three canvases.
    largest = max([1, *(across * down for _, across, down, _ in layers)])
    coefficients = 2 * sum(across * down for _, across, down, _ in layers) / largest if scans > 1 else 0
    needed = pixels * {"JPEG": 4 + max(coefficients, 3), "PNG": 7 + BYTES_PER_ROW / width, "WEBP": 17}[kind]
    if needed > max(MAX_BYTES, BYTES_PER_PIXEL * max_pixels):
        raise ValueError(f"{size} would take {needed / 2**20:.0f} MiB to decode as {kind}: scale it down")


def _scale_key(image: Image.Image, depth: int) -> None:
    """The transparent colour of a PNG in the 8 bits that Pillow has the pixels in; Pillow keeps it as it is written."""
    key = image.info.get("transparency")
    if image.mode in ("L", "RGB") and key is not None and depth != 8:
        scaled = [value >> 8 if depth == 16 else value * 255 // (2**depth - 1) for value in numpy.atleast_1d(key)]
        image.info["transparency"] = tuple(map(int, scaled)) if image.mode == "RGB" else int(scaled[0])


def _orientation(image: Image.Image) -> int:
    """Of EXIF or XMP, as Pillow's exif_transpose finds it; 1 where that is damaged: the picture stays as it is."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow promises no type for damaged metadata
        return 1


def _rgb(image: Image.Image, orientation: int) -> Tensor:
    """uint8 (3, H, W), a view of (H, W, 3). Converted and turned strip by strip, which bounds the memory."""
    width, height = image.size
    rows = max(1, STRIP // width)
    is_plain = orientation not in UPRIGHT and image.mode == "RGB" and not image.has_transparency_data
    if is_plain and width * height <= PLAIN:
        return torch.from_numpy(numpy.asarray(image)).permute(2, 0, 1)  # most pictures; shares Pillow's copy
    transposed, flipped, mirrored = UPRIGHT.get(orientation, (False, False, False))
    upright = numpy.empty((width, height, 3) if transposed else (height, width, 3), numpy.uint8)
    as_stored = upright[:: -1 if flipped else 1, :: -1 if mirrored else 1]
    as_stored = as_stored.transpose(1, 0, 2) if transposed else as_stored
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(height, top + rows))) if rows < height else image
        as_stored[top : top + rows] = _on_white(strip)
    return torch.from_numpy(upright).permute(2, 0, 1)


def _on_white(strip: Image.Image) -> numpy.ndarray:
    """uint8 (H, W, 3) of any mode of Pillow's."""
    if strip.mode == "I;16":  # of a 16-bit PNG, the others of which Pillow has as their high bytes
        deep = numpy.asarray(strip)
        grey = (deep >> 8).astype(numpy.uint8)
        grey[deep == strip.info.get("transparency", -1)] = 255
        return grey[:, :, None]
    if strip.has_transparency_data:
        strip = strip.convert("RGBA")
        strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
    return numpy.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]

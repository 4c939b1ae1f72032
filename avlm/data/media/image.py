"""Images: bytes -> what the vision tower sees.

decode  JPEG, PNG or WebP bytes -> uint8 RGB (3, H, W)
fit     -> uint8 (3, S, S), S = image_size, the way the tower was trained (CLIP: crop, SigLIP: stretch)

The numbers are those of transformers' CLIPImageProcessor, with antialiasing on bytes. Pixels stay bytes until the tower
normalises them: buffers, ranks and devices then get a quarter of the memory. Transparent parts are shown on white, so
that no colour appears that the author never saw.
"""

import io
import math
import warnings

import numpy
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, resize

from avlm.config.model import VisionConfig
from avlm.data.media import signature
from avlm.data.media.image_bytes import needed_of_jpeg, needed_of_png, scans_of_jpeg

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_ASPECT = 20  # longer images are cut before they are resized
MAX_BYTES = 2**30  # that decoding an image may take
BYTES_PER_PIXEL = 10  # that decoding may take where data.max_image_pixels is so large that it exceeds MAX_BYTES
BYTES_PER_ROW = 16  # of a PNG, whose rows Pillow allocates one by one; it counts where rows hold few pixels
MAX_SCAN_PIXELS = 2 * 10**9  # pixels times scans of a JPEG: 10 scans are usual, and each passes over all pixels
STRIP = 2**21  # pixels that are converted at a time
PLAIN = 2**22  # pixels up to which an image that needs no change is not cut into strips

ORIENTATION = 0x0112  # the EXIF tag
# Orientation -> whether rows and columns change places, and whether the result is upside down and mirrored.
UPRIGHT = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
AS_STORED = (False, False, False)
PNG_DEPTH = 24  # the byte of a PNG that holds the bits of a channel

# Blocks of 16 MiB that Pillow keeps for the next image: fresh pages would cost large images a third of their time. The
# documented way, an environment variable, is read before this module is imported.
Image.core.set_blocks_max(4)


class ImageFile:
    """An image whose header has been read, and nothing else: a small file can hold a huge image.

    ValueError for bytes that are no image, and for one that would take too much memory or time to decode.
    """

    def __init__(self, data: bytes, max_pixels: int) -> None:
        self._data = data
        with _quiet():
            self._image, num_scans = _open(data)
            _check_size(self._image, num_scans, max_pixels)
            self._orientation = _orientation(self._image)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, upright by its metadata."""
        width, height = self._image.size
        transposed, _, _ = UPRIGHT.get(self._orientation, AS_STORED)
        return (width, height) if transposed else (height, width)

    def decode(self) -> Tensor:
        """uint8 (3, H, W), upright, on white where transparent. Of an animation it is the first frame. ValueError for
        bytes that are no whole image."""
        image = self._image
        with _quiet():
            try:
                image.load()
            except Exception as error:  # Pillow promises no type for damaged files
                raise ValueError(f"image cannot be decoded: {_first_line(error)}") from None
            if image.mode == "P" and image.palette is None:
                raise ValueError("image cannot be decoded: it has no palette")
            if image.format == "PNG":
                _scale_key(image, self._data[PNG_DEPTH])
            return _rgb(image, self._orientation)


def decode(data: bytes, max_pixels: int) -> Tensor:
    """uint8 (3, H, W), as ``ImageFile`` decodes it."""
    return ImageFile(data, max_pixels).decode()


def fit(image: Tensor, vision: VisionConfig) -> Tensor:
    """uint8 (3, H, W) of any size -> uint8 (3, S, S), for a tower of square images."""
    size = vision.image_size
    mode = InterpolationMode(vision.resample)
    if vision.resize == "stretch":
        return resized(image, (size, size), vision)
    height, width = image.shape[1:]
    # CLIP: the short side becomes S and the long side int(S * long / short), then the middle is kept.
    if width <= height:
        scaled = [int(size * height / width), size]
    else:
        scaled = [size, int(size * width / height)]
    if max(height, width) > MAX_ASPECT * min(height, width):
        return _middle(image, max(scaled), vision)
    top, left = [(side - size) // 2 for side in scaled]
    image = resize(image, scaled, mode, antialias=True)
    return image[:, top : top + size, left : left + size]


def _middle(image: Tensor, scaled: int, vision: VisionConfig) -> Tensor:
    """The crop that ``fit`` would keep of the image with its long side resized to ``scaled``, made from that part of
    the image only."""
    size = vision.image_size
    sides = list(image.shape[1:])
    short, long = sorted(sides)
    dim = 1 + sides.index(long)
    start = (scaled - size) // 2
    margin = 2 * size + 4  # a bicubic filter sees no further
    steps = math.gcd(long, scaled)  # at each step a pixel starts both before and after resizing
    before = long // steps
    after = scaled // steps
    if before > MAX_ASPECT * short:
        return _resize_box(image, dim, start * long / scaled, (start + size) * long / scaled, vision)
    first = max(0, (start - margin) // after)
    last = min(steps, -(-(start + size + margin) // after))
    part = image.narrow(dim, first * before, (last - first) * before)
    resized = [size, size]
    resized[dim - 1] = (last - first) * after
    part = resize(part, resized, InterpolationMode(vision.resample), antialias=True)
    return part.narrow(dim, start - first * after, size)


def _resize_box(image: Tensor, dim: int, start: float, end: float, vision: VisionConfig) -> Tensor:
    """uint8 (3, S, S) of the image from ``start`` to ``end`` along a dimension. Both may cut pixels, and the filter
    sees the pixels next to them. Pillow resizes such boxes; it differs from torch by up to 2 of 255."""
    size = vision.image_size
    margin = 2 * min(image.shape[1:]) + 4
    first = max(0, int(start) - margin)
    last = min(image.shape[dim], int(end) + margin)
    part = image.narrow(dim, first, last - first).permute(1, 2, 0).contiguous()
    height, width = part.shape[:2]
    box = [(0, height), (0, width)]
    box[dim - 1] = (start - first, min(end - first, part.shape[dim - 1]))
    (top, bottom), (left, right) = box
    mode = Image.Resampling[vision.resample.upper()]
    # In two passes, the first along rows, as torch does: values are rounded and clipped between them.
    resized = Image.fromarray(part.numpy()).resize((size, height), mode, (left, 0, right, height))
    resized = resized.resize((size, size), mode, (0, top, size, bottom))
    return torch.from_numpy(numpy.array(resized)).permute(2, 0, 1).contiguous()


def resized(image: Tensor, size: tuple[int, int], vision: VisionConfig) -> Tensor:
    """uint8 (3, H, W) of any size -> uint8 of (height, width) ``size``."""
    if vision.resample == "lanczos":  # which torchvision has from 0.27 on
        height, width = size
        scaled = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize((width, height), Image.LANCZOS)
        return torch.from_numpy(numpy.array(scaled)).permute(2, 0, 1).contiguous()
    return resize(image, list(size), InterpolationMode(vision.resample), antialias=True)


def _open(data: bytes) -> tuple[Image.Image, int]:
    """The image with its header read and nothing decoded, and the number of its scans, which is 1 except in JPEGs."""
    num_scans = 1
    kind = signature.name(data)
    if kind is None:
        raise ValueError(f"{len(data)} bytes are not an image: give {', '.join(FORMATS)}")
    if kind == "JPEG":
        needed = needed_of_jpeg(data)
        num_scans, _ = scans_of_jpeg(needed, 2)
    elif kind == "PNG":
        needed = needed_of_png(data)
    elif kind == "WebP":
        needed = data
    else:
        raise ValueError(f"image is {kind}, which is not read: convert it to {', '.join(FORMATS)}")
    try:
        return Image.open(io.BytesIO(needed), formats=FORMATS), num_scans
    except Image.DecompressionBombError as error:
        raise ValueError(f"image is too large: {error}") from None
    except Exception:  # Pillow promises no type for damaged files
        raise ValueError(f"{len(data)} bytes are not an image: their {kind} header is damaged") from None


def _check_size(image: Image.Image, num_scans: int, max_pixels: int) -> None:
    """ValueError for an image that would take too much memory or time to decode."""
    width, height = image.size
    num_pixels = width * height
    size = f"image of {width} x {height} pixels"
    if num_pixels > max_pixels:
        raise ValueError(f"{size} exceeds data.max_image_pixels={max_pixels}")
    if num_scans * num_pixels > MAX_SCAN_PIXELS:
        raise ValueError(f"{size} has {num_scans} scans, too many to decode: save it as a baseline JPEG")
    kind = "JPEG" if image.format == "MPO" else image.format
    # Pillow's image and ours, and the decoder's own.
    if kind == "PNG":
        bytes_per_pixel = 7 + BYTES_PER_ROW / width
    elif kind == "WEBP":
        bytes_per_pixel = 17  # three canvases of libwebp
    else:
        bytes_per_pixel = 4 + max(3, _coefficient_bytes(image, num_scans))
    needed = num_pixels * bytes_per_pixel
    if needed > max(MAX_BYTES, BYTES_PER_PIXEL * max_pixels):
        raise ValueError(f"{size} would take {needed / 2**20:.0f} MiB to decode as {kind}: scale it down")


def _coefficient_bytes(image: Image.Image, num_scans: int) -> float:
    """Bytes a pixel that libjpeg keeps between the scans of a JPEG: 2 for each coefficient of its colour layers."""
    if num_scans <= 1:
        return 0
    sizes = [across * down for _, across, down, _ in getattr(image, "layer", [])]
    return 2 * sum(sizes) / max([1, *sizes])


def _scale_key(image: Image.Image, depth: int) -> None:
    """Scale the transparent colour of a PNG, which Pillow keeps as the file has it, to the 8 bits of the pixels."""
    key = image.info.get("transparency")
    if image.mode not in ("L", "RGB") or key is None or depth == 8:
        return
    values = numpy.atleast_1d(key)
    scaled = values >> 8 if depth == 16 else values * 255 // (2**depth - 1)
    image.info["transparency"] = tuple(scaled.tolist()) if image.mode == "RGB" else scaled[0].item()


def _orientation(image: Image.Image) -> int:
    """By EXIF or XMP, as Pillow's exif_transpose finds it; 1, the orientation of the pixels, if that is damaged."""
    try:
        # Not the PNG's own method, which decodes the pixels first to see what follows them: here nothing does.
        return Image.Image.getexif(image).get(ORIENTATION, 1)
    except Exception:  # Pillow promises no type for damaged metadata
        return 1


def _rgb(image: Image.Image, orientation: int) -> Tensor:
    """uint8 (3, H, W), a view of (H, W, 3). Converted and turned strip by strip, which bounds the memory."""
    width, height = image.size
    is_plain = orientation not in UPRIGHT and image.mode == "RGB" and not image.has_transparency_data
    if is_plain and width * height <= PLAIN:
        return torch.from_numpy(numpy.asarray(image)).permute(2, 0, 1)  # most images; shares Pillow's copy
    transposed, flipped, mirrored = UPRIGHT.get(orientation, AS_STORED)
    sides = (width, height) if transposed else (height, width)
    upright = numpy.empty((*sides, 3), numpy.uint8)
    as_stored = upright  # the same memory, indexed as the file stores it
    if flipped:
        as_stored = as_stored[::-1]
    if mirrored:
        as_stored = as_stored[:, ::-1]
    if transposed:
        as_stored = as_stored.transpose(1, 0, 2)
    num_rows = max(1, STRIP // width)
    for top in range(0, height, num_rows):
        strip = image
        if num_rows < height:
            strip = image.crop((0, top, width, min(height, top + num_rows)))
        as_stored[top : top + num_rows] = _on_white(strip)
    return torch.from_numpy(upright).permute(2, 0, 1)


def _on_white(strip: Image.Image) -> numpy.ndarray:
    """uint8 (H, W, 3) of an image in any of Pillow's modes."""
    if strip.mode == "I;16":  # a grey 16-bit PNG; of other 16-bit PNGs Pillow keeps the high bytes
        deep = numpy.asarray(strip)
        grey = (deep >> 8).astype(numpy.uint8)
        grey[deep == strip.info.get("transparency", -1)] = 255
        return grey[:, :, None]
    if strip.has_transparency_data:
        strip = strip.convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        strip = Image.alpha_composite(white, strip)
    if strip.mode != "RGB":
        strip = strip.convert("RGB")
    return numpy.asarray(strip)


def _quiet() -> warnings.catch_warnings:
    """Without Pillow's warnings on size, which is bounded here, and on damaged metadata."""
    return warnings.catch_warnings(action="ignore")


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]

"""Pictures: bytes -> what the vision tower sees.

decode     JPEG, PNG or WebP bytes -> uint8 RGB (3, H, W)
fit        -> uint8 (3, S, S), S = image_size, the way the tower was trained (CLIP: crop, SigLIP: stretch)
normalise  uint8 (I, 3, S, S) -> float32, (x / 255 - mean) / std

The numbers are those of transformers' CLIPImageProcessor, with antialiasing on bytes. Pictures stay bytes until their
row is packed, so that a packing buffer holds a quarter of the memory.
"""

import io
import warnings

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import InterpolationMode, center_crop, resize

from avlm.model_config import VisionConfig

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_ASPECT = 20  # beyond it only the middle of the long side is resized: all that the crop keeps, and a margin


def decode(data: bytes, max_pixels: int) -> Tensor:
    """uint8 (3, H, W), upright by its EXIF orientation, alpha dropped. ValueError for what is no whole picture.

    The size is read from the header before anything is decoded: a small file can hold a huge picture.
    """
    width, height, file_format = _header(data)
    if file_format not in FORMATS:
        raise ValueError(f"picture is {file_format}, which is not read: convert it to {', '.join(FORMATS)}")
    if width * height > max_pixels:
        raise ValueError(f"picture of {width} x {height} pixels exceeds data.max_image_pixels={max_pixels}")
    try:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        image = decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
    except RuntimeError as error:
        raise ValueError(f"picture cannot be decoded: {str(error).splitlines()[0]}") from None
    if image.dtype == torch.uint16:  # 16-bit PNG
        image = (image.int() >> 8).to(torch.uint8)
    return image


def fit(image: Tensor, vision: VisionConfig) -> Tensor:
    """uint8 (3, H, W) of any size -> uint8 (3, S, S)."""
    size, mode = vision.image_size, InterpolationMode(vision.resample)
    if vision.resize == "stretch":
        return resize(image, [size, size], mode, antialias=True)
    height, width = image.shape[1:]
    if max(height, width) > MAX_ASPECT * min(height, width):
        image = _middle(image, MAX_ASPECT * min(height, width))
        height, width = image.shape[1:]
    # CLIP: the short side becomes S and the long side int(S * long / short), then the middle is kept.
    scaled = [int(size * height / width), size] if width <= height else [size, int(size * width / height)]
    image = resize(image, scaled, mode, antialias=True)
    top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    return image[:, top : top + size, left : left + size]


def normalise(pixels: Tensor, vision: VisionConfig) -> Tensor:
    """uint8 (I, 3, S, S) -> float32, zero mean and unit variance on the tower's training set."""
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (vision.mean, vision.std))
    return pixels.float().sub_(mean).div_(std)


def denormalise(pixels: Tensor, vision: VisionConfig) -> Tensor:
    """The inverse of ``normalise``, to look at."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (vision.mean, vision.std))
    return ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _header(data: bytes) -> tuple[int, int, str]:
    """(width, height, format) without decoding."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning: the bound is ours
            with Image.open(io.BytesIO(data)) as image:
                return *image.size, image.format or "unknown"
    except Image.DecompressionBombError as error:
        raise ValueError(f"picture is too large: {error}") from None
    except (UnidentifiedImageError, OSError, SyntaxError):
        raise ValueError(f"{len(data)} bytes are not a picture: give {', '.join(FORMATS)}") from None


def _middle(image: Tensor, length: int) -> Tensor:
    """The middle of the long side."""
    return center_crop(image, [min(length, image.shape[1]), min(length, image.shape[2])])

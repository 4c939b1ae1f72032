"""The bytes of a JPEG or PNG that decoding needs: its pixels, palette and orientation.

Pillow refuses some images for damage in metadata that says nothing of the pixels, and does not notice damage in the
pixels of a PNG. So metadata are left out, and PNG chunks are checked here.
"""

import re
import zlib
from collections.abc import Iterator

from PIL.PngImagePlugin import MAX_TEXT_CHUNK, MAX_TEXT_MEMORY

MAX_JPEG_SEGMENTS = 2**16
JPEG_METADATA = [bytes([marker]) for marker in (*range(0xE0, 0xF0), 0xFE)]  # APP0 to APP15 and comments
JPEG_ORIENTATION = (b"\xe0", b"\xe1", b"\xee")  # JFIF, EXIF or XMP, and Adobe's, which says how colours are stored
# Markers with a segment. Those without one, and 0xff00, occur within coded pixels.
JPEG_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
END_OF_IMAGE, START_OF_SCAN = 0xD9, 0xDA

MAX_PNG_CHUNKS = 2**20
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT")
PNG_CHUNKS = (*PNG_PIXELS, b"tRNS", b"IEND", b"eXIf")
PNG_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
PNG_TEXTS = (b"exif", b"Raw profile type exif", b"XML:com.adobe.xmp", b"xmp")  # where Pillow looks for orientation


def needed_of_jpeg(data: bytes) -> bytes:
    """The first image of a JPEG, without metadata that say nothing of its pixels and orientation: Pillow refuses some
    images for damage there, and takes a phone's file of several images for another format. ValueError for a file of too
    many segments."""
    kept = [data[:2]]
    position = 2
    for _ in range(MAX_JPEG_SEGMENTS):
        position = data.find(b"\xff", position)
        if position < 0:
            return b"".join(kept)
        marker = data[position + 1 : position + 2]
        if marker in (b"\xff", b"\0"):  # padding, or no marker
            position += 1
            continue
        if not _precedes_pixels(marker):
            # The pixels. What is appended after them, such as a phone's video, is left out.
            if marker:
                kept.append(data[position : scans_of_jpeg(data, position)[1]])
            return b"".join(kept)
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4])
        if marker in JPEG_ORIENTATION or marker not in JPEG_METADATA:
            kept.append(data[position:end])
        position = end
    raise ValueError(f"image cannot be decoded: it has more than {MAX_JPEG_SEGMENTS} JPEG segments")


def _precedes_pixels(marker: bytes) -> bool:
    """Whether a segment of metadata, tables or sizes begins."""
    return b"\xc0" <= marker < b"\xd0" or b"\xda" < marker <= b"\xfe"


def scans_of_jpeg(data: bytes, position: int) -> tuple[int, int]:
    """(number of scans from a position on, where the image ends)."""
    count = 0
    while True:
        found = JPEG_MARKER.search(data, position)
        if found is None:
            return count, len(data)
        marker = found[0][1]
        position = found.end()
        if marker == END_OF_IMAGE:
            return count, position
        if marker == START_OF_SCAN:
            count += 1
        position += int.from_bytes(data[position : position + 2])  # its segment; no marker is found in coded pixels


def needed_of_png(data: bytes) -> bytes:
    """The chunks of pixels, palette and orientation, the pixels last, so that the orientation is known before they are
    decoded. ValueError if the pixels are damaged or cut."""
    kept = [PNG_START]
    pixels = []
    num_characters = 0
    for kind, chunk in _png_chunks(data):
        is_text = kind in PNG_TEXT_CHUNKS and bytes(chunk[8:88]).split(b"\0")[0] in PNG_TEXTS
        if kind not in PNG_CHUNKS and not is_text:
            continue
        if not _is_intact(chunk):
            if kind in PNG_PIXELS:
                raise ValueError(f"image cannot be decoded: its PNG chunk {kind.decode()} is damaged or cut")
            continue
        if is_text:
            length = _text_length(kind, bytes(chunk[8:-4]))
            if num_characters + length > MAX_TEXT_MEMORY:  # Pillow would refuse the image
                continue
            num_characters += length
        (pixels if kind in (b"IDAT", b"IEND") else kept).append(chunk)
    return b"".join(kept + pixels)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """(kind, chunk) up to the end of the image."""
    view = memoryview(data)
    start = len(PNG_START)
    for _ in range(MAX_PNG_CHUNKS + 1):
        header = data[start : start + 8]
        if len(header) < 8:
            return
        kind = header[4:]
        end = start + 12 + int.from_bytes(header[:4])
        yield kind, view[start:end]
        if kind == b"IEND":
            return
        start = end
    raise ValueError(f"image cannot be decoded: it has more than {MAX_PNG_CHUNKS} PNG chunks")


def _is_intact(chunk: memoryview) -> bool:
    is_whole = len(chunk) == 12 + int.from_bytes(chunk[:4])
    return is_whole and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])


def _text_length(kind: bytes, body: bytes) -> int:
    """Characters of a text when it is unpacked. For one that Pillow would not unpack, more than all may have."""
    _, _, value = body.partition(b"\0")
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
        return 0  # Pillow leaves it out
    return MAX_TEXT_MEMORY + 1 if unpacking.unconsumed_tail else length

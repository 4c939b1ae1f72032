"""The kind of a file by its first bytes, for messages about files that are not read."""

STARTS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF (or a camera's raw file)"),
    (b"MM\0*", "TIFF (or a camera's raw file)"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"8BPS", "PSD"),
    (b"\0\0\1\0", "ICO"),
    (b"icns", "ICNS"),
    (b"qoif", "QOI"),
    (b"DDS ", "DDS"),
    (b"v/1\1", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"\x8aMNG", "MNG"),
    (b"SIMPLE  =", "FITS"),
    (b"FUJIFILM", "a camera's raw file"),
    (b"IIRO", "a camera's raw file"),
    (b"IIU\0", "a camera's raw file"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"\xd7\xcd\xc6\x9a", "WMF"),
    (b"AT&TFORM", "DjVu"),
    (b"OggS", "Ogg"),
    (b"fLaC", "FLAC"),
    (b"ID3", "MP3"),
    (b"FLV", "FLV"),
    (b"\x1aE\xdf\xa3", "Matroska or WebM"),
    (b"\0\0\1\xba", "MPEG"),
    (b"PK\3\4", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"Rar!", "a RAR archive"),
    (b"version https://git-lfs", "a Git LFS pointer, so its file was not downloaded"),
)
BRANDS = (  # of ISO media files: the four bytes after "ftyp", or among the compatible brands that follow
    ((b"avif", b"avis"), "AVIF"),
    ((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1", b"mif2"), "HEIC"),
    ((b"crx ",), "a camera's raw file"),
    ((b"jxl ",), "JPEG XL"),
    ((b"jp2 ", b"jpx "), "JPEG 2000"),
)
TEXTS = (("<svg", "SVG"), ("<!doctype html", "an HTML page"), ("<html", "an HTML page"), ("<?xml", "XML"))


def name(data: bytes) -> str | None:
    """Such as "HEIC" or "an HTML page"; None for a file of no known kind."""
    for start, found in STARTS:
        if data.startswith(start):
            return found
    if _is_tga(data):
        return "TGA"
    if data.startswith(b"\0\0\2\0") and data[4:6] != b"\0\0":
        return "ICO"  # a cursor; the bytes count its images
    if data[:1] == b"\n" and data[1:2] in b"\0\2\3\4\5" and data[2:3] in b"\0\1" and data[3:4] in b"\1\2\4\x08":
        return "PCX"
    if data[4:8] == b"ftyp":
        return _of_iso(data)
    if data.startswith(b"RIFF"):
        return {b"WEBP": "WebP", b"WAVE": "WAV", b"AVI ": "AVI"}.get(data[8:12], "RIFF")
    if data[:1] == b"P" and data[1:2] in b"1234567" and data[2:3].isspace():
        return "PNM"
    if data[128:132] == b"DICM":
        return "DICOM"
    if data and not data.strip(b"\0"):
        return "nothing but zeros"
    text = data[:1024].lstrip(b"\xef\xbb\xbf").decode("latin-1").lower().lstrip()
    if text.startswith("<"):
        return next((found for tag, found in TEXTS if tag in text), None)
    return None


def _of_iso(data: bytes) -> str:
    """Of an ISO media file, by its brands."""
    end = min(len(data), int.from_bytes(data[:4]), 256)
    brands = {data[8:12]}
    for start in range(16, end, 4):
        brands.add(data[start : start + 4])
    for names, found in BRANDS:
        if brands & set(names):
            return found
    return "MP4 or QuickTime"


def _is_tga(data: bytes) -> bool:
    """Such a file begins with no signature, but its header allows few values: whether there is a palette, the type of
    image, and bits per pixel."""
    if len(data) < 18 or data[12:14] == b"\0\0" or data[14:16] == b"\0\0":  # width and height
        return False
    if data[1] == 0:
        return data[2] in (2, 3, 10, 11) and not any(data[3:8]) and data[16] in (8, 15, 16, 24, 32)
    return data[1] == 1 and data[2] in (1, 9) and data[7] in (15, 16, 24, 32) and data[16] in (8, 16)


def ending(data: bytes) -> str:
    """The end of a file's name, such as ".png"; "" for formats whose name is no single word."""
    kind = (name(data) or "").partition(" or ")[0]
    if kind == "Matroska":
        return ".mkv"
    return f".{kind.lower()}" if kind.isalnum() else ""

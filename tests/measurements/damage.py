"""Small files and records of every kind, and damage to them, for fuzz.py."""

import copy
import io
import json
import random
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from PIL import Image

from tests.data import small_files as media
from tests.data.small_files import image_file, tone, video_file


def images() -> list[bytes]:
    pictures = [media.photo(64, 48), media.photo(40, 90, 1).convert("L"), media.photo(30, 30, 2).convert("P")]
    clear = Image.merge("RGBA", [*media.photo(32, 32, 3).split(), media.photo(32, 32, 4).convert("L")])
    exif = Image.Exif()
    exif[0x112] = 6
    files = [image_file(picture, kind) for picture in pictures for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF")]
    files += [image_file(picture.convert("RGB"), "JPEG", exif=exif) for picture in pictures]
    deep = Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16)
    files += [image_file(clear), image_file(clear, "WEBP"), image_file(deep)]
    files += [image_file(pictures[0], "JPEG", progressive=True)]
    return [*files, image_file(pictures[0].convert("CMYK"), "JPEG")]


def sounds() -> list[bytes]:
    forms = [("wav", "pcm_s16le"), ("flac", "flac"), ("mp3", "mp3"), ("ogg", "libopus"), ("matroska", "libopus")]
    forms += [("adts", "aac"), ("ac3", "ac3")]
    return [tone(0.3), tone(0.2, 44_100, 2), *(_sound(*form) for form in forms)]


def _sound(container: str, codec: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", container) as file:
        stream = file.add_stream(codec, rate=48_000, layout="mono")
        wave = (8000 * np.sin(np.arange(12_000) / 20)).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
        frame.sample_rate = 48_000
        for part in av.AudioResampler(stream.format, stream.layout, 48_000, stream.frame_size or 1024).resample(frame):
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def videos() -> list[bytes]:
    kinds = [("matroska", "mpeg4"), ("avi", "mpeg4"), ("nut", "mpeg4")]
    kinds += [("mpegts", "mpeg2video"), ("mpeg", "mpeg2video")]
    files = [video_file(1.5, rate=25, container=container, codec=codec) for container, codec in kinds]
    return [*files, video_file(1.0, sound=True)]


def records() -> list[dict]:
    turns = [{"role": "user", "content": "<image>\nwhat is it?"}, {"role": "assistant", "content": "one two"}]
    llava = [{"from": "human", "value": "<audio> who?"}, {"from": "gpt", "value": "three"}]
    parts = [{"type": "text", "text": "hello"}, {"type": "image_url", "image_url": {"url": "a.png"}}]
    return [
        {"messages": turns, "images": ["a.png"]},
        {"id": 7, "conversations": llava, "audio": "a.wav", "system": "Be brief."},
        {"context": ["<video> what?"], "answers": ["four"], "videos": ["a.mkv"]},
        {"messages": [{"role": "user", "content": parts}, {**turns[1], "weight": 0}, *turns], "images": ["a.png"] * 2},
    ]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Some bytes of a file changed, lost, repeated or made numbers at the edge of their range."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        if not data:
            break
        at = rng.randrange(min(len(data), rng.choice([64, 512, len(data)])))
        kind = rng.randrange(7)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + rng.choice([1, 2, 4])] = rng.randbytes(rng.choice([1, 2, 4]))
        elif kind == 2:
            edge = rng.choice([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1])
            number = edge.to_bytes(8, rng.choice(["little", "big"]))
            data[at : at + 8] = number
        elif kind == 3:
            end = len(data) if rng.random() < 0.3 else at + rng.randrange(1, 200)
            del data[at:end]
        elif kind == 4:
            data[at:at] = data[at : at + rng.randrange(1, 300)] * rng.choice([1, 3])
        elif kind == 5:
            data[at:at] = bytes(rng.randrange(1, 2000))
        else:
            data[at:at] = rng.randbytes(rng.randrange(1, 50))
    return bytes(data)


JUNK: list[Any] = [None, True, False, 0, -1, 1, 10**30, 2**63, -0.5, 1e400, [], {}, [[]], ["x"], [None], {"x": 1}, [{}]]
JUNK += ["", "x", "\0", "\ud800", "\ufdd0", "<image>", "x" * 5000, "../a.png", "2024-01-01", "1e-3"]
JUNK += [{"": {}}, {"type": "text"}, ["a.png"] * 3]


def mutated(tree: Any, rng: random.Random) -> Any:
    """A tree of JSON with junk in some of its places, keys lost, renamed or nested once more."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        holders = list(_holders(tree))
        if not holders:
            return copy.deepcopy(rng.choice(JUNK))
        holder, key = rng.choice(holders)
        kind = rng.randrange(6)
        if kind < 3:
            holder[key] = copy.deepcopy(rng.choice(JUNK))
        elif kind == 3:
            holder[key] = [holder[key]] if rng.random() < 0.5 else {"x": holder[key]}
        elif kind == 4 and isinstance(holder, dict):
            holder[rng.choice(["x", "tools", "weight", key + "s", "type", "__module__"])] = holder.pop(key)
        else:
            del holder[key]
    return tree


def _holders(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield tree, key
        yield from _holders(value)

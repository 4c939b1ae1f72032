"""The committed raw material of the demo: photos, handwritten digits, spoken digits.  NOTICE says whose work it is."""

import dataclasses
import functools
import io
import tarfile
from pathlib import Path

import av
import numpy as np

FOLDER = Path(__file__).parent
SAMPLE_RATE = 16_000  # of every voice, in Hz

# How a voice came to be.  "human": a named person.  "undocumented": its package does not say whether a person spoke.
VOICE_GROUPS = {
    "human": ("allison",),
    "undocumented": ("spokennumbers", "captcha"),
    "synthetic": (
        *("flite_kal16", "flite_awb", "flite_rms", "flite_slt"),
        *("espeak_us", "espeak_gb", "espeak_scotland", "espeak_caribbean"),
        *("espeak_us_f2", "espeak_rp_f4", "espeak_us_m3", "espeak_midlands_m7"),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bank:
    """Everything is grouped by what it shows or says, and then by instance."""

    photos: dict[str, np.ndarray]  # "train": uint8 (10 classes, 300, 28, 28); "test": uint8 (10, 100, 28, 28)
    numerals: dict[str, list[np.ndarray]]  # "train", "test": ten arrays, uint8 (instances, 8, 8), values 0..16
    voices: dict[str, list[np.ndarray]]  # voice name -> ten int16 waveforms at SAMPLE_RATE, "zero" to "nine"


@functools.cache
def load() -> Bank:
    """Reads the bank (4 MB) once per process.  Treat the arrays as read-only."""
    with np.load(FOLDER / "photos.npz") as stored:
        photos = {split: by_class(stored[f"{split}_images"], stored[f"{split}_labels"]) for split in ("train", "test")}
    with np.load(FOLDER / "digits.npz") as stored:
        numerals = {
            split: by_class(stored[f"{split}_images"], stored[f"{split}_labels"]) for split in ("train", "test")
        }
    voices = {}
    for name in ("speech.tar", "speech_human.tar"):
        with tarfile.open(FOLDER / name) as tar:
            for member in tar:
                voice, digit = member.name.removesuffix(".flac").split("/")
                voices.setdefault(voice, [None] * 10)[int(digit)] = decode_flac(tar.extractfile(member).read())
    return Bank(
        photos={split: np.stack(images) for split, images in photos.items()},
        numerals=numerals,
        voices={voice: voices[voice] for group in VOICE_GROUPS.values() for voice in group},
    )


def by_class(images: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    return [images[labels == label] for label in range(10)]


def decode_flac(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])

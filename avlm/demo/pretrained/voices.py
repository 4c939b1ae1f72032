"""Synthetic speech to train on next to the prompts: four voices of Flite read sentences of the fortune files.

Flite (Black and Lenzo 2001) is called in its shared libraries, which come out of their packages into ``folder``.
"""

import ctypes
import re
from pathlib import Path

import numpy as np

from avlm.demo.pretrained.packages import read_deb

VOICES = ("kal16", "awb", "rms", "slt")  # all at 16 kHz
PACKAGES = ("libflite1", "libasound2", "fortunes")
FORTUNES = "./usr/share/games/fortunes/"
LEFT_OUT = ("drugs", "ethnic", "men-women", "zippy")  # of the fortune files
MAX_WORDS, SENTENCES = 12, 4000
QUIET, LEAD, TAIL = 200, 800, 1600  # samples below which it is silence; kept of it before and after


class Wave(ctypes.Structure):  # cst_wave
    _fields_ = [("type", ctypes.c_char_p), ("sample_rate", ctypes.c_int), ("num_samples", ctypes.c_int)]
    _fields_ += [("num_channels", ctypes.c_int), ("samples", ctypes.POINTER(ctypes.c_short))]


class Voice(ctypes.Structure):  # the beginning of cst_voice
    _fields_ = [("name", ctypes.c_char_p), ("features", ctypes.c_void_p)]


class Flite:
    """OSError where the libraries cannot be loaded: on another processor or system."""

    def __init__(self, folder: Path, packages: dict[str, Path]):
        for package in ("libasound2", "libflite1"):
            with read_deb(packages[package]) as files:
                files.extractall(folder, filter="data")
        [libraries] = {path.parent for path in folder.rglob("libflite.so.1")}
        # In the order in which they need each other: a library that is there is not searched for again.
        load = lambda name: ctypes.CDLL(str(libraries / name), mode=ctypes.RTLD_GLOBAL)
        load("libasound.so.2")
        self.flite = load("libflite.so.1")
        load("libflite_usenglish.so.1")
        load("libflite_cmulex.so.1")
        self.flite.flite_text_to_wave.restype = ctypes.POINTER(Wave)
        self.flite.flite_text_to_wave.argtypes = [ctypes.c_char_p, ctypes.POINTER(Voice)]
        self.flite.flite_feat_set_float.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float]
        self.flite.delete_wave.argtypes = [ctypes.POINTER(Wave)]
        self.flite.flite_init()
        self.voices = {}
        for name in VOICES:
            register = getattr(load(f"libflite_cmu_us_{name}.so.1"), f"register_cmu_us_{name}")
            register.restype, register.argtypes = ctypes.POINTER(Voice), [ctypes.c_char_p]
            self.voices[name] = register(None)

    def say(self, text: str, voice: str, stretch: float) -> np.ndarray:
        """int16 (samples,) at 16 kHz. ``stretch``: of the durations, 1 is the voice's own pace."""
        self.flite.flite_feat_set_float(self.voices[voice].contents.features, b"duration_stretch", stretch)
        wave = self.flite.flite_text_to_wave(text.encode(), self.voices[voice])
        samples = np.ctypeslib.as_array(wave.contents.samples, (wave.contents.num_samples,)).copy()
        self.flite.delete_wave(wave)
        loud = np.flatnonzero(np.abs(samples.astype(np.int32)) > QUIET)
        return samples[max(0, loud[0] - LEAD) : loud[-1] + TAIL] if len(loud) else samples


def read_aloud(folder: Path, packages: dict[str, Path]) -> list[tuple[str, np.ndarray, str]]:
    """(name, int16 samples at 16 kHz, what it says) of every sentence, each by one voice at a pace drawn at random.
    None at all without the packages, or where Flite cannot run: then the prompts are all there is to learn from."""
    if missing := [name for name in PACKAGES if name not in packages]:
        print(f"skipped: synthetic speech, without {', '.join(missing)}", flush=True)
        return []
    try:
        flite = Flite(folder, packages)
    except (OSError, ValueError) as error:
        print(f"skipped: synthetic speech, Flite cannot run here: {error}", flush=True)
        return []
    rng, clips = np.random.default_rng(1), []
    texts = rng.permutation(sentences(packages["fortunes"]))[:SENTENCES].tolist()
    print(f"Flite reads {len(texts)} sentences aloud, which takes some minutes", flush=True)
    for i, text in enumerate(texts):
        voice, stretch = VOICES[rng.integers(len(VOICES))], rng.uniform(0.85, 1.2)
        clips.append((f"synthetic/{i}", flite.say(text, voice, stretch), text))
    return clips


def sentences(fortunes: Path) -> list[str]:
    """Sentences of 2 to MAX_WORDS plain words, none twice."""
    found: dict[str, None] = {}
    with read_deb(fortunes) as files:
        for member in sorted(files, key=lambda member: member.name):
            name = member.name.removeprefix(FORTUNES)
            if member.isfile() and member.name.startswith(FORTUNES) and "." not in name and name not in LEFT_OUT:
                for saying in files.extractfile(member).read().decode(errors="ignore").split("\n%\n"):
                    saying = re.sub(r"(?ms)^\s*--.*", "", saying)  # whose it is
                    for sentence in re.split(r"(?<=[.?!])\s+", " ".join(saying.split())):
                        sentence = sentence.strip(" \"'")
                        plain = re.fullmatch(r"[A-Z][a-z']*(?:,? [A-Za-z'][a-z']*)*[.?!]", sentence)
                        if plain and 2 <= len(sentence.split()) <= MAX_WORDS:
                            found[sentence] = None
    return list(found)

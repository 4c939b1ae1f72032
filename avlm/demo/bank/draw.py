"""One sample in the making: photos, numerals and words of the bank, varied in how they look and sound.

F frames   H, W pixels
"""

import dataclasses

import numpy as np
from PIL import Image

from avlm.demo.bank.bank import SAMPLE_RATE, VOICE_GROUPS, Bank

CANVAS = 28  # pixels, each side, of every image and frame
NUM_FRAMES = 8
FRAME_RATE = 8  # frames per second of every video
# Neighbours share an axis and differ by the order of the frames alone.
MOTIONS = ("left", "right", "up", "down", "nearer", "away")
UNHEARD_VOICE = "flite_rms"  # speaks in no training sample


@dataclasses.dataclass(frozen=True)
class Video:
    frames_FHW: np.ndarray  # uint8
    sound: np.ndarray | None  # int16 at SAMPLE_RATE


@dataclasses.dataclass
class Draw:
    """`turn` says which case it is, `rng` how it looks and sounds; `sources` notes where the material came from."""

    bank: Bank
    split: str
    turn: int
    rng: np.random.Generator
    sources: list[str] = dataclasses.field(default_factory=list)
    mute: bool = False  # make no audio: only the words are needed

    @property
    def training(self) -> bool:
        return self.split == "train"

    def pick(self, choices):
        """Takes one of the choices and leaves the rest of the turn to the next pick."""
        self.turn, number = divmod(self.turn, len(choices))
        return choices[number]

    def any_of(self, *ways: str) -> str:
        return ways[self.rng.integers(len(ways))]

    def photo(self, thing: int, number: int | None = None) -> np.ndarray:
        pool = "train" if self.training else "test"
        count = len(self.bank.photos[pool][thing])
        number = self.rng.integers(count) if number is None else number % count
        self.sources.append(f"photo/{pool}/{thing}/{number}")
        pixels_HW = self.bank.photos[pool][thing, number]
        return pixels_HW[:, ::-1] if self.training and self.rng.random() < 0.5 else pixels_HW

    def numeral(self, digit: int, number: int | None = None) -> np.ndarray:
        pool = "train" if self.training else "test"
        count = len(self.bank.numerals[pool][digit])
        number = self.rng.integers(count) if number is None else number % count
        self.sources.append(f"numeral/{pool}/{digit}/{number}")
        pixels_HW = (self.bank.numerals[pool][digit][number] * 15.9).astype(np.uint8)
        return place(pixels_HW, 24, *self.shift())

    def shift(self) -> tuple[int, int]:
        return tuple(self.rng.integers(-2, 3, 2)) if self.training else (0, 0)

    def framed(self, photo_HW: np.ndarray) -> np.ndarray:
        """The photo as an image; in training every other one is as small and as far off the middle as in a video."""
        if self.training and self.rng.random() < 0.5:
            return place(photo_HW, self.rng.integers(16, 27), *self.rng.integers(-5, 6, 2))
        return place(photo_HW, CANVAS, *self.shift())

    def voice(self) -> str:
        """Training hears people, undocumented voices and engines 1 : 1 : 2, though engines are twelve of fifteen."""
        group = self.split.removeprefix("test_")
        if group == "unheard":
            return UNHEARD_VOICE
        if group not in VOICE_GROUPS:
            group = self.any_of("human", "undocumented", "synthetic", "synthetic")
        return self.any_of(*(voice for voice in VOICE_GROUPS[group] if voice != UNHEARD_VOICE))

    def speech(self, digits: tuple[int, ...], voice: str) -> np.ndarray:
        """Words at one speed between 0.85 and 1.15, gaps of 20 to 100 ms, noise 15 to 35 dB below the words."""
        if self.mute:
            return np.zeros(0, np.int16)
        speed = self.rng.uniform(0.85, 1.15)
        gaps = self.rng.integers(SAMPLE_RATE // 50, SAMPLE_RATE // 10, len(digits) + 1)
        pieces = [np.zeros(gaps[0])]
        for digit, gap in zip(digits, gaps[1:], strict=True):
            word = self.bank.voices[voice][digit].astype(np.float64)
            pieces += [np.interp(np.arange(0, len(word) - 1, speed), np.arange(len(word)), word), np.zeros(gap)]
            self.sources.append(f"voice/{voice}/{digit}")
        wave = np.concatenate(pieces)
        noise = 32768 * 10 ** (-(23 + self.rng.uniform(15, 35)) / 20)  # words stand at -23 dBFS
        wave += noise * self.rng.standard_normal(len(wave))
        return np.clip(np.round(wave * self.rng.uniform(0.6, 1.2)), -32768, 32767).astype(np.int16)


def move(photo_HW: np.ndarray, motion: int, rng: np.random.Generator) -> np.ndarray:
    """Eight frames in which the photo goes 8 to 10 pixels across the canvas, or grows or shrinks between 16 and 28."""
    travel = np.linspace(-0.5, 0.5, NUM_FRAMES) * rng.uniform(8, 10)
    travel = travel if MOTIONS[motion] in ("right", "down", "nearer") else -travel
    down, right = rng.uniform(-1.5, 1.5, 2)
    size = rng.uniform(22, 24)
    frames = []
    for step in travel:
        match motion // 2:
            case 0:
                frames.append(place(photo_HW, round(size), round(down), round(right + step)))
            case 1:
                frames.append(place(photo_HW, round(size), round(down + step), round(right)))
            case 2:
                frames.append(place(photo_HW, round(size - 1 + 1.2 * step), round(down), round(right)))
    return np.stack(frames)


def place(pixels_HW: np.ndarray, size: int, down: int, right: int) -> np.ndarray:
    """Scales to `size` x `size` and lays it on the black canvas, off its middle by (down, right) pixels."""
    if pixels_HW.shape[0] != size:
        pixels_HW = np.asarray(Image.fromarray(pixels_HW).resize((size, size), Image.Resampling.BILINEAR))
    margin = CANVAS
    board = np.zeros((CANVAS + 2 * margin,) * 2, np.uint8)
    top, left = (margin + (CANVAS - size) // 2 + offset for offset in (down, right))
    board[top : top + size, left : left + size] = pixels_HW
    return board[margin:-margin, margin:-margin]

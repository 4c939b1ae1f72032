"""Two speakers who take turns, and a duplex model that learns to be one of them, on CPUs in minutes:

    python -m tests.measurements.duplex_toy [--folder data/duplex_toy] [--steps 600]

The user's words are tones of different pitch and length, at random times and in noise; the agent answers each with a
word of its own, a fixed time after its end. How long a tone lasts is not known before it ends, and so neither is when
to answer. Conversations are made on the spot, ``train.py`` trains on them from nothing, and the model then walks
through others, of which it hears windows of 400 ms. Prints which answers were right, how late they were and how often
it talked when it should not, and draws one conversation.
"""

import argparse
import json
import random
import subprocess
import sys
import wave
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import yaml
from matplotlib.figure import Figure

from avlm.config.duplex import ROW_SECONDS
from avlm.data.duplex import RowText, Word
from avlm.data.media.audio import SAMPLE_RATE, decode
from avlm.evaluation.answering import load
from avlm.evaluation.listening import walk, windows_of
from avlm.process.exit import run_command
from tests.data.small_files import CONTROL, write_tokenizer

TONES = (250.0, 380.0, 570.0, 850.0, 1300.0, 1900.0, 2900.0, 4300.0)  # Hz
NAMES = "lamp river stone cloud apple tiger window paper"
ANSWERS = NAMES.split()  # to each tone
PAUSE = 0.24  # seconds from the end of the user's word to the answer
SECONDS = 20.0
PADS = {"pad_token": "<|listens|>", "begin_token": "<|speaks|>", "end_token": "<|spoke|>"}
MODEL = {
    "decoder": {
        **{"vocab_size": 400, "hidden_size": 128, "intermediate_size": 384, "num_layers": 3, "num_heads": 4},
        **{"num_kv_heads": 2, "max_position": 512},
    },
    "audio": {
        **{"hidden_size": 96, "intermediate_size": 288, "num_layers": 2, "num_heads": 3, "num_mels": 40},
        "max_positions": 20,  # 400 ms
    },
    "audio_projector": {"downsample": 4, "add": True},
}


@dataclass
class Conversation:
    file: Path
    heard: list[Word]  # the user's words, by the answer that they ask for
    words: list[Word]  # the agent's


def converse(file: Path, rng: random.Random) -> Conversation:
    """Write a conversation as a WAV file of the user's side."""
    noise = numpy.random.default_rng(rng.getrandbits(32))
    sound = noise.normal(0, 0.01, int(SECONDS * SAMPLE_RATE))
    heard, words = [], []
    time = rng.uniform(0.2, 2.0)
    while time < SECONDS - 2.5:
        number = rng.randrange(len(TONES))
        start = time
        seconds = rng.uniform(0.2, 0.8)
        first, count = int(time * SAMPLE_RATE), int(seconds * SAMPLE_RATE)
        t = numpy.arange(count) / SAMPLE_RATE
        fade = numpy.minimum(1, numpy.minimum(t, t[::-1]) / 0.02)
        pitch = TONES[number] * rng.uniform(0.95, 1.05)
        sound[first : first + count] += rng.uniform(0.1, 0.3) * fade * numpy.sin(2 * numpy.pi * pitch * t)
        time += seconds
        answer = ANSWERS[number]
        heard.append(Word(start, time, answer))
        words.append(Word(round(time + PAUSE, 3), round(time + PAUSE + 0.4, 3), answer))
        time += PAUSE + 0.6 + rng.uniform(0.2, 1.5)
    with wave.open(str(file), "wb") as out:
        out.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        out.writeframes((sound.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return Conversation(file, heard, words)


def build(folder: Path, steps: int, train: int, test: int, rows_per_step: int) -> tuple[Path, list[Conversation]]:
    """The config of a run, and conversations that it does not see."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    made = [converse(folder / f"{number}.wav", rng) for number in range(train + test)]
    records = [{"audio": each.file.name, "words": [list(word) for word in each.words]} for each in made]
    for name, part in {"train": records[:train], "test": records[train:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
    tokenizer = write_tokenizer(folder / "tokenizer", [*CONTROL, *PADS.values()], [NAMES])
    tree = {
        "output_dir": str(folder / "run"),
        "model": MODEL,
        "data": {
            **{"train": str(folder / "train.jsonl"), "validation": {"test": str(folder / "test.jsonl")}},
            **{"tokenizer": str(tokenizer), "template": "chatml", "seq_length": 500, "num_workers": 0},
            "duplex": {**PADS, "weights": {"pad": 0.2}},
        },
        "optimizer": {"lr": 1.5e-3, "min_lr": 1e-4, "warmup_steps": 50, "betas": [0.9, 0.98], "eps": 1e-8},
        "stages": [{"name": "duplex", "steps": steps, "train": ["decoder", "audio", "audio_projector"]}],
        "train": {"rows_per_step": rows_per_step, "log_every": 25, "validate_every": steps, "precision": "fp32"},
        "checkpoint": {"every": steps, "keep": 1},
        "device": "cpu",
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path, made[train:]


@dataclass
class Score:
    right: int = 0
    wrong: int = 0  # another word than the right one
    missed: int = 0
    early: int = 0  # answers that began before the user's word ended
    delays: Counter[int] | None = None  # of right answers, in rows after the row that was asked for
    false_rows: int = 0  # with a word in a row in which none was to be said, further than TOLERANCE from any that was
    silent_rows: int = 0


TOLERANCE = 5  # rows


def add_score(score: Score, conversation: Conversation, tokens: list[int], row_text: RowText) -> list[Word]:
    """Compare what was said with what was to be said. Returns what was said."""
    assert score.delays is not None
    spoken = row_text.words(tokens)
    target = row_text.rows(conversation.words, len(tokens)).tolist()
    starts = [row for row, token in enumerate(target) if token == row_text.begin]
    begun = [row for row, token in enumerate(tokens) if token == row_text.begin]
    for start, heard, word in zip(starts, conversation.heard, conversation.words):
        near = [row for row in begun if abs(row - start) <= TOLERANCE]
        if not near:
            score.missed += 1
            continue
        row = min(near, key=lambda row: abs(row - start))
        first = (row + 1) * ROW_SECONDS - 1e-6
        text = next((each.text for each in spoken if each.start >= first), "")
        score.right += text == word.text
        score.wrong += text != word.text
        score.early += row * ROW_SECONDS < heard.end
        if text == word.text:
            score.delays[row - start] += 1
    near_words = {row + shift for row, t in enumerate(target) if t != row_text.pad for shift in range(-5, 6)}
    silent = [row for row in range(len(tokens)) if row not in near_words]
    score.silent_rows += len(silent)
    score.false_rows += sum(tokens[row] != row_text.pad for row in silent)
    return spoken


def draw(conversation: Conversation, spoken: list[Word], path: Path) -> None:
    waveform = decode(conversation.file.read_bytes(), 600.0)
    figure = Figure(figsize=(14, 4), layout="constrained")
    axes = figure.subplots()
    times = torch.arange(len(waveform)) / SAMPLE_RATE
    axes.plot(times[::20], waveform[::20] / waveform.abs().max() * 0.8, color="#888888", linewidth=0.4)
    lines = {"to be said": (conversation.words, -1.5, "#3b8fd1"), "said": (spoken, -2.5, "#2e9e4f")}
    for words, height, colour in lines.values():
        for word in words:
            axes.broken_barh([(word.start, max(word.end - word.start, ROW_SECONDS))], (height - 0.3, 0.6), color=colour)
            axes.text(word.start, height + 0.36, word.text, fontsize=8)
    for word in conversation.heard:
        axes.axvline(word.end, color="#cc4444", linewidth=0.6, linestyle=":")
    axes.set_yticks([0, -1.5, -2.5], ["the user (dotted: a word ends)", *lines])
    axes.set_xlim(0, len(waveform) / SAMPLE_RATE)
    axes.set_ylim(-3, 1)
    axes.set_xlabel("seconds")
    figure.savefig(path, dpi=110)


def measure(run: Path, conversations: list[Conversation], picture: Path) -> Score:
    model = load(run, device="cpu")
    row_text = model.encoder.row_text
    assert row_text is not None
    score = Score(delays=Counter())
    for number, conversation in enumerate(conversations):
        waveform = decode(conversation.file.read_bytes(), 600.0)
        tokens = [token for token, _ in walk(model.network, windows_of(waveform, model.network), row_text.pad)]
        spoken = add_score(score, conversation, tokens, row_text)
        if number == 0:
            draw(conversation, spoken, picture)
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("data/duplex_toy"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--train", type=int, default=400, help="conversations of 20 s")
    parser.add_argument("--test", type=int, default=20)
    parser.add_argument("--rows-per-step", type=int, default=4, help="of 40 s each")
    options = parser.parse_args()
    path, conversations = build(options.folder, options.steps, options.train, options.test, options.rows_per_step)
    code = subprocess.run([sys.executable, "train.py", str(path)]).returncode
    if code:
        sys.exit(code)  # train.py has said why
    score = measure(options.folder / "run", conversations, options.folder / "conversation.png")
    asked = score.right + score.wrong + score.missed
    print(f"{asked} words of the user in {len(conversations)} conversations that training has not seen")
    print(f"right answers {score.right / asked:.1%}, wrong {score.wrong / asked:.1%}, none {score.missed / asked:.1%}")
    print(f"answers that began before the user had ended: {score.early}")
    delays = ", ".join(f"{delay:+d}: {count}" for delay, count in sorted((score.delays or Counter()).items()))
    print(f"rows of 80 ms by which right answers were late: {delays}")
    print(f"talked in {score.false_rows} of {score.silent_rows} rows in which nothing was to be said")
    print(f"one conversation: {options.folder / 'conversation.png'}")


if __name__ == "__main__":
    run_command(main)

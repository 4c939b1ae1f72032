"""Damaged files of every kind: each ends in a value or in one clear line, within 10 seconds and 1 GiB.

    python -m tests.measurements.fuzz [--only media records configs folders] [--count N] [--seed S]

By default 3,000 media, 1,000 records, 1,000 configs and 500 model, tokenizer and run folders, all made from seeds that
this file makes itself. Prints how each kind ended, and every fault with the number of its input; exit code 1 if there
is one. Inputs run in forks, so that one that hangs or takes the process with it is a fault like any other.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before anything imports huggingface_hub: what the shipped configs name on the Hub is in the form of its cache here.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(Path(__file__).parents[1] / "config" / "hub")}

import av
import torch
import yaml
from safetensors.torch import save_file

from avlm.config.load import resolve_config
from avlm.config.media import ImageLayout, VideoConfig
from avlm.data.media import audio, image, video
from avlm.data.sample import SampleEncoder, load_json, parse
from avlm.data.text.chat import Chat
from avlm.data.text.tokenizer import Tokenizer
from avlm.models.avlm import AVLM
from avlm.storage.run_folder import read_progress, read_run
from avlm.storage.weight_files import choose
from avlm.training import checkpoint
from avlm.weights import folder as folders
from avlm.weights.model_from import open_config
from avlm.weights.sources import open_checkpoint, read_files
from tests.data import small_files as media
from tests.data.small_files import AUDIO, VISION, tone, video_file, write_tokenizer
from tests.measurements.damage import JUNK, damaged, images, mutated, records, sounds, videos
from tests.parallel.small import TREE

ROOT = Path(__file__).parents[2]
COUNTS = {"media": 3000, "records": 1000, "configs": 1000, "folders": 500}
SECONDS, MIB = 10, 1024  # of one input; memory above the start
LINE = 600  # characters of a message

Case = Callable[[], Any]


# 1. Cases of each kind: a generator of closures, the same for the same seed.


def media_cases(folder: Path, rng: random.Random) -> Iterator[Case]:
    vision, tower = VISION, AUDIO
    read = {
        "image": lambda data: image.fit(image.decode(data, 10**8), vision),
        "audio": lambda data: audio.mels(audio.decode(data, 600.0), tower),
        "video": lambda data: [frame for frame, _ in video.decode(data, VideoConfig(), 10**8)],
        "video by time": lambda data: list(video.decode(data, VideoConfig(num_frames=None, fps=2.0), 10**8)),
        "sound of a video": lambda data: video.has_audio(data),
    }
    seeds = {"image": images(), "audio": sounds(), "video": videos()}
    seeds |= {"video by time": seeds["video"], "sound of a video": seeds["video"]}
    kinds = list(read)
    while True:
        kind = rng.choice([*kinds, "image", "audio", "video"])
        data = damaged(rng.choice(seeds[rng.choice(kinds) if rng.random() < 0.03 else kind]), rng)
        yield lambda kind=kind, data=data: check_finite(read[kind](data))


def check_finite(value: Any) -> Any:
    for tensor in value if isinstance(value, list) else [value]:
        assert not isinstance(tensor, torch.Tensor) or tensor.isfinite().all(), "a value that is not finite"
    return value


def record_cases(folder: Path, rng: random.Random) -> Iterator[Case]:
    files = {"a.png": images()[0], "a.wav": tone(0.3), "a.mkv": video_file(0.5)}
    seeds = records()
    tokenizer = Tokenizer(write_tokenizer(folder / "tokenizer"))
    joined = {"tiles": "pinpoints", "grids": [[1, 2], [2, 1], [2, 2]]}
    layouts = [ImageLayout(), ImageLayout(**joined), ImageLayout(tiles="aspect", only_alone=True)]
    layouts.append(ImageLayout(tiles="long_edge", longest_edge=64, line_end="\n"))
    of_data = [media.data(folder / "tokenizer", seq_length=2048, image_layout=layout) for layout in layouts]
    encoders = [SampleEncoder(media.model(), data, tokenizer) for data in of_data]

    def open_file(name: str) -> bytes:
        if name not in files:
            raise ValueError(f"no media file {name!r:.100}")
        return files[name]

    while True:
        text = json.dumps(mutated(rng.choice(seeds), rng)).encode()
        text = damaged(text, rng) if rng.random() < 0.3 else text
        encoder = rng.choice(encoders)
        yield lambda text=text, encoder=encoder: encoder.encode(parse(load_json(text), open_file, "record"))


def config_cases(folder: Path, rng: random.Random) -> Iterator[Case]:
    texts = [path.read_text() for path in sorted((ROOT / "configs").rglob("*.yaml"))]
    trees = [yaml.safe_load(text) for text in texts] + [TREE]
    keys = ["optimizer.lr", "stages.finetune", "stages.0.steps", "data.video", "model.lora", "x.y", "seed", "train"]
    for number in range(10**9):
        path = folder / f"config_{number % 64}.yaml"
        if rng.random() < 0.3:
            content = damaged(rng.choice(texts).encode(), rng)
        else:
            content = yaml.safe_dump(mutated(rng.choice(trees), rng)).encode()
        overrides = [f"{rng.choice(keys)}={json.dumps(rng.choice(JUNK))}"] if rng.random() < 0.3 else []
        yield functools.partial(_load_config, path, content, overrides)


def _load_config(path: Path, content: bytes, overrides: list[str]) -> Any:
    path.write_bytes(content)
    return open_config(path, overrides)


def folder_cases(folder: Path, rng: random.Random) -> Iterator[Case]:
    makers = [_model_folder(folder / "model"), _tokenizer_folder(folder / "tokenizer"), _run_folder(folder / "run")]
    for number in range(10**9):
        seed, use = rng.choice(makers)
        file = rng.choice(sorted(path for path in seed.rglob("*") if path.is_file() and path.suffix != ".lock"))
        content = file.read_bytes()
        if file.suffix == ".json" and rng.random() < 0.7:
            content = json.dumps(mutated(json.loads(content), rng)).encode()
        else:
            content = damaged(content, rng)
        yield functools.partial(_with_changed, seed, file.relative_to(seed), content, use, folder / f"case_{number}")


def _with_changed(seed: Path, place: Path, content: bytes, use: Callable[[Path], Any], folder: Path) -> Any:
    shutil.copytree(seed, folder)
    try:
        (folder / place).write_bytes(content)
        return use(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _model_folder(folder: Path) -> tuple[Path, Callable[[Path], Any]]:
    folder.mkdir()
    decoder = {"model_type": "llama", "vocab_size": 400, "hidden_size": 8, "intermediate_size": 8}
    decoder |= {"num_hidden_layers": 1, "num_attention_heads": 1, "rope_scaling": None}
    decoder |= {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    vision = {"model_type": "clip_vision_model", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
    vision |= {"image_size": 28, "patch_size": 7}
    keys = {"model_type": "llava", "text_config": decoder, "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(keys))
    pixels = {"size": {"shortest_edge": 28}, "crop_size": 28, "do_center_crop": True}
    pixels |= {"image_mean": [0.5] * 3, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    save_file({"language_model.lm_head.weight": torch.zeros(4, 8)}, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"language_model.lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(folder)

    def use(folder: Path) -> Any:
        folders.read_config(folder)
        folders.template_of(folder, Tokenizer(folder))
        return folders.stop_ids(folder), read_files(folder, choose(folder))

    return folder, use


def _tokenizer_folder(folder: Path) -> tuple[Path, Callable[[Path], Any]]:
    write_tokenizer(folder)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "pad_token": {"content": "</s>"}}))
    messages = [{"role": "user", "content": "hello <image> two"}, {"role": "assistant", "content": "three"}]

    def use(folder: Path) -> Any:
        tokenizer = Tokenizer(folder)
        for template in ("plain", "tokenizer", "chatml"):
            chat = Chat(tokenizer, template)
            ids = [token for _, ids in chat.encode(chat.pieces(messages)) for token in ids]
            tokenizer.decode(ids)
            assert all(isinstance(token, int) for token in (*ids, *chat.stop_ids))
        return tokenizer.size

    return folder, use


def _run_folder(folder: Path) -> tuple[Path, Callable[[Path], Any]]:
    """A run of one step, whose damage may be refused, but not change what is loaded."""
    import train

    tree = {**TREE, "output_dir": str(folder), "device": "cpu", "train": {"validate_every": 0, "precision": "fp32"}}
    tree["stages"] = [{"name": "all", "steps": 1, "train": ["decoder"]}]
    tree["data"] = {"train": "synthetic:documents=1,images=0,clips=0", "seq_length": 64}
    if os.fork() == 0:  # with a process group that ends with it
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(resolve_config(tree, "fuzz"))
        os._exit(0)
    os.wait()
    config, path = read_run(folder)
    state = lambda config, path: {name: stored[:] for name, stored in open_checkpoint(path).items()}
    expected, progress = state(config, path), read_progress(path)

    def use(folder: Path) -> Any:
        config, path = read_run(folder)
        assert read_progress(path) == progress, "the run stands elsewhere"
        model = AVLM(config.model)
        checkpoint.load_model(path, model)
        for name, tensor in state(config, path).items():
            assert tensor.equal(expected[name]), f"{name} is another"
        return len(expected)

    return folder, use


# 2. Running them.


def outcome(case: Case) -> str:
    """ "value", "line", or what is wrong."""
    try:
        case()
        return "value"
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        if type(error).__module__.startswith("pydantic"):
            return f"FAULT {type(error).__name__} of a library: {text[:150]!r}"
        wrong = len(text) > LINE or not text.strip() or not text.replace("\n", " ").isprintable()
        return f"FAULT no clear line, {len(text)} characters: {text[:150]!r}" if wrong else "line"
    except BaseException as error:
        return f"FAULT {type(error).__name__}: {str(error)[:150]!r}"


def high_water() -> int:
    """MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def run_some(cases: list[Case], first: int, pipe: int) -> None:
    """In a fork: a line for each case, begun and ended."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in range(first, len(cases)):
        os.write(pipe, f"{number}\n".encode())
        Path("/proc/self/clear_refs").write_text("5")
        before, started = high_water(), time.monotonic()
        signal.alarm(3 * SECONDS)
        found = outcome(cases[number])
        signal.alarm(0)
        seconds, grown = time.monotonic() - started, high_water() - before
        if seconds > SECONDS or grown > MIB:
            found = f"FAULT {seconds:.1f} s, {grown} MiB, {found}"
        os.write(pipe, f"{number} {found.encode('ascii', 'backslashreplace').decode()}\n".encode())
    os._exit(0)


def run(cases: list[Case]) -> Iterator[tuple[int, str]]:
    first = 0
    while first < len(cases):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            run_some(cases, first, writing)
        os.close(writing)
        begun = first
        with open(reading) as lines:
            for line in lines:
                number, _, found = line.rstrip("\n").partition(" ")
                begun = int(number)
                if found:
                    yield begun, found
                    first = begun + 1
        _, status = os.waitpid(child, 0)
        if first < len(cases):
            by = signal.Signals(status & 0x7F).name if status & 0x7F else f"exit code {status >> 8}"
            yield begun, f"FAULT the process ended by {by}"
            first = begun + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COUNTS, default=list(COUNTS))
    parser.add_argument("--count", type=int, help="inputs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    av.logging.set_level(None)
    makers = {"media": media_cases, "records": record_cases, "configs": config_cases, "folders": folder_cases}
    faults = 0
    for kind in arguments.only:
        started, ended = time.monotonic(), Counter()
        with tempfile.TemporaryDirectory() as folder:
            made = makers[kind](Path(folder), random.Random(f"{kind} {arguments.seed}"))
            cases = [next(made) for _ in range(arguments.count or COUNTS[kind])]
            for number, found in run(cases):
                ended[found.split()[0]] += 1
                if found.startswith("FAULT"):
                    print(f"{kind} {number}: {found}", flush=True)
        faults += ended["FAULT"]
        print(f"{kind}: {dict(ended)} in {time.monotonic() - started:.0f} s", flush=True)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()

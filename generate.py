"""Answer prompts about images, sound and video.

    python generate.py RUN_OR_EXPORT_OR_HF_FOLDER --image a.jpg --prompt "What is this?"

The model is a run of train.py (its newest complete checkpoint), a checkpoint of one, an exported AVLM, or a Hugging
Face folder (or Hub name) of a supported decoder or of LLaVA. Media and prompts may be repeated. A prompt gets the media
that its tags <image>, <audio> and <video> name; one without tags gets all of them in front.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from avlm.config.model import DecoderConfig, ModelConfig, validated
from avlm.config.run import DataConfig, InitFrom
from avlm.data.sample import EncodedSample, SampleEncoder
from avlm.data.text.chat import MEDIA, TAG, Chat, Messages, Piece, Tokenizer
from avlm.evaluation.generation import Completion, generate
from avlm.families.pretrained import read_config, resolve, stop_ids, template_of
from avlm.models.avlm import AVLM
from avlm.process.exit import one_line_errors
from avlm.storage.model_folder import read_json
from avlm.storage.run_folder import is_run, read_run
from avlm.storage.weight_files import local
from avlm.weights.load import load_weights


class RawChat:
    """Stands in for avlm.data.text.chat.Chat: no template, only what the tokenizer itself puts around a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = [tokenizer.id_of(tokenizer.eos)] if tokenizer.eos else []

    def pieces(self, messages: Messages, *, prompt: bool) -> list[Piece]:
        return [Piece(p if i % 2 else "text", p) for i, p in enumerate(TAG.split(messages[-1]["content"]))]

    def encode(self, pieces: list[Piece]) -> Iterator[tuple[Piece, list[int]]]:
        for i, piece in enumerate(pieces):
            text = "" if piece.kind in MEDIA else piece.text
            yield piece, self.tokenizer.encode_as_published(text, begins=i == 0)


def load_model(name: str, device: torch.device, dtype: torch.dtype, raw: bool) -> tuple[AVLM, SampleEncoder, list[int]]:
    """Model, prompt encoder and the ids that end an answer."""
    if is_run(local(name)):
        config, folder = read_run(local(name))
        model_config, data, stops, entry = config.model, config.stages[-1].data, [], "all"
        published = False
    else:
        folder = resolve(name)
        (model_config, data), stops = folder_config(folder), stop_ids(folder)
        entry = "decoder" if isinstance(read_config(folder), DecoderConfig) else "all"
        published = True
    tokenizer = Tokenizer(data.tokenizer)
    chat = RawChat(tokenizer) if raw else Chat(tokenizer, data.template, data.system, published=published)
    encoder = SampleEncoder(model_config, data, tokenizer, chat)
    if not raw or not stops:
        stops = sorted({*stops, *encoder.chat.stop_ids})
    with torch.device("meta"):
        model = AVLM(model_config)
    model.to(dtype).to_empty(device=device).requires_grad_(False)
    if model_config.decoder.tie_embedding:  # to_empty gave the head a weight of its own
        model.decoder.head.weight = model.decoder.embedding.weight
    load_weights(model, InitFrom(**{entry: str(folder)}))
    return model, encoder, stops


def folder_config(folder: Path) -> tuple[ModelConfig, DataConfig]:
    config = read_config(folder)
    if isinstance(config, DecoderConfig):
        config = ModelConfig(decoder=config)
    if not isinstance(config, ModelConfig):
        raise ValueError(f"{folder} holds a tower, which cannot answer: give a decoder, a LLaVA, an export or a run")
    path = folder / "config.json"
    keys = read_json(path)
    data = keys.get("data") if keys.get("architecture") == "AVLM" else {"template": template_of(folder, config)}
    if not isinstance(data, dict):
        raise ValueError(f"{path} does not say how its model was trained: it has no data")
    return config, validated(DataConfig, {**data, "train": "", "tokenizer": str(folder)}, f"{path}: data")


def encode(prompt: str, media: dict[str, list[bytes]], encoder: SampleEncoder) -> EncodedSample:
    tags = set(TAG.findall(prompt))
    if not tags and any(media.values()):
        tags, prompt = set(MEDIA), "".join(f"<{kind}>" * len(media[kind]) for kind in MEDIA) + "\n" + prompt
    chosen = {f"{kind}s": files for kind, files in media.items() if kind in tags}
    return encoder.prompt([{"role": "user", "content": prompt}], **chosen)


class Stream:
    """Prints an answer as it grows; a character whose bytes are not all there waits."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.ids, self.printed = tokenizer, [], 0

    def __call__(self, _: int, token: int) -> None:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, control=False).rstrip("\ufffd")
        print(text[self.printed :], end="", flush=True)
        self.printed = max(self.printed, len(text))


def show(arguments: argparse.Namespace, tokenizer: Tokenizer, completions: list[Completion]) -> None:
    for prompt, completion in zip(arguments.prompt, completions):
        text = tokenizer.decode(completion.token_ids, control=False)
        if arguments.json:
            print(json.dumps({"text": text, **dataclasses.asdict(completion)}, ensure_ascii=False))
        else:
            print(f"> {prompt}\n{text}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", action="append", required=True, help="repeatable: a batch")
    for kind in MEDIA:
        parser.add_argument(f"--{kind}", action="append", default=[], metavar="FILE", help="repeatable")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token every time")
    parser.add_argument("--top-k", type=int, default=0, help="draw from so many tokens only; 0: from all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the fewest tokens with this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--raw", action="store_true", help="no chat template, only what the tokenizer itself adds")
    parser.add_argument("--json", action="store_true", help="one object per prompt: text, token_ids, logprobs")
    arguments = parser.parse_args()
    with one_line_errors():
        device = arguments.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: this machine has no GPU that PyTorch can use")
        dtype = arguments.dtype.replace("auto", "float32" if device == "cpu" else "bfloat16")
        media = {kind: [Path(file).read_bytes() for file in getattr(arguments, kind)] for kind in MEDIA}
        model, encoder, stops = load_model(arguments.model, torch.device(device), getattr(torch, dtype), arguments.raw)
        prompts = [encode(prompt, media, encoder) for prompt in arguments.prompt]
        stream = Stream(encoder.tokenizer) if len(prompts) == 1 and not arguments.json else None
        settings = {key: getattr(arguments, key) for key in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
        completions = generate(model, prompts, stop_ids=stops, on_token=stream, **settings)
        print() if stream else show(arguments, encoder.tokenizer, completions)


if __name__ == "__main__":
    main()

"""Answer prompts about images, audio and video.

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

from avlm.data.sample import EncodedSample, SampleEncoder
from avlm.data.text.chat import Chat
from avlm.data.text.pieces import MEDIA, TAG, Messages, Piece
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation.generation import Completion, generate
from avlm.process.exit import run_command
from avlm.weights.load import OpenModel, open_model


class RawChat:
    """Replaces avlm.data.text.chat.Chat: no template, only the tokens that the tokenizer itself adds to a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = [tokenizer.id_of(tokenizer.eos)] if tokenizer.eos else []

    def pieces(self, messages: Messages, *, prompt: bool) -> list[Piece]:
        found = []
        for i, part in enumerate(TAG.split(messages[-1]["content"])):
            is_tag = i % 2 == 1
            found.append(Piece(part if is_tag else "text", part))
        return found

    def encode(self, pieces: list[Piece]) -> Iterator[tuple[Piece, list[int]]]:
        for i, piece in enumerate(pieces):
            text = "" if piece.kind in MEDIA else piece.text
            yield piece, self.tokenizer.encode_as_published(text, begins=i == 0)


def open_encoder(opened: OpenModel, raw: bool) -> tuple[SampleEncoder, list[int]]:
    """Prompt encoder and the ids that end an answer."""
    data = opened.data
    tokenizer = Tokenizer(data.tokenizer)
    chat = RawChat(tokenizer) if raw else Chat(tokenizer, data.template, data.system, published=opened.is_published)
    encoder = SampleEncoder(opened.config, data, tokenizer, chat)
    stops = opened.stop_ids
    if not raw or not stops:
        stops = sorted({*stops, *chat.stop_ids})
    return encoder, stops


def encode(prompt: str, media: dict[str, list[bytes]], encoder: SampleEncoder) -> EncodedSample:
    """A prompt with the media that its tags name; one without tags gets all of them in front."""
    tags = set(TAG.findall(prompt))
    if not tags and any(media.values()):
        tags = set(MEDIA)
        in_front = "".join(f"<{kind}>" * len(media[kind]) for kind in MEDIA)
        prompt = f"{in_front}\n{prompt}"
    chosen = {f"{kind}s": files for kind, files in media.items() if kind in tags}
    return encoder.prompt([{"role": "user", "content": prompt}], **chosen)


class AnswerPrinter:
    """Prints an answer as it grows. A character is held back until all of its bytes have arrived."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.printed = 0  # characters

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
    parser.add_argument("--top-k", type=int, default=0, help="draw from this many likeliest tokens; 0: from all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the fewest tokens with this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--raw", action="store_true", help="no chat template, only what the tokenizer itself adds")
    parser.add_argument("--json", action="store_true", help="one object per prompt: text, token_ids, logprobs")
    arguments = parser.parse_args()
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    device = arguments.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no GPU that PyTorch can use")
    dtype = arguments.dtype.replace("auto", "float32" if device == "cpu" else "bfloat16")
    media = {kind: [Path(file).read_bytes() for file in getattr(arguments, kind)] for kind in MEDIA}
    opened = open_model(arguments.model)
    encoder, stops = open_encoder(opened, arguments.raw)
    model = opened.load(torch.device(device), getattr(torch, dtype))
    prompts = [encode(prompt, media, encoder) for prompt in arguments.prompt]
    printer = AnswerPrinter(encoder.tokenizer) if len(prompts) == 1 and not arguments.json else None
    completions = generate(
        model,
        prompts,
        max_new_tokens=arguments.max_new_tokens,
        stop_ids=stops,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        on_token=printer,
    )
    if printer:
        print()
    else:
        show(arguments, encoder.tokenizer, completions)


if __name__ == "__main__":
    run_command(main)

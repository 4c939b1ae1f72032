"""Answer prompts about images, audio and video, or chat.

    python generate.py RUN_OR_EXPORT_OR_HF_FOLDER --image a.jpg --prompt "What is this?"
    python generate.py RUN_OR_EXPORT_OR_HF_FOLDER
    torchrun --standalone --nproc-per-node 8 generate.py MODEL_THAT_NEEDS_8_GPUS --prompt "Why is the sky blue?"

The model is a run of train.py (its newest complete checkpoint), a checkpoint of one, an exported AVLM, or a Hugging
Face folder (or Hub name) of a family that we read. Media and prompts may be repeated. A prompt gets the media that its
tags <image>, <audio> and <video> name; one without tags gets all of them in front. Without --prompt, questions
are read from the terminal or from a pipe, a turn of one conversation in each line; /help lists its commands.

Several ranks share the weights of one model and answer together, as one process would.
"""

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from avlm.data.text.pieces import MEDIA
from avlm.process.exit import run_command
from avlm.process.launch import ranks

if TYPE_CHECKING:
    from avlm.evaluation.answering import Media, Model, Options  # torch takes seconds, and --help needs none


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", action="append", default=[], help="repeatable: a batch. Without it: a chat")
    for kind in MEDIA:
        parser.add_argument(f"--{kind}", action="append", default=[], metavar="FILE", help="repeatable")
    parser.add_argument("--max-new-tokens", type=int, help="of an answer; default: 256, or what fits")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token every time")
    parser.add_argument("--top-k", type=int, default=0, help="draw from this many likeliest tokens; 0: from all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the fewest tokens with this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--raw", action="store_true", help="no chat template, only what the tokenizer itself adds")
    parser.add_argument("--json", action="store_true", help="one object per prompt: text, token_ids, logprobs")
    arguments = parser.parse_args()
    for name in ("raw", "json"):
        if getattr(arguments, name) and not arguments.prompt:
            raise ValueError(f"--{name} needs --prompt: a chat has turns, which are printed as they come")
    if ranks()[1] > 1 and not arguments.prompt:
        raise ValueError("a chat runs in one process: give --prompt, or start generate.py without a launcher")
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    from avlm.evaluation.answering import load, read_media  # torch takes seconds, and --help needs none
    from avlm.evaluation.terminal import chat

    media = read_media(**{kind: getattr(arguments, kind) for kind in MEDIA})
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    options = {name: getattr(arguments, name) for name in names}
    if ranks()[1] > 1:
        from avlm.evaluation.sharded import load_sharded
        from avlm.parallel import mesh

        model = load_sharded(arguments.model, arguments.device, arguments.dtype, arguments.raw)
        answer(model, arguments, media, options)
        mesh.stop()
        return
    model = load(arguments.model, arguments.device, arguments.dtype, arguments.raw)
    if arguments.prompt:
        answer(model, arguments, media, options)
    else:
        chat(model, media, **options)


def answer(model: "Model", arguments: argparse.Namespace, media: "Media", options: "Options") -> None:
    """All prompts, on every rank; the first one prints."""
    is_first = ranks()[0] == 0
    if len(arguments.prompt) == 1 and not arguments.json:
        for part in model.stream(arguments.prompt[0], **media, **options):
            print(part if is_first else "", end="", flush=True)
        print("\n" if is_first else "", end="")
        return
    prompts = [model.encode(prompt, **media) for prompt in arguments.prompt]
    for prompt, completion in zip(arguments.prompt, model.complete(prompts, **options)):
        text = model.text(completion.token_ids)
        if not is_first:
            continue
        if arguments.json:
            print(json.dumps({"text": text, **dataclasses.asdict(completion)}, ensure_ascii=False))
        else:
            print(f"> {prompt}\n{text}\n")


if __name__ == "__main__":
    run_command(main)

"""A model that answers: what generate.py, its chat and ``avlm.load`` have in common.

    model = load("runs/demo")
    model.answer("What is this?", image="a.png")

A prompt gets the media that its tags <image>, <audio> and <video> name; one without tags gets all of them in front.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from avlm.config.model import TOWERS
from avlm.config.values import counted
from avlm.data.sample import EncodedSample, SampleEncoder
from avlm.data.text.chat import Chat
from avlm.data.text.pieces import MEDIA, TAG, Messages, Piece
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation.generation import Completion, Ranks, generate, steps
from avlm.evaluation.kept_cache import KeptCache
from avlm.models.avlm import AVLM
from avlm.weights.load import OpenModel, open_model

File = str | Path | bytes  # a file's name, or its bytes
Files = File | list[File] | tuple[File, ...]
Media = dict[str, list[bytes]]  # the files of each kind of MEDIA


class Options(TypedDict, total=False):
    """How tokens are chosen, with the defaults of ``avlm.evaluation.generation.steps``."""

    max_new_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    seed: int


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


def open_encoder(opened: OpenModel, raw: bool = False) -> tuple[SampleEncoder, list[int]]:
    """Prompt encoder and the ids that end an answer."""
    data = opened.data
    tokenizer = Tokenizer(data.tokenizer)
    chat = RawChat(tokenizer) if raw else Chat(tokenizer, data.template, data.system, published=opened.is_published)
    encoder = SampleEncoder(opened.config, data, tokenizer, chat)
    stops = opened.stop_ids
    if not raw or not stops:
        stops = sorted({*stops, *chat.stop_ids})
    return encoder, stops


class Model:
    """``network`` and what makes prompts for it. Files are names or bytes, one or a list of each kind. ``ranks``: those
    that the network is sharded over, which are all asked the same.

    ValueError or FileNotFoundError, with one line, for a prompt that cannot be answered.
    """

    def __init__(self, network: AVLM, encoder: SampleEncoder, stop_ids: list[int], ranks: Ranks | None = None) -> None:
        self.network = network
        self.encoder = encoder
        self.stop_ids = stop_ids
        self.ranks = ranks

    def answer(
        self, prompt: str, *, image: Files = (), audio: Files = (), video: Files = (), **options: Unpack[Options]
    ) -> str:
        return "".join(self.stream(prompt, image=image, audio=audio, video=video, **options))

    def answers(self, prompts: list[str | dict[str, Any]], **options: Unpack[Options]) -> list[str]:
        """A batch. A prompt with media is {"prompt": ..., "image": ..., "audio": ..., "video": ...}."""
        asked = [prompt if isinstance(prompt, dict) else {"prompt": prompt} for prompt in prompts]
        encoded = [self.encode(**prompt) for prompt in asked]
        return [self.text(completion.token_ids) for completion in self.complete(encoded, **options)]

    def stream(
        self, prompt: str, *, image: Files = (), audio: Files = (), video: Files = (), **options: Unpack[Options]
    ) -> Iterator[str]:
        """The answer in parts, as it grows. A character is held back until all of its bytes have arrived."""
        return self.texts(self.tokens(self.encode(prompt, image=image, audio=audio, video=video), **options))

    def encode(self, prompt: str, *, image: Files = (), audio: Files = (), video: Files = ()) -> EncodedSample:
        content, media = place_tags(prompt, read_media(image=image, audio=audio, video=video))
        return self.encode_turns([{"role": "user", "content": content}], media)

    def encode_turns(self, messages: Messages, media: Media) -> EncodedSample:
        """A conversation that ends with a question. ``media`` are those of all its tags, in their order."""
        for kind, files in media.items():
            tower = TOWERS.get(kind, "vision")  # the vision tower reads the frames of a video
            if files and getattr(self.network.config, tower) is None:
                raise ValueError(f"the model has no {tower} tower: it takes no {kind}")
        return self.encoder.prompt(messages, **{f"{kind}s": files for kind, files in media.items()})

    def complete(self, prompts: list[EncodedSample], **options: Unpack[Options]) -> list[Completion]:
        return generate(self.network, prompts, stop_ids=self.stop_ids, ranks=self.ranks, **options)

    def tokens(self, prompt: EncodedSample, kept: KeptCache | None = None, **options: Unpack[Options]) -> Iterator[int]:
        """The answer's tokens, with the one that ends it, each as soon as it is known."""
        for [[(token, _), *_]] in steps(self.network, [prompt], read_every=1, kept=kept, ranks=self.ranks, **options):
            yield token
            has_ended = token in self.stop_ids
            if has_ended if self.ranks is None else self.ranks.everyone_done(has_ended):
                return

    def text(self, token_ids: list[int]) -> str:
        """An answer's text. The blank that some templates leave for the model to begin with is no part of it."""
        text = self.encoder.tokenizer.decode(token_ids, control=False)
        return text if isinstance(self.encoder.chat, RawChat) else text.lstrip(" ")

    def texts(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of tokens, part by part."""
        ids: list[int] = []
        text, given = "", 0  # characters given
        for token in tokens:
            ids.append(token)
            text = self.text(ids)
            whole = text.rstrip("\ufffd")
            if len(whole) > given:
                yield whole[given:]
                given = len(whole)
        if text[given:]:
            yield text[given:]


def load(name: str | Path, device: str = "auto", dtype: str = "auto", raw: bool = False) -> Model:
    """A run (its newest complete checkpoint), a checkpoint, an export, or a Hugging Face folder or Hub name, for use.

    ``device``: cpu, cuda or auto; ``dtype``: float32, bfloat16, float16, or auto: float32 on CPUs, else bfloat16.
    ``raw``: prompts get no chat template, only what the tokenizer itself adds.
    """
    has_gpu = torch.cuda.is_available()
    device = device.replace("auto", "cuda" if has_gpu else "cpu")
    if device == "cuda" and not has_gpu:
        raise ValueError("device cuda: this machine has no GPU that PyTorch can use")
    dtype = dtype.replace("auto", "float32" if device == "cpu" else "bfloat16")
    opened = open_model(str(name))
    encoder, stop_ids = open_encoder(opened, raw)
    return Model(opened.load(torch.device(device), getattr(torch, dtype)), encoder, stop_ids)


def read_media(**files: Files) -> Media:
    """The bytes of the files of each kind."""
    media: Media = {}
    for kind, given in files.items():
        listed = [given] if isinstance(given, File) else list(given)
        media[kind] = [file if isinstance(file, bytes) else _read(kind, Path(file)) for file in listed]
    return media


def _read(kind: str, path: Path) -> bytes:
    if not path.exists():
        raise FileNotFoundError(f"there is no {kind} file {path}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"the {kind} file {path} cannot be read: {error.strerror}") from None


def place_tags(prompt: str, media: Media) -> tuple[str, Media]:
    """A prompt with its tags, and the media that they name, which a batch of prompts may share."""
    tags = TAG.findall(prompt)
    if not tags and any(media.values()):
        in_front = "".join(f"<{kind}>" * len(media[kind]) for kind in MEDIA)
        return f"{in_front}\n{prompt}", media
    chosen = {kind: files for kind, files in media.items() if kind in tags}
    for kind in MEDIA:
        num_tags, num_files = tags.count(kind), len(chosen.get(kind, []))
        if num_tags != num_files:
            raise ValueError(
                f"the prompt has {counted(num_tags, f'<{kind}> tag')} but {counted(num_files, kind)}: give a file for "
                "each tag, or leave the tags out"
            )
    return prompt, chosen

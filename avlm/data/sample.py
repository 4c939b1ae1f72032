"""A sample: messages and media in, token ids with counted placeholders, targets and decoded media out.

Every placeholder id stands for exactly one feature row: an image gives (image_size / patch / downsample)^2 IMAGE ids, a
window of sound ceil(rows / stack) AUDIO ids, a film its frames as images and then, if asked for, its sound. They stand
in the order of the media, so the n-th IMAGE id belongs to the n-th image feature.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from avlm.config import DataConfig
from avlm.data import audio, image, video
from avlm.data.batch import AUDIO, IGNORE, IMAGE, KINDS
from avlm.data.chat import MEDIA, Chat, Messages, Tokenizer, check_vocabulary
from avlm.model_config import ModelConfig

LLAVA_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Sample:
    """Media are the bytes of their files, in the order of their tags. With ``answers`` evaluation compares with these
    and not with the last turn."""

    key: str
    messages: Messages
    images: list[bytes] = field(default_factory=list)
    audios: list[bytes] = field(default_factory=list)
    videos: list[bytes] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class EncodedSample:
    """T tokens   I images   S image side   M mel bins

    token_T   int64: vocabulary ids, IMAGE or AUDIO
    target_T  int64: the following token where that one is learned, else IGNORE
    pixels    uint8 (I, 3, S, S), not yet normalised
    mels      windows float32 (M, frames), or columns of samples (``log_mel``), in the order of their placeholders
    kind      one of KINDS
    """

    key: str
    kind: str
    token_T: Tensor
    target_T: Tensor
    pixels: Tensor
    mels: list[Tensor]

    def __len__(self) -> int:
        return self.token_T.shape[0]


def parse(record: dict, media: Callable[[str], bytes], key: str) -> Sample:
    """A sample from one JSON record of three forms; ``media`` reads a file by the name in the record.

    messages      {"messages": [{"role", "content"}], "images": [name], "audios": [...], "videos": [...]}
    LLaVA         {"conversations": [{"from": "human", "value": ...}], "image": name or list, "audio", "video"}
    NeMo AVLM     {"context": [user text], "answers": [assistant text], "images": ...}

    The first two may hold "answers": [text], the references of the last turn.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a record must be a JSON object, not {type(record).__name__}")
    names = {kind: _names(record, kind) for kind in MEDIA}
    parts = {f"{kind}s": [media(name) for name in names[kind]] for kind in MEDIA}
    messages, references = _messages(record), _references(record)
    for text in (*references, *(turn["content"] for turn in messages)):
        if isinstance(text, str) and re.search("[\ud800-\udfff]", text):  # JSON can write it, UTF-8 cannot
            raise ValueError("text holds half of a surrogate pair")
    return Sample(key=key, messages=messages, **parts, answers=references)


def load_json(text: bytes) -> Any:
    """ValueError for what is no JSON, or nested too deep."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested too deep: {error}") from None


def _messages(record: dict) -> Messages:
    try:
        if "messages" in record:
            return [{"role": turn["role"], "content": turn["content"]} for turn in record["messages"]]
        if "conversations" in record:
            turns = record["conversations"]
            return [{"role": LLAVA_ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in turns]
        if "context" in record and "answers" in record:
            context, answers = record["context"], record["answers"]
            if not (isinstance(context, list) and isinstance(answers, list) and len(context) == len(answers)):
                raise ValueError(f"context and answers must be lists of one length: {context!s:.60}, {answers!s:.60}")
            turns = zip(context, answers)
            pairs = ((("user", question), ("assistant", answer)) for question, answer in turns)
            return [{"role": role, "content": text} for pair in pairs for role, text in pair]
    except (TypeError, KeyError) as error:
        raise ValueError(f"turns are not of the form that sample.parse describes: {error}") from None
    raise ValueError(f"record has neither messages, conversations nor context and answers: {sorted(record)}")


def _references(record: dict) -> list[str]:
    if "answers" not in record or not ("messages" in record or "conversations" in record):
        return []
    answers = record["answers"]
    if not (isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers)):
        raise ValueError(f"answers must be a list of texts, not {answers!r:.80}")
    return [answer.strip() for answer in answers]


def _names(record: dict, kind: str) -> list[str]:
    """Names under "images" or "image": a list, one name or null."""
    given = record.get(f"{kind}s", record.get(kind))
    names = [] if given is None else given if isinstance(given, list) else [given]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{kind}s must be file names, not {given!r:.80}")
    return names


class SampleEncoder:
    """Encodes samples for one model, by ``data.template`` or a given chat. What is wrong with a sample raises
    ValueError with one line."""

    def __init__(self, model: ModelConfig, data: DataConfig, tokenizer: Tokenizer, chat: Chat | None = None) -> None:
        check_vocabulary(tokenizer, model.decoder.vocab_size)
        if data.video.sound and model.audio is None:
            raise ValueError("data.video.sound=true needs model.audio")
        self.model, self.data, self.tokenizer = model, data, tokenizer
        self.chat = chat or Chat(tokenizer, data.template, data.system)

    def encode(self, sample: Sample) -> EncodedSample:
        """A training sample. Raises ValueError if it exceeds data.seq_length or has nothing to learn."""
        encoded = self._encode(sample, prompt=False)
        if len(encoded) > self.data.seq_length:
            raise ValueError(f"sample has {len(encoded)} tokens, more than data.seq_length={self.data.seq_length}")
        if (encoded.target_T == IGNORE).all():
            raise ValueError("no token of the sample is learned: its assistant turns are empty")
        return encoded

    def prompt(
        self,
        messages: Messages,
        images: list[bytes] = (),
        audios: list[bytes] = (),
        videos: list[bytes] = (),
    ) -> EncodedSample:
        """A conversation that the model is to go on with: no targets, ends with the assistant's header."""
        return self._encode(Sample("prompt", messages, list(images), list(audios), list(videos)), prompt=True)

    def _encode(self, sample: Sample, prompt: bool) -> EncodedSample:
        pieces = self.chat.pieces(sample.messages, prompt=prompt)
        media = {"image": sample.images, "audio": sample.audios, "video": sample.videos}
        for kind, files in media.items():
            self._check_media(kind, files, sum(piece.kind == kind for piece in pieces))
        unread = {kind: iter(files) for kind, files in media.items()}
        ids: list[int] = []
        learned: list[bool] = []
        frames: list[Tensor] = []
        mels: list[Tensor] = []
        for piece, piece_ids in self.chat.encode(pieces):
            if piece.kind in MEDIA:
                new_frames, new_mels = self._read(piece.kind, next(unread[piece.kind]))
                piece_ids = [IMAGE] * sum(image_features(self.model) for _ in new_frames)
                piece_ids += [AUDIO] * sum(audio_features(self.model, mel) for mel in new_mels)
                frames += new_frames
                mels += new_mels
            ids += piece_ids
            learned += [piece.learned] * len(piece_ids)
        token_T = torch.tensor(ids, dtype=torch.int64)
        following_T = torch.cat([token_T[1:], token_T.new_full((1,), IGNORE)])
        target_T = torch.where(torch.tensor([*learned[1:], False], dtype=torch.bool), following_T, IGNORE)
        side = self.model.vision.image_size if self.model.vision else 1
        pixels = torch.stack(frames) if frames else torch.empty(0, 3, side, side, dtype=torch.uint8)
        return EncodedSample(sample.key, _kind(media), token_T, target_T, pixels, mels)

    def _check_media(self, kind: str, files: list[bytes], num_tags: int) -> None:
        if num_tags != len(files):
            raise ValueError(f"sample has {num_tags} <{kind}> tags but {len(files)} {kind}s")
        tower = "audio" if kind == "audio" else "vision"
        if files and getattr(self.model, tower) is None:
            raise ValueError(f"sample has {len(files)} {kind}s but the model has no {tower} tower")
        for data in files:
            if len(data) > self.data.max_media_bytes:
                raise ValueError(
                    f"{kind} of {len(data)} bytes exceeds data.max_media_bytes={self.data.max_media_bytes}"
                )

    def _read(self, kind: str, data: bytes) -> tuple[list[Tensor], list[Tensor]]:
        """(uint8 frames (3, S, S), windows of sound) of one file."""
        config, vision, frames, mels = self.data, self.model.vision, [], []
        if kind == "image":
            frames = [image.fit(image.decode(data, config.max_image_pixels), vision)]
        if kind == "video":
            films = video.decode(data, config.video, config.max_image_pixels)
            frames = [image.fit(frame, vision) for frame, _ in films]
        # A film without a sound track simply has no sound.
        if kind == "audio" or (kind == "video" and config.video.sound and video.has_sound(data)):
            mels = audio.mels(audio.decode(data, config.max_audio_seconds), self.model.audio)
        return frames, mels


def fingerprint(data: DataConfig, model: ModelConfig) -> str:
    """Changes with whatever decides what samples encode to and how they are packed, but not with where files lie."""
    elsewhere = ("train", "validation", "metrics", "tokenizer", "media_root", "num_workers", "max_bad_fraction")
    settings = {key: value for key, value in dataclasses.asdict(data).items() if key not in elsewhere}
    settings["vocab_size"] = model.decoder.vocab_size
    for part in ("vision", "audio", "vision_projector", "audio_projector"):
        settings[part] = dataclasses.asdict(getattr(model, part)) if getattr(model, part) else None
        for key in ("bias", "output_std", "log_mel", "resample"):  # no sample's length depends on them
            (settings[part] or {}).pop(key, None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def image_features(model: ModelConfig) -> int:
    """Rows that one image takes in the decoder."""
    vision = model.vision
    return (vision.patches_per_side // model.vision_projector.downsample) ** 2


def audio_features(model: ModelConfig, mel: Tensor) -> int:
    """Rows that one window (M, frames) takes in the decoder: the last stack of a window may be short."""
    return -(-audio.rows(mel) // model.audio_projector.downsample)


def _kind(media: dict[str, list[bytes]]) -> str:
    """Class for the loss per modality; a film with its sound is still a video."""
    given = [kind for kind in MEDIA if media[kind]]
    kind = "text" if not given else given[0] if len(given) == 1 else "mixed"
    assert kind in KINDS
    return kind

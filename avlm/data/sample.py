"""A sample: messages and media in, token ids with counted placeholders, targets and decoded media out.

Every placeholder id stands for exactly one feature row: an image gives (image_size / patch / downsample)^2 IMAGE ids, a
window of sound ceil(rows / stack) AUDIO ids, a film its frames as images and then, if asked for, its sound. They stand
in the order of the media, so the n-th IMAGE id belongs to the n-th image feature.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.data.media import audio, image, video
from avlm.data.records import read_record
from avlm.data.text.chat import MEDIA, TAG, Chat, Messages, Tokenizer, check_vocabulary
from avlm.models.batch import AUDIO, IGNORE, IMAGE, KINDS

# A text up to LONG_TEXT characters is tokenised whole, whatever its tokens may hold; of a longer one than PROBE the
# beginning is tokenised first.
LONG_TEXT, PROBE = 2**20, 2**18


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


def parse(record: Any, media: Callable[[str], bytes], key: str) -> Sample:
    """A sample from one JSON record (``avlm.data.records``); ``media`` reads a file by the name in the record."""
    messages, files, references = read_record(record, media)
    return Sample(key=key, messages=messages, **{f"{kind}s": files[kind] for kind in MEDIA}, answers=references)


def load_json(text: bytes) -> Any:
    """ValueError for what is no JSON, or nested too deep."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested too deep: {error}") from None


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
        self._check_length(sample.messages, self.model.decoder.max_position if prompt else self.data.seq_length)
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
                new_frames, new_mels = self._read(piece.kind, next(unread[piece.kind]), sample.key)
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

    def _check_length(self, messages: Messages, most: int) -> None:
        """Refuse text of more than ``most`` tokens before all of it is tokenised: by its length, and by the tokens of
        the beginning of a long one."""
        texts = [turn["content"] for turn in messages if isinstance(turn.get("content"), str)]
        length = sum(map(len, texts))
        if length > max(LONG_TEXT, most * self.tokenizer.longest):
            raise ValueError(f"sample has a text of {length:,} characters, which {most} tokens cannot hold")
        for text in texts:
            limit = most + self.tokenizer.longest
            if len(text) > PROBE and len(self.tokenizer.encode(TAG.sub("", text[:PROBE]))) > limit:
                raise ValueError(f"sample has a text of {len(text):,} characters, which are more than {most} tokens")

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

    def _read(self, kind: str, data: bytes, key: str) -> tuple[list[Tensor], list[Tensor]]:
        """(uint8 frames (3, S, S), windows of sound) of one file of the sample."""
        config, vision, frames, mels = self.data, self.model.vision, [], []
        if kind == "image":
            frames = [image.fit(image.decode(data, config.max_image_pixels), vision)]
        if kind == "video":
            films = video.decode(data, config.video, config.max_image_pixels)
            frames = [image.fit(frame, vision) for frame, _ in films]
        # A film without a sound track simply has no sound.
        if kind == "audio" or (kind == "video" and config.video.sound and video.has_sound(data)):
            mels = audio.mels(audio.decode(data, config.max_audio_seconds, f"{kind} of {key}"), self.model.audio)
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

"""A sample: messages and media in, token ids with counted placeholders, targets and decoded media out.

Every placeholder id stands for exactly one feature: an image of lines x columns patches gives (lines / downsample) *
(columns / downsample) IMAGE ids, a window of audio ceil(rows / stack) AUDIO ids, a video its frames as images and, if
asked for, its audio, after them or in turns with them. They have the order of the media, so the n-th IMAGE id belongs
to the n-th image feature. An image may be cut into views by ``data.image_layout``, between whose features stand markers
and rows that are learned. With cross-attention an id stands for an item, however many features it has. Around media
stand the markers of ``data.markers`` and the texts of ``data.video.text``.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from avlm.config.model import TOWERS, ModelConfig
from avlm.config.run import DataConfig
from avlm.config.values import counted, shown
from avlm.data.duplex import RowText, Word, codes_of, is_duplex, read_words
from avlm.data.features import Group, of_images
from avlm.data.media import audio
from avlm.data.media_reader import MediaReader, Room
from avlm.data.positions import Placed, position_of
from avlm.data.records import read_record
from avlm.data.runs import Run, around, lay_out
from avlm.data.text.chat import Chat, check_vocabulary, merged
from avlm.data.text.pieces import MEDIA, TAG, Messages, Piece
from avlm.data.text.tokenizer import Tokenizer
from avlm.models.batch import IGNORE, PLACEHOLDERS, Size

# A text of up to LONG_TEXT characters may be tokenised whole, whatever the length of its tokens. If it is longer than
# PROBE, its beginning is tokenised first.
LONG_TEXT, PROBE = 2**20, 2**18

Items = dict[str, list[Tensor]]  # modality -> what its tower reads, in the order of the placeholders


@dataclass(frozen=True)
class Sample:
    """Media are the bytes of their files, in the order of their tags. Evaluation compares with ``answers``, or with the
    last turn if there are none."""

    key: str
    messages: Messages
    images: list[bytes] = field(default_factory=list)
    audios: list[bytes] = field(default_factory=list)
    videos: list[bytes] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    words: list[Word] | None = None  # what the agent of a duplex model says while it hears the audio
    codes: Any = None  # of its speech, as the record has them
    files: list[str] = field(default_factory=list, compare=False)  # names of media files, as the record has them


@dataclass(frozen=True)
class EncodedSample:
    """T tokens   N numbers of a patch: channels, frames, lines and columns, in this order   M mel bins

    token_T   int64: vocabulary ids and placeholders
    target_T  int64: the following token where it is learned, else IGNORE
    media     by modality, in the order of their placeholders:
              "image"  uint8 patches (lines, columns, N), not yet normalised
              "audio"  log-mel windows float32 (M, frames)
    groups    of images, those that share their features; none if each has its own, line by line
    kind      one of KINDS
    num_features  of media that do not stand among the tokens, for cross-attention
    position_T  None: 0, 1, 2, ...; else int64 or float64, for M-RoPE (3, T): time, line and column
    factor_T  None, or float32: the weights of targets in the loss
    code_TK   None, or int64: the codes of the agent's speech in each row
    """

    key: str
    kind: str
    token_T: Tensor
    target_T: Tensor
    media: Items = field(default_factory=dict)
    position_T: Tensor | None = None
    groups: list[Group] = field(default_factory=list)
    factor_T: Tensor | None = None
    num_features: int = 0
    code_TK: Tensor | None = None

    def __len__(self) -> int:
        return self.token_T.shape[0]

    @property
    def room(self) -> int:
        """What it takes of a packed row, whose media have a row of their own of the same length."""
        return max(len(self), self.num_features)


def parse(record: Any, media: Callable[[str], bytes], key: str) -> Sample:
    """A sample from one JSON record (``avlm.data.records``); ``media`` reads a file by the name in the record."""
    names: list[str] = []

    def read(name: str) -> bytes:
        content = media(name)
        names.append(name)
        return content

    if is_duplex(record):
        name, words, codes = read_words(record)
        codes = read(codes) if isinstance(codes, str) else codes
        return Sample(key=key, messages=[], audios=[read(name)], words=words, codes=codes, files=names)
    messages, files, references = read_record(record, read)
    by_field = {f"{kind}s": files[kind] for kind in MEDIA}
    return Sample(key=key, messages=messages, answers=references, files=names, **by_field)


def load_json(text: bytes) -> Any:
    """ValueError for text that is not JSON, or that is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested too deep: {error}") from None


class SampleEncoder:
    """Encodes samples for a model, by ``data.template`` or a given chat. A bad sample raises a one-line ValueError."""

    def __init__(self, model: ModelConfig, data: DataConfig, tokenizer: Tokenizer, chat: Chat | None = None) -> None:
        check_vocabulary(tokenizer, model.decoder.vocab_size)
        if data.video.audio and model.audio is None:
            raise ValueError(f"data.video.audio={data.video.audio} needs model.audio")
        self.model = model
        self.data = data
        self.tokenizer = tokenizer
        self.chat = chat or Chat(tokenizer, data.template, data.system)
        self.reader = MediaReader(model, data)
        self.row_text = RowText(data.duplex, tokenizer) if data.duplex else None
        layout = data.image_layout
        of_views = {"tile_markers": layout.tile_markers, "whole_markers": layout.whole_markers}
        of_views["line_break"] = [layout.line_break]
        marked = {f"markers.{kind}": markers for kind, markers in data.markers.items()}
        marked |= {f"image_layout.{key}": markers for key, markers in of_views.items()}
        for key, markers in marked.items():
            for marker in markers:
                filled = marker.replace("{line}", "1").replace("{column}", "1")
                if marker and not any(token in filled for token in tokenizer.control_tokens):
                    raise ValueError(f"data.{key}: {shown(marker)!r} has no control token of {tokenizer.file}")

    def encode(self, sample: Sample) -> EncodedSample:
        """A training sample. Raises ValueError if it exceeds data.seq_length or has nothing to learn."""
        encoded = self._encode(sample, prompt=False) if sample.words is None else self._duplex(sample, sample.words)
        if len(encoded) > self.data.seq_length:
            raise ValueError(f"sample has {len(encoded)} tokens, more than data.seq_length={self.data.seq_length}")
        if encoded.room > self.data.seq_length:
            raise ValueError(
                f"the media of the sample have {encoded.num_features} features, more than data.seq_length="
                f"{self.data.seq_length}: raise it, or make fewer (a resampler, or downsample)"
            )
        if (encoded.target_T == IGNORE).all():
            raise ValueError("no token of the sample is learned: its assistant turns are empty")
        return encoded

    def _duplex(self, sample: Sample, words: list[Word]) -> EncodedSample:
        """A recording with what the agent says in each of its rows; all rows are learned."""
        if self.row_text is None:
            raise ValueError("the record has words with times, which a model with data.duplex reads")
        self._check_media("audio", sample.audios, 1)
        [run] = self.reader.read("audio", sample.audios[0], sample.key, Room(self.data.seq_length, "data.seq_length"))
        said_T = self.row_text.rows(words, len(run.tokens))
        token_T = self.row_text.inputs(said_T)
        media: Items = {"image": [], "audio": run.items}
        factor_T = self.row_text.factors(said_T)
        code_TK = codes_of(sample.codes, len(said_T), self.model.codec)
        return EncodedSample(sample.key, "audio", token_T, said_T, media, factor_T=factor_T, code_TK=code_TK)

    def prompt(
        self,
        messages: Messages,
        images: list[bytes] = (),
        audios: list[bytes] = (),
        videos: list[bytes] = (),
    ) -> EncodedSample:
        """A conversation that the model is to continue: no targets; it ends with the assistant's header."""
        sample = Sample("prompt", messages, list(images), list(audios), list(videos))
        return self._encode(sample, prompt=True)

    def _encode(self, sample: Sample, prompt: bool) -> EncodedSample:
        room = Room(self.data.seq_length, "data.seq_length")
        if prompt:
            room = Room(self.model.decoder.max_position, "model.decoder.max_position")
        self._check_length(sample.messages, room.most)
        pieces = self.chat.pieces(sample.messages, prompt=prompt)
        files = {"image": sample.images, "audio": sample.audios, "video": sample.videos}
        for kind, of_kind in files.items():
            self._check_media(kind, of_kind, sum(piece.kind == kind for piece in pieces))
        pieces, runs = self._with_media(pieces, files, sample.key, room)
        unplaced = iter(runs)
        ids: list[int] = []
        learned: list[bool] = []
        media: Items = {modality: [] for modality in PLACEHOLDERS}
        groups = groups_of(runs, self.model)
        placed: list[Placed] = []
        for piece, piece_ids in self.chat.encode(pieces):
            if piece.kind in MEDIA:
                run = next(unplaced)
                media[run.modality] += run.items
                piece_ids = run.tokens
                placed += self._placed(run, len(ids))
            ids += piece_ids
            learned += [piece.learned] * len(piece_ids)
        if self.row_text is not None and media["audio"]:
            raise ValueError(
                "a model with data.duplex hears recordings alone: train it on records of audio and words, and let it "
                "answer by python -m avlm.evaluation.duplex MODEL CLIP"
            )
        token_T = torch.tensor(ids, dtype=torch.int64)
        following_T = torch.cat([token_T[1:], token_T.new_full((1,), IGNORE)])
        is_learned_T = torch.tensor([*learned[1:], False], dtype=torch.bool)
        target_T = torch.where(is_learned_T, following_T, IGNORE)
        position_T = position_of(len(ids), placed, self.model)
        num_features = count_features(media, self.model) if self.model.cross else 0
        whole = sample.key, kind_of(files), token_T, target_T, media, position_T, groups
        return EncodedSample(*whole, num_features=num_features)

    def _with_media(
        self, pieces: list[Piece], files: dict[str, list[bytes]], key: str, room: Room
    ) -> tuple[list[Piece], list[Run]]:
        """The pieces with the texts and markers of media, and the runs of features that the pieces of media stand
        for."""
        unread = {kind: enumerate(of_kind, 1) for kind, of_kind in files.items()}
        laid_out: list[Piece] = []
        found: list[Run] = []
        is_behind = False  # text of a run stands last, which is tokenised together with what follows
        for piece in pieces:
            if is_behind and piece.kind in ("text", "markup") and not piece.learned:
                piece = replace(piece, text=laid_out.pop().text + piece.text)
            is_behind = False
            if piece.kind not in MEDIA:
                laid_out.append(piece)
                continue
            number, file = next(unread[piece.kind])
            try:
                runs = self.reader.read(piece.kind, file, key, room, number, len(files[piece.kind]))
            except ValueError as error:
                if len(files[piece.kind]) == 1:
                    raise
                raise ValueError(f"{piece.kind} {number}: {error}") from None
            for run in runs:
                lay_out(run, laid_out, self.tokenizer.control_tokens)
                room = replace(room, taken=room.taken + len(run.tokens))
            found += runs
            is_behind = laid_out[-1].kind == "text"
        return merged(laid_out), found

    def _placed(self, run: Run, start: int) -> Iterator[Placed]:
        """The positions of a run that begins at a token, and of its markers if they stand abreast."""
        if run.offsets is None:
            return
        _, *markup, _ = around(run, self.tokenizer.control_tokens)
        before, after = (len(self.tokenizer.encode(text, control=True)) if text else 0 for text in markup)
        if run.abreast and before:
            yield Placed(start - before, torch.zeros(3, before, dtype=torch.int64))
        yield Placed(start, run.offsets, run.continues)
        if run.abreast and after:
            yield Placed(start + len(run.tokens), torch.zeros(3, after, dtype=torch.int64))

    def _check_length(self, messages: Messages, most: int) -> None:
        """Refuse text of more than ``most`` tokens before all of it is tokenised: by its length, and a long text by the
        number of tokens at its beginning."""
        longest = self.tokenizer.longest
        texts = [turn["content"] for turn in messages if isinstance(turn.get("content"), str)]
        length = sum(len(text) for text in texts)
        if length > max(LONG_TEXT, most * longest):
            raise ValueError(f"sample has a text of {length:,} characters, which {most} tokens cannot hold")
        for text in texts:
            if len(text) <= PROBE:
                continue
            beginning = TAG.sub("", text[:PROBE])
            if len(self.tokenizer.encode(beginning)) > most + longest:
                raise ValueError(f"sample has a text of {len(text):,} characters, which are more than {most} tokens")

    def _check_media(self, kind: str, files: list[bytes], num_tags: int) -> None:
        if num_tags != len(files):
            raise ValueError(
                f"sample has {counted(num_tags, f'<{kind}> tag')} but {counted(len(files), kind)}: write <{kind}> into "
                f"the turns once for each"
            )
        tower = TOWERS.get(kind, "vision")  # the vision tower reads the frames of a video
        if files and getattr(self.model, tower) is None:
            raise ValueError(f"sample has {counted(len(files), kind)}, but the model has no {tower} tower")
        for data in files:
            if len(data) > self.data.max_media_bytes:
                raise ValueError(
                    f"{kind} of {len(data)} bytes exceeds data.max_media_bytes={self.data.max_media_bytes}"
                )


def groups_of(runs: list[Run], model: ModelConfig) -> list[Group]:
    """Of the images of a sample, in the order of their placeholders."""
    if not any(run.groups for run in runs):
        return []
    found = []
    for run in runs:
        if run.modality == "image":
            of_each = (Group(1, of_images([size_of("image", item, model)], model)) for item in run.items)
            found += run.groups or of_each
    return found


def placeholders(modality: str, items: list[Tensor], model: ModelConfig) -> list[int]:
    """A placeholder id for every feature of some items, or for each item of a model with cross-attention. The last
    feature of a window may be made of fewer rows."""
    tower = model.modalities[modality]
    count = sum(model.tokens_of(tower, size_of(modality, item, model)) for item in items)
    return [PLACEHOLDERS[modality]] * count


def count_features(media: Items, model: ModelConfig) -> int:
    """Of all items together."""
    sizes = ((modality, size_of(modality, item, model)) for modality, items in media.items() for item in items)
    return sum(model.features_of(model.modalities[modality], size) for modality, size in sizes)


def size_of(modality: str, item: Tensor, model: ModelConfig) -> Size:
    return audio.num_frames(item, model.audio) if modality == "audio" else (item.shape[0], item.shape[1])


def kind_of(media: dict[str, list[Any]]) -> str:
    """Modality class of a sample, by the media that it is given. A video with its audio is still a video."""
    given = [kind for kind in MEDIA if media.get(kind)]
    if len(given) > 1:
        return "mixed"
    return given[0] if given else "text"

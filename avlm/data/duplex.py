"""A recording and the agent's words with their times -> a token for each row of 80 ms.

    {"audio": "call.wav", "words": [[start_s, end_s, text], ...]}
    {"audio": "call.wav", "words": [...], "codes": "call.npy"}      for a model with a codec; or K lists of codes

A turn is words less than ``turn_gap`` apart. It begins with ``begin_token`` in the row of its first word's start; the
tokens of a word stand one a row from its start on, or as soon as there is room for them; ``end_token`` follows the last
of them, not before the word's end. Every other row has ``pad_token``. (NeMo, collections/speechlm2: a turn's text
follows its begin token without gaps there, unless its words have times.)
"""

import io
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from avlm.config.codec import CodecConfig
from avlm.config.duplex import ROW_SECONDS, DuplexConfig
from avlm.config.values import counted, shown
from avlm.data.record_keys import HARMLESS, Record, check_keys
from avlm.data.text.tokenizer import Tokenizer

EXAMPLE = '{"audio": "call.wav", "words": [[1.2, 1.5, "hello"], [1.5, 1.9, "there"]]}'


class Word(NamedTuple):
    start: float  # seconds
    end: float
    text: str


def is_duplex(record: Any) -> bool:
    """Whether a record has the agent's words instead of turns. There may be none: an agent that only listens."""
    turns = ("messages", "conversations", "context")
    return isinstance(record, dict) and "words" in record and not any(key in record for key in turns)


def read_words(record: Record) -> tuple[str, list[Word], Any]:
    """The name of the recording, the words, and what stands under codes. One-line ValueError for a record that is not
    of this form."""
    check_keys(record, {"audio", "words", "codes"}, "the record", HARMLESS)
    name, given = record.get("audio"), record["words"]
    if not isinstance(name, str) or not name:
        raise ValueError(f"a record with words needs the name of a file under audio, such as {EXAMPLE}")
    wrong = [word for word in given if not _is_word(word)] if isinstance(given, list) else [given]
    if wrong:
        raise ValueError(
            "words must be a list of [start_s, end_s, text] with a text that is not empty and 0 <= start_s <= end_s, "
            f"and this has {shown(wrong[0])}"
        )
    words = [Word(*word) for word in given]
    for word, following in pairwise(words):
        if following.start < word.start:
            raise ValueError(f"words must ascend: {shown(following.text)!r} starts before {shown(word.text)!r}")
    return name, words, record.get("codes")


def _is_word(word: Any) -> bool:
    if not (isinstance(word, list) and len(word) == 3 and isinstance(word[2], str) and word[2].strip()):
        return False
    times = word[:2]
    return all(type(time) in (int, float) for time in times) and 0 <= times[0] <= times[1] < float("inf")


def codes_of(given: Any, num_rows: int, codec: CodecConfig | None) -> Tensor | None:
    """The codes of speech of each row, int64 (T, K), of a list for each codebook or of the bytes of a .npy file with
    such lists. ValueError for those that do not fit the rows or the codec."""
    if codec is None or given is None:
        if codec is not None or given is not None:
            has, lacks = ("model.codec", "the record has no codes") if codec else ("codes", "the model has no codec")
            raise ValueError(f"{lacks}: a record has codes where the model has a codec, and this one has only {has}")
        return None
    try:
        content = numpy.load(io.BytesIO(given), allow_pickle=False) if isinstance(given, bytes) else numpy.array(given)
    except (ValueError, OSError, EOFError):
        form = (
            "the content of its file is no array in NumPy's .npy format"
            if isinstance(given, bytes)
            else ("its lists are not of one length, or hold other things than numbers")
        )
        raise ValueError(f"codes cannot be read: {form}") from None
    if content.dtype.kind not in "iu" or content.shape != (codec.num_codebooks, num_rows):
        raise ValueError(
            f"codes must be whole numbers of {codec.num_codebooks} codebooks and {num_rows} rows of {ROW_SECONDS:g} s, "
            f"not {content.dtype} of shape {content.shape}"
        )
    if content.size and not 0 <= content.min() <= content.max() < codec.codebook_size:
        raise ValueError(
            f"codes must lie in 0..{codec.codebook_size - 1}, not in {content.min()}..{content.max()}: see "
            "model.codec.codebook_size"
        )
    return torch.from_numpy(content.T.astype(numpy.int64))


class RowText:
    """Words to tokens of rows and back, with the tokens of ``data.duplex``."""

    def __init__(self, config: DuplexConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer
        for key in ("pad_token", "begin_token", "end_token"):
            token = getattr(config, key)
            if token not in tokenizer.control_tokens:
                raise ValueError(f"data.duplex.{key}: {shown(token)!r} is no control token of {tokenizer.file}")
        self.pad, self.begin, self.end = map(tokenizer.id_of, (config.pad_token, config.begin_token, config.end_token))

    def rows(self, words: list[Word], num_rows: int) -> Tensor:
        """The token that is said in each row, int64 (T,). ValueError if the recording ends before a word is said. The
        end of a turn may lie past it."""
        said_T = torch.full((num_rows,), self.pad)
        row = 0  # the first that is free
        ends = list(accumulate((word.end for word in words), max))  # of words that overlap the last counts
        for i, word in enumerate(words):
            begins = i == 0 or word.start - ends[i - 1] >= self.config.turn_gap
            text = word.text.strip()
            ids = self.tokenizer.encode(text if begins else f" {text}", continues=True)
            ids = [self.begin, *ids] if begins else ids
            row = max(row, self._row(word.start))
            if row + len(ids) > num_rows:
                raise ValueError(
                    f"the recording has {counted(num_rows, 'row')} of {ROW_SECONDS:g} s, and {shown(text)!r} at "
                    f"{word.start:g} s needs {counted(row + len(ids), 'row')}: add silence to its end"
                )
            said_T[row : row + len(ids)] = torch.tensor(ids)
            row += len(ids)
            if i + 1 == len(words) or words[i + 1].start - ends[i] >= self.config.turn_gap:
                row = max(row, self._row(ends[i]))
                said_T[row : row + 1] = self.end
                row += 1
        return said_T

    def _row(self, seconds: float) -> int:
        return int(seconds / ROW_SECONDS + 1e-6) + self.config.delay

    def inputs(self, said_T: Tensor) -> Tensor:
        """The token that each row's input is made of: what was said in the row before."""
        return torch.cat([torch.tensor([self.pad]), said_T[:-1]])

    def factors(self, said_T: Tensor) -> Tensor | None:
        """The weight of each row in the loss, float32 (T,); None if all are 1."""
        weights = {**dict.fromkeys(("pad", "begin", "end", "word"), 1.0), **self.config.weights}
        if set(weights.values()) == {1.0}:
            return None
        factor_T = torch.full((len(said_T),), weights["word"])
        for name in ("pad", "begin", "end"):
            factor_T[said_T == getattr(self, name)] = weights[name]
        return factor_T

    def words(self, said: list[int]) -> list[Word]:
        """What tokens of rows say, with the times of their rows. A word begins with a blank, or after another token
        than that of a word."""
        found: list[Word] = []
        ids: list[int] = []  # of the word that is being said
        start = 0
        for row, token in enumerate([*said, self.pad]):
            is_word = token not in (self.pad, self.begin, self.end)
            if ids and (row > start + len(ids) or not is_word or self.tokenizer.decode([token])[:1] == " "):
                text = self.tokenizer.decode(ids, control=False).strip()
                end = (start + len(ids)) * ROW_SECONDS
                found.append(Word(start * ROW_SECONDS, end, text))
                ids = []
            if is_word:
                start = start if ids else row
                ids.append(token)
        return found

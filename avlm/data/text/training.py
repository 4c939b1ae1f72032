"""Trains a byte-level BPE through the ``tokenizers`` library, and writes it as a Hugging Face folder."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from avlm.config.run import DataConfig, is_json
from avlm.data.jsonl import Records
from avlm.data.sample import parse
from avlm.data.text.pieces import ROLES, TAG
from avlm.data.text.templates import FIELD, TEMPLATES, jinja

PAD = "<|endoftext|>"
BOS, EOS = "<s>", "</s>"  # of templates without control tokens of their own
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def texts_of(file: Path, template: str) -> Iterator[str]:
    """The lines of a .txt file, or the turns of a file of records, each with the words that the template puts around
    it. ValueError for a record that is not read."""
    if file.suffix == ".txt":
        if not file.is_file():
            raise FileNotFoundError(f"no text file {file}")
        with file.open(encoding="utf-8") as lines:
            yield from lines
        return
    if not is_json(file.name):
        raise ValueError(f"{file} is no .txt, .json or .jsonl file")
    around = _words_of(template)
    records = Records(file, DataConfig(train=str(file)))
    for number in range(len(records)):
        try:
            sample = parse(records[number], _no_media, records.key(number))
        except ValueError as error:
            raise ValueError(f"{records.key(number)}: {error}") from None
        for message in sample.messages:
            yield TAG.sub("", message["content"])
            yield from around[message["role"]]
        yield from (word.text for word in sample.words or ())


def train_tokenizer(texts: Iterable[str], vocab_size: int, template: str, folder: Path) -> int:
    """Write a folder with a tokenizer for a template. Returns its number of tokens, fewer than ``vocab_size`` if the
    texts have no more parts that occur twice."""
    known = TEMPLATES[template]
    control = [PAD, *(known.control_tokens or [BOS, EOS])]
    if "{bos}" in known.opening and BOS not in control:
        control.append(BOS)
    least = len(control) + len(ALPHABET)
    if vocab_size < least:
        raise ValueError(
            f"a vocabulary of {vocab_size} tokens has no room for all bytes and control tokens: give {least}"
        )
    if (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder} holds a tokenizer already: give another folder")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in control],
        initial_alphabet=ALPHABET,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    begin = {"bos_token": known.opening.format(bos=BOS)} if known.opening else {}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **begin,
        "eos_token": known.end if known.control_tokens else EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": jinja(template, {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return tokenizer.get_vocab_size()


def _words_of(template: str) -> dict[str, list[str]]:
    """Role -> texts between the control tokens that a template puts around a turn."""
    found = {}
    for role in ROLES:
        turn = TEMPLATES[template].turns[role]
        pattern = (turn.header + turn.text + turn.end).replace("{role}", role)
        found[role] = [part for part in re.split(FIELD, pattern) if part and not FIELD.fullmatch(part)]
    return found


def _no_media(name: str) -> bytes:
    return b""

"""A Hugging Face tokenizer folder, read as transformers' AutoTokenizer reads it.

Names of special tokens (bos_token, eos_token, ...) come from tokenizer_config.json; special_tokens_map.json overrides
it where the config lists no ``added_tokens_decoder``. Added tokens come from tokenizer.json, and from the
``added_tokens_decoder`` or added_tokens.json what tokenizer.json lacks. A tokenizer without a chat template has that of
the processor next to it, chat_template.json.
"""

import functools
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from avlm.config.values import shown
from avlm.storage.hub import may_be_on_hub, resolve

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Lists of more special tokens; the first may be an object.
EXTRA = ("extra_special_tokens", "additional_special_tokens")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # how an added token is found in a text


@functools.cache
def _fetched(name: str) -> Path:
    """The local path of a tokenizer; a name of the Hub is fetched once a process."""
    path = Path(name).expanduser()
    return resolve(name, weights=False) if may_be_on_hub(name) and not path.exists() else path


class Tokenizer:
    """A Hugging Face ``tokenizer.json`` and the files next to it: ``names`` of special tokens, as Jinja templates get
    them, and the chat template. Any fault in them, even one that only shows in a text, is a ValueError of one line."""

    def __init__(self, path: str | Path) -> None:
        path = _fetched(str(path))
        self.file = path / "tokenizer.json" if path.is_dir() else path
        if not self.file.is_file():
            raise FileNotFoundError(
                f"no tokenizer {self.file}: data.tokenizer is a folder with tokenizer.json, the file, or a Hub name"
            )
        with one_line(f"{self.file} is no tokenizer"):
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self.file))
            self._tokenizer.no_truncation()  # the file may ask for either
            self._tokenizer.no_padding()
        config = self.config
        self.names = self._names(config)
        self.bos, self.eos = self.names.get("bos_token"), self.names.get("eos_token")
        self.chat_template = self._chat_template(config)
        self._add_tokens(config)
        # SentencePiece vocabularies open every text with a blank. Inside a line that blank would be wrong, so a
        # continuation is encoded after a newline whose ids are dropped.
        line_break = self.encode("\n")
        self._before = line_break if self.encode("a") != self.encode("\na")[len(line_break) :] else []
        # After a control token SentencePiece adds the blank again ("always") or not ("first").
        control = next(iter(self.control_tokens), "")
        self.blank_after_control = self.encode(control + "a", control=True)[bool(control) :] == self.encode("a")

    @property
    def config(self) -> dict[str, Any]:
        """The keys of tokenizer_config.json, none without that file."""
        return self._keys("tokenizer_config.json")

    @property
    def size(self) -> int:
        """Rows that an embedding needs for every id."""
        with one_line(f"{self.file} is no tokenizer"):
            return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def longest(self) -> int:
        """Characters of the longest token: no text has more of them than this for each of its ids."""
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)))

    def encode(self, text: str, *, continues: bool = False, control: bool = False) -> list[int]:
        """Ids of a text, nothing added. ``continues``: it continues another text; ``control``: read control tokens."""
        before = self._before if continues else []
        if before:
            text = "\n" + text
        self._tokenizer.encode_special_tokens = not control
        with one_line(f"{self.file} cannot encode a text"):
            return self._tokenizer.encode(text, add_special_tokens=False).ids[len(before) :]

    def encode_as_published(self, text: str, begins: bool) -> list[int]:
        """Ids of a text in which control tokens are read. If it ``begins`` a prompt, they have the tokens around them
        that the file itself adds."""
        self._tokenizer.encode_special_tokens = False
        with one_line(f"{self.file} cannot encode a text"):
            return self._tokenizer.encode(text, add_special_tokens=begins).ids

    def decode(self, ids: list[int], *, control: bool = True) -> str:
        """Text of ids; ``control``: control tokens are shown."""
        with one_line(f"{self.file} cannot decode ids"):
            return self._tokenizer.decode(ids, skip_special_tokens=not control)

    def find(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def id_of(self, token: str) -> int:
        number = self.find(token)
        if number is None:
            raise ValueError(f"{self.file} has no token {shown(token)!r}")
        return number

    @functools.cached_property
    def control_tokens(self) -> list[str]:
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]

    @functools.cached_property
    def added_tokens(self) -> list[str]:
        """Control tokens, and others that are found in a text before it is split."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]

    def added_entries(self) -> list[dict[str, Any]]:
        """The added tokens as a tokenizer.json lists them."""
        entries = []
        for number, token in sorted(self._tokenizer.get_added_tokens_decoder().items()):
            values = {key: getattr(token, key) for key in ("content", *FLAGS, "special")}
            entries.append({"id": number, **values})
        return entries

    def _keys(self, name: str) -> dict[str, Any]:
        """The JSON object of a file next to tokenizer.json."""
        file = self.file.with_name(name)
        if not file.is_file():
            return {}
        with one_line(f"{file} is not valid JSON"):
            keys = json.loads(file.read_bytes())
        if not isinstance(keys, dict):
            raise ValueError(f"{file} must hold keys and values, not {shown(keys)}")
        return keys

    def _names(self, config: dict[str, Any]) -> dict[str, str]:
        """Special tokens by name: the seven of NAMES, and others that tokenizer_config.json names ``..._token``."""
        named = [(key, value) for key, value in config.items() if key.endswith("_token") and key not in NAMES]
        extra = config.get(EXTRA[0])
        if isinstance(extra, dict):
            named += extra.items()
        names = {key: value for key, value in named if isinstance(value, str) and value}
        sources = {"tokenizer_config.json": config}
        if "added_tokens_decoder" not in config:
            sources["special_tokens_map.json"] = self._keys("special_tokens_map.json")
        for file, keys in sources.items():
            for key in NAMES:
                if key not in keys:
                    continue
                names.pop(key, None)
                token = self._content(keys[key], file, key)
                if token is not None:
                    names[key] = token
        return names

    def _content(self, value: Any, file: str, key: str) -> str | None:
        token = value.get("content") if isinstance(value, dict) else value
        if not isinstance(token, str) and value is not None and value is not False:
            raise ValueError(
                f"{self.file.with_name(file)}: {key} must be a text, or an object with one under content, "
                f"not {shown(value)}"
            )
        return token or None

    def _chat_template(self, config: dict[str, Any]) -> str | None:
        file = self.file.with_name("chat_template.jinja")
        if file.is_file():
            with one_line(f"{file} is no text"):
                return file.read_text(encoding="utf-8")
        template = config.get("chat_template") or self._keys("chat_template.json").get("chat_template")
        if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):  # several named ones
            template = {entry.get("name"): entry.get("template") for entry in template}
        if isinstance(template, dict):
            template = template.get("default")
        if template is not None and not isinstance(template, str):
            file = self.file.with_name("tokenizer_config.json")
            raise ValueError(f"{file}: chat_template must be a text or a list of named ones, not {shown(template)}")
        return template

    def _add_tokens(self, config: dict[str, Any]) -> None:
        """Add the tokens that the other files call added or special and tokenizer.json does not.

        Tokens without an id in the vocabulary are added only if the chat template or the end of a turn needs them: an
        unused id is no reason to ask for a larger embedding.
        """
        needed, known = (self.bos, self.eos), set(self.added_tokens)
        missing, control = [], [self.bos, self.eos]
        for number, token in self._listed(config):
            content = token.content
            is_needed = content in needed or content in (self.chat_template or "")
            if content in known:
                control += [content] if token.special else []
            elif content and (is_needed or self.find(content) is not None):
                missing.append((number, token))
                known.add(content)
        self._add([token for _, token in missing])  # at once: the library goes over all of them in each call
        for number, token in missing:
            if self.find(token.content) != number:
                raise ValueError(
                    f"{self.file.parent} gives the token {shown(token.content)!r} the id {number}, but tokenizer.json "
                    f"has {self.find(token.content)} for it: they belong to different tokenizers"
                )
        for key in EXTRA:
            control += texts(config.get(key))
            if "added_tokens_decoder" not in config:
                control += texts(self._keys("special_tokens_map.json").get(key))
        self.make_control([token for token in control if token and self.find(token) is not None])

    def make_control(self, tokens: Iterable[str]) -> bool:
        """Read tokens of the vocabulary as control tokens from here on. Whether any of them was none before."""
        present = set(self.control_tokens)
        known = {token.content: token for token in self._tokenizer.get_added_tokens_decoder().values()}
        new = []
        for content in dict.fromkeys(tokens):
            if content in present:
                continue
            flags = {"normalized": False}
            if content in known:
                flags = {flag: getattr(known[content], flag) for flag in FLAGS}
            new.append(AddedToken(content, **flags, special=True))
        if new:
            self._add(new)
        return bool(new)

    def _add(self, tokens: list[AddedToken]) -> None:
        self._tokenizer.add_tokens(tokens)
        self.__dict__.pop("control_tokens", None)
        self.__dict__.pop("added_tokens", None)

    def _listed(self, config: dict[str, Any]) -> list[tuple[int, AddedToken]]:
        """(id, token) of the lists next to tokenizer.json, in the order of the ids."""
        if "added_tokens_decoder" in config:
            file = "tokenizer_config.json"
            listed = config["added_tokens_decoder"] or {}
            pairs = listed.items() if isinstance(listed, dict) else [(None, listed)]
        else:
            file = "added_tokens.json"
            special = set(self.names.values())
            numbers = self._keys(file).items()
            pairs = [(number, {"content": content, "special": content in special}) for content, number in numbers]
        found = []
        for number, entry in pairs:
            fields = entry if isinstance(entry, dict) else {"content": entry}
            content = fields.get("content")
            if not str(number).isdecimal() or isinstance(number, bool) or not isinstance(content, str):
                file = self.file.with_name(file)
                raise ValueError(f"{file}: an added token must have an id and a text, not {shown([number, entry])}")
            flags = {flag: fields[flag] for flag in (*FLAGS, "special") if isinstance(fields.get(flag), bool)}
            found.append((int(number), AddedToken(content, **flags)))
        return sorted(found, key=lambda pair: pair[0])


def texts(tokens: Any) -> list[str]:
    """The texts of a list of tokens, which may be objects."""
    if not isinstance(tokens, list):
        return []
    found = []
    for token in tokens:
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and content:
            found.append(content)
    return found


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turns whatever is raised inside into a ValueError of one line. A panic of Rust is no Exception to Python."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {said(error)}") from None


def said(error: BaseException) -> str:
    """The message of an error, on one line that is printable and short."""
    return shown(" ".join(str(error).split()) or type(error).__name__)

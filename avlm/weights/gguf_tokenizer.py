"""A tokenizer as llama.cpp reads it, from the metadata of a GGUF file.

llama.cpp has code for each way to cut a text into words, which a file names. Byte-level BPE (Llama 3, Qwen, SmolLM, the
tokenizers that ``avlm.data.tokenizer`` trains) and the BPE of SentencePiece (Llama 2, Mistral 7B) are written.
"""

import json
from collections.abc import Mapping
from typing import Any

from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.data.text.chat import Chat
from avlm.data.text.tokenizer import Tokenizer
from avlm.families.llama import QWEN2_WORDS
from avlm.storage.model_folder import read_json

MAX_BYTES = 2**28  # of a tokenizer.json
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's types of tokens
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's name -> its words. Its "tekken" (Mistral's) is not among them: it parts marks of Hindi and Thai otherwise.
WORDS = {"llama-bpe": LLAMA3_WORDS, "qwen2": QWEN2_WORDS}
WHOLE_WORDS = ("llama-bpe",)  # where a word that is a token is not taken apart (ignore_merges)
BLANK = "▁"
FLAGS = ("single_word", "lstrip", "rstrip")


def tokenizer_keys(tokenizer: Tokenizer, data: DataConfig, rows: int, template: str) -> dict[str, Any]:
    """Metadata with ``rows`` tokens: those that the vocabulary lacks are unused. ``template``: of chats, in Jinja."""
    tree = read_json(tokenizer.file, MAX_BYTES)
    model = tree.get("model") or {}
    if model.get("type") != "BPE":
        raise _refused(tokenizer, f"a model of type {model.get('type')}", "BPE")
    if model.get("byte_fallback"):
        keys = _sentencepiece_keys(tokenizer, tree, rows)
    else:
        keys = _byte_level_keys(tokenizer, tree, rows)
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for ours, theirs in named.items():
        token = tokenizer.names.get(f"{ours}_token")
        if token is not None and tokenizer.find(token) is not None:
            keys[f"{theirs}_token_id"] = tokenizer.id_of(token)
    ends = [token for token in Chat(tokenizer, data.template).stop_ids if token != keys.get("eos_token_id")]
    if ends:
        keys["eot_token_id" if "eos_token_id" in keys else "eos_token_id"] = ends[0]
    keys |= {"add_bos_token": False, "add_eos_token": False}  # templates spell them out
    return {**{f"tokenizer.ggml.{key}": value for key, value in keys.items()}, "tokenizer.chat_template": template}


def _refused(tokenizer: Tokenizer, found: str, known: str) -> ValueError:
    return ValueError(f"GGUF cannot hold the tokenizer {tokenizer.file}, which has {found}: llama.cpp knows {known}")


def _byte_level_keys(tokenizer: Tokenizer, tree: Mapping[str, Any], rows: int) -> dict[str, Any]:
    name = pre_tokenizer(tree)
    if name is None:
        found = f"the pre_tokenizer {shown(json.dumps(tree.get('pre_tokenizer'), ensure_ascii=False))}"
        raise _refused(tokenizer, found, f"those of gpt-2, smollm, {', '.join(WORDS)}")
    normalizer = (tree.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # text is in this form nearly always, and llama.cpp leaves it as it is
        raise _refused(tokenizer, f"the normalizer {normalizer}", "none")
    if bool(tree["model"].get("ignore_merges")) != (name in WHOLE_WORDS):
        raise _refused(tokenizer, f"ignore_merges={tree['model'].get('ignore_merges')}", f"{name} with the opposite")
    return {"model": "gpt2", "pre": name, "merges": _merges(tree), **_tokens(tokenizer, tree, rows)}


def pre_tokenizer(tree: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of what cuts the texts of a tokenizer.json into words, None if it has none."""
    given = tree.get("pre_tokenizer") or {}
    parts = given.get("pretokenizers", [given])
    if any(part.get("add_prefix_space") for part in parts) or [part.get("type") for part in parts][-1:] != [
        "ByteLevel"
    ]:
        return None
    before, splits = parts[:-1], parts[-1].get("use_regex", True)
    if splits and not before:
        return "gpt-2"
    if splits and before == [{"type": "Digits", "individual_digits": True}]:
        return "smollm"
    for name, words in WORDS.items():
        split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
        if not splits and before == [split]:
            return name
    return None


def _sentencepiece_keys(tokenizer: Tokenizer, tree: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """llama.cpp merges the pair whose token has the highest score: the token that is made first gets it."""
    first = {"type": "Prepend", "prepend": BLANK}
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    metaspace = {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": "always", "split": False}
    legacy = tree.get("normalizer") == {"type": "Sequence", "normalizers": [first, blanks]}
    if not (legacy and tree.get("pre_tokenizer") is None) and tree.get("pre_tokenizer") != metaspace:
        found = f"the pre_tokenizer {shown(json.dumps(tree.get('pre_tokenizer'), ensure_ascii=False))}"
        raise _refused(tokenizer, found, f"texts whose blanks are {BLANK}, with one before each")
    keys = _tokens(tokenizer, tree, rows)
    made: dict[str, int] = {}
    for rank, merge in enumerate(_merges(tree)):
        made.setdefault(merge.replace(" ", ""), rank)
    unknown = tree["model"].get("unk_token")
    for i, token in enumerate(keys["tokens"]):
        if len(token) == 6 and token.startswith("<0x"):
            keys["token_type"][i] = BYTE
        elif token == unknown:
            keys["token_type"][i] = UNKNOWN
    keys["scores"] = [-float(made.get(token, len(made))) for token in keys["tokens"]]
    return {"model": "llama", "pre": "default", "add_space_prefix": True, **keys}


def _merges(tree: Mapping[str, Any]) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in tree["model"]["merges"]]


def _tokens(tokenizer: Tokenizer, tree: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The tokens by their ids, and their types."""
    tokens, types = [f"[UNUSED{i}]" for i in range(rows)], [UNUSED] * rows
    for token, number in tree["model"]["vocab"].items():
        tokens[number], types[number] = token, NORMAL
    for entry in tokenizer.added_entries():
        wrong = [flag for flag in FLAGS if entry[flag]]
        if wrong:
            found = f"the token {shown(entry['content'])!r} with {wrong[0]}"
            raise _refused(tokenizer, found, "tokens that leave what is around them as it is")
        tokens[entry["id"]], types[entry["id"]] = entry["content"], CONTROL if entry["special"] else USER_DEFINED
    return {"tokens": tokens, "token_type": types}

"""The tokenizer of an exported folder, as transformers reads it: media tokens, chat template, what ends an answer."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from avlm.config.run import DataConfig
from avlm.data.text.chat import MEDIA, Chat, Tokenizer
from avlm.data.text.jinja_template import JinjaTemplate
from avlm.data.text.tokenizer import EXTRA, texts
from avlm.families.pretrained import read_json, stop_ids
from avlm.storage.model_folder import write_json

MEDIA_TOKENS = {"llava": "<image>", "voxtral": "[AUDIO]"}  # format -> what stands for features
MAX_BYTES = 2**28  # of a tokenizer.json: those of 262,144 words have 33 MB
TOKENIZER_FILES = ["chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt"]
# Of tokenizer_config.json: what tokenizer.json says too, and what would have transformers build a tokenizer of its own.
OWN_KEYS = ("added_tokens_decoder", "auto_map", "tokenizer_file", "split_special_tokens", "add_prefix_space")
# Model types for which transformers takes its own class whatever tokenizer_config.json names, unless that has an
# "auto_map", which it then leaves aside (transformers 5.17, AutoTokenizer.from_pretrained).
REBUILT = ("qwen2",)
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# avlm.data.text.chat's templates as expressions of Jinja: what opens a conversation, a turn, what asks for an answer.
TURNS = {
    "llama3": (
        "'<|begin_of_text|>'",
        "'<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + text | trim + '<|eot_id|>'",
        "'<|start_header_id|>assistant<|end_header_id|>\\n\\n'",
    ),
    "chatml": ("''", "'<|im_start|>' + role + '\\n' + text + '<|im_end|>\\n'", "'<|im_start|>assistant\\n'"),
    "llava": (
        "bos_token",
        "{'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[role] + text | trim"
        " + (eos_token if role == 'assistant' else ' ')",
        "'ASSISTANT:'",
    ),
    "plain": ("bos_token", "text + (eos_token if role == 'assistant' else '')", "''"),
}
SYSTEM_PROMPT = (
    "{% if 'system' not in messages | map(attribute='role') %}{% set messages = SYSTEM + messages %}{% endif %}"
)
CHAT_TEMPLATE = """\
{{- OPENING -}}
{%- for message in messages -%}
  {%- set role = message.role -%}
  {%- set text -%}
    {%- if message.content is string -%}
      {{- message.content | replace('<audio>', AUDIO) -}}
    {%- else -%}
      {%- for part in message.content -%}
        {%- if part.type == 'text' -%}
          {{- part.text -}}
        {%- elif part.type in MEDIA -%}
          {{- MEDIA[part.type] -}}
          {{- '\\n' if not loop.last and loop.nextitem.type == 'text' -}}
        {%- else -%}
          {{- raise_exception('this template knows no part of type ' ~ part.type) -}}
        {%- endif -%}
      {%- endfor -%}
    {%- endif -%}
  {%- endset -%}
  {{- TURN -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ QUESTION }}{% endif -%}
"""


def write_tokenizer(
    tokenizer: Tokenizer, data: DataConfig, folder: Path, format: str, token: int | None, model_type: str | None = None
) -> None:
    """The files of ``data.tokenizer``, with the chat template of ``data`` and the format's media token, if it has one,
    under the id ``token``; and generation_config.json with the ids that end an answer.

    tokenizer.json says all of what we encode with. So that transformers, for a model of ``model_type``, encodes with
    nothing else, tokenizer_config.json names the class that reads that file as it is, and lists no tokens of its own.
    """
    for name in TOKENIZER_FILES:
        if tokenizer.file.with_name(name).is_file():
            shutil.copyfile(tokenizer.file.with_name(name), folder / name)
    tree = read_json(tokenizer.file, MAX_BYTES)
    rebuilt = model_type in REBUILT and not _is_qwen2(tree)
    write_json(folder / "tokenizer.json", {**tree, "added_tokens": tokenizer.added_entries()})
    config = {key: value for key, value in tokenizer.config.items() if key not in (*OWN_KEYS, *EXTRA)}
    config |= tokenizer.names
    extra = [word for key in EXTRA for word in texts(tokenizer.config.get(key)) if tokenizer.find(word) is not None]
    config |= {EXTRA[0]: list(dict.fromkeys(extra))} if extra else {}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config |= {"auto_map": {"AutoTokenizer": [None, None]}} if rebuilt else {}
    template = chat_template(tokenizer, data, format)
    if template != tokenizer.chat_template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        config.pop("chat_template", None)
    write_json(folder / "tokenizer_config.json", config)
    if format in MEDIA_TOKENS:
        _add_token(folder, MEDIA_TOKENS[format], token)
    stops = {*stop_ids(tokenizer.file.parent), *Chat(tokenizer, data.template).stop_ids}
    write_json(folder / "generation_config.json", {"eos_token_id": sorted(stops)})


def chat_template(tokenizer: Tokenizer, data: DataConfig, format: str) -> str:
    """``data.template`` with ``data.system`` in Jinja. A turn's content is a text with tags, or a list of texts and
    media, in which a text that follows media begins a line."""
    tags = {kind: f"<{kind}>" for kind in MEDIA}
    words = {"decoder": {}, "llava": {"image": tags["image"]}, "voxtral": {"audio": MEDIA_TOKENS["voxtral"]}}
    words = words.get(format, tags)
    template = tokenizer.chat_template
    if data.template == "tokenizer":
        block = JinjaTemplate(tokenizer).block  # what stands before an answer in training, besides the prompt
        if block:
            asks = f"{{%+ if add_generation_prompt %}}{{{{ {json.dumps(block, ensure_ascii=False)} }}}}{{% endif %}}"
            template = template.removesuffix("\n") + asks  # a line break at the end of a template is not written
    else:
        values = dict(zip(("OPENING", "TURN", "QUESTION"), TURNS[data.template], strict=True))
        values |= {"MEDIA": json.dumps(words), "AUDIO": json.dumps((tags | words)["audio"])}
        template = re.sub("|".join(values), lambda name: values[name[0]], CHAT_TEMPLATE)
    if not data.system:
        return template
    system = [{"role": "system", "content": data.system}]
    return SYSTEM_PROMPT.replace("SYSTEM", json.dumps(system, ensure_ascii=False)) + template


def media_token(tokenizer: Tokenizer | None, word: str, vocab_size: int) -> int:
    """The id of a media token, or the first that the tokenizer leaves free."""
    if tokenizer is None:
        return vocab_size
    return tokenizer.size if tokenizer.find(word) is None else tokenizer.find(word)


def _is_qwen2(tree: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is what transformers' Qwen2Tokenizer makes of its vocabulary."""
    words = [{"type": "Split", "pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated", "invert": False}]
    words += [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
    splitter, model = tree.get("pre_tokenizer") or {}, tree.get("model") or {}
    found = [{key: part.get(key) for key in word} for part, word in zip(splitter.get("pretokenizers") or [], words)]
    has_pad = any(token["content"] == "<|endoftext|>" for token in tree.get("added_tokens") or [])  # else it is added
    plain = has_pad and not any(
        model.get(key) for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    )
    return found == words and tree.get("normalizer") == {"type": "NFC"} and model.get("type") == "BPE" and plain


def _add_token(folder: Path, word: str, token: int) -> None:
    """Make a word a special token, unless it is an added one."""
    tree = read_json(folder / "tokenizer.json", MAX_BYTES)
    added = tree.get("added_tokens") or []
    if any(each["content"] == word for each in added):
        return
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    entry = {"id": token, "content": word, **flags, "special": True}
    write_json(folder / "tokenizer.json", {**tree, "added_tokens": [*added, entry]})

"""The tokenizer of an exported folder, as transformers reads it: media tokens, chat template, what ends an answer."""

import json
import re
import shutil
from pathlib import Path

from avlm.config import DataConfig
from avlm.data.chat import MEDIA, Chat, Tokenizer
from avlm.model_folder import write_json
from avlm.pretrained import read_json, stop_ids

MEDIA_TOKENS = {"llava": "<image>", "voxtral": "[AUDIO]"}  # format -> what stands for features
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
TOKENIZER_FILES += ["chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt"]
# avlm.data.chat's templates as expressions of Jinja: what opens a conversation, a turn, what asks for an answer.
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


def write_tokenizer(tokenizer: Tokenizer, data: DataConfig, folder: Path, format: str, token: int | None) -> None:
    """The files of ``data.tokenizer``, with the chat template of ``data`` and the format's media token, if it has one,
    under the id ``token``; and generation_config.json with the ids that end an answer."""
    for name in TOKENIZER_FILES:
        if tokenizer.file.with_name(name).is_file():
            shutil.copyfile(tokenizer.file.with_name(name), folder / name)
    shutil.copyfile(tokenizer.file, folder / "tokenizer.json")
    if data.template != "tokenizer" or data.system:
        (folder / "chat_template.jinja").write_text(chat_template(tokenizer, data, format))
        config_file = folder / "tokenizer_config.json"
        if config_file.is_file():
            write_json(config_file, {k: v for k, v in read_json(config_file).items() if k != "chat_template"})
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
    if data.template != "tokenizer":
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


def _add_token(folder: Path, word: str, token: int) -> None:
    """Make a word a special token, unless it is an added one. Classes of transformers that build a tokenizer of their
    own, as Qwen2Tokenizer does, take such tokens from the list of tokenizer_config.json where it has one."""
    tree = read_json(folder / "tokenizer.json")
    added = tree.get("added_tokens") or []
    if any(each["content"] == word for each in added):
        return
    entry = {
        "content": word,
        **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        "special": True,
    }
    write_json(folder / "tokenizer.json", {**tree, "added_tokens": [*added, {"id": token, **entry}]})
    config_file = folder / "tokenizer_config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"][str(token)] = entry
        write_json(config_file, config)

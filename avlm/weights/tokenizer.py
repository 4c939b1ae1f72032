"""The tokenizer of an exported folder, as transformers reads it: media tokens, chat template, stop tokens."""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from avlm.config.run import DataConfig
from avlm.data.text import templates
from avlm.data.text.chat import Chat
from avlm.data.text.jinja_template import JinjaTemplate
from avlm.data.text.tokenizer import EXTRA, Tokenizer, texts
from avlm.families.door import rebuilds_tokenizer
from avlm.storage.model_folder import read_json, write_json
from avlm.weights.folder import stop_ids

MAX_BYTES = 2**28  # of a tokenizer.json: one with 262,144 words has 33 MB
COPIED = ["chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt"]
# Keys of tokenizer_config.json that repeat tokenizer.json, or would make transformers build a different tokenizer.
LEFT_OUT = ("added_tokens_decoder", "auto_map", "tokenizer_file", "split_special_tokens", "add_prefix_space", *EXTRA)
SYSTEM_PROMPT = (
    "{% if 'system' not in messages | map(attribute='role') %}{% set messages = SYSTEM + messages %}{% endif %}"
)
# Before a template that does not know some media: parts of these become texts.
ADDED_MEDIA = """\
{%- set read = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message.content is string -%}
    {%- set content = message.content REPLACED -%}
  {%- else -%}
    {%- set turn = namespace(parts=[]) -%}
    {%- for part in message.content -%}
      {%- set text = {'type': 'text', 'text': ADDED[part.type]} if part.type in ADDED else part -%}
      {%- set turn.parts = turn.parts + [text] -%}
    {%- endfor -%}
    {%- set content = turn.parts -%}
  {%- endif -%}
  {%- set read.messages = read.messages + [dict(message, content=content)] -%}
{%- endfor -%}
{%- set messages = read.messages -%}
"""


def write_tokenizer(
    tokenizer: Tokenizer,
    data: DataConfig,
    folder: Path,
    media: dict[str, str],
    ids: dict[str, int],
    model_type: str | None = None,
    names: Mapping[str, str] = {},
    added: Iterable[str] = (),
    own_template: str | None = None,
) -> None:
    """The files of ``data.tokenizer`` with the chat template of ``data``, and generation_config.json with the ids that
    end an answer.

    ``media``: kind -> what stands for it in prompts. ``ids``: those of the tokens that the format needs, which the
    tokenizer may lack. ``names``: by which its processor asks for some of them. ``added``: the kinds of media that the
    tokenizer's own template does not know. ``own_template``: what the format's processor takes, if that is not all of a
    prompt. transformers has to encode with
    tokenizer.json alone, as we do, whatever class it prefers for ``model_type``. So tokenizer_config.json names the
    class that reads that file unchanged, and lists no tokens of its own.
    """
    for name in COPIED:
        if tokenizer.file.with_name(name).is_file():
            shutil.copyfile(tokenizer.file.with_name(name), folder / name)
    tree = read_json(tokenizer.file, MAX_BYTES)
    is_rebuilt = rebuilds_tokenizer(model_type, tree)
    write_json(folder / "tokenizer.json", {**tree, "added_tokens": _with_tokens(tokenizer.added_entries(), ids)})
    template = own_template or chat_template(tokenizer, data, media, added)
    config = {**names, **_tokenizer_config(tokenizer)}
    if is_rebuilt:
        config["auto_map"] = {"AutoTokenizer": [None, None]}
    has_media = any(token in template for token in ids)  # then processors use it as well, and they read this file alone
    is_there = (folder / "chat_template.jinja").is_file() or config.get("chat_template") is not None
    if has_media or not is_there or template != tokenizer.chat_template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        config.pop("chat_template", None)
    write_json(folder / "tokenizer_config.json", config)
    stops = {*stop_ids(tokenizer.file.parent), *Chat(tokenizer, data.template).stop_ids}
    write_json(folder / "generation_config.json", {"eos_token_id": sorted(stops)})


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    config = {key: value for key, value in tokenizer.config.items() if key not in LEFT_OUT}
    config |= tokenizer.names
    extra = [word for key in EXTRA for word in texts(tokenizer.config.get(key)) if tokenizer.find(word) is not None]
    if extra:
        config[EXTRA[0]] = list(dict.fromkeys(extra))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["padding_side"] = "left"  # or prompts of a batch are answered after their padding
    return config


def chat_template(tokenizer: Tokenizer, data: DataConfig, media: dict[str, str], added: Iterable[str] = ()) -> str:
    """``data.template`` with ``data.system`` in Jinja."""
    template = tokenizer.chat_template
    if data.template != "tokenizer":
        template = templates.jinja(data.template, media)
    elif block := JinjaTemplate(tokenizer).block:  # the text between prompt and answer in training
        asks = f"{{%+ if add_generation_prompt %}}{{{{ {json.dumps(block, ensure_ascii=False)} }}}}{{% endif %}}"
        template = template.removesuffix("\n") + asks  # Jinja drops a newline at the end of a template
    if data.template == "tokenizer" and added:
        values = {
            " REPLACED": templates.replaced_tags(media),
            "ADDED": json.dumps({kind: media[kind] for kind in added}),
        }
        template = re.sub("|".join(values), lambda found: values[found[0]], ADDED_MEDIA) + template
    if not data.system:
        return template
    system = json.dumps([{"role": "system", "content": data.system}], ensure_ascii=False)
    return SYSTEM_PROMPT.replace("SYSTEM", system) + template


def media_token_ids(tokenizer: Tokenizer | None, tokens: Iterable[str], vocab_size: int) -> dict[str, int]:
    """The ids of tokens; those that the tokenizer lacks get the first free ids."""
    free = vocab_size if tokenizer is None else tokenizer.size
    ids = {}
    for token in tokens:
        known = tokenizer.find(token) if tokenizer else None
        ids[token] = free if known is None else known
        free += known is None
    return ids


def _with_tokens(added: list[dict[str, Any]], ids: dict[str, int]) -> list[dict[str, Any]]:
    """The added tokens, with those of ``ids`` that are not among them yet."""
    known = {entry["content"] for entry in added}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    new = [{"id": number, "content": token, **flags, "special": True} for token, number in ids.items()]
    return [*added, *(entry for entry in new if entry["content"] not in known)]

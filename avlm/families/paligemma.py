"""PaliGemma: Gemma 1 with SigLIP and one linear. A prompt is an image, <bos>, a text and a line break, whose tokens see
each other; the answer follows. PaliGemma 2, with Gemma 2, has other names of tensors (paligemma2.py).

Features are as large as the linear makes them. Older versions of transformers divide them by sqrt(D) and multiply all
embeddings by it, which is the same; 5.17 multiplies those of tokens alone, as we do.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from avlm.config.media import ImageLayout
from avlm.config.model import ModelConfig, ProjectorConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.families import clip, gemma, gemma3, llama, llava
from avlm.families.keys import require_accepted, require_same

MODEL_TYPES = ("paligemma",)
FORMAT = "paligemma"
TEXTS = ("gemma", "gemma2")
# A config.json may leave out the keys that equal the defaults of its class.
TEXT_DEFAULTS = {  # without a text_config
    "model_type": "gemma",
    "hidden_size": 2048,
    "num_hidden_layers": 18,
    "intermediate_size": 16384,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "vocab_size": 257152,
}
VISION_DEFAULTS = {  # without a vision_config
    "intermediate_size": 4096,
    "hidden_size": 1152,
    "patch_size": 14,
    "image_size": 224,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
}
WIDTH = 2048  # of features, where the key is absent
ACCEPTED = {"quantization_config": (None,)}
PIXELS = {"resample": clip.RESAMPLE["bicubic"]}  # the processor's default
BOTH_WAYS = "use_bidirectional_attention"  # in text_config; what it means there is the prompt, not all of the text

NAMES = {**llama.NAMES, **clip.NAMES, "vision_projector": {"linear": "linear"}}
PREFIXES = llava.PREFIXES
HEAD = llava.HEAD
CLASS = "PaliGemmaForConditionalGeneration"
LOADED = llava.LOADED
SKIPPED = {**llama.SKIPPED, **clip.SKIPPED, "vision_projector": []}
SINUSOIDS = llama.SINUSOIDS
PROJECTORS = llava.PROJECTORS
constants = llama.constants

PROCESSOR_FILES = gemma3.PROCESSOR_FILES
IMAGE = "<image>"
MEDIA = {"image": IMAGE}
MEDIA_TOKENS = (IMAGE,)
TIES_HEAD = True
TEMPLATE = "paligemma"
# What the processor takes: it writes <bos> and the line break itself.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {%- set text -%}
    {%- if message.content is string -%}
      {{- message.content -}}
    {%- else -%}
      {%- for part in message.content -%}
        {{- '<image>' if part.type == 'image' else part.text -}}
      {%- endfor -%}
    {%- endif -%}
  {%- endset -%}
  {%- if loop.length > 1 or message.role != 'user' -%}
    {{- raise_exception('a prompt of PaliGemma is one question') -}}
  {%- endif -%}
  {%- set text = text | trim -%}
  {{- text.rpartition('<image>')[:2] | join + text.rpartition('<image>')[2] | trim -}}
{%- endfor -%}
"""


# 1. config.json


def read(keys: Mapping[str, Any], files: Mapping[str, dict]) -> ModelConfig:
    """``files``: those of PROCESSOR_FILES that the folder has, by their names."""
    keys = {key: value for key, value in keys.items() if value is not None}
    require_accepted(keys, ACCEPTED)
    text = gemma3.read_text({"text_config": TEXT_DEFAULTS, **keys}, "gemma", TEXTS)
    if text.pop(BOTH_WAYS, None) is False:
        raise ValueError(f"text_config.{BOTH_WAYS}=False is not implemented: a prompt's tokens see each other")
    tower = gemma3.read_tower({"vision_config": VISION_DEFAULTS, **keys}, files, PIXELS)
    gemma3.require_count("the number of patches", tower.num_patches, files)
    decoder = dataclasses.replace(gemma.read(text), bidirectional="prefix")
    width = keys.get("projection_dim", WIDTH)
    if width != decoder.hidden_size:
        raise ValueError(f"projection_dim={shown(repr(width))} is not text_config.hidden_size={decoder.hidden_size}")
    return ModelConfig(decoder=decoder, vision=tower, vision_projector=ProjectorConfig(type="linear"))


def is_second(keys: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of PaliGemma 2."""
    return (keys.get("text_config") or {}).get("model_type") == "gemma2"


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Raises ValueError for a model that the format cannot hold."""
    return write_model(config, ids, FORMAT, has_post_norms=False)


def write_model(config: ModelConfig, ids: Mapping[str, int], format: str, has_post_norms: bool) -> dict[str, Any]:
    """Only the layers that we build are exported."""
    gemma3.require_parts(config, format)
    if config.decoder.post_norms != has_post_norms:
        raise ValueError(
            f"the {format} format cannot hold decoder.post_norms={config.decoder.post_norms}, only {has_post_norms}"
        )
    width = config.decoder.hidden_size
    keys = {
        "architectures": [CLASS],
        "model_type": FORMAT,
        "image_token_index": ids[IMAGE],
        "projection_dim": width,
        "hidden_size": width,
        "tie_word_embeddings": config.decoder.tie_embedding,
        "text_config": gemma.write(config.decoder),
        "vision_config": clip.write(config.vision),
    }
    require_same(format, config, read, keys, processor_json(config, None))
    return keys


# 2. Processors and prompts


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    """File name -> keys."""
    return gemma3.write_processors(config, "PaliGemmaProcessor", "SiglipImageProcessor")


def prompt_keys(config: ModelConfig, data: DataConfig) -> dict[str, Any]:
    """What config.json says about prompts: nothing."""
    require_prompts(FORMAT, data)
    return {}


def require_prompts(format: str, data: DataConfig) -> None:
    """ValueError for prompts that the processor does not make."""
    llava.require_layout(format, data, ImageLayout())
    for key, only in {"template": TEMPLATE, "markers": {}, "system": None}.items():
        value = getattr(data, key)
        if value != only:
            raise ValueError(f"the {format} format cannot hold data.{key}={shown(repr(value))}, only {only!r}")


def text_template(keys: Mapping[str, Any], control_tokens: Collection[str]) -> str:
    """The ``data.template`` that makes the prompts of the processor."""
    return TEMPLATE

"""Which family a model_type, a module or an export format belongs to. Each family is a module of this folder.

    MODEL_TYPES, read             config.json -> our config
    PROCESSOR_FILES               files besides config.json that ``read`` needs
    NAMES, PREFIXES, SKIPPED      our module -> names of its tensors, prefixes of them, tensors that are not loaded

A family that is an export format, FORMATS, also has ``config_json`` and ``processor_json``, our config -> their files,
HEAD (the name of the decoder's head), TIES_HEAD (whether a tied head may be left out), MEDIA_TOKENS, CLASS (the class
of transformers that loads it) and LOADED (our module -> where it lies in that class, which names PEFT's tensors).
"""

import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from avlm.config.model import AudioConfig, DecoderConfig, ModelConfig, VisionConfig, shown
from avlm.families import clip, llama, llava, voxtral, whisper
from avlm.families.keys import check_types

AnyConfig = DecoderConfig | VisionConfig | AudioConfig | ModelConfig

# Whole models first: if a file fits several layouts, the first is taken.
FAMILIES = (llava, voxtral, llama, clip, whisper)
FORMATS: dict[str, ModuleType] = {"decoder": llama, "llava": llava, "voxtral": voxtral}
BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.MODEL_TYPES}

NAMES = {module: names for family in FAMILIES for module, names in family.NAMES.items()}
SKIPPED = {module: patterns for family in FAMILIES for module, patterns in family.SKIPPED.items()}


def _prefixes(module: str) -> list[str]:
    found: dict[str, None] = {}
    for family in FAMILIES:
        found |= dict.fromkeys(family.PREFIXES.get(module, []))
    return list(found)


PREFIXES = {module: _prefixes(module) for module in NAMES}
HEADS = (llama.HEAD, llava.HEAD)
RESHAPED = clip.RESHAPED
SINUSOIDS = {"audio": whisper.SINUSOIDS}  # module -> its table of positions, which we compute
CONSTANTS = {"vision": clip.POOLED_NORM}  # module -> tensors that only exports have, and the value that fills them
TEXT_TEMPLATES = {"llava": llava.text_template}  # model_type -> our template for one of parts
rebuilds_tokenizer = llama.rebuilds_tokenizer


def family_of(keys: Mapping[str, Any]) -> ModuleType:
    """The family of a config.json. ValueError for one that we do not support."""
    check_types(keys)
    model_type = keys.get("model_type")
    if model_type not in BY_MODEL_TYPE:
        raise ValueError(
            f"model_type {shown(repr(model_type))} is not supported (supported: {', '.join(BY_MODEL_TYPE)})"
        )
    return BY_MODEL_TYPE[model_type]


def stop_ids(keys: Mapping[str, Any]) -> list[int] | None:
    """The ids that end an answer, from a config.json or generation_config.json; None if it has none."""
    inner = keys.get("text_config")
    ids = keys.get("eos_token_id")
    if ids is None and isinstance(inner, dict):
        ids = inner.get("eos_token_id")
    if ids is None:
        return None
    ids = ids if isinstance(ids, list) else [ids]
    if any(type(each) is not int for each in ids):
        raise ValueError(f"eos_token_id must be a number or a list of numbers, not {shown(repr(ids))}")
    return ids


def hugging_face_name(module: str, name: str) -> str:
    """Hugging Face's name of our parameter, both without the prefix of the module."""
    layer = re.match(r"blocks\.(\d+)\.", name)
    pattern = re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name)
    leaf = ""
    if pattern not in NAMES[module]:
        pattern, _, leaf = pattern.rpartition(".")
        leaf = "." + leaf
    theirs = NAMES[module][pattern]
    if layer:
        theirs = theirs.replace("{i}", layer[1])
    return theirs + leaf


def anchor(module: str) -> str:
    """The tensor by which a module is found in a file: the first of its table, which every variant has."""
    return f"{next(iter(NAMES[module].values()))}.weight"


def skip_reason(module: str, name: str, config: ModelConfig) -> str | None:
    """Why a folder may hold a tensor that has no parameter here, or None if there is no good reason.

    ``name`` is without the prefix of the module.
    """
    if module == "vision" and config.vision and clip.is_unused_layer(name, config.vision):
        return "layers above feature_layer"
    for pattern, reason in SKIPPED[module]:
        if re.match(pattern, name):
            return reason
    return None


def stored_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter -> its shape in a file, if the two differ."""
    return clip.stored_shapes(config.vision) if config.vision else {}

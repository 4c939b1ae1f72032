"""Gemma: a decoder whose norms multiply by 1 + weight and whose embeddings are scaled. This file has the keys of
Gemma 1, Gemma 2 and the text model of Gemma 3; the last two name their norms otherwise (gemma2.py)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from avlm.config.decoder import DecoderConfig
from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.families import llama
from avlm.families.keys import require_accepted, require_same, to_ours, to_theirs
from avlm.families.llama import Constants
from avlm.families.rotary import read_rope, write_rope

MODEL_TYPES = ("gemma",)
ARCHITECTURES = {"gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}

# our field -> their key
FIELDS = llama.FIELDS
SCORES = {  # of Gemma 2 and 3
    "score_size": "query_pre_attn_scalar",
    "attention_softcap": "attn_logit_softcapping",
    "logit_softcap": "final_logit_softcapping",
}
OPTIONS = {"activation": "gelu_tanh", "norm_offset": True, "embedding_scale": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "gemma": {**OPTIONS, "post_norms": False, "qk_norm": False},
    "gemma2": {**OPTIONS, "post_norms": True, "qk_norm": False},
    "gemma3_text": {**OPTIONS, "post_norms": True, "qk_norm": True},
}

PATTERN = "sliding_window_pattern"  # of Gemma 3 alone: every so many layers, one sees all
PATTERN_OF_GEMMA2 = 2

# A config.json may leave out the keys that equal the defaults of its class.
GEMMA = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "hidden_act": "gelu_pytorch_tanh",
}
GEMMA2 = {
    **GEMMA,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
GEMMA3 = {
    **GEMMA2,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    PATTERN: 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
DEFAULTS = {"gemma": GEMMA, "gemma2": GEMMA2, "gemma3_text": GEMMA3}
THETAS = {"full_attention": 1e6, "sliding_attention": 1e4}  # of Gemma 3

# Key -> the values under which our decoder computes the same function, the default first.
ACCEPTED: dict[str, tuple] = {
    "hidden_activation": (None, "gelu_pytorch_tanh"),
    "attention_bias": (False,),
    "use_bidirectional_attention": (None, False),  # of text
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
}
# Gemma 3's class has the key and does not read it
ACCEPTED_OF_GEMMA3: dict[str, tuple] = {"attn_logit_softcapping": (None,)}
# Gemma 1 was trained with the tanh form. Files that say gelu here mean it, and transformers 4 computes it for them;
# transformers 5 (5.17) takes the exact form there.
ACCEPTED_OF_GEMMA: dict[str, tuple] = {"hidden_act": ("gelu_pytorch_tanh", "gelu")}
KINDS = ("full_attention", "sliding_attention")  # of layers

NAMES = llama.NAMES
PREFIXES = llama.PREFIXES
HEAD = llama.HEAD
CLASS = llama.CLASS
LOADED = llama.LOADED
SKIPPED = llama.SKIPPED
SINUSOIDS: dict[str, str] = {}
PROJECTORS: dict[str, tuple[str, ...]] = {}

PROCESSOR_FILES = ()
MEDIA: dict[str, str] = {}
MEDIA_TOKENS: tuple[str, ...] = ()
TIES_HEAD = True


def read(given: Mapping[str, Any], files: Mapping[str, dict] | None = None) -> DecoderConfig:
    """The decoder of a config.json, or of a ``text_config`` in one, of any of the three."""
    model_type = given["model_type"]
    keys = {**DEFAULTS[model_type], **given}
    require_accepted(keys, ACCEPTED)
    require_accepted(keys, {"gemma": ACCEPTED_OF_GEMMA, "gemma3_text": ACCEPTED_OF_GEMMA3}.get(model_type, {}))
    fields = to_ours(FIELDS, keys)
    fields["tie_embedding"] = bool(fields["tie_embedding"])
    if model_type == "gemma3_text":
        fields |= _read_ropes(keys)
    else:
        fields |= read_rope(keys, {})
    if model_type != "gemma":
        fields |= to_ours(SCORES, keys)
        if fields["score_size"] == fields["head_dim"]:
            fields["score_size"] = None
    theta = fields.pop("window_rope_theta", None)
    config = DecoderConfig(**fields, **VARIANTS[model_type])
    return config if model_type == "gemma" else _with_window(config, keys, theta)


def _read_ropes(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Of Gemma 3, whose layers with a window have a base of their own: two sets of parameters, or two bases and a
    scaling for full layers."""
    given = keys.get("rope_parameters") or {}
    if given and keys.get("rope_scaling"):
        raise ValueError("rope_scaling beside rope_parameters is not implemented: keep one of the two")
    if not isinstance(given, Mapping) or not set(given) <= set(KINDS):
        raise ValueError(f"rope_parameters {shown(given)} is not understood: gemma3_text has {' and '.join(KINDS)}")
    full, window = (dict(given.get(kind) or {}) for kind in KINDS)
    full = {**(keys.get("rope_scaling") or {}), **full}
    full.setdefault("rope_theta", keys.get("rope_theta") or THETAS["full_attention"])
    window.setdefault("rope_theta", keys.get("rope_local_base_freq") or THETAS["sliding_attention"])
    inner = {key: value for key, value in keys.items() if not key.startswith("rope_")}
    fields = read_rope({**inner, "rope_parameters": full}, {})
    of_window = read_rope({**inner, "rope_parameters": window}, {})
    theta = of_window.pop("rope_theta")
    if of_window:
        kind = window.get("rope_type", window.get("type"))
        raise ValueError(f"rope_type {shown(repr(kind))} is not implemented for layers with a window")
    is_plain = set(fields) == {"rope_theta"}
    return {**fields, "window_rope_theta": None if is_plain and theta == fields["rope_theta"] else theta}


def _with_window(config: DecoderConfig, keys: Mapping[str, Any], theta: float | None) -> DecoderConfig:
    """The config with the sliding window that is in use: one that no position exceeds is not, unless its layers have a
    base of their own, ``theta``."""
    window, layers = keys["sliding_window"], range(config.num_layers)
    kinds = keys.get("layer_types")
    if kinds is None:
        pattern = _pattern(keys) if keys["model_type"] == "gemma3_text" else PATTERN_OF_GEMMA2
        kinds = [KINDS[0] if (i + 1) % pattern == 0 else KINDS[1] for i in layers]
    if len(kinds) != len(layers) or not set(map(str, kinds)) <= set(KINDS):
        raise ValueError(f"layer_types {shown(kinds)} is not implemented ({' or '.join(KINDS)}, for each layer)")
    windowed = [i for i in layers if kinds[i] == "sliding_attention"]
    if windowed and window is None:
        raise ValueError("layer_types has sliding_attention, but there is no sliding_window")
    if not windowed or (window >= config.max_position and theta is None):
        return config
    some = windowed if len(windowed) < len(layers) else None
    return dataclasses.replace(config, sliding_window=window, window_layers=some, window_rope_theta=theta)


def _pattern(keys: Mapping[str, Any]) -> int:
    pattern = GEMMA3[PATTERN] if keys[PATTERN] is None else keys[PATTERN]
    if pattern < 1:
        raise ValueError(f"{PATTERN}={shown(pattern)} is not a number of layers")
    return pattern


def write(config: DecoderConfig) -> dict[str, Any]:
    """Keys of whichever of the three computes a decoder; ``config_json`` checks that one does."""
    model_type = "gemma"
    if config.post_norms:
        model_type = "gemma3_text" if config.qk_norm else "gemma2"
    keys = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **to_theirs(FIELDS, config),
    }
    if model_type == "gemma":
        return {**keys, "hidden_act": "gelu_pytorch_tanh", **write_rope(config)}
    kinds = [KINDS[config.has_window(i)] for i in range(config.num_layers)]
    keys |= {
        "hidden_activation": "gelu_pytorch_tanh",
        **to_theirs(SCORES, config),
        "query_pre_attn_scalar": _score_size(config),
        "sliding_window": config.sliding_window or config.max_position,
        "layer_types": kinds,
        **write_rope(config),
    }
    if model_type == "gemma3_text":
        local = config.window_rope_theta
        keys["rope_local_base_freq"] = config.rope_theta if local is None else local
    return keys


def _score_size(config: DecoderConfig) -> int:
    size = config.score_size or config.head_dim
    if size != int(size):
        raise ValueError(f"no text model of Gemma has score_size={size}: query_pre_attn_scalar is an integer")
    return int(size)


def text_config(config: DecoderConfig) -> dict[str, Any]:
    """Of a text model. ValueError for a decoder that does not come back from ``write``. That the features of images see
    each other does not matter without images."""
    if config.bidirectional == "prefix":
        raise ValueError("no text model of Gemma has decoder.bidirectional=prefix: all of their rows are causal")
    keys = write(config)
    ours = dataclasses.replace(config, bidirectional="none")
    require_same(keys["model_type"], ModelConfig(decoder=ours), _whole, keys, {})
    return keys


def _whole(keys: Mapping[str, Any], files: Mapping[str, dict]) -> ModelConfig:
    return ModelConfig(decoder=read(keys))


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """config.json of the decoder alone. Towers are left out."""
    if config.decoder.post_norms:
        raise ValueError("the gemma format cannot hold decoder.post_norms=True: take gemma2")
    return text_config(config.decoder)


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    return {}


def constants(config: ModelConfig) -> Constants:
    return {}

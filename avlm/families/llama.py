"""Llama, Mistral, Ministral 3, Qwen 2 and Qwen 3, the last two with experts too: one decoder, whose variants differ in
biases, norms, windows and defaults, and in queries that grow."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from avlm.config.decoder import DecoderConfig
from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.families import qwen3_moe
from avlm.families.keys import require_accepted, to_ours, to_theirs
from avlm.families.rotary import read_rope, write_rope

Constants = dict[str, tuple[tuple[int, ...], float]]

# model_type -> what sets it apart in our config
VARIANTS: dict[str, dict[str, bool]] = {
    "llama": {"qkv_bias": False, "qk_norm": False},
    "mistral": {"qkv_bias": False, "qk_norm": False},
    "ministral3": {"qkv_bias": False, "qk_norm": False},
    "qwen2": {"qkv_bias": True, "qk_norm": False},
    "qwen3": {"qkv_bias": False, "qk_norm": True},
    **qwen3_moe.VARIANTS,
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    **qwen3_moe.ARCHITECTURES,
}
MODEL_TYPES = tuple(VARIANTS)
QWEN = ("qwen2", "qwen3")  # some layers may have a window, others not

# our field -> their key
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tie_embedding": "tie_word_embeddings",
    "max_position": "max_position_embeddings",
}

# A config.json may leave out the keys that equal the defaults of its class.
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # num_attention_heads
    "head_dim": None,  # hidden_size / num_attention_heads
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "use_sliding_window": True,  # Mistral has no such key: a window is used if there is one
}
MISTRAL = {
    **LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
MINISTRAL3 = {
    **MISTRAL,
    "vocab_size": 131072,
    "num_hidden_layers": 34,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 262144,
    "sliding_window": None,
}
QWEN2 = {
    **LLAMA,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
DEFAULTS = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "ministral3": MINISTRAL3,
    "qwen2": QWEN2,
    "qwen3": {**QWEN2, "head_dim": 128},
    **{model_type: {**QWEN2, **defaults} for model_type, defaults in qwen3_moe.DEFAULTS.items()},
}
# Options of Gemma, in formats of their own
GEMMA = ("activation", "norm_offset", "post_norms", "embedding_scale", "score_size", "attention_softcap")
GEMMA += ("logit_softcap", "window_rope_theta", "bidirectional")
GROWING = "ministral3"  # its queries may grow, and its class scales positions where a file does not say how
GROWING_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "attention_factor": 1.0,
    "llama_4_scaling_beta": 0.1,
}

# Key -> the values under which our decoder computes the same function, the default first.
ACCEPTED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "quantization_config": (None,),
}
WITHOUT_EXPERTS = {"num_experts": (None, 0), "num_local_experts": (None, 0)}

# Our module or parameter -> theirs, {i} the layer, without the prefix of the module.
NAMES = {
    "decoder": {
        "embedding": "embed_tokens",
        "blocks.{i}.attention_norm": "layers.{i}.input_layernorm",
        "blocks.{i}.attention.q": "layers.{i}.self_attn.q_proj",
        "blocks.{i}.attention.k": "layers.{i}.self_attn.k_proj",
        "blocks.{i}.attention.v": "layers.{i}.self_attn.v_proj",
        "blocks.{i}.attention.o": "layers.{i}.self_attn.o_proj",
        "blocks.{i}.attention.q_norm": "layers.{i}.self_attn.q_norm",
        "blocks.{i}.attention.k_norm": "layers.{i}.self_attn.k_norm",
        "blocks.{i}.ffn_norm": "layers.{i}.post_attention_layernorm",
        "blocks.{i}.ffn.gate": "layers.{i}.mlp.gate_proj",
        "blocks.{i}.ffn.up": "layers.{i}.mlp.up_proj",
        "blocks.{i}.ffn.down": "layers.{i}.mlp.down_proj",
        **qwen3_moe.NAMES,
        "norm": "norm",
        "head": "lm_head",  # outside the prefix of the others
    }
}
PREFIXES = {"decoder": ["model.", ""]}
HEAD = "lm_head.weight"
CLASS = "AutoModelForCausalLM"
LOADED = {"decoder": "model."}
SKIPPED = {"decoder": [(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", "computed frequencies")]}
SINUSOIDS: dict[str, str] = {}
PROJECTORS: dict[str, tuple[str, ...]] = {}

PROCESSOR_FILES = ()
MEDIA: dict[str, str] = {}
MEDIA_TOKENS: tuple[str, ...] = ()
TIES_HEAD = True

# The words into which Qwen 2's pre-tokenizer splits a text.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read(given: Mapping[str, Any], files: Mapping[str, dict] | None = None, mrope: bool = False) -> DecoderConfig:
    """``mrope``: the decoder has positions of three numbers, which only some whole models have."""
    model_type = given["model_type"]
    keys = {**DEFAULTS[model_type], **given}
    require_accepted(keys, ACCEPTED)
    fields = to_ours(FIELDS, keys)
    has_experts = model_type in qwen3_moe.VARIANTS
    require_accepted(keys, {} if has_experts else WITHOUT_EXPERTS)
    fields["num_kv_heads"] = fields["num_kv_heads"] or fields["num_heads"]
    fields["head_dim"] = fields["head_dim"] or 0
    fields["tie_embedding"] = bool(fields["tie_embedding"])
    grows = model_type == GROWING
    fields |= read_rope(keys, GROWING_ROPE if grows else {}, mrope, grows)
    config = _with_window(DecoderConfig(**fields, **VARIANTS[model_type]), keys)
    if not has_experts:
        return config
    return dataclasses.replace(config, experts=qwen3_moe.read(given, DEFAULTS[model_type], config.num_layers))


def require_variant(model_type: str) -> None:
    """ValueError for a decoder in a whole model that is not ours."""
    if model_type not in VARIANTS:
        known = ", ".join(VARIANTS)
        raise ValueError(f"text_config.model_type {shown(repr(model_type))} is not supported (supported: {known})")


def write(config: DecoderConfig) -> dict[str, Any]:
    """Raises ValueError for a decoder that no architecture of transformers computes."""
    for field in GEMMA:
        value = getattr(config, field)
        if value != DecoderConfig.__dataclass_fields__[field].default:
            raise ValueError(f"the decoder format cannot hold {field}={value}: Gemma's are gemma and gemma2")
    if config.mrope_sections is not None:
        raise ValueError("only the formats of Qwen-VL hold a decoder with mrope_sections")
    model_type = _model_type(config)
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **to_theirs(FIELDS, config),
        "hidden_act": "silu",
        **write_rope(config),
        **_write_window(config, model_type),
        **(qwen3_moe.write(config.experts) if config.experts is not None else {}),
    }


def _model_type(config: DecoderConfig) -> str:
    if config.experts is not None:
        return qwen3_moe.model_type(config)
    variant = {"qkv_bias": config.qkv_bias, "qk_norm": config.qk_norm}
    model_type = next((name for name in ARCHITECTURES if VARIANTS[name] == variant), None)
    if model_type is None:
        raise ValueError("no Hugging Face architecture has both qkv_bias and qk_norm")
    if model_type != "llama":
        if config.query_growth:
            raise ValueError("no Hugging Face architecture has query_growth with qkv_bias or qk_norm")
        return model_type
    if config.window_layers is not None:
        raise ValueError("no Hugging Face architecture has window_layers without qkv_bias or qk_norm")
    if config.query_growth:
        return GROWING
    return "llama" if config.sliding_window is None else "mistral"


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """config.json of the decoder alone. Towers are left out, and with them M-RoPE: text has one number on all axes."""
    return write(dataclasses.replace(config.decoder, mrope_sections=None, mrope_interleaved=False))


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    return {}


def constants(config: ModelConfig) -> Constants:
    return {}


def rebuilds_tokenizer(model_type: str | None, tokenizer: Mapping[str, Any]) -> bool:
    """Whether transformers would build a different tokenizer for a model than the one in this tokenizer.json.

    For Qwen 2 it takes its own class whatever tokenizer_config.json names, unless that has an "auto_map"
    (transformers 5.17, AutoTokenizer.from_pretrained). The class keeps the vocabulary and replaces everything else.
    """
    return model_type == "qwen2" and not _is_qwen2_tokenizer(tokenizer)


def _is_qwen2_tokenizer(tree: Mapping[str, Any]) -> bool:
    splitter = tree.get("pre_tokenizer") or {}
    steps = [
        {"type": "Split", "pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    found = []
    for part, step in zip(splitter.get("pretokenizers") or [], steps):
        found.append({key: part.get(key) for key in step})
    model = tree.get("model") or {}
    options = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    is_plain = model.get("type") == "BPE" and not any(model.get(key) for key in options)
    added = [token["content"] for token in tree.get("added_tokens") or []]
    has_pad = "<|endoftext|>" in added  # the class would add it
    return found == steps and tree.get("normalizer") == {"type": "NFC"} and is_plain and has_pad


def _with_window(config: DecoderConfig, keys: Mapping[str, Any]) -> DecoderConfig:
    """The config with the sliding window that is in use. A window that no position exceeds is not."""
    window = keys.get("sliding_window")
    kinds = keys.get("layer_types")
    layers = range(config.num_layers)
    if keys["model_type"] in qwen3_moe.VARIANTS:
        return config
    if keys["model_type"] not in QWEN:
        if kinds is not None and set(map(str, kinds)) != {"full_attention" if window is None else "sliding_attention"}:
            raise ValueError(f"layer_types {shown(kinds)} is not implemented for {keys['model_type']}")
        windowed = list(layers)
    elif kinds is not None:
        if len(kinds) != len(layers) or not set(map(str, kinds)) <= {"full_attention", "sliding_attention"}:
            raise ValueError(f"layer_types {shown(kinds)} is not implemented (full_attention or sliding_attention)")
        windowed = [i for i in layers if kinds[i] == "sliding_attention"]
    else:
        windowed = [i for i in layers if i >= (keys["max_window_layers"] or 0)]
    if window is None or not keys["use_sliding_window"]:
        if kinds is not None and windowed and keys["model_type"] in QWEN:
            raise ValueError("layer_types has sliding_attention, but no sliding_window is in use")
        return config
    if not windowed or window >= config.max_position:
        return config
    if keys["model_type"] == "llama":
        raise ValueError(f"sliding_window={window} is not implemented for llama, which has none in transformers")
    some = windowed if len(windowed) < len(layers) else None
    return dataclasses.replace(config, sliding_window=window, window_layers=some)


def _write_window(config: DecoderConfig, model_type: str) -> dict[str, Any]:
    if config.sliding_window is None:
        return {}
    if model_type not in QWEN:
        return {"sliding_window": config.sliding_window}
    kinds = ["sliding_attention" if config.has_window(i) else "full_attention" for i in range(config.num_layers)]
    return {
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        "max_window_layers": kinds.index("sliding_attention"),  # what older versions of transformers read
        "layer_types": kinds,
    }

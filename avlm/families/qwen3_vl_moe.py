"""Qwen3-VL with experts: Qwen3-VL's tower, and a decoder of Qwen3-MoE's with its M-RoPE and DeepStack.

The Hub's folders have one tensor for the experts of a layer (``avlm.weights.experts``).
"""

from collections.abc import Mapping
from typing import Any

from avlm.config.model import ModelConfig
from avlm.families import qwen2_vl, qwen3_moe, qwen3_vl

MODEL_TYPES = ("qwen3_vl_moe",)
# A config.json may leave out the keys that equal the defaults of its classes.
TEXT_DEFAULTS = {
    **qwen3_vl.TEXT_DEFAULTS,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": None,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
}

NAMES = qwen3_vl.NAMES
PREFIXES = qwen3_vl.PREFIXES
HEAD = qwen3_vl.HEAD
CLASS = "Qwen3VLMoeForConditionalGeneration"
LOADED = qwen3_vl.LOADED
SINUSOIDS = qwen3_vl.SINUSOIDS
PROJECTORS = qwen3_vl.PROJECTORS
SKIPPED = qwen3_vl.SKIPPED
constants = qwen3_vl.constants

PROCESSOR_FILES = qwen3_vl.PROCESSOR_FILES
MEDIA = qwen3_vl.MEDIA
MEDIA_TOKENS = qwen3_vl.MEDIA_TOKENS
TIES_HEAD = True

prompts = qwen3_vl.prompts
processor_json = qwen3_vl.processor_json


def read(keys: Mapping[str, Any], files: Mapping[str, dict]) -> ModelConfig:
    """Its class normalises the weights of experts whatever a file says, and ties the head as the top of it says."""
    tied = bool(keys.get("tie_word_embeddings"))
    given = qwen3_moe.with_number(keys.get("text_config") or {})
    text = {**given, "norm_topk_prob": True, "tie_word_embeddings": tied}
    decoder = qwen2_vl.read_decoder({"text_config": text}, "qwen3_moe", TEXT_DEFAULTS)
    return qwen3_vl.read_around(decoder, keys, files)


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Raises ValueError for a model that the format cannot hold."""
    if config.decoder.experts is None:
        raise ValueError("the qwen3_vl_moe format needs decoder.experts: take qwen3_vl")
    return qwen3_vl.write_whole(config, ids, CLASS, "qwen3_vl_moe", read)

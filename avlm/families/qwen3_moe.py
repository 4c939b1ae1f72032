"""The experts of Qwen3-MoE and Qwen2-MoE, whose decoders are otherwise Qwen 3 and Qwen 2 (``avlm.families.llama``).

Qwen2-MoE has one more expert, which takes every token. transformers 5 writes the number of experts under another name
than the Hub's folders have, and reads both; we read both and write the Hub's.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from avlm.config.decoder import DecoderConfig, ExpertsConfig
from avlm.config.values import first_error, shown
from avlm.families.keys import require_accepted, to_ours, to_theirs

# model_type -> what sets it apart in our config
VARIANTS = {
    "qwen2_moe": {"qkv_bias": True, "qk_norm": False},
    "qwen3_moe": {"qkv_bias": False, "qk_norm": True},
}
ARCHITECTURES = {"qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
SHARES = "qwen2_moe"  # has the expert that takes every token
# our field of ExpertsConfig -> their key
FIELDS = {
    "num": "num_experts",
    "per_token": "num_experts_per_tok",
    "intermediate_size": "moe_intermediate_size",
    "normalize": "norm_topk_prob",
}
SHARED = "shared_expert_intermediate_size"
OTHER_NUM = "num_local_experts"  # as transformers 5 writes num_experts
# Key -> the values under which our decoder computes the same function, the default first.
ACCEPTED = {"use_sliding_window": (False,), "qkv_bias": (True,)}

# A config.json may leave out the keys that equal the defaults of its class.
QWEN2_MOE = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 32768,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    SHARED: 5632,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
}
QWEN3_MOE = {
    **QWEN2_MOE,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
DEFAULTS = {"qwen2_moe": QWEN2_MOE, "qwen3_moe": QWEN3_MOE}

# Our module or parameter -> theirs, {i} the layer, {e} the expert.
NAMES = {
    "blocks.{i}.ffn.router": "layers.{i}.mlp.gate",
    "blocks.{i}.ffn.experts.gate": "layers.{i}.mlp.experts.{e}.gate_proj",
    "blocks.{i}.ffn.experts.up": "layers.{i}.mlp.experts.{e}.up_proj",
    "blocks.{i}.ffn.experts.down": "layers.{i}.mlp.experts.{e}.down_proj",
    "blocks.{i}.ffn.shared.gate": "layers.{i}.mlp.shared_expert.gate_proj",
    "blocks.{i}.ffn.shared.up": "layers.{i}.mlp.shared_expert.up_proj",
    "blocks.{i}.ffn.shared.down": "layers.{i}.mlp.shared_expert.down_proj",
    "blocks.{i}.ffn.shared_gate": "layers.{i}.mlp.shared_expert_gate",
}


def read(given: Mapping[str, Any], defaults: Mapping[str, Any], num_layers: int) -> ExpertsConfig | None:
    """None if ``given``, the keys of a file, makes every layer dense. ``defaults``: those of its class."""
    keys = {**defaults, **with_number(given)}
    require_accepted(keys, ACCEPTED)
    every, dense = keys["decoder_sparse_step"], keys["mlp_only_layers"] or []
    if every is None or every < 1:
        raise ValueError(f"decoder_sparse_step={shown(every)} is not a number of layers")
    dense_layers = [layer for layer in range(num_layers) if layer in dense or (layer + 1) % every]
    if len(dense_layers) == num_layers or not keys["num_experts"]:
        return None
    shared_size = keys[SHARED] if keys["model_type"] == SHARES else 0
    try:
        return ExpertsConfig(**to_ours(FIELDS, keys), shared_size=shared_size, dense_layers=dense_layers)
    except ValidationError as error:
        where = error.errors()[0]["loc"]
        if not where:  # of two keys
            number, each = shown(keys["num_experts"]), shown(keys["num_experts_per_tok"])
            raise ValueError(f"num_experts_per_tok={each} is more than num_experts={number}") from None
        raise ValueError(first_error(error, ({**FIELDS, "shared_size": SHARED}[where[0]],))) from None


def with_number(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys with the number of experts under the Hub's name."""
    number = given.get(OTHER_NUM)
    if number is None:
        return given
    if given.get("num_experts") not in (None, number):
        raise ValueError(f"num_experts={shown(given['num_experts'])} is not {OTHER_NUM}={shown(number)}")
    return {**given, "num_experts": number}


def model_type(config: DecoderConfig) -> str:
    """ValueError for experts that no architecture of transformers has."""
    assert config.experts is not None
    variant = {"qkv_bias": config.qkv_bias, "qk_norm": config.qk_norm}
    found = next((name for name in VARIANTS if VARIANTS[name] == variant), None)
    if found is None or (found == SHARES) != bool(config.experts.shared_size):
        raise ValueError(
            "Hugging Face's decoders with experts have qk_norm without experts.shared_size (Qwen3-MoE), or qkv_bias "
            "with it (Qwen2-MoE)"
        )
    if config.sliding_window is not None:
        raise ValueError("Hugging Face's decoders with experts have no sliding_window")
    return found


def write(experts: ExpertsConfig) -> dict[str, Any]:
    keys = {**to_theirs(FIELDS, experts), "decoder_sparse_step": 1, "mlp_only_layers": experts.dense_layers}
    return {**keys, SHARED: experts.shared_size} if experts.shared_size else keys

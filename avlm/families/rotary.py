"""The keys of rotary positions, in and out.

transformers 5 writes ``rope_parameters``; most folders of the Hub hold ``rope_theta`` and ``rope_scaling``. We read
both, and write the older keys, which every version of transformers reads.
"""

import math
from collections.abc import Mapping
from typing import Any

from avlm.config.decoder import DecoderConfig, RopeScaling, YarnScaling
from avlm.config.values import shown
from avlm.families.keys import to_ours, to_theirs

ORIGINAL = "original_max_position_embeddings"  # among the keys of the scaling; at the top of config.json it counts more
# our field -> their key
LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position": ORIGINAL,
}
YARN = {
    "factor": "factor",
    "original_max_position": ORIGINAL,
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}
GROWTH = "llama_4_scaling_beta"  # of the decoders whose queries grow
MROPE = {"mrope_sections": ("mrope_section", None), "mrope_interleaved": ("mrope_interleaved", False)}


def read_rope(
    keys: Mapping[str, Any], default: Mapping[str, Any], mrope: bool = False, grows: bool = False
) -> dict[str, Any]:
    """Fields of DecoderConfig. ``default``: the parameters of a class whose files may leave them out; ``mrope``: tokens
    have positions of three numbers; ``grows``: queries may grow."""
    rope = {**(keys.get("rope_scaling") or {}), **(keys.get("rope_parameters") or {})} or dict(default)
    fields: dict[str, Any] = {"rope_theta": float(rope.pop("rope_theta", keys.get("rope_theta") or 10_000.0))}
    old_name = rope.pop("type", "default")
    rope_type = rope.pop("rope_type", old_name)
    accepted = ("default", "mrope") if mrope else ("default", "dynamic", "linear", "llama3", "yarn")
    if mrope:
        fields |= {field: rope.pop(key, absent) for field, (key, absent) in MROPE.items()}
    elif "mrope_section" in rope:
        raise ValueError(f"mrope_section is not implemented for {keys['model_type']}")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor below 1 is not implemented")
    has_parts = any(isinstance(value, dict) for value in rope.values())  # a set of parameters for each kind of layer
    if rope_type not in accepted or has_parts:
        raise ValueError(f"rope_type {shown(repr(rope_type))} is not implemented (accepted: {', '.join(accepted)})")
    if rope_type == "dynamic":  # differs past max_position_embeddings alone, where we have no positions
        _require_keys(rope_type, rope, {"factor"}, set())
    if keys.get(ORIGINAL) is not None:
        rope[ORIGINAL] = keys[ORIGINAL]
    if rope_type == "linear":
        _require_keys(rope_type, rope, {"factor"}, set())
        fields["rope_stretch"] = rope["factor"]
    if rope_type == "yarn":
        return {**fields, **_read_yarn(rope, keys, grows)}
    if rope_type == "llama3":
        _require_keys(rope_type, rope, set(LLAMA3.values()), set())
        fields["rope_scaling"] = RopeScaling(**to_ours(LLAMA3, rope))
    return fields


def _read_yarn(rope: dict[str, Any], keys: Mapping[str, Any], grows: bool) -> dict[str, Any]:
    """A folder that got YaRN later may have its original context as its largest position still."""
    growth = rope.pop(GROWTH, None) if grows else None
    rope = {key: value for key, value in rope.items() if value is not None and key != "max_position_embeddings"}
    rope.setdefault(ORIGINAL, keys["max_position_embeddings"])
    if not rope.pop("truncate", True):
        raise ValueError("truncate=False is not implemented for rope_type 'yarn'")
    scales = rope.pop("mscale", 0.0), rope.pop("mscale_all_dim", 0.0)
    _require_keys("yarn", rope, {"factor", ORIGINAL}, set(YARN.values()))
    rope.setdefault("attention_factor", _attention_factor(rope["factor"], *scales))
    given = {field: rope[key] for field, key in YARN.items() if key in rope}
    yarn = YarnScaling(**given)
    longest = keys["max_position_embeddings"]
    if longest <= yarn.original_max_position:
        longest = int(yarn.factor * yarn.original_max_position)
    return {"yarn": yarn, "query_growth": growth or 0.0, "max_position": longest}


def _attention_factor(factor: float, scale: float, scale_of_all: float) -> float:
    """Where a file has none (Peng et al. 2023, section 3.4; the scales are DeepSeek's)."""
    growth = 0.1 * math.log(max(factor, 1))
    return (1 + scale * growth) / (1 + scale_of_all * growth) if scale and scale_of_all else 1 + growth


def _require_keys(rope_type: str, rope: Mapping[str, Any], needed: set[str], known: set[str]) -> None:
    if not needed <= rope.keys() <= needed | known:
        raise ValueError(f"rope_type '{rope_type}' with the keys {shown(sorted(rope))} is not implemented")


def write_rope(config: DecoderConfig) -> dict[str, Any]:
    """Keys of a decoder without M-RoPE. Those of queries that grow are of transformers 5 alone."""
    scaling: dict[str, Any] | None = None
    if config.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **to_theirs(LLAMA3, config.rope_scaling)}
    if config.yarn is not None:
        scaling = {"rope_type": "yarn", **to_theirs(YARN, config.yarn)}
    if config.rope_stretch != 1:
        if scaling is not None:
            raise ValueError(f"no Hugging Face architecture has rope_stretch with rope_type {scaling['rope_type']}")
        scaling = {"rope_type": "linear", "factor": config.rope_stretch}
    if scaling is not None and config.query_growth:
        return {"rope_parameters": {"rope_theta": config.rope_theta, **scaling, GROWTH: config.query_growth}}
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling}

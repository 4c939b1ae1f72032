"""The keys of a config.json: their types, the values that we implement, and tables that are read in both directions."""

from collections.abc import Mapping
from typing import Any

from avlm.config.values import shown

NUMBER = (int, float)
# Keys that we use before the config classes check them, by type. (bool("false"), for example, is True.)
KEYS_OF_TYPE = {
    str: "model_type hidden_act",
    list: "layer_types fullatt_block_indexes deepstack_visual_indexes",
    dict: "text_config vision_config audio_config rope_scaling rope_parameters",
    bool: "tie_word_embeddings use_sliding_window multimodal_projector_bias",
    int: "hidden_size intermediate_size head_dim image_size num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings max_source_positions sliding_window max_window_layers depth embed_dim num_heads "
    "patch_size window_size spatial_merge_size temporal_patch_size num_position_embeddings",
    NUMBER: "rope_theta partial_rotary_factor factor mlp_ratio tokens_per_second",
}
TYPES: dict[str, Any] = {key: kind for kind, keys in KEYS_OF_TYPE.items() for key in keys.split()}
TYPE_NAMES = {
    str: "a string",
    list: "a list",
    dict: "an object",
    bool: "true or false",
    int: "an integer",
    NUMBER: "a number",
}


def check_types(keys: Mapping[str, Any], where: str = "") -> None:
    """Raise ValueError for a key of the wrong type, at any depth. Null is allowed: it means the default."""
    for key, value in keys.items():
        wanted = TYPES.get(key)
        if wanted is None or value is None:
            continue
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise ValueError(f"{where}{key} must be {TYPE_NAMES[wanted]}, not {shown(repr(value))}")
        if wanted is dict:
            check_types(value, f"{where}{key}.")


def require_accepted(keys: Mapping[str, Any], accepted: Mapping[str, tuple]) -> None:
    """``accepted``: key -> the values that our modules implement, the default of an absent key first."""
    for key, values in accepted.items():
        if keys.get(key, values[0]) not in values:
            choices = ", ".join(map(repr, values))
            raise ValueError(f"{key}={shown(repr(keys[key]))} is not implemented (accepted: {choices})")


def to_ours(fields: Mapping[str, str], keys: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of one of our config classes. ``fields``: our field -> their key."""
    return {field: keys[key] for field, key in fields.items()}


def to_theirs(fields: Mapping[str, str], config: Any) -> dict[str, Any]:
    """The inverse of ``to_ours``."""
    return {key: getattr(config, field) for field, key in fields.items()}

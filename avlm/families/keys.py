"""The keys of a config.json: their types, the values that we implement, tables that are read in both directions, and
whether a model comes back from its keys."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from avlm.config.model import ModelConfig, ProjectorConfig, VisionConfig
from avlm.config.values import first_error, shown

Reader = Callable[[Mapping[str, Any], Mapping[str, dict]], ModelConfig]

NUMBER = (int, float)
SIDES = (int, list)
# Keys that we use before the config classes check them, by type. (bool("false"), for example, is True.)
KEYS_OF_TYPE = {
    str: "model_type hidden_act text_model_id audio_model_id projector_act norm_type",
    list: "layer_types fullatt_block_indexes deepstack_visual_indexes mlp_only_layers",
    dict: "text_config vision_config audio_config thinker_config rope_scaling rope_parameters "
    "full_attention sliding_attention",
    bool: "tie_word_embeddings use_sliding_window multimodal_projector_bias projector_bias projector_ln_mid "
    "use_audio_in_video truncate use_qk_norm use_mean_pooling norm_topk_prob",
    int: "hidden_size intermediate_size head_dim num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings max_source_positions sliding_window max_window_layers depth embed_dim num_heads "
    "window_size spatial_merge_size temporal_patch_size num_position_embeddings n_window output_dim "
    "stack_factor scale_factor original_max_position_embeddings num_experts num_local_experts num_experts_per_tok "
    "moe_intermediate_size decoder_sparse_step shared_expert_intermediate_size mm_tokens_per_image "
    "projection_dim n_window_infer downsample_hidden_size sliding_window_pattern",
    NUMBER: "rope_theta partial_rotary_factor factor mlp_ratio tokens_per_second position_id_per_seconds "
    "seconds_per_chunk mscale mscale_all_dim llama_4_scaling_beta downsample_ratio rope_local_base_freq",
    SIDES: "image_size patch_size",
}
TYPES: dict[str, Any] = {key: kind for kind, keys in KEYS_OF_TYPE.items() for key in keys.split()}
PROCESSORS = {  # of images and videos: the first file that is there, unless processor_config.json has one for them
    "image": ("preprocessor_config.json",),
    "video": ("video_preprocessor_config.json", "preprocessor_config.json"),
}
TYPE_NAMES = {
    str: "a string",
    list: "a list",
    dict: "an object",
    bool: "true or false",
    int: "an integer",
    NUMBER: "a number",
    SIDES: "an integer or a list",
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


def require_same(format: str, ours: ModelConfig, read: Reader, keys: Mapping[str, Any], files: Mapping) -> None:
    """ValueError if a model is not the one that ``read`` makes of its keys: the format has no place for it."""
    try:
        back = read(keys, files)
    except ValidationError as error:
        raise ValueError(f"the {format} format cannot hold {first_error(error)}") from None
    except ValueError as error:
        raise ValueError(f"the {format} format cannot hold this model: {error}") from None
    for module in back.modules:
        part, other = _as_exported(getattr(ours, module), ours, getattr(back, module)), getattr(back, module)
        for field in dataclasses.fields(part):
            value, theirs = getattr(part, field.name), getattr(other, field.name)
            if value != theirs:
                raise ValueError(f"the {format} format cannot hold {module}.{field.name}={value}, only {theirs}")


def _as_exported(part: Any, model: ModelConfig, other: Any) -> Any:
    """A module with what an export writes out (layers that run, a width of its own), and without what changes nothing
    there. ``other``: the same module, read back."""
    if isinstance(part, VisionConfig):
        return dataclasses.replace(part, num_layers=part.num_blocks, feature_layer=-1)
    if not isinstance(part, ProjectorConfig):
        return part
    changes: dict[str, Any] = {"output_std": other.output_std}  # of the first values alone
    width = model.decoder.hidden_size
    if part.type == "linear" or (part.hidden_size or width) == (other.hidden_size or width):
        changes["hidden_size"] = other.hidden_size
    if not has_norms(part):
        changes["norm_eps"] = other.norm_eps
    return dataclasses.replace(part, **changes)


def has_norms(projector: ProjectorConfig) -> bool:
    kinds = (projector.norm, projector.feature_norm, projector.hidden_norm, projector.output_norm)
    return any(kind != "none" for kind in kinds)


def processor(files: Mapping[str, dict], kind: str) -> tuple[str, dict[str, Any]]:
    """The name of the file by which transformers makes images or videos, "" if there is none, and its keys that have a
    value."""
    name = next((name for name in PROCESSORS[kind] if name in files), "")
    keys: Any = files.get(name, {})
    nested = files.get("processor_config.json", {}).get(f"{kind}_processor")
    if nested is not None:
        name, keys = "processor_config.json", nested
    if not isinstance(keys, dict):
        raise ValueError(f"the {kind} processor in {name} is not understood: {shown(repr(keys))}")
    return name, {key: value for key, value in keys.items() if value is not None}

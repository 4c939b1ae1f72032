"""Qwen2.5-VL: Qwen2-VL with RMS norms, a gated MLP and windows of attention in its tower, and seconds in the positions
of videos."""

from collections.abc import Mapping
from typing import Any

from avlm.config.model import ModelConfig, VisionConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.families import llama, qwen2_vl
from avlm.families.keys import require_accepted, require_same

MODEL_TYPES = ("qwen2_5_vl",)
# our field of VisionConfig -> their key
FIELDS = {
    **qwen2_vl.FIELDS,
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "tokens_per_second": "tokens_per_second",
}
TOWER = {"norm": "rms", "gated": True}
# A config.json may leave out the keys that equal the defaults of its classes.
VISION_DEFAULTS = {
    "depth": 32,
    "hidden_size": 3584,
    "out_hidden_size": 3584,  # that of the decoder
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 4,
    "window_size": 112,  # pixels a side
    "fullatt_block_indexes": [7, 15, 23, 31],
}

NAMES = {
    **llama.NAMES,
    "vision": {
        "blocks.{i}.gate": "blocks.{i}.mlp.gate_proj",
        "blocks.{i}.up": "blocks.{i}.mlp.up_proj",
        "blocks.{i}.down": "blocks.{i}.mlp.down_proj",
        **qwen2_vl.ATTENTION,
    },
    "vision_projector": qwen2_vl.NAMES["vision_projector"],
}
PREFIXES = qwen2_vl.PREFIXES
HEAD = qwen2_vl.HEAD
CLASS = "Qwen2_5_VLForConditionalGeneration"
LOADED = qwen2_vl.LOADED
PROJECTORS = qwen2_vl.PROJECTORS
SKIPPED = qwen2_vl.SKIPPED
SINUSOIDS = llama.SINUSOIDS
constants = llama.constants

PROCESSOR_FILES = qwen2_vl.PROCESSOR_FILES
MEDIA = qwen2_vl.MEDIA
MEDIA_TOKENS = qwen2_vl.MEDIA_TOKENS
TIES_HEAD = True

prompts = qwen2_vl.prompts


def read(keys: Mapping[str, Any], files: Mapping[str, dict]) -> ModelConfig:
    require_accepted(keys, qwen2_vl.ACCEPTED)
    vision = {**VISION_DEFAULTS, **(keys.get("vision_config") or {})}
    decoder = qwen2_vl.read_decoder(keys, "qwen2", qwen2_vl.TEXT_DEFAULTS)
    tower = read_tower(vision, files)
    return qwen2_vl.whole(decoder, tower, vision["spatial_merge_size"], vision["out_hidden_size"])


def read_tower(vision: Mapping[str, Any], files: Mapping[str, dict]) -> VisionConfig:
    """``vision``: all keys of the tower."""
    merge = vision["spatial_merge_size"]
    window = vision["window_size"] // (merge * vision["patch_size"]) * merge
    if window < 1:
        raise ValueError(f"window_size={shown(vision['window_size'])} is smaller than a feature")
    full = [layer for layer in vision["fullatt_block_indexes"] if layer < vision["depth"]]
    return qwen2_vl.read_tower(FIELDS, vision, files, **TOWER, window=window, full_layers=sorted(full))


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Raises ValueError for a model that the format cannot hold."""
    qwen2_vl.require_vision(config, "qwen2_5_vl")
    keys = {
        **qwen2_vl.write_top(config, ids, CLASS, "qwen2_5_vl"),
        **qwen2_vl.write_decoder(config.decoder),
        "rope_scaling": {"type": "mrope", "mrope_section": config.decoder.mrope_sections},
        "vision_config": write_tower(config, "qwen2_5_vl"),
    }
    require_same("qwen2_5_vl", config, read, keys, processor_json(config, None))
    return keys


def write_tower(config: ModelConfig, format: str) -> dict[str, Any]:
    vision = config.vision
    if vision.window is None or vision.tokens_per_second is None:
        raise ValueError(f"the {format} format needs vision.window and vision.tokens_per_second")
    return {
        **qwen2_vl.write_tower(config, FIELDS),
        "out_hidden_size": config.decoder.hidden_size,
        "tokens_per_second": int(vision.tokens_per_second),
        "window_size": vision.window * vision.patch_size,
        "fullatt_block_indexes": vision.full_layers,
    }


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    """File name -> keys: those of Qwen2-VL, which another class reads."""
    files = qwen2_vl.processor_json(config, data)
    return {name: {**keys, "processor_class": "Qwen2_5_VLProcessor"} for name, keys in files.items()}

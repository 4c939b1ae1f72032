"""LLaVA-OneVision: LLaVA-NeXT on SigLIP and Qwen 2. Large images are stretched to fewer features, several images in a
sample are not cut, and the features of a video's frames are halved."""

import re
from collections.abc import Mapping
from typing import Any

from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.families import llava, llava_next, llava_next_video
from avlm.families.keys import require_same

MODEL_TYPES = ("llava_onevision",)
FORMAT = "llava_onevision"
SIGLIP_LARGE = {  # SigLIP so400m at 384 pixels without its last layer
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
# A config.json may leave out the keys that equal the defaults of its class.
DEFAULTS = {
    "text_config": "qwen2",  # its model_type
    "vision_config": SIGLIP_LARGE,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "image_grid_pinpoints": [[384 * lines, 384 * columns] for lines in range(1, 7) for columns in range(1, 7)],
    "vision_aspect_ratio": "anyres_max_9",
}

NAMES = llava.NAMES
PREFIXES = llava.PREFIXES
HEAD = llava.HEAD
CLASS = "LlavaOnevisionForConditionalGeneration"
LOADED = llava.LOADED
SKIPPED = llava.SKIPPED
SINUSOIDS = llava.SINUSOIDS
PROJECTORS = llava.PROJECTORS
constants = llava.constants

PROCESSOR_FILES = llava_next_video.PROCESSOR_FILES
VIDEO = llava_next_video.VIDEO
MEDIA = llava_next_video.MEDIA
MEDIA_TOKENS = llava_next_video.MEDIA_TOKENS
TIES_HEAD = True


def read(keys: Mapping[str, Any], files: Mapping[str, dict]) -> ModelConfig:
    most = _most_tiles(keys)
    if _most_tiles(files.get("processor_config.json", keys)) != most:
        raise ValueError("vision_aspect_ratio in processor_config.json is not that of config.json")
    fields = {"halve_frames": "bilinear", "stretch_above_tiles": most}
    return llava_next_video.read_model(keys, files, DEFAULTS, **fields)


def _most_tiles(keys: Mapping[str, Any]) -> float:
    ratio = keys.get("vision_aspect_ratio") or DEFAULTS["vision_aspect_ratio"]
    found = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", str(ratio))
    if found is None:
        raise ValueError(f"vision_aspect_ratio={shown(repr(ratio))} is not implemented (accepted: anyres_max_N)")
    return float(found[1])


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Raises ValueError for a model that the format cannot hold."""
    keys = {
        "architectures": [CLASS],
        "model_type": FORMAT,
        **llava_next.write_model(config, ids, FORMAT, DEFAULTS),
        "video_token_index": ids[VIDEO],
        "vision_aspect_ratio": _aspect_ratio(config),
    }
    require_same(FORMAT, config, read, keys, processor_json(config, None))
    return keys


def _aspect_ratio(config: ModelConfig) -> str:
    most = config.vision_projector.stretch_above_tiles
    if most is None or most != int(most):
        raise ValueError(
            f"the {FORMAT} format cannot hold vision_projector.stretch_above_tiles={most}: give a whole number"
        )
    return f"anyres_max_{int(most)}"


def prompts(config: ModelConfig, files: Mapping[str, dict]) -> dict[str, Any]:
    """The keys of ``data`` with which we make the prompts that a folder's processor makes."""
    layout = {**llava_next.read_layout(config, files, DEFAULTS), "only_alone": True}
    return {"image_layout": layout, "video": {**llava_next_video.read_frames(files), "newline": True}}


def prompt_keys(config: ModelConfig, data: DataConfig) -> dict[str, Any]:
    """The keys of config.json that ``prompts`` reads."""
    llava_next_video.require_newline(FORMAT, data, True)
    return llava_next.write_layout(FORMAT, config, data, only_alone=True)


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    """File name -> keys. Its features are counted by the rows of the tower."""
    vision = config.vision
    counts = {
        "processor_class": "LlavaOnevisionProcessor",
        "image_token": llava.IMAGE,
        "video_token": VIDEO,
        "num_image_tokens": vision.num_rows,
        "vision_feature_select_strategy": llava.feature_strategy(vision),
        "vision_aspect_ratio": _aspect_ratio(config),
    }
    return {
        "preprocessor_config.json": llava_next.write_images(config, data, "LlavaOnevision", DEFAULTS),
        "video_preprocessor_config.json": llava_next_video.write_frames(config, data, "LlavaOnevision"),
        "processor_config.json": counts,
    }

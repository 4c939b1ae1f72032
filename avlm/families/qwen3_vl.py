"""Qwen3-VL, dense (``qwen3_vl_moe`` has experts): a Qwen 3 decoder with interleaved M-RoPE, whose first layers also get
features of inner layers of the tower (DeepStack), and times in the text before the frames of a video."""

import math
from collections.abc import Mapping
from typing import Any

from avlm.config.decoder import DecoderConfig
from avlm.config.media import TIMESTAMP
from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.families import llama, qwen2_vl
from avlm.families.keys import Reader, require_accepted, require_same

MODEL_TYPES = ("qwen3_vl",)
# our field of VisionConfig -> their key
FIELDS = {
    **qwen2_vl.FIELDS,
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "deepstack_layers": "deepstack_visual_indexes",
}
TOWER = {"patch_bias": True, "mean": [0.5] * 3, "std": [0.5] * 3}
# A config.json may leave out the keys that equal the defaults of its classes.
TEXT_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e5,
    "max_position_embeddings": 128000,
    "mrope_section": [24, 20, 20],
    "mrope_interleaved": True,
}
VISION_DEFAULTS = {
    "depth": 27,
    "hidden_size": 1152,
    "out_hidden_size": 3584,  # that of the decoder
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}

NAMES = {
    **llama.NAMES,
    "vision": {
        "blocks.{i}.up": "blocks.{i}.mlp.linear_fc1",
        "blocks.{i}.down": "blocks.{i}.mlp.linear_fc2",
        **qwen2_vl.ATTENTION,
        "position": "pos_embed.weight",
    },
    "vision_projector": {
        "norm": "merger.norm",
        "up": "merger.linear_fc1",
        "down": "merger.linear_fc2",
        "deep.{i}.norm": "deepstack_merger_list.{i}.norm",
        "deep.{i}.up": "deepstack_merger_list.{i}.linear_fc1",
        "deep.{i}.down": "deepstack_merger_list.{i}.linear_fc2",
    },
}
PREFIXES = {
    "decoder": ["model.language_model."],
    "vision": ["model.visual."],
    "vision_projector": ["model.visual."],
}
HEAD = qwen2_vl.HEAD
CLASS = "Qwen3VLForConditionalGeneration"
LOADED = qwen2_vl.LOADED
SINUSOIDS = llama.SINUSOIDS
PROJECTORS = {"vision_projector": ("merger", "deepstack_merger_list.{i}")}
SKIPPED = qwen2_vl.SKIPPED
constants = llama.constants

PROCESSOR_FILES = qwen2_vl.PROCESSOR_FILES
VIDEO_AREA = (128 * 32 * 32, 768 * 32 * 32)  # the least and the most pixels of all frames together, of the class
MEDIA = qwen2_vl.MEDIA
MEDIA_TOKENS = qwen2_vl.MEDIA_TOKENS
TIES_HEAD = True


def read(keys: Mapping[str, Any], files: Mapping[str, dict]) -> ModelConfig:
    return read_around(qwen2_vl.read_decoder(keys, "qwen3", TEXT_DEFAULTS), keys, files)


def read_around(
    decoder: DecoderConfig, keys: Mapping[str, Any], files: Mapping[str, dict], **others: Any
) -> ModelConfig:
    """The whole model of a decoder. ``others``: more fields of its tower."""
    require_accepted(keys, qwen2_vl.ACCEPTED)
    vision = {**VISION_DEFAULTS, **(keys.get("vision_config") or {})}
    side = math.isqrt(vision["num_position_embeddings"])
    if side**2 != vision["num_position_embeddings"]:
        number = shown(vision["num_position_embeddings"])
        raise ValueError(f"num_position_embeddings={number} is no square: the table has as many lines as columns")
    tower = qwen2_vl.read_tower(FIELDS, vision, files, **TOWER, image_size=side * vision["patch_size"], **others)
    return qwen2_vl.whole(decoder, tower, vision["spatial_merge_size"], vision["out_hidden_size"])


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Raises ValueError for a model that the format cannot hold."""
    if config.decoder.experts is not None:
        raise ValueError("the qwen3_vl format cannot hold decoder.experts: take qwen3_vl_moe")
    return write_whole(config, ids, CLASS, "qwen3_vl", read)


def write_whole(config: ModelConfig, ids: Mapping[str, int], name: str, format: str, read: Reader) -> dict[str, Any]:
    """``name``: of the class of transformers."""
    qwen2_vl.require_vision(config, format)
    keys = {
        **qwen2_vl.write_top(config, ids, name, format),
        "text_config": {
            **qwen2_vl.write_decoder(config.decoder),
            "model_type": f"{format}_text",
            "rope_scaling": rope_scaling(config.decoder),
        },
        "vision_config": write_tower(config),
    }
    require_same(format, config, read, keys, processor_json(config, None))
    return keys


def rope_scaling(decoder: DecoderConfig) -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": decoder.mrope_sections, "mrope_interleaved": True}


def write_tower(config: ModelConfig) -> dict[str, Any]:
    return {
        **qwen2_vl.write_tower(config, FIELDS),
        "out_hidden_size": config.decoder.hidden_size,
        "num_position_embeddings": config.vision.num_patches,
    }


def prompts(config: ModelConfig, files: Mapping[str, dict]) -> dict[str, Any]:
    """The keys of ``data`` with which we make the prompts that a folder's processor makes."""
    image, video = (qwen2_vl.pixels_processor(files, kind)[1] for kind in ("image", "video"))
    video = {key: value for key, value in video.items() if key not in qwen2_vl.EDGES.values()}  # it reads size alone
    together = qwen2_vl.read_size(video, VIDEO_AREA, config, config.vision.frames_per_patch)
    frames = {"spread": "first_to_last", "text": {"frame": TIMESTAMP}, "tokens": together}
    return {**qwen2_vl.read_images(image, config), "video": {**qwen2_vl.read_frames(video), **frames}}


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    """File name -> keys. Bounds of areas and frames are those of the prompts of ``data``."""
    data = data or DataConfig(train="")
    together = data.video.tokens or data.image_tokens
    video = {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "size": qwen2_vl.write_size(together, config, config.vision.frames_per_patch),
    }
    return qwen2_vl.write_processors(config, data, video, "Qwen3VLProcessor")

"""Mistral Small 3.1 and 3.2, and Ministral 3: the tower and the prompts of Pixtral, with a projector that first merges
the patches of a feature. The decoder is Mistral's or Ministral's.

The merger's columns stand channel by channel in files, each with the patches of a feature; ours stand patch by patch.
"""

from collections.abc import Mapping
from typing import Any

from avlm.config.model import ModelConfig, ProjectorConfig
from avlm.config.run import DataConfig
from avlm.families import llama, llava, pixtral
from avlm.families.keys import require_accepted, require_same

MODEL_TYPES = ("mistral3",)
# A config.json may leave out the keys that equal the defaults of its class, or all of a part.
VISION = {"image_size": 1540, "patch_size": 14}
TEXT = {
    "model_type": "mistral",
    "head_dim": 128,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "max_position_embeddings": 131072,
    "num_hidden_layers": 40,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e9,
    "sliding_window": None,
    "vocab_size": 131072,
}
ACCEPTED = {"projector_hidden_act": ("gelu",), "quantization_config": (None,)}

NAMES = {
    **pixtral.NAMES,
    "vision_projector": {
        "merger": "patch_merger.merging_layer",
        "norm": "norm",
        "up": "linear_1",
        "down": "linear_2",
    },
}
CHANNEL_MAJOR = ("vision_projector.merger.weight",)
PREFIXES = pixtral.PREFIXES
HEAD = pixtral.HEAD
CLASS = "Mistral3ForConditionalGeneration"
LOADED = pixtral.LOADED
SKIPPED = pixtral.SKIPPED
SINUSOIDS = pixtral.SINUSOIDS
PROJECTORS = pixtral.PROJECTORS
constants = pixtral.constants

PROCESSOR_FILES = pixtral.PROCESSOR_FILES
MEDIA = pixtral.MEDIA
MEDIA_TOKENS = pixtral.MEDIA_TOKENS
TIES_HEAD = True
LONGEST_EDGE = 1540  # of the folders of the Hub


def read(keys: Mapping[str, Any], files: Mapping[str, dict]) -> ModelConfig:
    """``files``: those of PROCESSOR_FILES that the folder has, by their names."""
    require_accepted(keys, ACCEPTED)
    decoder = llama.read(_text(keys))
    merge = keys.get("spatial_merge_size", 2)
    vision = keys if keys.get("vision_config") else {**keys, "vision_config": VISION}
    tower = pixtral.read_tower(vision, files, keys.get("vision_feature_layer", -1), merge)
    projector = ProjectorConfig(
        downsample=merge,
        merge=True,
        norm="rms",
        norm_eps=decoder.norm_eps,
        bias=bool(keys.get("multimodal_projector_bias")),
    )
    return ModelConfig(decoder=decoder, vision=tower, vision_projector=projector)


def _text(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the head is tied the inner key says: the class of transformers 5 writes true at the top of any folder
    that has no key there, and loads a head of its own nevertheless."""
    text = {"model_type": "mistral", **keys["text_config"]} if keys.get("text_config") else dict(TEXT)
    llama.require_variant(text["model_type"])
    tied = text.get("tie_word_embeddings", keys.get("tie_word_embeddings", False))
    return {**text, "tie_word_embeddings": tied}


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Raises ValueError for a model that the format cannot hold."""
    llava.require_tower(config, "mistral3")
    keys = {
        **pixtral.write_top(config, ids, CLASS, "mistral3", LONGEST_EDGE),
        "spatial_merge_size": config.vision_projector.downsample,
    }
    require_same("mistral3", config, read, keys, processor_json(config, None))
    return keys


def prompts(config: ModelConfig, files: Mapping[str, dict]) -> dict[str, Any]:
    """The keys of ``data`` with which we make the prompts that a folder's processor makes."""
    return pixtral.read_prompts(files, LONGEST_EDGE)


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    """File name -> keys. The longest edge and the tokens after lines are those of the prompts of ``data``."""
    return pixtral.write_processors(config, data, LONGEST_EDGE, "mistral3")

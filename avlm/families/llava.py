"""LLaVA: a decoder of the Llama family with a CLIP or SigLIP tower and a two-layer projector."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from avlm.config.media import ImageLayout
from avlm.config.model import ModelConfig, ProjectorConfig, VisionConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.families import clip, llama
from avlm.families.keys import has_norms, require_accepted, require_same

MODEL_TYPES = ("llava",)
# The tower of a config.json without a vision_config: CLIP ViT-L/14 at 336 pixels.
CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
# A config.json may leave out the keys that equal the defaults of its class.
DEFAULTS = {
    "text_config": "llama",  # its model_type
    "vision_config": CLIP_LARGE,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
ACCEPTED = {"projector_hidden_act": ("gelu",), "quantization_config": (None,)}

PROJECTOR = {"up": "linear_1", "down": "linear_2", "newline": "../image_newline"}  # the last from LLaVA-NeXT on
NAMES = {**llama.NAMES, **clip.NAMES, "vision_projector": PROJECTOR}
# First the Hub's layout, which an export has too, then that of transformers 4.52 and later.
PREFIXES = {
    "decoder": ["language_model.model.", "model.language_model."],
    "vision": [
        "vision_tower.vision_model.",
        "model.vision_tower.vision_model.",
        "model.vision_tower.",
        "vision_tower.",
    ],
    "vision_projector": ["multi_modal_projector.", "model.multi_modal_projector."],
}
HEAD = "language_model.lm_head.weight"
CLASS = "LlavaForConditionalGeneration"
LOADED = {
    "decoder": "model.language_model.",
    "vision": "model.vision_tower.",
    "vision_projector": "model.multi_modal_projector.",
}
SKIPPED = {**llama.SKIPPED, **clip.SKIPPED, "vision_projector": []}
SINUSOIDS = llama.SINUSOIDS
PROJECTORS = {"vision_projector": ("multi_modal_projector",)}

PROCESSOR_FILES = clip.PROCESSOR_FILES
IMAGE = "<image>"
MEDIA = {"image": IMAGE}
MEDIA_TOKENS = (IMAGE,)
TIES_HEAD = True


def read(keys: Mapping[str, Any], files: Mapping[str, dict]) -> ModelConfig:
    return read_model(keys, files, DEFAULTS)


def read_model(
    keys: Mapping[str, Any], files: Mapping[str, dict], defaults: Mapping[str, Any], **projector: Any
) -> ModelConfig:
    """``defaults``: of absent keys. ``projector``: what sets it apart in our config."""
    require_accepted(keys, ACCEPTED)
    text = read_text(keys, defaults["text_config"])
    vision = keys.get("vision_config") or defaults["vision_config"]
    vision = {"model_type": defaults["vision_config"]["model_type"], **vision}
    if vision["model_type"] not in clip.VARIANTS:
        raise ValueError(f"a LLaVA with a {shown(repr(vision['model_type']))} is not implemented")
    num_layers = vision.get("num_hidden_layers", clip.DEFAULTS[vision["model_type"]]["num_hidden_layers"])
    layer = keys.get("vision_feature_layer", defaults["vision_feature_layer"])
    tower = clip.read(vision, files, feature_layer(layer, num_layers))
    strategy = keys.get("vision_feature_select_strategy", defaults["vision_feature_select_strategy"])
    if (strategy == "default") != (feature_strategy(tower) == "default"):
        found = shown(repr(strategy))
        raise ValueError(f"vision_feature_select_strategy={found} of a {vision['model_type']} is not implemented")
    bias = keys.get("multimodal_projector_bias", True)
    return ModelConfig(decoder=llama.read(text), vision=tower, vision_projector=ProjectorConfig(bias=bias, **projector))


def read_text(keys: Mapping[str, Any], default: str) -> dict[str, Any]:
    """The keys of the decoder, of the ``default`` type if none is named. A tied head may stand at the top or inside."""
    text = {"model_type": default, **(keys.get("text_config") or {})}
    llama.require_variant(text["model_type"])
    return {**text, "tie_word_embeddings": keys.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)}


def feature_layer(layer: Any, num_layers: int) -> int:
    """``vision.feature_layer`` of their number, which counts from either end: 0 is the input of the first layer."""
    if type(layer) is not int:
        raise ValueError(f"vision_feature_layer={shown(repr(layer))}: features of several layers are not implemented")
    return layer if layer < 0 else layer - 1 - num_layers


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    keys = {"architectures": [CLASS], "model_type": "llava", **write_model(config, ids, "llava")}
    require_same("llava", config, read, keys, processor_json(config, None))
    return keys


def write_model(config: ModelConfig, ids: Mapping[str, int], format: str) -> dict[str, Any]:
    """The keys that the formats of LLaVA share. Only the layers that we build are exported, so the features are those
    of the last layer."""
    require_tower(config, format)
    vision, projector = config.vision, config.vision_projector
    if projector.type != "mlp2x_gelu" or projector.downsample != 1 or has_norms(projector) or vision.post_norm:
        raise ValueError(
            f"the {format} format holds an mlp2x_gelu projector without a norm and without downsampling, and no "
            "post_norm"
        )
    if projector.hidden_size not in (0, config.decoder.hidden_size):
        raise ValueError(f"the {format} format cannot hold vision_projector.hidden_size={projector.hidden_size}")
    return {
        "image_token_index": ids[IMAGE],
        "image_seq_length": vision.num_patches,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": projector.bias,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": feature_strategy(vision),
        "tie_word_embeddings": config.decoder.tie_embedding,
        "text_config": llama.write(config.decoder),
        "vision_config": clip.write(vision),
    }


def require_tower(config: ModelConfig, format: str) -> None:
    if config.vision is None or config.audio is not None:
        raise ValueError(f"the {format} format holds a decoder with a vision tower and without an audio tower")


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    """File name -> keys."""
    return {
        "preprocessor_config.json": {"processor_class": "LlavaProcessor", **clip.write_processor(config.vision)},
        "processor_config.json": {"processor_class": "LlavaProcessor", **write_counts(config.vision)},
    }


def write_counts(vision: VisionConfig) -> dict[str, Any]:
    """What the tokens of an image are counted by: (side / patch_size)^2 and the additional ones, minus one under the
    strategy "default", which drops the class token."""
    return {
        "image_token": IMAGE,
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": int(vision.class_token),
        "vision_feature_select_strategy": feature_strategy(vision),
    }


def prompt_keys(config: ModelConfig, data: DataConfig) -> dict[str, Any]:
    """What config.json says about prompts: nothing."""
    require_layout("llava", data, ImageLayout())
    return {}


def require_layout(format: str, data: DataConfig, layout: ImageLayout) -> None:
    """ValueError unless images are laid out as the format has it."""
    for field in dataclasses.fields(layout):
        value, only = getattr(data.image_layout, field.name), getattr(layout, field.name)
        if value != only:
            raise ValueError(f"the {format} format cannot hold data.image_layout.{field.name}={value}, only {only}")


def constants(config: ModelConfig) -> llama.Constants:
    """The norm of the pooled output, which features do not need."""
    shape = (config.vision.hidden_size,)
    return {PREFIXES["vision"][0] + name: (shape, value) for name, value in clip.POOLED_NORM.items()}


def text_template(keys: Mapping[str, Any], control_tokens: Collection[str]) -> str:
    """The ``data.template`` that makes the same prompts as a folder's own template for lists of parts."""
    return "chatml" if "<|im_start|>" in control_tokens else "llava"


def feature_strategy(vision: VisionConfig) -> str:
    return "default" if vision.class_token else "full"

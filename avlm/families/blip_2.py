"""BLIP-2: a ViT and a Q-Former, whose queries a linear brings to the width of a language model (Li et al. 2023).

Its language models, OPT and T5, are none of ours: a folder gives a vision tower and a Q-Former to another decoder, and
its linear too if that decoder is as wide as theirs. Dropout, which the Q-Former has in training, is not computed.
"""

from collections.abc import Mapping
from typing import Any

from avlm.config.connector import ResamplerConfig
from avlm.config.model import ProjectorConfig, VisionConfig, VisionParts
from avlm.config.values import shown
from avlm.families import clip
from avlm.families.keys import processor, require_accepted, to_ours

MODEL_TYPES = ("blip-2",)
ACCEPTED = {"quantization_config": (None,)}
# What all of these towers have, and what no key of theirs tells. Pixels are those of the processor's class.
TOWER: dict[str, Any] = {
    "class_token": True,
    "pre_norm": False,
    "patch_bias": True,
    "post_norm": True,
    "feature_layer": -1,
    "resize": "stretch",
}
# A config.json may leave out the keys that equal the defaults of its class.
VISION_DEFAULTS = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
}
VISION_FIELDS = {**clip.FIELDS, "qkv_bias": "qkv_bias"}  # our field -> their key
VISION_ACCEPTED = {
    "model_type": ("blip_2_vision_model",),
    "hidden_act": tuple(clip.OUR_ACTIVATIONS),
    "quantization_config": (None,),
}
QFORMER_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "cross_attention_frequency": 2,
}
QFORMER_FIELDS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
    "read_every": "cross_attention_frequency",
}
QFORMER_ACCEPTED = {
    "model_type": ("blip_2_qformer",),
    "hidden_act": ("gelu", "relu", "silu"),
    "position_embedding_type": ("absolute", None),  # which queries have none of
}
NUM_QUERIES = 32
CLASS_SIDE = 384  # of images, where the processor's file says nothing

# Our module or parameter -> theirs, {i} the layer, without the prefix of the module.
VISION_LAYER, LAYER = "encoder.layers.{i}.", "qformer.encoder.layer.{i}."
NAMES = {
    "vision": {  # what sets it apart from CLIP first
        **{f"blocks.{{i}}.attention.{part}": f"{VISION_LAYER}self_attn.qkv" for part in ("q", "k", "v")},
        **clip.NAMES["vision"],
        **{f"blocks.{{i}}.attention.{part}": f"{VISION_LAYER}self_attn.qkv" for part in ("q", "k", "v")},
        "blocks.{i}.attention.o": f"{VISION_LAYER}self_attn.projection",
        "position": "embeddings.position_embedding",
    },
    "vision_projector": {
        "resampler.first_norm": "qformer.layernorm",
        "resampler.queries": "query_tokens",
        **{
            f"resampler.blocks.{{i}}.{ours}.{part}": f"{LAYER}{theirs}.attention.{name}"
            for ours, theirs in {"attention": "attention", "reading": "crossattention"}.items()
            for part, name in {"q": "query", "k": "key", "v": "value"}.items()
        },
        "resampler.blocks.{i}.attention.o": f"{LAYER}attention.output.dense",
        "resampler.blocks.{i}.attention_norm": f"{LAYER}attention.output.LayerNorm",
        "resampler.blocks.{i}.reading.o": f"{LAYER}crossattention.output.dense",
        "resampler.blocks.{i}.reading_norm": f"{LAYER}crossattention.output.LayerNorm",
        "resampler.blocks.{i}.up": f"{LAYER}intermediate_query.dense",
        "resampler.blocks.{i}.down": f"{LAYER}output_query.dense",
        "resampler.blocks.{i}.ffn_norm": f"{LAYER}output_query.LayerNorm",
        "linear": "language_projection",
    },
}
PREFIXES = {"vision": ["vision_model."], "vision_projector": [""]}
SKIPPED = {
    "vision": [
        (r"post_layernorm\.", "norm above feature_layer"),
        (r"language_model\.", "language model"),
    ],
    "vision_projector": [
        (r"language_model\.", "language model"),
        (r"language_projection\.", "projection to a language model that our decoder is none of"),
    ],
}
QUERIES = "vision_projector.resampler.queries"  # (1, N, D) in files
LINEAR = {"weight": "vision_projector.linear.weight", "bias": "vision_projector.linear.bias"}

PROCESSOR_FILES = clip.PROCESSOR_FILES


def read(given: Mapping[str, Any], files: Mapping[str, dict]) -> VisionParts:
    """``files``: those of PROCESSOR_FILES that the folder has, by their names."""
    require_accepted(given, ACCEPTED)
    keys = _with_defaults(given, "qformer_config", QFORMER_DEFAULTS)
    require_accepted(keys, QFORMER_ACCEPTED)
    num_queries = given.get("num_query_tokens", NUM_QUERIES)
    resampler = ResamplerConfig(type="qformer", num_queries=num_queries, **to_ours(QFORMER_FIELDS, keys))
    projector = ProjectorConfig(type="linear", resampler=resampler)
    return VisionParts(vision=_read_tower(given, files), vision_projector=projector)


def _read_tower(given: Mapping[str, Any], files: Mapping[str, dict]) -> VisionConfig:
    keys = _with_defaults(given, "vision_config", VISION_DEFAULTS)
    require_accepted(keys, VISION_ACCEPTED)
    fields = {**TOWER, **to_ours(VISION_FIELDS, keys)}
    fields["activation"] = clip.OUR_ACTIVATIONS[fields["activation"]]
    name, pixels = processor(files, "image")
    if pixels:
        pixels = {"size": {"height": CLASS_SIDE, "width": CLASS_SIDE}, **pixels}
        fields |= clip.read_processor(pixels, keys["image_size"], name)
        if fields["resize"] != "stretch":
            found = shown(repr(pixels["size"]))
            raise ValueError(f"size={found} in {name} is not implemented (accepted: height and width)")
    return VisionConfig(**fields)


def _with_defaults(given: Mapping[str, Any], key: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    part = given.get(key) or {}
    if not isinstance(part, Mapping):
        raise ValueError(f"{key} must be an object, not {shown(repr(part))}")
    return {**defaults, **part}


def starts_at_random(name: str, shapes: Mapping[str, tuple[int, ...]], held: Mapping[str, Any]) -> bool:
    """Whether a folder has nothing for a parameter of ours, its name with our module, because it stands behind the
    Q-Former and theirs leads to a decoder of another width, or is another kind of projector."""
    if not name.startswith("vision_projector.") or name.startswith("vision_projector.resampler."):
        return False
    fits = [
        theirs in held and shapes.get(ours) == tuple(held[theirs].get_shape())
        for ours, theirs in ((ours, f"language_projection.{leaf}") for leaf, ours in LINEAR.items())
    ]
    return not all(fits)

"""CLIP and SigLIP: one vision tower, whose variants differ in the class token, norms, biases and pixels."""

import math
from collections.abc import Mapping
from typing import Any

from avlm.config.model import VisionConfig
from avlm.config.values import shown
from avlm.families.keys import NUMBER, require_accepted, to_ours, to_theirs

# model_type -> what sets it apart in our config
VARIANTS = {
    "clip_vision_model": {"class_token": True, "pre_norm": True, "patch_bias": False},
    "siglip_vision_model": {"class_token": False, "pre_norm": False, "patch_bias": True},
}
PLAIN = {"axial_rope": False, "deepstack_layers": [], "gated": False, "norm": "layer", "any_grid": False}
TWO_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # both towers -> the one we take
MODEL_TYPES = (*VARIANTS, *TWO_TOWERS)

# our field -> their key
FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
}
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "silu": "silu"}
OUR_ACTIVATIONS = {theirs: ours for ours, theirs in ACTIVATIONS.items()}

# A config.json may leave out the keys that equal the defaults of its class.
CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SIGLIP = {**CLIP, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
DEFAULTS = {"clip_vision_model": CLIP, "siglip_vision_model": SIGLIP}
ACCEPTED = {"hidden_act": tuple(OUR_ACTIVATIONS), "num_channels": (3,), "quantization_config": (None,)}

# How pixels are made. CLIP's way is the default of VisionConfig.
PIXELS = {
    "clip_vision_model": {},
    "siglip_vision_model": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize": "stretch"},
}
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # the first that is there counts
PROCESSOR_FIELDS = {"mean": "image_mean", "std": "image_std"}
RESAMPLE = {"lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's codes
# For Lanczos most processors of transformers take bicubic in its place, by the version of torchvision.
OUR_RESAMPLE = {number: name for name, number in RESAMPLE.items() if name != "lanczos"}

# Our module or parameter -> theirs, {i} the layer, without the prefix of the module.
NAMES = {
    "vision": {
        "patch": "embeddings.patch_embedding",
        "class_token": "embeddings.class_embedding",
        "position": "embeddings.position_embedding.weight",
        "pre_norm": "pre_layrnorm",  # sic
        "blocks.{i}.attention_norm": "encoder.layers.{i}.layer_norm1",
        "blocks.{i}.attention.q": "encoder.layers.{i}.self_attn.q_proj",
        "blocks.{i}.attention.k": "encoder.layers.{i}.self_attn.k_proj",
        "blocks.{i}.attention.v": "encoder.layers.{i}.self_attn.v_proj",
        "blocks.{i}.attention.o": "encoder.layers.{i}.self_attn.out_proj",
        "blocks.{i}.ffn_norm": "encoder.layers.{i}.layer_norm2",
        "blocks.{i}.up": "encoder.layers.{i}.mlp.fc1",
        "blocks.{i}.down": "encoder.layers.{i}.mlp.fc2",
        "post_norm": "post_layernorm",
    }
}
PREFIXES = {"vision": ["vision_model.", ""]}
# Tensors that a folder may hold and we do not load.
SKIPPED = {
    "vision": [
        (r"embeddings\.position_ids", "computed position ids"),
        (r"text_model\.|text_projection|visual_projection|logit_scale|logit_bias", "text tower and its projections"),
        (r"head\.", "attention-pooling head"),
        (r"post_layernorm\.", "norm of the pooled output"),
    ]
}
# Features do not need that norm, but transformers expects its tensors: name -> the value that fills it.
POOLED_NORM = {"post_layernorm.weight": 1.0, "post_layernorm.bias": 0.0}


def read(given: Mapping[str, Any], files: Mapping[str, dict], feature_layer: int = -2) -> VisionConfig:
    """``files``: those of PROCESSOR_FILES that the folder has, by their names."""
    if given["model_type"] in TWO_TOWERS:
        given = {"model_type": TWO_TOWERS[given["model_type"]], **(given.get("vision_config") or {})}
    model_type = given["model_type"]
    if model_type not in VARIANTS:
        raise ValueError(f"vision_config.model_type {shown(repr(model_type))} is not supported")
    keys = {**DEFAULTS[model_type], **given}
    require_accepted(keys, ACCEPTED)
    fields = to_ours(FIELDS, keys)
    fields["activation"] = OUR_ACTIVATIONS[fields["activation"]]
    fields |= PIXELS[model_type]
    for name in [name for name in PROCESSOR_FILES if name in files][:1]:
        fields |= read_processor(files[name], keys["image_size"], name)
    return VisionConfig(**fields, **VARIANTS[model_type], feature_layer=feature_layer)


def write(config: VisionConfig) -> dict[str, Any]:
    """vision_config of the layers that we build. Raises ValueError for a tower that is neither CLIP nor SigLIP."""
    variant = {"class_token": config.class_token, "pre_norm": config.pre_norm, "patch_bias": config.patch_bias}
    model_type = next((name for name in VARIANTS if VARIANTS[name] == variant), None)
    if model_type is None:
        raise ValueError(f"Hugging Face's formats hold a CLIP or a SigLIP tower, and none with {variant}")
    for key, value in PLAIN.items():
        if getattr(config, key) != value:
            raise ValueError(f"CLIP and SigLIP have no {key}={getattr(config, key)}")
    return {
        "model_type": model_type,
        **to_theirs(FIELDS, config),
        "num_hidden_layers": config.num_blocks,
        "hidden_act": ACTIVATIONS[config.activation],
        "vision_use_head": False,
    }


def stored_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Shapes that parameters of RESHAPED have in a file: a convolution (D, 3, P, P), or over frames as well
    (D, 3, frames, P, P) in the towers of Qwen-VL, and a vector (D,)."""
    side = config.patch_size
    frames = (config.frames_per_patch,) if config.resize == "area" else ()
    return {
        "vision.patch.weight": (config.hidden_size, 3, *frames, side, side),
        "vision.class_token": (config.hidden_size,),
    }


RESHAPED = ("vision.patch.weight", "vision.class_token", "vision.position")  # of any family


def read_processor(processor: dict[str, Any], side: int, file: str) -> dict[str, Any]:
    """Fields of VisionConfig. ValueError if our tower would get different pixels from theirs."""
    processor = processor.get("image_processor", processor)
    if not isinstance(processor, dict):
        raise ValueError(f"image_processor in {file} must be an object, not {shown(repr(processor))}")
    given = {key: value for key, value in processor.items() if value is not None}
    size, crops = given.get("size", side), given.get("do_center_crop")
    has_shortest = isinstance(size, dict) and bool(size.get("shortest_edge"))
    wanted = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_pad": False, "size": side}
    if crops:
        wanted["crop_size"] = side
    if has_shortest:
        wanted["do_center_crop"] = True  # or images would not become squares
    wrong = [key for key, value in wanted.items() if key in given and not _is_all(given[key], value)]
    resample = given.get("resample", RESAMPLE["bicubic"])
    if type(resample) is not int or resample not in OUR_RESAMPLE:
        wrong.append("resample")
    factor = given.get("rescale_factor", 1 / 255)
    if not isinstance(factor, NUMBER) or not math.isclose(factor, 1 / 255, rel_tol=1e-5):
        wrong.append("rescale_factor")
    if wrong:
        raise ValueError(f"{wrong[0]}={shown(repr(given[wrong[0]]))} in {file} is not implemented")
    fields = {field: given[key] for field, key in PROCESSOR_FIELDS.items() if key in given}
    if "resample" in given:
        fields["resample"] = OUR_RESAMPLE[resample]
    if has_shortest:
        fields["resize"] = "crop"
    elif isinstance(size, int) and crops is not None:  # a bare number is the shortest edge where images are cropped
        fields["resize"] = "crop" if crops else "stretch"
    elif not isinstance(size, int):
        fields["resize"] = "stretch"
    return fields


def _is_all(found: Any, value: Any) -> bool:
    """Whether every number of a size is ``value``. A size may be a number, a list or an object."""
    if isinstance(found, dict):
        found = list(found.values())
    if not isinstance(found, list):
        found = [found]
    numbers = [each for each in found if each is not None]
    return bool(numbers) and all(each == value for each in numbers)


def write_processor(config: VisionConfig) -> dict[str, Any]:
    """preprocessor_config.json of CLIP or SigLIP."""
    side = {"height": config.image_size, "width": config.image_size}
    crops = config.resize == "crop"
    return {
        "image_processor_type": "CLIPImageProcessor" if crops else "SiglipImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": config.image_size} if crops else side,
        "do_center_crop": crops,
        "crop_size": side,
        "resample": RESAMPLE[config.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        **to_theirs(PROCESSOR_FIELDS, config),
    }

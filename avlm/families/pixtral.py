"""Pixtral 12B: a decoder of the Llama family, and a tower for images of any grid of patches whose features stand in the
prompt line by line, each line with a token after it. The class of transformers is LLaVA's.

Mistral 3 takes from this file what it shares with it: the tower, processors and prompts.
"""

from collections.abc import Mapping
from typing import Any

from avlm.config.media import ImageLayout
from avlm.config.model import ModelConfig, ProjectorConfig, VisionConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.families import clip, llama, llava
from avlm.families.keys import processor, require_accepted, require_same, to_ours, to_theirs

MODEL_TYPES = ()  # llava's, with a tower of TOWER_TYPE
TOWER_TYPE = "pixtral"
# our field of VisionConfig -> their key
FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "patch_size": "patch_size",
    "activation": "hidden_act",
}
# What all of these towers have, and what no key of theirs tells.
TOWER: dict[str, Any] = {
    "class_token": False,
    "gated": True,
    "bias": False,
    "norm": "rms",
    "norm_eps": 1e-5,
    "axial_rope": True,
    "axial_offset": True,
    "resize": "longest",
}
# A config.json may leave out the keys that equal the defaults of its class.
VISION_DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 16,
    "hidden_act": "gelu",
}
VISION_ACCEPTED = {
    "model_type": (TOWER_TYPE,),
    "hidden_act": tuple(clip.OUR_ACTIVATIONS),
    "num_channels": (3,),
    "rope_theta": (10_000.0, None),
    "rope_parameters": (None, {"rope_type": "axial", "rope_theta": 10_000.0}),
    "quantization_config": (None,),
}
# The default of their class would drop the first patch, as if it were a class token.
ACCEPTED = {**llava.ACCEPTED, "vision_feature_select_strategy": ("full",)}

# Our module or parameter -> theirs, {i} the layer, without the prefix of the module.
NAMES = {
    **llava.NAMES,
    "vision": {
        "patch": "patch_conv",
        "pre_norm": "ln_pre",
        "blocks.{i}.attention_norm": "transformer.layers.{i}.attention_norm",
        "blocks.{i}.attention.q": "transformer.layers.{i}.attention.q_proj",
        "blocks.{i}.attention.k": "transformer.layers.{i}.attention.k_proj",
        "blocks.{i}.attention.v": "transformer.layers.{i}.attention.v_proj",
        "blocks.{i}.attention.o": "transformer.layers.{i}.attention.o_proj",
        "blocks.{i}.ffn_norm": "transformer.layers.{i}.ffn_norm",
        "blocks.{i}.gate": "transformer.layers.{i}.feed_forward.gate_proj",
        "blocks.{i}.up": "transformer.layers.{i}.feed_forward.up_proj",
        "blocks.{i}.down": "transformer.layers.{i}.feed_forward.down_proj",
    },
}
PREFIXES = {**llava.PREFIXES, "vision": ["vision_tower.", "model.vision_tower."]}
HEAD = llava.HEAD
CLASS = llava.CLASS
LOADED = llava.LOADED
SKIPPED = {
    **llama.SKIPPED,
    "vision": [(r"patch_positional_embedding\.inv_freq", "computed frequencies")],
    "vision_projector": [],
}
SINUSOIDS = llama.SINUSOIDS
PROJECTORS = llava.PROJECTORS
constants = llama.constants

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
IMAGE, LINE_BREAK, END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"
MEDIA = {"image": IMAGE}
MEDIA_TOKENS = (IMAGE, LINE_BREAK, END)
TIES_HEAD = True
LONGEST_EDGE = 1024  # of the processor's class
PROCESSOR_ACCEPTED = {
    "do_convert_rgb": (True,),
    "do_resize": (True,),
    "do_center_crop": (None, False),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "rescale_factor": (1 / 255,),
    "resample": tuple(clip.OUR_RESAMPLE),
}


# 1. config.json


def is_meant(keys: Mapping[str, Any]) -> bool:
    """Whether the config.json of a LLaVA is that of a Pixtral."""
    return (keys.get("vision_config") or {}).get("model_type") == TOWER_TYPE


def read(keys: Mapping[str, Any], files: Mapping[str, dict]) -> ModelConfig:
    """``files``: those of PROCESSOR_FILES that the folder has, by their names."""
    given = {**llava.DEFAULTS, **keys}
    require_accepted(given, ACCEPTED)
    text = llava.read_text(keys, llava.DEFAULTS["text_config"])
    tower = read_tower(keys, files, given["vision_feature_layer"])
    projector = ProjectorConfig(bias=keys.get("multimodal_projector_bias", True))
    return ModelConfig(decoder=llama.read(text), vision=tower, vision_projector=projector)


def read_tower(keys: Mapping[str, Any], files: Mapping[str, dict], layer: Any, merge: int = 1) -> VisionConfig:
    """``layer``: whose output is taken; ``merge``: patches a side of a feature."""
    vision = {**VISION_DEFAULTS, **(keys.get("vision_config") or {})}
    head = vision["hidden_size"] // vision["num_attention_heads"]
    require_accepted(vision, {**VISION_ACCEPTED, "head_dim": (head,)})
    _require_sizes(files, vision["patch_size"], merge)
    fields = {**TOWER, **to_ours(FIELDS, vision), **_pixels(files)}
    fields["activation"] = clip.OUR_ACTIVATIONS[fields["activation"]]
    return VisionConfig(**fields, feature_layer=llava.feature_layer(layer, vision["num_hidden_layers"]))


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Only the layers that we build are exported, so the features are those of the last layer."""
    llava.require_tower(config, "pixtral")
    keys = {
        **write_top(config, ids, CLASS, "llava", LONGEST_EDGE),
        "image_seq_length": 1,  # of a tower of squares
        "vision_feature_select_strategy": "full",
    }
    pixels = {"preprocessor_config.json": processor_json(config, None)["preprocessor_config.json"]}
    require_same("pixtral", config, read, keys, pixels)
    return keys


def write_top(config: ModelConfig, ids: Mapping[str, int], name: str, model_type: str, edge: int) -> dict[str, Any]:
    return {
        "architectures": [name],
        "model_type": model_type,
        "image_token_index": ids[IMAGE],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": config.vision_projector.bias,
        "vision_feature_layer": -1,
        "tie_word_embeddings": config.decoder.tie_embedding,
        "text_config": write_text(config),
        "vision_config": {
            "model_type": TOWER_TYPE,
            **to_theirs(FIELDS, config.vision),
            "num_hidden_layers": config.vision.num_blocks,
            "hidden_act": clip.ACTIVATIONS[config.vision.activation],
            "image_size": edge,
            "num_channels": 3,
            "rope_theta": 10_000.0,
        },
    }


def write_text(config: ModelConfig) -> dict[str, Any]:
    """What Llama and Mistral compute alike is called Mistral here, as in the folders of the Hub."""
    text = llama.write(config.decoder)
    if text["model_type"] == "llama":
        text |= {"model_type": "mistral", "architectures": [llama.ARCHITECTURES["mistral"]], "sliding_window": None}
    return text


# 2. Processors and prompts


def prompts(config: ModelConfig, files: Mapping[str, dict]) -> dict[str, Any]:
    """The keys of ``data`` with which we make the prompts that a folder's processor makes."""
    return read_prompts(files, LONGEST_EDGE)


def read_prompts(files: Mapping[str, dict], default: int) -> dict[str, Any]:
    """``default``: the longest edge where no file says it."""
    name, image = processor(files, "image")
    names = files.get("processor_config.json", {})
    layout = {
        "longest_edge": _longest_edge(image.get("size", {"longest_edge": default}), name),
        "line_break": names.get("image_break_token") or LINE_BREAK,
    }
    return {"markers": {"image": ["", names.get("image_end_token") or END]}, "image_layout": layout}


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    """File name -> keys. The longest edge and the tokens after lines are those of the prompts of ``data``."""
    return write_processors(config, data, LONGEST_EDGE, "pixtral")


def write_processors(config: ModelConfig, data: DataConfig | None, edge: int, format: str) -> dict[str, dict[str, Any]]:
    """``edge``: the longest one where ``data`` has none."""
    vision, merge = config.vision, config.vision_projector.downsample
    line_break, end = LINE_BREAK, END
    if data is not None:
        edge = data.image_layout.longest_edge or edge
        line_break, (start, end) = data.image_layout.line_break, data.markers.get("image", ["", ""])
        if start or not line_break or not end:
            raise ValueError(
                f"the processor of the {format} format puts {LINE_BREAK} between lines of features and {END} after "
                f"them, and data.image_layout.line_break={line_break!r} and data.markers.image={[start, end]} are not "
                "such: a model that was trained without them has to be exported as avlm"
            )
        llava.require_layout(format, data, ImageLayout(longest_edge=edge, line_break=line_break))
    pixels = {
        "image_processor_type": "PixtralImageProcessor",
        "processor_class": "PixtralProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": edge},
        "patch_size": {"height": vision.patch_size, "width": vision.patch_size},
        "resample": clip.RESAMPLE[vision.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        **to_theirs(clip.PROCESSOR_FIELDS, vision),
    }
    processor = {
        "processor_class": "PixtralProcessor",
        "patch_size": vision.patch_size,
        "spatial_merge_size": merge,
        "image_token": IMAGE,
        "image_break_token": line_break,
        "image_end_token": end,
    }
    return {"preprocessor_config.json": pixels, "processor_config.json": processor}


def _longest_edge(size: Any, name: str) -> int:
    """A height and a width bound an image as a longest edge does if they are equal."""
    edges = set(size.values()) if isinstance(size, dict) and size.keys() <= {"height", "width", "longest_edge"} else {}
    if len(edges) != 1:
        raise ValueError(f"size={shown(repr(size))} in {name} is not implemented (accepted: longest_edge)")
    return edges.pop()


def _pixels(files: Mapping[str, dict]) -> dict[str, Any]:
    """Fields of VisionConfig. ValueError if our tower would get different pixels from theirs."""
    name, keys = processor(files, "image")
    for key, values in PROCESSOR_ACCEPTED.items():
        if keys.get(key, values[0]) not in values:
            raise ValueError(f"{key}={shown(repr(keys[key]))} in {name} is not implemented")
    fields = {ours: keys[theirs] for ours, theirs in clip.PROCESSOR_FIELDS.items() if theirs in keys}
    return {**fields, "resample": clip.OUR_RESAMPLE[keys.get("resample", clip.RESAMPLE["bicubic"])]}


def _require_sizes(files: Mapping[str, dict], patch_size: int, merge: int) -> None:
    """ValueError if the processor would make images of other whole features than the tower takes. The patch of the
    image processor itself is not read: the processor around it gives it one."""
    found = files.get("processor_config.json", {})
    for key, value in {"patch_size": patch_size, "spatial_merge_size": merge}.items():
        if key in found and found[key] != value:
            raise ValueError(f"{key}={shown(repr(found[key]))} in processor_config.json, and {value} in config.json")

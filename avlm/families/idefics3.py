"""Idefics3 and the first SmolVLM: a decoder of the Llama family with a SigLIP tower, of which n x n rows side by side
become a feature by one linear. An image is seen in tiles and then whole, each a square with markers.

transformers gives a patch the row of the position table for its share of the side, in float32. For squares that is its
own row; for some numbers of patches a side that nobody has published (19, say) rounding makes it the row before.

SmolVLM2 takes from this file what it shares with it.
"""

from collections.abc import Collection, Mapping
from typing import Any

from avlm.config.media import ImageLayout
from avlm.config.model import ModelConfig, ProjectorConfig, VisionConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.families import clip, llama, llava
from avlm.families.keys import processor, require_accepted, require_same, to_ours, to_theirs

MODEL_TYPES = ("idefics3",)
FORMAT = "idefics3"
TOWER: dict[str, Any] = {  # what no key tells
    "class_token": False,
    "pre_norm": False,
    "patch_bias": True,
    "post_norm": True,
    "feature_layer": -1,
    "resize": "stretch",
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "resample": "lanczos",
}
# A config.json may leave out the keys that equal the defaults of its classes.
VISION_DEFAULTS = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
TEXT = {"model_type": "llama", "rms_norm_eps": 1e-5}  # where there is no text_config
ACCEPTED = {"quantization_config": (None,)}

NAMES = {**llama.NAMES, **clip.NAMES, "vision_projector": {"linear": "modality_projection.proj"}}
PREFIXES = {
    "decoder": ["model.text_model."],
    "vision": ["model.vision_model."],
    "vision_projector": ["model.connector."],
}
HEAD = "lm_head.weight"
CLASS = "Idefics3ForConditionalGeneration"
LOADED = {module: first for module, [first] in PREFIXES.items()}
SKIPPED = {**llama.SKIPPED, "vision": clip.SKIPPED["vision"][:1], "vision_projector": []}
SINUSOIDS = llama.SINUSOIDS
PROJECTORS = {"vision_projector": ("connector",)}
constants = llama.constants

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
IMAGE, FAKE = "<image>", "<fake_token_around_image>"
MEDIA = {"image": IMAGE}
MEDIA_TOKENS = (IMAGE, FAKE)
TIES_HEAD = True
WHOLE_MARKERS = [f"{FAKE}<global-img>", FAKE]
OF_TILES = {
    "tiles": "long_edge",
    "tile_markers": [f"{FAKE}<row_{{line}}_col_{{column}}>", ""],
    "line_end": "\n",
    "tiles_end": "\n",
}
SIDE = 364  # of a tile, by default; the longest edge is that of four
OUR_RESAMPLE = {number: name for name, number in clip.RESAMPLE.items()}
PIXELS_ACCEPTED = {
    "do_convert_rgb": (True,),
    "do_resize": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "rescale_factor": (1 / 255,),
    "resample": tuple(OUR_RESAMPLE),
}


# 1. config.json


def read(keys: Mapping[str, Any], files: Mapping[str, dict]) -> ModelConfig:
    """``files``: those of PROCESSOR_FILES that the folder has, by their names."""
    return read_model(keys, files, ["image"])


def read_model(keys: Mapping[str, Any], files: Mapping[str, dict], kinds: list[str]) -> ModelConfig:
    """``kinds``: of media that the family sees."""
    require_accepted(keys, ACCEPTED)
    vision = {**VISION_DEFAULTS, **(keys.get("vision_config") or {})}
    require_accepted(vision, clip.ACCEPTED)
    fields = {**to_ours(clip.FIELDS, vision), **TOWER, **_pixels(files, kinds, vision["image_size"])}
    fields["activation"] = clip.OUR_ACTIVATIONS[fields["activation"]]
    config = ModelConfig(
        decoder=llama.read(_text(keys)),
        vision=VisionConfig(**fields),
        vision_projector=ProjectorConfig(type="linear", bias=False, downsample=keys.get("scale_factor", 2)),
    )
    counts = files.get("processor_config.json", {})
    count = counts.get("image_seq_len", num_features(config))
    if count != num_features(config):
        raise ValueError(
            f"image_seq_len={shown(repr(count))} in processor_config.json, and an image of config.json has "
            f"{num_features(config)} features"
        )
    return config


def _text(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the head is tied the outer key alone says."""
    text = {"model_type": TEXT["model_type"], **keys["text_config"]} if keys.get("text_config") else TEXT
    llama.require_variant(text["model_type"])
    return {**text, "tie_word_embeddings": keys.get("tie_word_embeddings", False)}


def num_features(config: ModelConfig) -> int:
    """Of a square."""
    side = config.vision.patches_per_side
    return config.vision.num_features((side, side), config.vision_projector.downsample)


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Raises ValueError for a model that the format cannot hold."""
    keys = write_model(config, ids, FORMAT, CLASS)
    require_same(FORMAT, config, read, keys, processor_json(config, None))
    return keys


def write_model(config: ModelConfig, ids: Mapping[str, int], format: str, name: str) -> dict[str, Any]:
    """Only the layers that we build are exported."""
    vision = config.vision
    if vision is None or config.audio is not None:
        raise ValueError(f"the {format} format holds a decoder with a vision tower and without an audio tower")
    if vision.any_grid:
        raise ValueError(
            f"the {format} format holds a tower of squares, and vision.resize={vision.resize} keeps shapes"
        )
    return {
        "architectures": [name],
        "model_type": format,
        "image_token_id": ids[IMAGE],
        "pad_token_id": None,  # the class's own may lie past the vocabulary
        "scale_factor": config.vision_projector.downsample,
        "tie_word_embeddings": config.decoder.tie_embedding,
        "text_config": llama.write(config.decoder),
        "vision_config": {
            "model_type": f"{format}_vision",
            **to_theirs(clip.FIELDS, vision),
            "num_hidden_layers": vision.num_blocks,
            "hidden_act": clip.ACTIVATIONS[vision.activation],
        },
    }


# 2. Processors and prompts


def prompts(config: ModelConfig, files: Mapping[str, dict]) -> dict[str, Any]:
    """The keys of ``data`` with which we make the prompts that a folder's processor makes."""
    return {"image_layout": read_layout(config, files)}


def read_layout(config: ModelConfig, files: Mapping[str, dict]) -> dict[str, Any]:
    name, keys = processor(files, "image")
    edge = longest_edge(name, keys) if name else 4 * config.vision.image_size
    return layout_of(edge, keys.get("do_image_splitting", True))


def layout_of(edge: int, cuts: bool) -> dict[str, Any]:
    """Of images whose long side is given ``edge`` pixels, cut into tiles or not."""
    return {"longest_edge": edge, "whole_markers": WHOLE_MARKERS, **(OF_TILES if cuts else {})}


def longest_edge(name: str, keys: Mapping[str, Any], key: str = "size", default: int = 4 * SIDE) -> int:
    size = keys.get(key, {"longest_edge": default})
    edge = size.get("longest_edge") if isinstance(size, dict) else None
    if type(edge) is not int:
        raise ValueError(f"{key}={shown(repr(size))} in {name} is not implemented (accepted: longest_edge)")
    return edge


def _pixels(files: Mapping[str, dict], kinds: list[str], side: int) -> dict[str, Any]:
    """Fields of VisionConfig. ValueError if our tower, for squares of ``side`` pixels, would get different pixels from
    theirs."""
    found = []
    for name, keys in (processor(files, kind) for kind in kinds):
        if not name:
            continue
        for key, values in PIXELS_ACCEPTED.items():
            if keys.get(key, values[0]) not in values:
                raise ValueError(f"{key}={shown(repr(keys[key]))} in {name} is not implemented")
        tile = longest_edge(name, keys, "max_image_size", SIDE)
        if tile != side:
            raise ValueError(f"max_image_size={tile} in {name}, and image_size={side} in config.json")
        resample = OUR_RESAMPLE[keys.get("resample", clip.RESAMPLE["lanczos"])]
        fields = {ours: keys[theirs] for ours, theirs in clip.PROCESSOR_FIELDS.items() if theirs in keys}
        found.append({**fields, "resample": resample})
    if any(fields != found[0] for fields in found):
        raise ValueError("images and videos that are resampled or normalised in different ways are not implemented")
    return found[0] if found else {}


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    """File name -> keys. The layout of images is that of ``data``."""
    return write_processors(config, data, FORMAT, "Idefics3")


def write_processors(
    config: ModelConfig, data: DataConfig | None, format: str, name: str, **keys: Any
) -> dict[str, dict[str, Any]]:
    """``name``: of the classes of processors, without their ends; ``keys``: more of the processor's."""
    vision = config.vision
    edge, cuts = 4 * vision.image_size, True
    if data is not None:
        cuts = data.image_layout.tiles != "none"
        edge = data.image_layout.longest_edge or edge
        llava.require_layout(format, data, ImageLayout(**layout_of(edge, cuts)))
        require_markers(format, data, "image", ["", ""])
    pixels = {
        "image_processor_type": f"{name}ImageProcessor",
        "processor_class": f"{name}Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": edge},
        "resample": clip.RESAMPLE[vision.resample],
        "do_image_splitting": cuts,
        "max_image_size": {"longest_edge": vision.image_size},
        "do_pad": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        **to_theirs(clip.PROCESSOR_FIELDS, vision),
        **keys,
    }
    counts = {"processor_class": f"{name}Processor", "image_seq_len": num_features(config)}
    return {"preprocessor_config.json": pixels, "processor_config.json": counts}


def require_markers(format: str, data: DataConfig, kind: str, only: list[str]) -> None:
    """ValueError unless a run puts around media what the format's processor puts there."""
    markers = data.markers.get(kind, ["", ""])
    if list(markers) != only:
        raise ValueError(f"the {format} format cannot hold data.markers.{kind}={markers}, only {only}")


def text_template(keys: Mapping[str, Any], control_tokens: Collection[str]) -> str:
    """The ``data.template`` that makes the same prompts as a folder's own template for lists of parts."""
    return "smolvlm"

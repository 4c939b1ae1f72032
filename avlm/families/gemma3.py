"""Gemma 3 with its tower (4B, 12B, 27B): the text model of Gemma 3 with SigLIP, of which the mean of n x n rows is
normalised and becomes a feature by one linear without a bias. The features of an image see each other.

An image is one square. Pan-and-scan, which adds crops of a long one, is off in published folders and not implemented.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from avlm.config.media import ImageLayout
from avlm.config.model import ModelConfig, ProjectorConfig, VisionConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.families import clip, gemma, gemma2, llama, llava
from avlm.families.keys import processor, require_accepted, require_same

MODEL_TYPES = ("gemma3",)
FORMAT = "gemma3"
TEXT, TOWER = "gemma3_text", "siglip_vision_model"
NUM_FEATURES = 256  # of an image, where the key is absent
ACCEPTED = {"quantization_config": (None,)}
PIXELS = {"size": {"height": 224, "width": 224}, "resample": clip.RESAMPLE["bilinear"]}  # the processor's defaults

PROJECTOR = {"feature_norm": "mm_soft_emb_norm", "linear.weight": "mm_input_projection_weight"}
TRANSPOSED = ("vision_projector.linear.weight",)
NAMES = {**gemma2.NAMES, **clip.NAMES, "vision_projector": PROJECTOR}
PREFIXES = llava.PREFIXES
HEAD = llava.HEAD
CLASS = "Gemma3ForConditionalGeneration"
LOADED = llava.LOADED
SKIPPED = {**gemma2.SKIPPED, **clip.SKIPPED, "vision_projector": []}
SINUSOIDS = gemma2.SINUSOIDS
PROJECTORS = llava.PROJECTORS
constants = llama.constants

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
IMAGE, START, END = "<image_soft_token>", "<start_of_image>", "<end_of_image>"
TOKEN_NAMES = {"image_token": IMAGE, "boi_token": START, "eoi_token": END}
MARKERS = {"image": [f"\n\n{START}", f"{END}\n\n"]}
MEDIA = {"image": START}  # for which the processor writes the markers and the features
MEDIA_TOKENS = (IMAGE, START, END)
TIES_HEAD = True


# 1. config.json


def read(keys: Mapping[str, Any], files: Mapping[str, dict]) -> ModelConfig:
    """``files``: those of PROCESSOR_FILES that the folder has, by their names."""
    keys = {key: value for key, value in keys.items() if value is not None}
    require_accepted(keys, ACCEPTED)
    text = read_text(keys, TEXT, (TEXT,))
    tower = read_tower(keys, files, PIXELS)
    count = keys.get("mm_tokens_per_image", NUM_FEATURES)
    require_count("mm_tokens_per_image", count, files)
    side = math.isqrt(count) if isinstance(count, int) and count > 0 else 0
    if not side or side**2 != count or tower.patches_per_side % side:
        raise ValueError(
            f"mm_tokens_per_image={shown(repr(count))} is not implemented: {tower.patches_per_side} patches a side "
            "make no such square of features"
        )
    projector = ProjectorConfig(
        type="linear",
        bias=False,
        mean=True,
        downsample=tower.patches_per_side // side,
        feature_norm="rms_offset",
        norm_eps=tower.norm_eps,
    )
    decoder = dataclasses.replace(gemma.read(text), bidirectional="images")
    return ModelConfig(decoder=decoder, vision=tower, vision_projector=projector)


def read_text(keys: Mapping[str, Any], default: str, known: tuple[str, ...]) -> dict[str, Any]:
    """The keys of the decoder, of the ``default`` type if none is named. Whether the head is tied the outer key alone
    says."""
    text = {"model_type": default, **(keys.get("text_config") or {})}
    if text["model_type"] not in known:
        raise ValueError(
            f"text_config.model_type {shown(repr(text['model_type']))} is not supported (supported: {', '.join(known)})"
        )
    tied = keys.get("tie_word_embeddings")
    return {**text, "tie_word_embeddings": True if tied is None else tied}


def read_tower(keys: Mapping[str, Any], files: Mapping[str, dict], defaults: Mapping[str, Any]) -> VisionConfig:
    """SigLIP with its last norm. ``defaults``: of the keys of its processor."""
    vision = {"model_type": TOWER, **(keys.get("vision_config") or {})}
    require_accepted(vision, {"model_type": (TOWER,)})
    tower = clip.read(vision, {}, feature_layer=-1)
    return dataclasses.replace(tower, post_norm=True, **_pixels(files, tower.image_size, defaults))


def require_count(key: str, count: int, files: Mapping[str, dict]) -> None:
    """ValueError where a processor writes another number of features than an image has by config.json."""
    for name, given in files.items():
        for found in (given, given.get("image_processor") or {}):
            number = found.get("image_seq_length", count) if isinstance(found, dict) else count
            if number != count:
                raise ValueError(f"image_seq_length={shown(repr(number))} in {name}, and {key} is {count}")


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Raises ValueError for a model that the format cannot hold. Only the layers that we build are exported."""
    require_parts(config, FORMAT)
    keys = {
        "architectures": [CLASS],
        "model_type": FORMAT,
        "boi_token_index": ids[START],
        "eoi_token_index": ids[END],
        "image_token_index": ids[IMAGE],
        "mm_tokens_per_image": num_features(config),
        "tie_word_embeddings": config.decoder.tie_embedding,
        "text_config": gemma.write(config.decoder),
        "vision_config": clip.write(config.vision),
    }
    require_same(FORMAT, config, read, keys, processor_json(config, None))
    return keys


def require_parts(config: ModelConfig, format: str) -> None:
    llava.require_tower(config, format)
    if config.vision.resize != "stretch":
        raise ValueError(f"the {format} format cannot hold vision.resize={config.vision.resize}, only stretch")


def num_features(config: ModelConfig) -> int:
    """Of an image."""
    side = config.vision.patches_per_side
    return config.vision.num_features((side, side), config.vision_projector.downsample)


# 2. Processors and prompts


def _pixels(files: Mapping[str, dict], side: int, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of VisionConfig. ValueError if our tower would get different pixels from theirs."""
    name, given = processor(files, "image")
    if not name:
        return {"resample": clip.OUR_RESAMPLE[defaults["resample"]]}
    if given.get("do_pan_and_scan"):
        raise ValueError(f"do_pan_and_scan={shown(repr(given['do_pan_and_scan']))} in {name} is not implemented")
    fields = clip.read_processor({**defaults, **given}, side, name)
    if fields.pop("resize", "stretch") != "stretch":
        size = shown(repr({**defaults, **given}["size"]))
        raise ValueError(f"size={size} in {name} is not implemented (accepted: height and width)")
    return fields


def prompts(config: ModelConfig, files: Mapping[str, dict]) -> dict[str, Any]:
    """The keys of ``data`` with which we make the prompts that a folder's processor makes."""
    return {"markers": MARKERS}


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    """File name -> keys."""
    if data is not None:
        llava.require_layout(FORMAT, data, ImageLayout())
        if data.markers != MARKERS:
            raise ValueError(f"the {FORMAT} format cannot hold data.markers={data.markers}, only {MARKERS}")
    files = write_processors(config, "Gemma3Processor", "Gemma3ImageProcessor")
    files["preprocessor_config.json"]["do_pan_and_scan"] = False
    return files


def write_processors(config: ModelConfig, name: str, of_images: str) -> dict[str, dict[str, Any]]:
    """``name``, ``of_images``: classes of processors."""
    of_class = {"processor_class": name, "image_seq_length": num_features(config)}
    crops = ("do_center_crop", "crop_size")
    pixels = {key: value for key, value in clip.write_processor(config.vision).items() if key not in crops}
    images = {**pixels, "image_processor_type": of_images, "do_convert_rgb": True, **of_class}
    return {"preprocessor_config.json": images, "processor_config.json": of_class}

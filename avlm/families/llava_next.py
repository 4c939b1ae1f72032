"""LLaVA-NeXT: a LLaVA that sees an image whole and cut into tiles, with a learned row after each line of features.

Which grids of tiles an image may become, ``image_grid_pinpoints`` in pixels, stands in config.json and in the
processor's file, and is ``data.image_layout`` here. LLaVA-NeXT-Video and LLaVA-OneVision take from this file what they
share with it.
"""

from collections.abc import Collection, Mapping
from typing import Any

from avlm.config.media import ImageLayout
from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.families import clip, llava
from avlm.families.keys import require_accepted, require_same

Grids = list[list[int]]  # lines and columns of tiles

MODEL_TYPES = ("llava_next",)
FORMAT = "llava_next"
# A config.json may leave out the keys that equal the defaults of its class.
DEFAULTS = {**llava.DEFAULTS, "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]}
ACCEPTED = {"use_image_newline_parameter": (True, None)}

NAMES = llava.NAMES
PREFIXES = llava.PREFIXES
HEAD = llava.HEAD
CLASS = "LlavaNextForConditionalGeneration"
LOADED = llava.LOADED
SKIPPED = llava.SKIPPED
SINUSOIDS = llava.SINUSOIDS
PROJECTORS = llava.PROJECTORS
constants = llava.constants

PROCESSOR_FILES = ("config.json", *clip.PROCESSOR_FILES)
MEDIA = llava.MEDIA
MEDIA_TOKENS = llava.MEDIA_TOKENS
TIES_HEAD = True


def read(keys: Mapping[str, Any], files: Mapping[str, dict]) -> ModelConfig:
    return read_model(keys, files, DEFAULTS)


def read_model(
    keys: Mapping[str, Any], files: Mapping[str, dict], defaults: Mapping[str, Any], **projector: Any
) -> ModelConfig:
    """Of any of the three families. ``projector``: what sets it apart in our config."""
    require_accepted(keys, ACCEPTED)
    pixels = {name: _of_images(file) for name, file in files.items() if name in clip.PROCESSOR_FILES}
    config = llava.read_model(keys, pixels, defaults, newline=True, **projector)
    pinpoints = _pinpoints(keys, defaults)
    for name, file in pixels.items():
        if _pinpoints(file, {"image_grid_pinpoints": pinpoints}) != pinpoints:
            raise ValueError(f"image_grid_pinpoints in {name} are not those of config.json")
    grids_of(pinpoints, config)
    return config


def _of_images(file: dict[str, Any]) -> dict[str, Any]:
    """The keys of an image processor. That of tiles pads batches of them, and no image."""
    keys = file.get("image_processor", file)
    if not isinstance(keys, dict):
        raise ValueError(f"image_processor must be an object, not {shown(repr(keys))}")
    return {key: value for key, value in keys.items() if key != "do_pad"}


def _pinpoints(keys: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    given = keys.get("image_grid_pinpoints")
    return defaults["image_grid_pinpoints"] if given is None else given


def grids_of(pinpoints: Any, config: ModelConfig) -> Grids:
    """In tiles, of heights and widths in pixels."""
    side = config.vision.image_size
    for point in pinpoints:
        if len(point) != 2 or any(type(pixels) is not int or pixels % side for pixels in point):
            raise ValueError(f"image_grid_pinpoints has {shown(point)}, which is not cut into tiles of {side} pixels")
    return [[height // side, width // side] for height, width in pinpoints]


def pinpoints_of(grids: Grids, config: ModelConfig) -> Grids:
    """The inverse of ``grids_of``."""
    side = config.vision.image_size
    return [[lines * side, columns * side] for lines, columns in grids]


def default_grids(defaults: Mapping[str, Any]) -> Grids:
    """In tiles of the published size."""
    pinpoints = defaults["image_grid_pinpoints"]
    side = defaults["vision_config"]["image_size"]
    return [[height // side, width // side] for height, width in pinpoints]


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Raises ValueError for a model that the format cannot hold."""
    keys = {"architectures": [CLASS], "model_type": FORMAT, **write_model(config, ids, FORMAT, DEFAULTS)}
    require_same(FORMAT, config, read, keys, processor_json(config, None))
    return keys


def write_model(
    config: ModelConfig, ids: Mapping[str, int], format: str, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """With the grids of the published model; ``prompt_keys`` has those of a run."""
    keys = llava.write_model(config, ids, format)
    if not config.vision_projector.newline:
        raise ValueError(f"the {format} format needs vision_projector.newline=true")
    return {
        **keys,
        "image_grid_pinpoints": pinpoints_of(default_grids(defaults), config),
        "use_image_newline_parameter": True,
    }


def prompts(config: ModelConfig, files: Mapping[str, dict]) -> dict[str, Any]:
    """The keys of ``data`` with which we make the prompts that a folder's processor makes."""
    return {"image_layout": read_layout(config, files, DEFAULTS)}


def read_layout(config: ModelConfig, files: Mapping[str, dict], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {"tiles": "pinpoints", "grids": grids_of(_pinpoints(files.get("config.json", {}), defaults), config)}


def prompt_keys(config: ModelConfig, data: DataConfig) -> dict[str, Any]:
    """The keys of config.json that ``prompts`` reads."""
    return write_layout(FORMAT, config, data)


def write_layout(format: str, config: ModelConfig, data: DataConfig, only_alone: bool = False) -> dict[str, Any]:
    """Raises ValueError for a layout that the format cannot hold."""
    grids = data.image_layout.grids or [[1, 1]]
    llava.require_layout(format, data, ImageLayout(tiles="pinpoints", grids=grids, only_alone=only_alone))
    return {"image_grid_pinpoints": pinpoints_of(grids, config)}


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    """File name -> keys."""
    return {
        "preprocessor_config.json": write_images(config, data, "LlavaNext", DEFAULTS),
        "processor_config.json": {**llava.write_counts(config.vision), "processor_class": "LlavaNextProcessor"},
    }


def write_images(
    config: ModelConfig, data: DataConfig | None, name: str, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """``name``: of the classes of processors, without their ends."""
    grids = default_grids(defaults) if data is None else data.image_layout.grids
    return {
        **clip.write_processor(config.vision),
        "image_processor_type": f"{name}ImageProcessor",
        "processor_class": f"{name}Processor",
        "do_pad": True,
        "image_grid_pinpoints": pinpoints_of(grids, config),
    }


def text_template(keys: Mapping[str, Any], control_tokens: Collection[str]) -> str:
    """The ``data.template`` that makes the same prompts as a folder's own template for lists of parts."""
    if "<|start_header_id|>" in control_tokens:
        return "llama3"
    if (keys.get("text_config") or {}).get("model_type") == "mistral":
        return "mistral"
    return llava.text_template(keys, control_tokens)

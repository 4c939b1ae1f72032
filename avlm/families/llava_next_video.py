"""LLaVA-NeXT-Video: LLaVA-NeXT with videos, of which 2 x 2 rows of the tower are averaged before the projector."""

from collections.abc import Mapping
from typing import Any

from avlm.config.model import ModelConfig, VisionConfig
from avlm.config.run import DataConfig
from avlm.families import clip, llava, llava_next
from avlm.families.keys import processor, require_accepted, require_same, to_theirs

MODEL_TYPES = ("llava_next_video",)
FORMAT = "llava_next_video"
DEFAULTS = llava_next.DEFAULTS
ACCEPTED = {"spatial_pool_mode": ("average",), "spatial_pool_stride": (2,)}

NAMES = llava.NAMES
PREFIXES = llava.PREFIXES
HEAD = llava.HEAD
CLASS = "LlavaNextVideoForConditionalGeneration"
LOADED = llava.LOADED
SKIPPED = llava.SKIPPED
SINUSOIDS = llava.SINUSOIDS
PROJECTORS = llava.PROJECTORS
constants = llava.constants

PROCESSOR_FILES = (*llava_next.PROCESSOR_FILES, "video_preprocessor_config.json")
VIDEO = "<video>"
MEDIA = {**llava.MEDIA, "video": VIDEO}
MEDIA_TOKENS = (*llava.MEDIA_TOKENS, VIDEO)
TIES_HEAD = True


def read(keys: Mapping[str, Any], files: Mapping[str, dict]) -> ModelConfig:
    require_accepted(keys, ACCEPTED)
    return read_model(keys, files, DEFAULTS, halve_frames="mean")


def read_model(
    keys: Mapping[str, Any], files: Mapping[str, dict], defaults: Mapping[str, Any], **projector: Any
) -> ModelConfig:
    """Of this family or LLaVA-OneVision. ``projector``: what sets it apart in our config."""
    config = llava_next.read_model(keys, files, defaults, **projector)
    require_pixels_of_images(files, config.vision)
    return config


def require_pixels_of_images(files: Mapping[str, dict], vision: VisionConfig) -> None:
    """ValueError if the frames of a video would become other pixels than those of images do."""
    name, video = processor(files, "video")
    if name:
        fields = clip.read_processor({**video, "do_pad": None}, vision.image_size, name)
        if any(getattr(vision, field) != value for field, value in fields.items()):
            raise ValueError("images and videos that are resized or normalised in different ways are not implemented")


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Raises ValueError for a model that the format cannot hold."""
    keys = {
        "architectures": [CLASS],
        "model_type": FORMAT,
        **llava_next.write_model(config, ids, FORMAT, DEFAULTS),
        "video_token_index": ids[VIDEO],
        "spatial_pool_mode": "average",
        "spatial_pool_stride": 2,
    }
    require_same(FORMAT, config, read, keys, processor_json(config, None))
    return keys


def prompts(config: ModelConfig, files: Mapping[str, dict]) -> dict[str, Any]:
    """The keys of ``data`` with which we make the prompts that a folder's processor makes."""
    return {"image_layout": llava_next.read_layout(config, files, DEFAULTS), "video": read_frames(files)}


def read_frames(files: Mapping[str, dict]) -> dict[str, Any]:
    """Which frames of a video are seen; published folders do not say how many."""
    _, keys = processor(files, "video")
    frames: dict[str, Any] = {"spread": "starts"}
    if keys.get("num_frames") is not None:
        return {**frames, "num_frames": keys["num_frames"], "fps": None}
    if keys.get("fps") is not None:
        return {**frames, "num_frames": None, "fps": float(keys["fps"])}
    return frames


def prompt_keys(config: ModelConfig, data: DataConfig) -> dict[str, Any]:
    """The keys of config.json that ``prompts`` reads."""
    require_newline(FORMAT, data, False)
    return llava_next.write_layout(FORMAT, config, data)


def require_newline(format: str, data: DataConfig, newline: bool) -> None:
    if data.video.newline != newline:
        raise ValueError(f"the {format} format cannot hold data.video.newline={data.video.newline}, only {newline}")


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    """File name -> keys. Images have the processor of LLaVA-NeXT."""
    name = "LlavaNextVideoProcessor"
    images = llava_next.write_images(config, data, "LlavaNext", DEFAULTS)
    counts = {**llava.write_counts(config.vision), "video_token": VIDEO, "processor_class": name}
    return {
        "preprocessor_config.json": {**images, "processor_class": name},
        "video_preprocessor_config.json": write_frames(config, data, "LlavaNextVideo"),
        "processor_config.json": counts,
    }


def write_frames(config: ModelConfig, data: DataConfig | None, name: str) -> dict[str, Any]:
    """``name``: of the classes of processors, without their ends."""
    video = (data or DataConfig(train="")).video
    fields = {field: field for field in ("num_frames", "fps") if getattr(video, field) is not None}
    pixels = {key: value for key, value in clip.write_processor(config.vision).items() if key != "image_processor_type"}
    classes = {"video_processor_type": f"{name}VideoProcessor", "processor_class": f"{name}Processor"}
    return {**pixels, **classes, **to_theirs(fields, video)}

"""SmolVLM2: Idefics3 with videos, whose frames are squares as a whole image is, each after its time in the text. How
many are seen stands among the keys of images, under ``video_sampling``.
"""

from collections.abc import Mapping
from typing import Any

from avlm.config.media import VideoConfig, VideoText
from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.families import idefics3
from avlm.families.keys import processor, require_same

MODEL_TYPES = ("smolvlm",)
FORMAT = "smolvlm"

NAMES = idefics3.NAMES
PREFIXES = idefics3.PREFIXES
HEAD = idefics3.HEAD
CLASS = "SmolVLMForConditionalGeneration"
LOADED = idefics3.LOADED
SKIPPED = idefics3.SKIPPED
SINUSOIDS = idefics3.SINUSOIDS
PROJECTORS = idefics3.PROJECTORS
constants = idefics3.constants

PROCESSOR_FILES = (*idefics3.PROCESSOR_FILES, "video_preprocessor_config.json")
MEDIA = {**idefics3.MEDIA, "video": "<video>"}  # text, which the processor replaces
MEDIA_TOKENS = idefics3.MEDIA_TOKENS
TIES_HEAD = True
TEXT = {
    "before": "You are provided the following series of {count_in_words} frames from a {duration} [H:MM:SS] video.\n",
    "frame": "\nFrame from {clock}:",
    "after": "\n\n",
}
FPS, MAX_FRAMES = 1.0, 64  # of published folders


def read(keys: Mapping[str, Any], files: Mapping[str, dict]) -> ModelConfig:
    """``files``: those of PROCESSOR_FILES that the folder has, by their names."""
    return idefics3.read_model(keys, files, ["image", "video"])


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Raises ValueError for a model that the format cannot hold."""
    keys = idefics3.write_model(config, ids, FORMAT, CLASS)
    require_same(FORMAT, config, read, keys, processor_json(config, None))
    return keys


def prompts(config: ModelConfig, files: Mapping[str, dict]) -> dict[str, Any]:
    """The keys of ``data`` with which we make the prompts that a folder's processor makes."""
    layout = idefics3.read_layout(config, files)
    return {
        "image_layout": layout,
        "markers": {"video": idefics3.WHOLE_MARKERS},
        "video": {**_read_frames(files, layout["longest_edge"]), "text": TEXT},
    }


def _read_frames(files: Mapping[str, dict], edge: int) -> dict[str, Any]:
    """``edge``: the longest one of images."""
    name, keys = processor(files, "video")
    sampling = keys.get("video_sampling", {"max_frames": keys.get("num_frames"), "fps": keys.get("fps")})
    if not isinstance(sampling, dict):
        raise ValueError(f"video_sampling={shown(repr(sampling))} in {name} is not understood")
    if name:
        # The size of images, where a file has both, is that of frames too.
        sizes = {"size": sampling["video_size"], **keys} if "video_size" in sampling else keys
        found = idefics3.longest_edge(name, sizes)
        if min(found, 4096) != min(edge, 4096):
            raise ValueError(
                f"frames of a longest edge of {found} pixels, in {name}, and images of {edge} are not implemented"
            )
    return {
        "num_frames": None,
        "fps": float(sampling.get("fps") or FPS),
        "max_frames": sampling.get("max_frames") or MAX_FRAMES,
        "spread": "inner",
    }


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    """File name -> keys. The layout of images, and which frames of a video are seen, are those of ``data``."""
    fps, most = FPS, MAX_FRAMES
    if data is not None:
        fps, most = _require_video(data), data.video.max_frames
    edge = data.image_layout.longest_edge if data is not None else None
    sampling = {
        "fps": fps,
        "max_frames": most,
        "video_size": {"longest_edge": edge or 4 * config.vision.image_size},
    }
    return idefics3.write_processors(config, data, FORMAT, "SmolVLM", video_sampling=sampling)


def _require_video(data: DataConfig) -> float:
    """The frames a second of videos; ValueError for other videos than the format's processor makes."""
    if data.video.fps is None:
        raise ValueError(
            f"the {FORMAT} format cannot hold data.video.num_frames={data.video.num_frames}, only data.video.fps; a "
            "model that was trained without videos may be exported as idefics3"
        )
    only = VideoConfig(
        num_frames=None, fps=data.video.fps, max_frames=data.video.max_frames, spread="inner", text=VideoText(**TEXT)
    )
    for key in ("spread", "min_frames", "text", "audio"):
        value = getattr(data.video, key)
        if value != getattr(only, key):
            raise ValueError(
                f"the {FORMAT} format cannot hold data.video.{key}={shown(repr(value))}, only {getattr(only, key)!r}"
            )
    idefics3.require_markers(FORMAT, data, "video", idefics3.WHOLE_MARKERS)
    return data.video.fps

"""AVLM in transformers: a class of theirs that sees, the base, subclassed to hear. The code of the subclass lies in
avlm/weights/serving, and goes into the folder.

A base is a family whose format holds the model without its audio half; a LLaVA may have a projector of ours in place of
its own. The base of a model that does not see is Voxtral, with our audio half in place of its own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from avlm.config.load import to_dict
from avlm.config.media import VideoText
from avlm.config.model import ModelConfig, ProjectorConfig
from avlm.config.run import DataConfig
from avlm.families import clip, llama, llava, llava_next, llava_next_video, llava_onevision, voxtral, whisper
from avlm.families.keys import to_theirs

MODEL_TYPE = "avlm"
CLASS = "AVLMForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "modeling_avlm.AVLMConfig",
    "AutoModel": "modeling_avlm.AVLMModel",
    "AutoModelForImageTextToText": f"modeling_avlm.{CLASS}",
    "AutoModelForMultimodalLM": f"modeling_avlm.{CLASS}",
    "AutoProcessor": "processing_avlm.AVLMProcessor",
}
LLAVAS = (llava, llava_next, llava_next_video, llava_onevision)  # whose projector may be one of ours
AUDIO, VIDEO = "<audio>", "<video>"

OWN = ("norm", "merger", "feature_norm", "linear", "gate", "up", "hidden_norm", "down", "output_norm")
PROJECTOR = {name: name for name in OWN}
NAMES = {
    **whisper.NAMES,
    "vision": {**clip.NAMES["vision"], "post_norm": "../multi_modal_projector.post_norm"},  # a tower's own is another
    "vision_projector": {**PROJECTOR, "newline": "../image_newline"},
    "audio_projector": PROJECTOR,
}
LOADED = {**llava.LOADED, "audio": "model.audio_tower.", "audio_projector": "model.audio_projector."}
HEAD = llama.HEAD
SKIPPED = {**clip.SKIPPED, **whisper.SKIPPED, "vision_projector": [], "audio_projector": []}


def sight(config: ModelConfig, own_projector: bool = False) -> ModelConfig:
    """The part of a model that its base holds, with a LLaVA's projector where there is one of ours."""
    config = dataclasses.replace(config, audio=None, audio_projector=None)
    projector, vision = config.vision_projector, config.vision
    if projector is None or vision is None or not own_projector:
        return config
    kept = ("newline", "halve_frames", "stretch_above_tiles")
    like = ProjectorConfig(**{name: getattr(projector, name) for name in kept})
    return dataclasses.replace(config, vision_projector=like, vision=dataclasses.replace(vision, post_norm=False))


def audio_keys(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Keys of config.json."""
    audio = config.audio
    if audio is None:
        return {}
    return {
        "audio_token_id": ids[AUDIO],
        "audio_projector": to_dict(config.audio_projector),
        "audio_config": {
            "model_type": "voxtral_encoder",
            **to_theirs(voxtral.FIELDS, audio),
            **whisper.CONSTANT_KEYS,
            **{key: getattr(audio, key) for key in ("edge", "pool", "key_bias")},
        },
    }


def projector_keys(config: ModelConfig) -> dict[str, Any]:
    """Keys of config.json about a projector of ours in a LLaVA."""
    projector, vision = config.vision_projector, config.vision
    post_norm = vision.norm_eps if vision.post_norm else None
    features = vision.num_features((vision.patches_per_side,) * 2, projector.downsample)
    return {"vision_projector": {**to_dict(projector), "post_norm": post_norm}, "image_seq_length": features}


def hearing(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Keys of processor_config.json."""
    audio = config.audio
    if audio is None:
        return {}
    options = {"windows": audio.window, **{key: getattr(audio, key) for key in ("log_mel", "edge", "pool")}}
    frames = audio.window_frames
    windows = {**whisper.write_processor(audio, frames), "window_frames": frames}
    extractor = {**windows, "feature_extractor_type": "AVLMFeatureExtractor", **options}
    extractor["downsample"] = config.audio_projector.downsample
    return {"audio_token": AUDIO, "audio_token_id": ids[AUDIO], "feature_extractor": extractor}


def video_obstacle(data: DataConfig) -> str | None:
    """Why a base without videos cannot take frames as images, or None."""
    video = data.video
    for key, only in {"spread": "middles", "text": VideoText(), "newline": False}.items():
        if getattr(video, key) != only:
            return f"data.video.{key}={getattr(video, key)}"
    return f"data.video.audio={video.audio}" if video.audio in ("interleaved", "merged") else None


def watching(config: ModelConfig, data: DataConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Keys of processor_config.json by which a base without videos gets frames, which it sees as images."""
    vision, video = config.vision, data.video
    features = vision.num_features((vision.patches_per_side,) * 2, config.vision_projector.downsample)
    frames = {key: getattr(video, key) for key in ("num_frames", "fps", "min_frames", "max_frames")}
    pixels = {key: value for key, value in clip.write_processor(vision).items() if key != "image_processor_type"}
    token = {"video_token": VIDEO, "video_token_id": ids[VIDEO]}
    return {**token, "features_per_frame": features, "video_processor": {**pixels, **frames, "do_sample_frames": True}}

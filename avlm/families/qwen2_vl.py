"""Qwen2-VL: a Qwen 2 decoder with M-RoPE, and a tower for images and videos of any grid of patches.

The later families of Qwen take from this file what they share with it: decoder, projector, processors and prompts.
Most folders of the Hub have the decoder's keys at the top of config.json, as we write them; transformers 5 puts them
into ``text_config``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from avlm.config.decoder import DecoderConfig
from avlm.config.model import ModelConfig, ProjectorConfig, VisionConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.families import clip, llama
from avlm.families.keys import processor, require_accepted, require_same, to_ours, to_theirs

Bounds = tuple[int, int]

MODEL_TYPES = ("qwen2_vl",)
# our field of VisionConfig -> their key
FIELDS = {
    "hidden_size": "embed_dim",
    "num_layers": "depth",
    "num_heads": "num_heads",
    "patch_size": "patch_size",
    "activation": "hidden_act",
    "frames_per_patch": "temporal_patch_size",
}
# What all of these towers have, and what no key of theirs tells.
TOWER: dict[str, Any] = {
    "feature_layer": -1,
    "class_token": False,
    "pre_norm": False,
    "axial_rope": True,
    "norm_eps": 1e-6,
    "resize": "area",
}
# A config.json may leave out the keys that equal the defaults of its classes.
TEXT_DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": 4096,
    "max_window_layers": 80,
    "mrope_section": [16, 24, 24],
    "mrope_interleaved": False,
}
VISION_DEFAULTS = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,  # that of the decoder
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
MROPE = ("mrope_section", "mrope_interleaved")  # the first may stand in a file, the second is that of the class
ACCEPTED = {"quantization_config": (None,)}
VISION_ACCEPTED = {
    "hidden_act": tuple(clip.OUR_ACTIVATIONS),
    "in_channels": (3,),
    "in_chans": (3,),
    "rope_parameters": (None, {"rope_type": "axial", "rope_theta": 10_000.0}),
    "quantization_config": (None,),
}

# Our module or parameter -> theirs, {i} the layer, without the prefix of the module. The first one of a tower tells
# the families of Qwen apart.
ATTENTION = {
    "blocks.{i}.attention.q": "blocks.{i}.attn.qkv",
    "blocks.{i}.attention.k": "blocks.{i}.attn.qkv",
    "blocks.{i}.attention.v": "blocks.{i}.attn.qkv",
    "blocks.{i}.attention.o": "blocks.{i}.attn.proj",
    "blocks.{i}.attention_norm": "blocks.{i}.norm1",
    "blocks.{i}.ffn_norm": "blocks.{i}.norm2",
    "patch": "patch_embed.proj",
}
NAMES = {
    **llama.NAMES,
    "vision": {"blocks.{i}.up": "blocks.{i}.mlp.fc1", "blocks.{i}.down": "blocks.{i}.mlp.fc2", **ATTENTION},
    "vision_projector": {"norm": "merger.ln_q", "up": "merger.mlp.0", "down": "merger.mlp.2"},
}
# First the Hub's layout, which an export has too, then that of transformers 4.52 and later in memory.
PREFIXES = {
    "decoder": ["model.", "model.language_model."],
    "vision": ["visual.", "model.visual."],
    "vision_projector": ["visual.", "model.visual."],
}
HEAD = "lm_head.weight"
CLASS = "Qwen2VLForConditionalGeneration"
LOADED = {"decoder": "model.language_model.", "vision": "model.visual.", "vision_projector": "model.visual."}
SINUSOIDS = llama.SINUSOIDS
PROJECTORS = {"vision_projector": ("merger",)}
SKIPPED = {
    **llama.SKIPPED,
    "vision": [(r"rotary_pos_emb\.inv_freq", "computed frequencies")],
    "vision_projector": [],
}
constants = llama.constants

PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
START, IMAGE, VIDEO, END = "<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"
MEDIA = {"image": IMAGE, "video": VIDEO}
MEDIA_TOKENS = (START, IMAGE, VIDEO, END)
TIES_HEAD = True
PROCESSOR_ACCEPTED = {
    "do_convert_rgb": (True,),
    "do_resize": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "rescale_factor": (1 / 255,),
    "resample": tuple(clip.OUR_RESAMPLE),
    "cap_pixels_per_frame": (None, False),
}
# Of the processors' classes: the least and the most pixels of an image, and of a frame of a video.
IMAGE_AREA, FRAME_AREA = (56 * 56, 1280 * 28 * 28), (128 * 28 * 28, 768 * 28 * 28)
EDGES = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}  # of size: the key that wins over each
FRAMES = {"min_frames": 4, "max_frames": 768}
FPS = 2.0  # frames seen of a second of video, where no file says it: that of the authors' qwen-vl-utils


# 1. config.json


def read(keys: Mapping[str, Any], files: Mapping[str, dict]) -> ModelConfig:
    """``files``: those of PROCESSOR_FILES that the folder has, by their names."""
    require_accepted(keys, ACCEPTED)
    vision = {**VISION_DEFAULTS, **(keys.get("vision_config") or {})}
    tower = read_tower(FIELDS, vision, files, intermediate_size=int(vision["embed_dim"] * vision["mlp_ratio"]))
    decoder = read_decoder(keys, "qwen2", TEXT_DEFAULTS)
    return whole(decoder, tower, vision["spatial_merge_size"], vision["hidden_size"])


def read_decoder(keys: Mapping[str, Any], model_type: str, defaults: Mapping[str, Any]) -> DecoderConfig:
    """``model_type``: that of the same decoder without M-RoPE. A tied head may stand at the top or inside."""
    text = keys.get("text_config") or {key: value for key, value in keys.items() if key != "vision_config"}
    tied = bool(keys.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    rope = {**{key: defaults[key] for key in MROPE}, **(text.get("rope_scaling") or {})}
    given = {**defaults, **text, "model_type": model_type, "tie_word_embeddings": tied, "rope_scaling": rope}
    decoder = llama.read(given, mrope=True)
    if decoder.mrope_sections is None:
        raise ValueError("mrope_section=None is not implemented")
    if decoder.mrope_interleaved != defaults["mrope_interleaved"]:
        raise ValueError(f"mrope_interleaved={decoder.mrope_interleaved} is not implemented")
    return decoder


def read_tower(
    fields: Mapping[str, str], vision: Mapping[str, Any], files: Mapping[str, dict], **others: Any
) -> VisionConfig:
    """``fields``: our field -> their key. ``others``: more of ours, with the defaults of pixels."""
    require_accepted(vision, VISION_ACCEPTED)
    ours = {**TOWER, **to_ours(fields, vision), **others}
    ours["activation"] = clip.OUR_ACTIVATIONS[ours["activation"]]
    return VisionConfig(**{**ours, **_pixels(vision, files)})


def whole(decoder: DecoderConfig, tower: VisionConfig, merge: int, width: Any) -> ModelConfig:
    """``merge``: patches a side of a feature. ``width``: of a feature, as the tower's config has it."""
    if width != decoder.hidden_size:
        raise ValueError(f"vision_config has features of {shown(width)} numbers, and the decoder {decoder.hidden_size}")
    projector = ProjectorConfig(
        downsample=merge, hidden_size=tower.hidden_size * merge**2, norm=tower.norm, norm_eps=tower.norm_eps
    )
    return ModelConfig(decoder=decoder, vision=tower, vision_projector=projector)


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Raises ValueError for a model that the format cannot hold."""
    vision = require_vision(config, "qwen2_vl")
    ratio, rest = divmod(vision.intermediate_size, vision.hidden_size)
    if rest:
        raise ValueError(
            f"the qwen2_vl format needs vision.intermediate_size={vision.intermediate_size} to be a multiple of "
            f"vision.hidden_size={vision.hidden_size}"
        )
    keys = {
        **write_top(config, ids, CLASS, "qwen2_vl"),
        **write_decoder(config.decoder),
        "rope_scaling": {"type": "mrope", "mrope_section": config.decoder.mrope_sections},
        "vision_config": {
            **write_tower(config, FIELDS),
            "hidden_size": config.decoder.hidden_size,
            "mlp_ratio": ratio,
        },
    }
    require_same("qwen2_vl", config, read, keys, processor_json(config, None))
    return keys


def require_vision(config: ModelConfig, format: str) -> VisionConfig:
    if config.vision is None or config.audio is not None:
        raise ValueError(f"the {format} format holds a decoder with a vision tower and without an audio tower")
    require_any_grid(config, format)
    return config.vision


def require_any_grid(config: ModelConfig, format: str) -> None:
    if config.decoder.mrope_sections is None or not config.vision.any_grid:
        raise ValueError(f"the {format} format holds a decoder with mrope_sections and a tower with resize=area")


def write_top(config: ModelConfig, ids: Mapping[str, int], name: str, model_type: str) -> dict[str, Any]:
    return {
        "architectures": [name],
        "model_type": model_type,
        "vision_start_token_id": ids[START],
        "vision_end_token_id": ids[END],
        "image_token_id": ids[IMAGE],
        "video_token_id": ids[VIDEO],
        "tie_word_embeddings": config.decoder.tie_embedding,
    }


def write_decoder(decoder: DecoderConfig) -> dict[str, Any]:
    """The keys of a decoder but for its rope_scaling."""
    plain = dataclasses.replace(decoder, mrope_sections=None, mrope_interleaved=False)
    left_out = ("architectures", "model_type", "rope_scaling")
    return {key: value for key, value in llama.write(plain).items() if key not in left_out}


def write_tower(config: ModelConfig, fields: Mapping[str, str]) -> dict[str, Any]:
    """The keys of the layers that we build."""
    vision = config.vision
    return {
        **to_theirs(fields, vision),
        "depth": vision.num_blocks,
        "hidden_act": clip.ACTIVATIONS[vision.activation],
        "in_channels": 3,
        "spatial_merge_size": config.vision_projector.downsample,
    }


# 2. Processors and prompts


def prompts(config: ModelConfig, files: Mapping[str, dict]) -> dict[str, Any]:
    """The keys of ``data`` with which we make the prompts that a folder's processor makes."""
    image, video = (pixels_processor(files, kind)[1] for kind in ("image", "video"))
    frames = {"spread": "starts", "frame_tokens": read_size(video, FRAME_AREA, config)}
    return {**read_images(image, config), "video": {**read_frames(video), **frames}}


def read_images(image: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    markers = {kind: [START, END] for kind in MEDIA}
    return {"markers": markers, "image_tokens": read_size(image, IMAGE_AREA, config)}


def read_frames(video: Mapping[str, Any]) -> dict[str, Any]:
    """How many frames of a video are seen: a number of them, or some of each second within bounds."""
    bounds = {key: video.get(key, default) for key, default in FRAMES.items()}
    if video.get("num_frames") is not None:
        return {"num_frames": video["num_frames"], "fps": None, **bounds}
    return {"num_frames": None, "fps": float(video.get("fps", FPS)), **bounds}


def read_size(keys: Mapping[str, Any], default: Bounds, config: ModelConfig, frames: int = 1) -> list[float]:
    """Bounds of an area in pixels as numbers of features, each of ``frames`` frames."""
    size = keys.get("size", {})
    least = keys.get("min_pixels", size.get("shortest_edge", default[0]))
    most = keys.get("max_pixels", size.get("longest_edge", default[1]))
    return [bound / (frames * _pixels_of_a_feature(config)) for bound in (least, most)]


def write_size(tokens: list[float], config: ModelConfig, frames: int = 1) -> dict[str, int]:
    least, most = (round(bound * frames * _pixels_of_a_feature(config)) for bound in tokens)
    return {"shortest_edge": least, "longest_edge": most}


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    """File name -> keys. Bounds of areas and frames are those of the prompts of ``data``."""
    data = data or DataConfig(train="")
    size = write_size(data.video.frame_tokens or data.image_tokens, config)
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "size": size}
    return write_processors(config, data, video, "Qwen2VLProcessor")


def write_processors(
    config: ModelConfig, data: DataConfig, video: Mapping[str, Any], name: str
) -> dict[str, dict[str, Any]]:
    vision = config.vision
    pixels = {
        "processor_class": name,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": clip.RESAMPLE[vision.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        **to_theirs(clip.PROCESSOR_FIELDS, vision),
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.frames_per_patch,
        "merge_size": config.vision_projector.downsample,
    }
    image = {"image_processor_type": "Qwen2VLImageProcessor", "size": write_size(data.image_tokens, config)}
    frames = {"min_frames": data.video.min_frames, "max_frames": data.video.max_frames}
    for key in ("fps", "num_frames"):
        if getattr(data.video, key) is not None:
            frames[key] = getattr(data.video, key)
    return {
        "preprocessor_config.json": {**pixels, **image},
        "video_preprocessor_config.json": {**pixels, **frames, **video},
    }


def _pixels_of_a_feature(config: ModelConfig) -> int:
    return (config.vision.patch_size * config.vision_projector.downsample) ** 2


def pixels_processor(files: Mapping[str, dict], kind: str) -> tuple[str, dict[str, Any]]:
    """The name of the file by which transformers makes images or videos, and its keys that have a value."""
    name, keys = processor(files, kind)
    if not isinstance(keys.get("size") or {}, dict):
        raise ValueError(f"the {kind} processor in {name} is not understood: {shown(repr(keys))}")
    size = keys.get("size")
    for edge, pixels in EDGES.items():
        if size and size.get(edge) is None and pixels not in keys:
            raise ValueError(f"size={shown(repr(size))} in {name} has no {edge}, and there is no {pixels}")
    return name, keys


def _pixels(vision: Mapping[str, Any], files: Mapping[str, dict]) -> dict[str, Any]:
    """Fields of VisionConfig. ValueError if our tower would get different pixels from theirs."""
    accepted = {
        **PROCESSOR_ACCEPTED,
        "patch_size": (vision["patch_size"],),
        "temporal_patch_size": (vision["temporal_patch_size"],),
        "merge_size": (vision["spatial_merge_size"],),
    }
    found = []
    for kind in ("image", "video"):
        name, keys = pixels_processor(files, kind)
        for key, values in accepted.items():
            if keys.get(key, values[0]) not in values:
                raise ValueError(f"{key}={shown(repr(keys[key]))} in {name} is not implemented")
        fields = {ours: keys[theirs] for ours, theirs in clip.PROCESSOR_FIELDS.items() if theirs in keys}
        fields["resample"] = clip.OUR_RESAMPLE[keys.get("resample", clip.RESAMPLE["bicubic"])]
        found.append(fields)
    image, video = found
    if image != video:
        raise ValueError("images and videos that are resized or normalised in different ways are not implemented")
    return image

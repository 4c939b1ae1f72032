"""InternVL3 and 3.5 in the folders of transformers (-hf): a decoder of Qwen 2, Qwen 3 or Llama with InternViT and a
projector with a norm, whose images are cut into the tiles of the nearest shape.

A video's frames stand one by one in the prompt, each with its number.
"""

from collections.abc import Mapping
from typing import Any

from avlm.config.media import ImageLayout, VideoText
from avlm.config.model import ModelConfig, ProjectorConfig, VisionConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.families import clip, llama, llava, llava_next_video
from avlm.families.keys import processor, require_accepted, require_same, to_ours, to_theirs

MODEL_TYPES = ("internvl",)
FORMAT = "internvl"
ACCEPTED = {
    "projector_hidden_act": ("gelu",),
    "vision_feature_select_strategy": ("default",),
    "downsample_ratio": (0.5, 1.0, 0.25, 0.125),  # for others transformers makes no whole features
    "quantization_config": (None,),
}
# our field -> their key
FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "activation": "hidden_act",
    "qkv_bias": "attention_bias",
    "qk_norm": "use_qk_norm",
    "norm_eps": "layer_norm_eps",
}
# What all of these towers have, and what no key of theirs tells.
TOWER: dict[str, Any] = {
    "class_token": True,
    "pre_norm": False,
    "patch_bias": True,
    "layer_scale": True,
    "resize": "stretch",
}
# A config.json may leave out the keys that equal the defaults of its class.
VISION_DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "attention_bias": False,
    "use_qk_norm": False,
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "image_size": 448,
    "patch_size": 14,
}
NORMS = {"layer_norm": "layer", "rms_norm": "rms"}
VISION_ACCEPTED = {
    "model_type": ("internvl_vision",),
    "hidden_act": tuple(clip.OUR_ACTIVATIONS),
    "norm_type": tuple(NORMS),
    "num_channels": (3,),
    "use_absolute_position_embeddings": (True,),
    "quantization_config": (None,),
}
QK_NORM_EPS = 1e-6  # whatever layer_norm_eps is
PROJECTOR_EPS = 1e-5

# Our module or parameter -> theirs, {i} the layer, without the prefix of the module.
NAMES = {
    **llama.NAMES,
    "vision": {
        "patch": "embeddings.patch_embeddings.projection",
        "class_token": "embeddings.cls_token",
        "position": "embeddings.position_embeddings",
        "blocks.{i}.attention_norm": "encoder.layer.{i}.layernorm_before",
        "blocks.{i}.attention.q": "encoder.layer.{i}.attention.q_proj",
        "blocks.{i}.attention.k": "encoder.layer.{i}.attention.k_proj",
        "blocks.{i}.attention.v": "encoder.layer.{i}.attention.v_proj",
        "blocks.{i}.attention.o": "encoder.layer.{i}.attention.projection_layer",
        "blocks.{i}.attention.q_norm": "encoder.layer.{i}.attention.q_norm",
        "blocks.{i}.attention.k_norm": "encoder.layer.{i}.attention.k_norm",
        "blocks.{i}.attention_scale": "encoder.layer.{i}.lambda_1",
        "blocks.{i}.ffn_norm": "encoder.layer.{i}.layernorm_after",
        "blocks.{i}.up": "encoder.layer.{i}.mlp.fc1",
        "blocks.{i}.down": "encoder.layer.{i}.mlp.fc2",
        "blocks.{i}.ffn_scale": "encoder.layer.{i}.lambda_2",
        "post_norm": "layernorm",
    },
    "vision_projector": {"feature_norm": "layer_norm", "up": "linear_1", "down": "linear_2"},
}
PREFIXES = {**llava.PREFIXES, "vision": ["vision_tower.", "model.vision_tower."]}
HEAD = llava.HEAD
CLASS = "InternVLForConditionalGeneration"
LOADED = llava.LOADED
SKIPPED = {
    **llama.SKIPPED,
    "vision": [
        (r"embeddings\.mask_token", "token of masked patches, of the pretraining"),
        (r"layernorm\.", "norm above feature_layer"),
    ],
    "vision_projector": [],
}
SINUSOIDS = llama.SINUSOIDS
PROJECTORS = llava.PROJECTORS
constants = llama.constants

PROCESSOR_FILES = llava_next_video.PROCESSOR_FILES
IMAGE, VIDEO, START, END = "<IMG_CONTEXT>", "<video>", "<img>", "</img>"
MARKERS = {"image": [START, END], "video": [START, END]}
MEDIA = {"image": IMAGE, "video": VIDEO}
MEDIA_TOKENS = (IMAGE, START, END, VIDEO)
TOKEN_NAMES = {
    "context_image_token": IMAGE,
    "start_image_token": START,
    "end_image_token": END,
    "video_token": VIDEO,
}
TIES_HEAD = True
FRAMES = VideoText(frame="Frame{n}: ", between="\n")
CLASS_SIDE = 384  # of images, where the processor's file says nothing
LIMITS = {"min_tiles": ("min_patches", 1), "max_tiles": ("max_patches", 12)}  # our field -> their key and its default


# 1. config.json


def read(keys: Mapping[str, Any], files: Mapping[str, dict]) -> ModelConfig:
    """``files``: those of PROCESSOR_FILES that the folder has, by their names."""
    require_accepted(keys, ACCEPTED)
    tower = _read_tower(keys, files)
    downsample = round(1 / keys.get("downsample_ratio", 0.5))
    projector = ProjectorConfig(downsample=downsample, feature_norm="layer", norm_eps=PROJECTOR_EPS)
    config = ModelConfig(decoder=llama.read(_text(keys)), vision=tower, vision_projector=projector)
    llava_next_video.require_pixels_of_images(files, tower)
    found = files.get("processor_config.json", {}).get("image_seq_length", _features(config))
    if found != _features(config):
        raise ValueError(
            f"image_seq_length={shown(repr(found))} in processor_config.json: a tile has {_features(config)} features"
        )
    return config


def _text(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the head is tied the inner key says: the class has true at the top of any folder that says nothing there,
    and loads a head of its own nevertheless."""
    text = {"model_type": "qwen2", **(keys.get("text_config") or {})}
    llama.require_variant(text["model_type"])
    tied = text.get("tie_word_embeddings", keys.get("tie_word_embeddings", False))
    return {**text, "tie_word_embeddings": tied}


def _read_tower(keys: Mapping[str, Any], files: Mapping[str, dict]) -> VisionConfig:
    vision = {**VISION_DEFAULTS, **(keys.get("vision_config") or {})}
    require_accepted(vision, VISION_ACCEPTED)
    layer = llava.feature_layer(keys.get("vision_feature_layer", -1), vision["num_hidden_layers"])
    has_post_norm = not vision.get("use_mean_pooling", True) and layer == -1
    if has_post_norm and vision["norm_type"] != "layer_norm":
        raise ValueError("use_mean_pooling=False with norm_type='rms_norm' is not implemented")
    if vision["use_qk_norm"] and vision["layer_norm_eps"] != QK_NORM_EPS:
        found = shown(repr(vision["layer_norm_eps"]))
        raise ValueError(f"layer_norm_eps={found} with use_qk_norm=True is not implemented (accepted: {QK_NORM_EPS})")
    side = _side("image_size", vision)
    fields = {**TOWER, **to_ours(FIELDS, vision), **_pixels(files, side)}
    fields["activation"] = clip.OUR_ACTIVATIONS[fields["activation"]]
    return VisionConfig(
        **fields,
        image_size=side,
        patch_size=_side("patch_size", vision),
        norm=NORMS[vision["norm_type"]],
        post_norm=has_post_norm,
        feature_layer=layer,
    )


def _side(key: str, vision: Mapping[str, Any]) -> Any:
    """Of a square, which may be given as height and width."""
    sides = vision[key] if isinstance(vision[key], list) else [vision[key]] * 2
    if len(sides) != 2 or sides[0] != sides[1]:
        raise ValueError(f"{key}={shown(repr(vision[key]))} is not implemented (accepted: squares)")
    return sides[0]


def stored_shapes(vision: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Shapes that the parameters of ``clip.RESHAPED`` have in a file."""
    return {
        **clip.stored_shapes(vision),
        "vision.class_token": (1, 1, vision.hidden_size),
        "vision.position": (1, vision.num_rows, vision.hidden_size),
    }


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Raises ValueError for a model that the format cannot hold. Only the layers that we build are exported, so the
    features are those of the last layer."""
    llava.require_tower(config, FORMAT)
    vision = config.vision
    if vision.resize != "stretch":
        raise ValueError(f"the {FORMAT} format cannot hold vision.resize={vision.resize}, only stretch")
    keys = {
        "architectures": [CLASS],
        "model_type": FORMAT,
        "image_token_id": ids[IMAGE],
        "image_seq_length": _features(config),
        "downsample_ratio": 1 / config.vision_projector.downsample,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": config.decoder.tie_embedding,
        "text_config": llama.write(config.decoder),
        "vision_config": {
            "model_type": "internvl_vision",
            **to_theirs(FIELDS, vision),
            "num_hidden_layers": vision.num_blocks,
            "hidden_act": clip.ACTIVATIONS[vision.activation],
            "norm_type": "rms_norm" if vision.norm == "rms" else "layer_norm",
            "image_size": [vision.image_size] * 2,
            "patch_size": [vision.patch_size] * 2,
            "num_channels": 3,
            "layer_scale_init_value": 0.1,
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": not vision.post_norm,
        },
    }
    require_same(FORMAT, config, read, keys, processor_json(config, None))
    return keys


def _features(config: ModelConfig) -> int:
    """Of a tile."""
    side = config.vision.patches_per_side
    return config.vision.num_features((side, side), config.vision_projector.downsample)


# 2. Processors and prompts


def _pixels(files: Mapping[str, dict], side: int) -> dict[str, Any]:
    """Fields of VisionConfig. ValueError if our tower would get different pixels from theirs."""
    name, keys = processor(files, "image")
    if not keys:
        return {}
    given = {"size": {"height": CLASS_SIDE, "width": CLASS_SIDE}, **keys, "do_pad": None}
    fields = clip.read_processor(given, side, name)
    if fields.pop("resize", "stretch") != "stretch":
        raise ValueError(f"size={shown(repr(given['size']))} in {name} is not implemented (accepted: height and width)")
    return fields


def prompts(config: ModelConfig, files: Mapping[str, dict]) -> dict[str, Any]:
    """The keys of ``data`` with which we make the prompts that a folder's processor makes. It cuts images whatever
    crop_to_patches says."""
    _, image = processor(files, "image")
    limits = {field: image.get(key, default) for field, (key, default) in LIMITS.items()}
    text = {"frame": FRAMES.frame, "between": FRAMES.between}
    return {
        "markers": MARKERS,
        "image_layout": {"tiles": "aspect", **limits},
        "video": {**llava_next_video.read_frames(files), "spread": _spread(files), "text": text},
    }


def _spread(files: Mapping[str, dict]) -> str:
    name, video = processor(files, "video")
    shift = video.get("initial_shift")
    if shift is not None and type(shift) is not bool:
        raise ValueError(f"initial_shift={shown(repr(shift))} in {name} is not implemented (accepted: true, false)")
    return "starts" if shift is False else "middle_frames"


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    """File name -> keys. The bounds of tiles and the number of frames are those of the prompts of ``data``."""
    layout = ImageLayout(tiles="aspect") if data is None else data.image_layout
    if data is not None:
        _require_prompts(data)
    name = "InternVLProcessor"
    images = {
        **clip.write_processor(config.vision),
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": name,
        "do_convert_rgb": True,
        "crop_to_patches": True,
        **{key: getattr(layout, field) for field, (key, _) in LIMITS.items()},
    }
    frames = llava_next_video.write_frames(config, data, "InternVL")
    frames["initial_shift"] = data is None or data.video.spread != "starts"
    return {
        "preprocessor_config.json": images,
        "video_preprocessor_config.json": frames,
        "processor_config.json": {"processor_class": name, "image_seq_length": _features(config)},
    }


def _require_prompts(data: DataConfig) -> None:
    """ValueError unless media stand in prompts as the processor puts them."""
    layout = data.image_layout
    tiles = ImageLayout(tiles="aspect", min_tiles=layout.min_tiles, max_tiles=layout.max_tiles)
    llava.require_layout(FORMAT, data, tiles)
    if data.markers != MARKERS:
        raise ValueError(f"the {FORMAT} format cannot hold data.markers={data.markers}, only {MARKERS}")
    if data.video.text != FRAMES:
        raise ValueError(f"the {FORMAT} format cannot hold data.video.text={data.video.text}, only {FRAMES}")

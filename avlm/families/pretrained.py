"""What a model folder says about itself: Hugging Face's ``config.json`` in both dialects, and our own, read strictly.

transformers 5 writes ``rope_parameters``; most folders of the Hub hold ``rope_theta`` and ``rope_scaling``. Keys equal
to a class default may be left out, so the defaults that matter stand here. What our models do not compute is refused by
name: a folder that loads gives the numbers that it was trained for.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from avlm.config.model import (
    AudioConfig,
    DecoderConfig,
    ModelConfig,
    ProjectorConfig,
    RopeScaling,
    VisionConfig,
    first_error,
    shown,
    validated,
)
from avlm.data.text.chat import Chat, Tokenizer
from avlm.storage.model_folder import read_json
from avlm.storage.weight_files import local, to_fetch

DECODER_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
DECODER_KEYS += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps")
VISION_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
VISION_KEYS += ("image_size", "patch_size", "hidden_act", "layer_norm_eps")
AUDIO_KEYS = (
    "d_model",
    "encoder_ffn_dim",
    "encoder_layers",
    "encoder_attention_heads",
    "num_mel_bins",
    "max_source_positions",
)
VOXTRAL_ENCODER_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
VOXTRAL_ENCODER_KEYS += AUDIO_KEYS[-2:]
QWEN = dict(zip(DECODER_KEYS, (151936, 4096, 22016, 32, 32, 32, 32768, 1e-6)), use_sliding_window=False)
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": dict(zip(DECODER_KEYS, (32000, 4096, 11008, 32, 32, None, 2048, 1e-6))),
    "mistral": dict(zip(DECODER_KEYS, (32000, 4096, 14336, 32, 32, 8, 131072, 1e-6)), sliding_window=4096),
    "qwen2": QWEN,
    "qwen3": {**QWEN, "head_dim": 128},
    "clip_vision_model": dict(zip(VISION_KEYS, (768, 3072, 12, 12, 224, 32, "quick_gelu", 1e-5))),
    "siglip_vision_model": dict(zip(VISION_KEYS, (768, 3072, 12, 12, 224, 16, "gelu_pytorch_tanh", 1e-6))),
    "whisper": dict(zip(AUDIO_KEYS, (384, 1536, 4, 6, 80, 1500))),
    "voxtral_encoder": dict(zip(VOXTRAL_ENCODER_KEYS, (1280, 5120, 32, 20, 128, 1500))),
}
DECODERS = ("llama", "mistral", "qwen2", "qwen3")
VOXTRAL_TEXT = dict(zip(DECODER_KEYS, (131072, 3072, 8192, 30, 32, 8, 131072, 1e-5)), rope_theta=1e8, head_dim=128)
WHOLE = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # two-tower models and the tower that we take
SUPPORTED = (*DECODERS, "clip_vision_model", "siglip_vision_model", "whisper", *WHOLE, "llava", "voxtral")
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # numbers of Pillow
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}

# Key -> the values under which our modules compute the same function; a key that is absent has the first of them.
ACCEPTED = {
    "decoder": {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "partial_rotary_factor": (1.0,),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "num_experts": (None, 0),
        "num_local_experts": (None, 0),
        "quantization_config": (None,),
    },
    "vision": {"hidden_act": tuple(ACTIVATIONS), "num_channels": (3,), "quantization_config": (None,)},
    "audio": {"activation_function": ("gelu",), "quantization_config": (None,)},
    "llava": {"projector_hidden_act": ("gelu",), "quantization_config": (None,)},
    "voxtral": {"projector_hidden_act": ("gelu",), "quantization_config": (None,)},
}

# Types of the keys that we read before pydantic sees them. A flag of the text "false" would be true.
NUMBER = (int, float)
FLAGS = "tie_word_embeddings use_sliding_window multimodal_projector_bias"
INTEGERS = "num_hidden_layers max_position_embeddings sliding_window max_window_layers num_key_value_heads head_dim"
INTEGERS += " num_attention_heads image_size intermediate_size hidden_size max_source_positions"
OBJECTS = ["text_config", "vision_config", "audio_config", "rope_scaling", "rope_parameters"]
TYPES: dict[str, Any] = {"model_type": str, "hidden_act": str, "layer_types": list, **dict.fromkeys(OBJECTS, dict)}
TYPES |= dict.fromkeys(FLAGS.split(), bool) | dict.fromkeys(INTEGERS.split(), int)
TYPES |= dict.fromkeys(("rope_theta", "partial_rotary_factor", "factor"), NUMBER)
NAMES_OF_TYPES = {str: "text", list: "list", dict: "object of keys", bool: "true or false", int: "integer"}

AnyConfig = DecoderConfig | VisionConfig | AudioConfig | ModelConfig


def resolve(name_or_folder: str | Path) -> Path:
    """The local folder, or the downloaded snapshot of a Hub name; only files that we read are fetched."""
    folder = local(name_or_folder)
    if folder.is_dir():
        return folder
    name = str(name_or_folder)
    if not may_be_on_hub(name):
        raise FileNotFoundError(f"no model folder {shown(name)} (a name of the Hub has the form owner/model)")
    import huggingface_hub  # slow to import, and of use only here
    from huggingface_hub import errors

    fetch = lambda patterns: Path(
        huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"])
    )
    try:
        path = fetch(["*.json", "*.jinja", "*.model", "*.txt"])
        for files in to_fetch(path):
            fetch(files)
        return path
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError, OSError) as error:
        reason = shown(next(iter(str(error).strip().splitlines()), type(error).__name__))
        raise ValueError(
            f"{shown(name)} is no folder here and could not be fetched from the Hub ({reason}); "
            "download it elsewhere and give the folder"
        ) from None


def may_be_on_hub(name: str) -> bool:
    return not Path(name).expanduser().is_absolute() and not name.startswith(".") and name.count("/") == 1


def read_config(folder: str | Path) -> AnyConfig:
    """The config of a supported decoder, tower, LLaVA, Voxtral or of our own export."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no config.json in {folder}: it is no model folder")
    keys = read_json(path)
    try:
        if keys.get("architecture") == "AVLM":
            return validated(ModelConfig, keys.get("model"), "model")
        return _hugging_face(_typed(keys), Path(folder))
    except ValidationError as error:
        raise ValueError(f"{path}: {first_error(error)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path} is not understood ({type(error).__name__}: {shown(str(error))})") from None


def _hugging_face(keys: dict[str, Any], folder: Path) -> AnyConfig:
    model_type = keys.get("model_type")
    if model_type in DECODERS:
        return _decoder(keys)
    if model_type in WHOLE.values():
        return _vision(keys, folder)
    if model_type in WHOLE:
        vision = {"model_type": WHOLE[model_type], **(keys.get("vision_config") or {})}
        if vision["model_type"] not in WHOLE.values():
            raise ValueError(f"vision_config.model_type {shown(repr(vision['model_type']))} is not supported")
        return _vision(vision, folder)
    if model_type == "whisper":
        return _audio(keys)
    if model_type == "llava":
        return _llava(keys, folder)
    if model_type == "voxtral":
        return _voxtral(keys)
    raise ValueError(f"model_type {shown(repr(model_type))} is not supported (supported: {', '.join(SUPPORTED)})")


def _typed(keys: dict[str, Any], where: str = "") -> dict[str, Any]:
    """``keys``, those that we read of the types that they have in transformers, or null; ValueError otherwise."""
    for key, value in keys.items():
        kind = TYPES.get(key)
        is_right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) if kind else True
        if value is not None and not is_right:
            name = "number" if kind == NUMBER else NAMES_OF_TYPES[kind]
            raise ValueError(f"{where}{key} is no {name} but {shown(repr(value))}")
        if key in OBJECTS and value:
            _typed(value, f"{where}{key}.")
    return keys


def stop_ids(folder: str | Path) -> list[int]:
    """Ids that end an answer: of generation_config.json, else of config.json, else none."""
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        keys = read_json(path) if path.is_file() else {}
        inner = keys.get("text_config")
        for tree in (keys, inner if isinstance(inner, dict) else {}):
            ids = tree.get("eos_token_id")
            if ids is not None:
                ids = ids if isinstance(ids, list) else [ids]
                if any(type(each) is not int for each in ids):
                    raise ValueError(f"{path}: eos_token_id is no number or list of numbers but {shown(repr(ids))}")
                return ids
    return []


def template_of(folder: Path, config: ModelConfig) -> str:
    """The ``data.template`` of a Hugging Face folder's prompts: its own, where that takes texts. Those of LLaVA folders
    of the Hub want lists of parts; they are replaced by the one that says the same."""
    if config.vision is None:
        return "tokenizer"
    tokenizer, question = Tokenizer(folder), [{"role": "user", "content": "question"}]
    if not (folder / "chat_template.json").is_file():  # the processor's; the tokenizer's is then that of its decoder
        try:
            chat = Chat(tokenizer, "tokenizer", published=True)
            if any("question" in piece.text for piece in chat.pieces(question, prompt=True)):
                return "tokenizer"
        except ValueError:
            pass
    return "chatml" if "<|im_start|>" in tokenizer.control_tokens else "llava"


def _require_accepted(kind: str, keys: dict[str, Any]) -> None:
    for key, values in ACCEPTED[kind].items():
        if keys.get(key, values[0]) not in values:
            found = shown(repr(keys[key]))
            raise ValueError(f"{key}={found} is not implemented (accepted: {', '.join(map(repr, values))})")


def _decoder(given: dict[str, Any]) -> DecoderConfig:
    model_type = given["model_type"]
    keys = {**DEFAULTS[model_type], **given}
    _require_accepted("decoder", keys)
    window = keys.get("sliding_window") if keys.get("use_sliding_window", model_type in ("mistral", "llama")) else None
    if window is not None and model_type.startswith("qwen"):
        first = keys.get("max_window_layers", 28)  # the window is used by the layers from this one on
        window = window if first is None or first < keys["num_hidden_layers"] else None
    window_cuts = window is not None and window < keys["max_position_embeddings"]
    if window_cuts or "sliding_attention" in (keys.get("layer_types") or ()):
        raise ValueError(
            f"sliding_window={keys.get('sliding_window')} is in use, and sliding windows are not implemented"
        )
    theta, scaling = _rope(keys)
    return DecoderConfig(
        vocab_size=keys["vocab_size"],
        hidden_size=keys["hidden_size"],
        intermediate_size=keys["intermediate_size"],
        num_layers=keys["num_hidden_layers"],
        num_heads=keys["num_attention_heads"],
        num_kv_heads=keys.get("num_key_value_heads") or keys["num_attention_heads"],
        head_dim=keys.get("head_dim") or 0,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=keys["rms_norm_eps"],
        tie_embedding=bool(keys.get("tie_word_embeddings", False)),
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        max_position=keys["max_position_embeddings"],
    )


def _rope(keys: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    rope = {**(keys.get("rope_scaling") or {}), **(keys.get("rope_parameters") or {})}
    theta = float(rope.pop("rope_theta", keys.get("rope_theta") or 10_000.0))
    old_name = rope.pop("type", "default")
    rope_type = rope.pop("rope_type", old_name)
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor below 1 is not implemented")
    if rope_type == "default" and not any(isinstance(value, dict) for value in rope.values()):
        return theta, None
    if rope_type != "llama3":
        raise ValueError(f"rope_type {shown(repr(rope_type))} is not implemented (accepted: default, llama3)")
    names = {"original_max_position_embeddings": "original_max_position"}
    if set(rope) != {"factor", "low_freq_factor", "high_freq_factor", *names}:
        raise ValueError(f"rope_type 'llama3' with the keys {shown(sorted(rope))} is not implemented")
    return theta, RopeScaling(**{names.get(key, key): value for key, value in rope.items()})


def _vision(given: dict[str, Any], folder: Path, feature_layer: int = -2) -> VisionConfig:
    model_type = given["model_type"]
    keys = {**DEFAULTS[model_type], **given}
    _require_accepted("vision", keys)
    clip = model_type == "clip_vision_model"
    seen = {} if clip else {"mean": [0.5] * 3, "std": [0.5] * 3, "resize": "stretch"}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            processor = read_json(folder / name)
            processor = processor.get("image_processor", processor)
            if not isinstance(processor, dict):
                raise ValueError(f"image_processor in {name} is no object of keys but {shown(repr(processor))}")
            seen |= _pixels(processor, keys["image_size"], name)
            break
    return VisionConfig(
        hidden_size=keys["hidden_size"],
        intermediate_size=keys["intermediate_size"],
        num_layers=keys["num_hidden_layers"],
        num_heads=keys["num_attention_heads"],
        image_size=keys["image_size"],
        patch_size=keys["patch_size"],
        feature_layer=feature_layer,
        activation=ACTIVATIONS[keys["hidden_act"]],
        norm_eps=keys["layer_norm_eps"],
        class_token=clip,
        pre_norm=clip,
        patch_bias=not clip,
        **seen,
    )


def _pixels(processor: dict[str, Any], side: int, file: str) -> dict[str, Any]:
    """The image processor's part of a VisionConfig. ValueError where its pixels would differ from ours."""
    given = {key: value for key, value in processor.items() if value is not None}
    size, crops = given.get("size", side), given.get("do_center_crop")
    shortest = isinstance(size, dict) and bool(size.get("shortest_edge"))
    wanted = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_pad": False, "size": side}
    wanted |= {"crop_size": side} if crops else {}
    wanted |= {"do_center_crop": True} if shortest else {}  # or pictures would not become squares
    values = lambda found: found.values() if isinstance(found, dict) else found if isinstance(found, list) else [found]
    sides = lambda found: [value for value in values(found) if value is not None]
    is_right = lambda found, value: bool(sides(found)) and all(side == value for side in sides(found))
    wrong = [key for key, value in wanted.items() if not is_right(given.get(key, value), value)]
    resample, factor = given.get("resample", 3), given.get("rescale_factor", 1 / 255)
    wrong += [] if type(resample) is int and resample in RESAMPLE else ["resample"]
    wrong += [] if isinstance(factor, NUMBER) and math.isclose(factor, 1 / 255, rel_tol=1e-5) else ["rescale_factor"]
    if wrong:
        raise ValueError(f"{wrong[0]}={shown(repr(given[wrong[0]]))} in {file} is not implemented")
    seen = {name: given[f"image_{name}"] for name in ("mean", "std") if f"image_{name}" in given}
    seen |= {"resample": RESAMPLE[given["resample"]]} if "resample" in given else {}
    if shortest or crops is not None or not isinstance(size, int):
        seen["resize"] = "crop" if shortest or (crops and isinstance(size, int)) else "stretch"
    return seen


def _audio(given: dict[str, Any]) -> AudioConfig:
    keys = {**DEFAULTS["whisper"], **given}
    _require_accepted("audio", keys)
    return AudioConfig(
        hidden_size=keys["d_model"],
        intermediate_size=keys["encoder_ffn_dim"],
        num_layers=keys["encoder_layers"],
        num_heads=keys["encoder_attention_heads"],
        num_mels=keys["num_mel_bins"],
        max_positions=keys["max_source_positions"],
    )


def _llava(keys: dict[str, Any], folder: Path) -> ModelConfig:
    _require_accepted("llava", keys)
    text = {"model_type": "llama", **(keys.get("text_config") or {})}
    large_336 = dict(zip(VISION_KEYS, (1024, 4096, 24, 16, 336, 14)))
    vision = keys.get("vision_config") or large_336
    vision = {"model_type": "clip_vision_model", **vision}
    if text["model_type"] not in DECODERS or vision["model_type"] not in WHOLE.values():
        found = shown(f"{text['model_type']} and {vision['model_type']}")
        raise ValueError(f"a LLaVA of {found} is not implemented")
    text["tie_word_embeddings"] = keys.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
    layer = keys.get("vision_feature_layer", -2)
    if type(layer) is not int:
        raise ValueError(f"vision_feature_layer={shown(repr(layer))}: features of several layers are not implemented")
    if layer >= 0:  # hidden_states[0] is the input of the first layer
        layer -= 1 + {**DEFAULTS[vision["model_type"]], **vision}["num_hidden_layers"]
    tower = _vision(vision, folder, layer)
    strategy = keys.get("vision_feature_select_strategy", "default")
    if (strategy == "default") != tower.class_token:
        raise ValueError(
            f"vision_feature_select_strategy={shown(repr(strategy))} of a {vision['model_type']} is not implemented"
        )
    projector = ProjectorConfig(bias=keys.get("multimodal_projector_bias", True))
    return ModelConfig(decoder=_decoder(text), vision=tower, vision_projector=projector)


def _voxtral(keys: dict[str, Any]) -> ModelConfig:
    """The encoder takes whole windows; the projector's input, rows side by side, is as wide as the encoder's MLP."""
    _require_accepted("voxtral", keys)
    text = {"model_type": "llama", **(keys.get("text_config") or {})}
    audio = {**DEFAULTS["voxtral_encoder"], **(keys.get("audio_config") or {})}
    if text["model_type"] not in DECODERS:
        raise ValueError(f"a Voxtral of {shown(text['model_type'])} is not implemented")
    named = {theirs: audio[key] for theirs, key in zip(AUDIO_KEYS, VOXTRAL_ENCODER_KEYS)}
    tower = dataclasses.replace(_audio({**audio, **named}), window="fixed")
    stacked, rest = divmod(tower.intermediate_size, tower.hidden_size)
    if rest or tower.max_positions % stacked:
        raise ValueError(f"a Voxtral whose intermediate_size is {tower.intermediate_size} is not implemented")
    projector = ProjectorConfig(downsample=stacked, bias=False)
    return ModelConfig(
        decoder=_decoder({**VOXTRAL_TEXT, **text, "tie_word_embeddings": False}), audio=tower, audio_projector=projector
    )

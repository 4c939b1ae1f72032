"""Ultravox: a language model of another folder, Whisper's encoder, and a projector that stacks rows of it.

    feature = linear_2(norm(silu(b) * a)),  a, b = halves of linear_1(norm(8 rows side by side))     from version 0.5 on
    feature = norm(linear_2(silu(b) * a))                                                            before

A folder of the Hub holds the projector and, if it was trained, the encoder; ``text_model_id`` and ``audio_model_id`` of
its config.json name the folders of the rest, by a path or a name of the Hub. An export holds everything.

The encoder sees the rows of a clip alone. Its processor pads a clip of less than 30 s with nothing, as we do, and what
is left of a longer one with zeros: a last window with an odd number of frames gets another last row from it. It also
mirrors the last 40 samples of a clip, where ours is followed by silence, which changes the last frame a little.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from avlm.config.decoder import DecoderConfig
from avlm.config.model import AudioConfig, ModelConfig, ProjectorConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.families import llama, voxtral, whisper
from avlm.families.keys import require_accepted, require_same, to_theirs

MODEL_TYPES = ("ultravox",)
TOWER: dict[str, Any] = {"window": "true", "log_mel": "clip", "edge": "masked"}  # what no key tells
# A config.json may leave out the keys that equal the defaults of its class.
DEFAULTS = {"hidden_size": 4096, "stack_factor": 8, "projector_act": "swiglu", "projector_ln_mid": False}
TYPES = {"swiglu": "swiglu", "gelu": "mlp2x_gelu"}  # projector_act -> our type
ACCEPTED = {
    "projector_act": tuple(TYPES),
    "audio_latency_block_size": (None,),  # an encoder that sees no future
    "quantization_config": (None,),
}

NAMES = {
    **llama.NAMES,
    **whisper.NAMES,
    "audio_projector": {
        "feature_norm": "ln_pre",
        "up": "linear_1",  # its first half
        "gate": "linear_1",
        "down": "linear_2",
        "hidden_norm": "ln_mid",
        "output_norm": "ln_post",
    },
}
PREFIXES = {
    "decoder": ["language_model.model."],
    "audio": ["audio_tower."],
    "audio_projector": ["multi_modal_projector."],
}
HEAD = "language_model.lm_head.weight"
CLASS = None  # transformers has none; vLLM has, and the Hub's folders bring their own
LOADED = {module: prefixes[0] for module, prefixes in PREFIXES.items()}
SKIPPED = {**llama.SKIPPED, **whisper.SKIPPED, "audio_projector": []}
SINUSOIDS = voxtral.SINUSOIDS
PROJECTORS = voxtral.PROJECTORS
constants = llama.constants

PROCESSOR_FILES = ()
AUDIO = "<|audio|>"
MEDIA = {"audio": AUDIO}
MEDIA_TOKENS = ()  # its processor writes over any token
TIES_HEAD = True


def elsewhere(keys: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Our module -> the key that names its folder, and that name, of the modules that another folder holds."""
    named = {"decoder": "text_model_id", "audio": "audio_model_id"}
    return {module: (key, keys[key]) for module, key in named.items() if keys.get(key) is not None}


def read(
    given: Mapping[str, Any],
    files: Mapping[str, dict],
    decoder: DecoderConfig | None = None,
    audio: AudioConfig | None = None,
) -> ModelConfig:
    """``decoder`` and ``audio``: what the other folders hold."""
    keys = {**DEFAULTS, **given}
    require_accepted(keys, ACCEPTED)
    if decoder is None:
        text = {"model_type": "llama", **(keys.get("text_config") or {})}
        if text["model_type"] not in llama.VARIANTS:
            raise ValueError(f"an Ultravox with a decoder of {shown(repr(text['model_type']))} is not implemented")
        decoder = llama.read(text)
    if audio is None:
        encoder = {"model_type": "whisper", **(keys.get("audio_config") or {})}
        require_accepted(encoder, {"model_type": ("whisper",)})
        audio = whisper.read(encoder, {})
    width, kind = keys["hidden_size"], TYPES[keys["projector_act"]]
    if kind == "swiglu" and width % 2:
        raise ValueError(f"hidden_size={shown(width)} is odd: swiglu takes two halves of it")
    projector = ProjectorConfig(
        type=kind,
        downsample=keys["stack_factor"],
        hidden_size=width // 2 if kind == "swiglu" else width,
        bias=False,
        feature_norm="rms",
        **{"hidden_norm" if keys["projector_ln_mid"] else "output_norm": "rms"},
    )
    return ModelConfig(decoder=decoder, audio=dataclasses.replace(audio, **TOWER), audio_projector=projector)


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Raises ValueError for a model that the format cannot hold."""
    whole = voxtral.require_audio(config, "ultravox", "clip")
    config = dataclasses.replace(whole, decoder=config.decoder)
    projector = config.audio_projector
    width = projector.hidden_size or config.decoder.hidden_size
    keys = {
        "architectures": ["UltravoxModel"],
        "model_type": "ultravox",
        "hidden_size": 2 * width if projector.type == "swiglu" else width,
        "stack_factor": projector.downsample,
        "projector_act": next((act for act, kind in TYPES.items() if kind == projector.type), "swiglu"),
        "projector_ln_mid": projector.hidden_norm != "none",
        "text_config": llama.write(config.decoder),
        "audio_config": {
            "model_type": "whisper",
            **to_theirs(whisper.FIELDS, config.audio),
            **whisper.CONSTANT_KEYS,
        },
    }
    require_same("ultravox", config, read, keys, {})
    return keys


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    """File name -> keys."""
    return {"preprocessor_config.json": whisper.write_processor(config.audio, 2 * config.audio.max_positions)}

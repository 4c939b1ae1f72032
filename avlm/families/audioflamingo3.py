"""Audio Flamingo 3: the encoder of Qwen2-Audio under key names of its own, and a two-layer projector.

Its processor takes at most 600 s of a clip, in windows of 30 s; ours takes as many windows as
``data.max_audio_seconds`` allows.
"""

from collections.abc import Mapping
from typing import Any

from avlm.config.model import AudioConfig, ModelConfig, ProjectorConfig
from avlm.config.run import DataConfig
from avlm.families import llama, qwen2_audio, voxtral, whisper
from avlm.families.keys import require_accepted, require_same, to_ours, to_theirs

MODEL_TYPES = ("audioflamingo3",)
ACCEPTED = {"projector_hidden_act": ("gelu",), "quantization_config": (None,)}

NAMES = voxtral.NAMES
PREFIXES = voxtral.PREFIXES
HEAD = voxtral.HEAD
CLASS = "AudioFlamingo3ForConditionalGeneration"
LOADED = voxtral.LOADED
SKIPPED = voxtral.SKIPPED
SINUSOIDS = voxtral.SINUSOIDS
PROJECTORS = voxtral.PROJECTORS
constants = llama.constants

PROCESSOR_FILES = ()
AUDIO = "<sound>"
MEDIA = {"audio": AUDIO}
MEDIA_TOKENS = (AUDIO,)
TIES_HEAD = False


def read(keys: Mapping[str, Any], files: Mapping[str, dict]) -> ModelConfig:
    require_accepted(keys, ACCEPTED)
    audio = {**voxtral.AUDIO_DEFAULTS, **(keys.get("audio_config") or {})}
    require_accepted(audio, whisper.ACCEPTED)
    tower = AudioConfig(**to_ours(voxtral.FIELDS, audio), **qwen2_audio.TOWER)
    projector = ProjectorConfig(bias=keys.get("projector_bias", True))
    decoder = qwen2_audio.read_decoder(keys, "Audio Flamingo 3")
    return ModelConfig(decoder=decoder, audio=tower, audio_projector=projector)


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Raises ValueError for a model that the format cannot hold."""
    config = voxtral.require_audio(config, "audioflamingo3", "window")
    keys = {
        "architectures": [CLASS],
        "model_type": "audioflamingo3",
        "audio_token_id": ids[AUDIO],
        "projector_hidden_act": "gelu",
        "projector_bias": config.audio_projector.bias,
        "text_config": llama.write(config.decoder),
        "audio_config": {
            "model_type": "audioflamingo3_encoder",
            **to_theirs(voxtral.FIELDS, config.audio),
            **whisper.CONSTANT_KEYS,
        },
    }
    require_same("audioflamingo3", config, read, keys, {})
    return keys


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    """File name -> keys."""
    keys = {"processor_class": "AudioFlamingo3Processor", "audio_token": AUDIO}
    frames = 2 * config.audio.max_positions
    return {
        "preprocessor_config.json": {**keys, **whisper.write_processor(config.audio, frames)},
        "processor_config.json": keys,
    }

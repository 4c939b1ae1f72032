"""Voxtral: a decoder of the Llama family with Whisper's encoder, which takes full windows, and a two-layer projector
without biases. Encoder rows are stacked until they are as wide as the encoder's MLP, and projected together.

The families that hear alone take from this file what they share with it: prefixes, and the keys of an encoder."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from avlm.config.model import AudioConfig, ModelConfig, ProjectorConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.families import llama, whisper
from avlm.families.keys import has_norms, require_accepted, require_same, to_ours, to_theirs

MODEL_TYPES = ("voxtral",)
# our field of AudioConfig -> their key
FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_mels": "num_mel_bins",
    "max_positions": "max_source_positions",
}
# A config.json may leave out the keys that equal the defaults of its classes.
AUDIO_DEFAULTS = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
}
TEXT_DEFAULTS = {
    "vocab_size": 131072,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e8,
    "max_position_embeddings": 131072,
}
ACCEPTED = {"projector_hidden_act": ("gelu",), "quantization_config": (None,)}

NAMES = {**llama.NAMES, **whisper.NAMES, "audio_projector": {"up": "linear_1", "down": "linear_2"}}
# First the Hub's layout, which an export has too; then that of transformers 5.17, which writes "model" twice, and that
# which it has in memory.
PREFIXES = {
    "decoder": ["language_model.model.", "language_model.model.model.", "model.language_model."],
    "audio": ["audio_tower.", "model.audio_tower."],
    "audio_projector": ["multi_modal_projector.", "model.multi_modal_projector."],
}
HEAD = "language_model.lm_head.weight"
CLASS = "VoxtralForConditionalGeneration"
LOADED = {
    "decoder": "model.language_model.",
    "audio": "model.audio_tower.",
    "audio_projector": "model.multi_modal_projector.",
}
SKIPPED = {**llama.SKIPPED, **whisper.SKIPPED, "audio_projector": []}
SINUSOIDS = {"audio": whisper.SINUSOIDS}
PROJECTORS = {"audio_projector": ("multi_modal_projector",)}
constants = llama.constants

PROCESSOR_FILES = ()
AUDIO = "[AUDIO]"
MEDIA = {"audio": AUDIO}
MEDIA_TOKENS = (AUDIO,)
TIES_HEAD = False


def read(keys: Mapping[str, Any], files: Mapping[str, dict]) -> ModelConfig:
    require_accepted(keys, ACCEPTED)
    text = {"model_type": "llama", **(keys.get("text_config") or {})}
    if text["model_type"] not in llama.VARIANTS:
        raise ValueError(f"a Voxtral of {shown(text['model_type'])} is not implemented")
    decoder = {**TEXT_DEFAULTS, **text, "tie_word_embeddings": False}
    audio = {**AUDIO_DEFAULTS, **(keys.get("audio_config") or {})}
    require_accepted(audio, whisper.ACCEPTED)
    tower = AudioConfig(**to_ours(FIELDS, audio), window="fixed", log_mel="clip")
    stacked, rest = divmod(tower.intermediate_size, tower.hidden_size)
    if rest or tower.max_positions % stacked:
        raise ValueError(f"a Voxtral with intermediate_size={tower.intermediate_size} is not implemented")
    projector = ProjectorConfig(downsample=stacked, bias=False)
    return ModelConfig(decoder=llama.read(decoder), audio=tower, audio_projector=projector)


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Raises ValueError for a model that the format cannot hold."""
    config = require_audio(config, "voxtral", "clip")
    _require_voxtral(config)
    keys = {
        "architectures": [CLASS],
        "model_type": "voxtral",
        "audio_token_id": ids[AUDIO],
        "projector_hidden_act": "gelu",
        "text_config": llama.write(config.decoder),
        "audio_config": {
            "model_type": "voxtral_encoder",
            **to_theirs(FIELDS, config.audio),
            **whisper.CONSTANT_KEYS,
        },
    }
    require_same("voxtral", config, read, keys, {})
    return keys


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    """File name -> keys."""
    return {"preprocessor_config.json": whisper.write_processor(config.audio, 2 * config.audio.max_positions)}


def require_audio(config: ModelConfig, format: str, log_mel: str) -> ModelConfig:
    """The model as a format holds it: with a head of its own, and the ``log_mel`` of its processor, which is the same
    for a clip of one window. ValueError if it sees."""
    if config.audio is None or config.vision is not None:
        raise ValueError(f"the {format} format holds a decoder with an audio tower and without a vision tower")
    decoder = dataclasses.replace(config.decoder, tie_embedding=False)
    return dataclasses.replace(config, decoder=decoder, audio=dataclasses.replace(config.audio, log_mel=log_mel))


def _require_voxtral(config: ModelConfig) -> None:
    audio, projector = config.audio, config.audio_projector
    if projector.type != "mlp2x_gelu" or projector.bias or has_norms(projector):
        raise ValueError("the voxtral format holds an audio_projector of type mlp2x_gelu with bias=false and no norm")
    if projector.hidden_size not in (0, config.decoder.hidden_size):
        raise ValueError(f"the voxtral format cannot hold audio_projector.hidden_size={projector.hidden_size}")
    if audio.window != "fixed":
        raise ValueError("the voxtral format holds full windows: audio.window=fixed")
    if projector.downsample * audio.hidden_size != audio.intermediate_size:
        raise ValueError(
            f"the voxtral format needs audio.intermediate_size={audio.intermediate_size} to be "
            f"audio_projector.downsample={projector.downsample} times audio.hidden_size={audio.hidden_size}"
        )
    if audio.max_positions % projector.downsample:
        raise ValueError(
            f"the voxtral format needs audio.max_positions={audio.max_positions} to be a multiple of "
            f"audio_projector.downsample={projector.downsample}"
        )

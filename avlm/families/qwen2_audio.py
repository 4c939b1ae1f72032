"""Qwen2-Audio: a Qwen 2 decoder with Whisper's encoder, whose rows are averaged in pairs and projected by one linear.

The rows of a clip attend to each other alone, and behind it the convolutions see silence. Its processor cuts a clip off
at 30 s; we cut a longer one into windows of 30 s, one after the other, and lose nothing.
"""

from collections.abc import Mapping
from typing import Any

from avlm.config.decoder import DecoderConfig
from avlm.config.model import AudioConfig, ModelConfig, ProjectorConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.families import llama, voxtral, whisper
from avlm.families.keys import require_accepted, require_same, to_ours, to_theirs

MODEL_TYPES = ("qwen2_audio",)
TOWER: dict[str, Any] = {"edge": "silence", "pool": 2}  # what no key tells
# A config.json may leave out the keys that equal the defaults of its classes.
AUDIO_DEFAULTS = {
    "d_model": 1280,
    "encoder_ffn_dim": 5120,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
}
ACCEPTED = {"quantization_config": (None,)}

NAMES = {**llama.NAMES, **whisper.NAMES, "audio_projector": {"linear": "linear"}}
PREFIXES = voxtral.PREFIXES
HEAD = voxtral.HEAD
CLASS = "Qwen2AudioForConditionalGeneration"
LOADED = voxtral.LOADED
SKIPPED = voxtral.SKIPPED
SINUSOIDS = voxtral.SINUSOIDS
PROJECTORS = voxtral.PROJECTORS
constants = llama.constants

PROCESSOR_FILES = ()
START, AUDIO, END = "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"
MEDIA = {"audio": AUDIO}
MEDIA_TOKENS = (START, AUDIO, END)
TIES_HEAD = False


def read(keys: Mapping[str, Any], files: Mapping[str, dict]) -> ModelConfig:
    require_accepted(keys, ACCEPTED)
    audio = {**AUDIO_DEFAULTS, **(keys.get("audio_config") or {})}
    require_accepted(audio, whisper.ACCEPTED)
    tower = AudioConfig(**to_ours(whisper.FIELDS, audio), **TOWER)
    return ModelConfig(
        decoder=read_decoder(keys, "Qwen2-Audio"), audio=tower, audio_projector=ProjectorConfig(type="linear")
    )


def read_decoder(keys: Mapping[str, Any], name: str) -> DecoderConfig:
    """A Qwen 2 unless the keys say otherwise; its head is never tied."""
    text = {"model_type": "qwen2", **(keys.get("text_config") or {})}
    if text["model_type"] not in llama.VARIANTS:
        raise ValueError(f"{name} with a decoder of model_type {shown(repr(text['model_type']))} is not implemented")
    return llama.read({**text, "tie_word_embeddings": False})


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Raises ValueError for a model that the format cannot hold."""
    config = voxtral.require_audio(config, "qwen2_audio", "window")
    keys = {
        "architectures": [CLASS],
        "model_type": "qwen2_audio",
        "audio_token_index": ids[AUDIO],
        "text_config": llama.write(config.decoder),
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            **to_theirs(whisper.FIELDS, config.audio),
            **whisper.CONSTANT_KEYS,
        },
    }
    require_same("qwen2_audio", config, read, keys, {})
    return keys


def prompts(config: ModelConfig, files: Mapping[str, dict]) -> dict[str, Any]:
    """The keys of ``data`` with which we make the prompts that a folder's template makes."""
    return {"markers": {"audio": [f"Audio {{n}}: {START}", f"{END}\n"]}}


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    """File name -> keys."""
    keys = {
        "processor_class": "Qwen2AudioProcessor",
        **whisper.write_processor(config.audio, 2 * config.audio.max_positions),
    }
    return {"preprocessor_config.json": keys}

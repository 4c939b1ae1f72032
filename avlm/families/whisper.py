"""Whisper: its encoder is our audio tower."""

from collections.abc import Mapping
from typing import Any

from avlm.config.model import AudioConfig
from avlm.families.keys import require_accepted, to_ours

MODEL_TYPES = ("whisper",)
# our field -> their key
FIELDS = {
    "hidden_size": "d_model",
    "intermediate_size": "encoder_ffn_dim",
    "num_layers": "encoder_layers",
    "num_heads": "encoder_attention_heads",
    "num_mels": "num_mel_bins",
    "max_positions": "max_source_positions",
}
# A config.json may leave out the keys that equal the defaults of its class.
DEFAULTS = {
    "d_model": 384,
    "encoder_ffn_dim": 1536,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
}
ACCEPTED = {"activation_function": ("gelu",), "quantization_config": (None,)}
CONSTANT_KEYS = {"activation_function": "gelu", "scale_embedding": False}  # of the encoders made from Whisper's

# Our module or parameter -> theirs, {i} the layer, without the prefix of the module.
NAMES = {
    "audio": {
        "conv1": "conv1",
        "conv2": "conv2",
        "blocks.{i}.attention_norm": "layers.{i}.self_attn_layer_norm",
        "blocks.{i}.attention.q": "layers.{i}.self_attn.q_proj",
        "blocks.{i}.attention.k": "layers.{i}.self_attn.k_proj",
        "blocks.{i}.attention.v": "layers.{i}.self_attn.v_proj",
        "blocks.{i}.attention.o": "layers.{i}.self_attn.out_proj",
        "blocks.{i}.ffn_norm": "layers.{i}.final_layer_norm",
        "blocks.{i}.up": "layers.{i}.fc1",
        "blocks.{i}.down": "layers.{i}.fc2",
        "norm": "layer_norm",
    }
}
PREFIXES = {"audio": ["model.encoder.", "encoder.", ""]}
SINUSOIDS = "embed_positions.weight"  # a table in files; we compute it
SKIPPED = {
    "audio": [
        (r"embed_positions\.weight", "fixed sinusoids, computed"),
        (r"(model\.)?decoder\.|proj_out\.", "Whisper's decoder"),
    ]
}

PROCESSOR_FILES = ()
# The same as in avlm.models.log_mel, which computes them.
SAMPLE_RATE, HOP, FFT = 16_000, 160, 400  # Hz, samples, samples


def read(given: Mapping[str, Any], files: Mapping[str, dict]) -> AudioConfig:
    keys = {**DEFAULTS, **given}
    require_accepted(keys, ACCEPTED)
    return AudioConfig(**to_ours(FIELDS, keys))


def write_processor(config: AudioConfig, frames: int) -> dict[str, Any]:
    """preprocessor_config.json of a feature extractor that pads a clip to ``frames``."""
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": config.num_mels,
        "sampling_rate": SAMPLE_RATE,
        "hop_length": HOP,
        "n_fft": FFT,
        "chunk_length": frames * HOP // SAMPLE_RATE,
        "n_samples": frames * HOP,
        "nb_max_frames": frames,
        "padding_value": 0.0,
        "return_attention_mask": False,
    }

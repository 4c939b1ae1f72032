"""Parakeet: its FastConformer encoder is an audio tower of ours. The heads that write text (CTC, RNN-T, TDT) are not
loaded, and what NeMo itself writes (.nemo, pickles) is not read: transformers' folders are.

A batch norm is a scale and a shift here (``avlm.models.conformer``), and convolutions over one row are linears:
``avlm.weights.conformer`` has their tensors in either direction.
"""

from collections.abc import Mapping
from typing import Any

from avlm.config.model import AudioConfig
from avlm.config.values import shown
from avlm.families.keys import require_accepted, to_ours, to_theirs

MODEL_TYPES = ("parakeet_encoder", "parakeet_ctc", "parakeet_rnnt", "parakeet_tdt")
TOWER: dict[str, Any] = {  # what no key tells
    **{"block": "conformer", "stem": "depthwise", "mel": "nemo", "log_mel": "clip", "edge": "masked"},
}
# our field -> their key
FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_mels": "num_mel_bins",
    "max_positions": "max_position_embeddings",
    "stem_width": "subsampling_conv_channels",
    "conv_kernel": "conv_kernel_size",
    "bias": "attention_bias",
    "conv_bias": "convolution_bias",
    "scale_input": "scale_input",
}
# A config.json may leave out the keys that equal the defaults of its class.
DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_mel_bins": 80,
    "max_position_embeddings": 5000,
    "subsampling_conv_channels": 256,
    "conv_kernel_size": 9,
    "attention_bias": True,
    "convolution_bias": True,
    "scale_input": True,
}
ACCEPTED = {
    "hidden_act": ("silu",),
    "subsampling_factor": (8,),
    "subsampling_conv_kernel_size": (3,),
    "subsampling_conv_stride": (2,),
    "quantization_config": (None,),
}
CLASS = "ParakeetEncoder"

# Our module or parameter -> theirs, {i} the layer, without the prefix of the module.
BLOCK = {
    "ffn1_norm": "norm_feed_forward1",
    "ffn1.up": "feed_forward1.linear1",
    "ffn1.down": "feed_forward1.linear2",
    "attention_norm": "norm_self_att",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.relative": "self_attn.relative_k_proj",
    "attention.o": "self_attn.o_proj",
    "attention.bias_u": "self_attn.bias_u",
    "attention.bias_v": "self_attn.bias_v",
    "conv_norm": "norm_conv",
    "conv.expand": "conv.pointwise_conv1",
    "conv.depthwise": "conv.depthwise_conv",
    "conv.scale": "conv.norm.weight",
    "conv.shift": "conv.norm.bias",
    "conv.project": "conv.pointwise_conv2",
    "ffn2_norm": "norm_feed_forward2",
    "ffn2.up": "feed_forward2.linear1",
    "ffn2.down": "feed_forward2.linear2",
    "norm": "norm_out",
}
NAMES = {
    "audio": {
        "stem_out": "subsampling.linear",
        "conv1": "subsampling.layers.0",
        "conv2": "subsampling.layers.2",
        "point2": "subsampling.layers.3",
        "conv3": "subsampling.layers.5",
        "point3": "subsampling.layers.6",
        **{f"blocks.{{i}}.{ours}": f"layers.{{i}}.{theirs}" for ours, theirs in BLOCK.items()},
    }
}
PREFIXES = {"audio": ["", "encoder."]}
SKIPPED = {
    "audio": [
        (r"layers\.\d+\.conv\.norm\.num_batches_tracked", "counters of batch norms"),
        (r"ctc_head\.|decoder\.|joint\.|encoder_projector\.", "heads that write text"),
    ]
}
BATCH_NORM_EPS = 1e-5

PROCESSOR_FILES = ()


def read(given: Mapping[str, Any], files: Mapping[str, dict]) -> AudioConfig:
    keys = given
    if given["model_type"] != "parakeet_encoder":
        keys = given.get("encoder_config") or {}
        if not isinstance(keys, Mapping):
            raise ValueError(f"encoder_config must be an object, not {shown(repr(keys))}")
    keys = {**DEFAULTS, **{key: value for key, value in keys.items() if value is not None}}
    require_accepted(keys, ACCEPTED)
    return AudioConfig(**to_ours(FIELDS, keys), **TOWER)


def config_json(config: AudioConfig) -> dict[str, Any]:
    """ValueError for a tower that the format cannot hold."""
    keys = {"architectures": [CLASS], "model_type": "parakeet_encoder", **to_theirs(FIELDS, config)}
    keys |= {key: values[0] for key, values in ACCEPTED.items() if values[0] is not None}
    back = read(keys, {})
    for field, value in vars(back).items():
        ours = getattr(config, field)
        if ours != value and field not in ("log_mel", "stem_frames"):
            raise ValueError(f"the parakeet format cannot hold audio.{field}={ours}, only {value}")
    return keys


def processor_json(config: AudioConfig) -> dict[str, dict[str, Any]]:
    """File name -> keys."""
    keys = {
        "feature_extractor_type": "ParakeetFeatureExtractor",
        "feature_size": config.num_mels,
        "sampling_rate": 16_000,
        "hop_length": 160,
        "n_fft": 512,
        "win_length": 400,
        "preemphasis": 0.97,
        "padding_value": 0.0,
        "padding_side": "right",
        "return_attention_mask": True,
    }
    return {"preprocessor_config.json": keys}

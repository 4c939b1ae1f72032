"""Gemma 2 and the text model of Gemma 3: two more norms in a block. Their keys stand in gemma.py."""

from collections.abc import Mapping
from typing import Any

from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.families import gemma, llama
from avlm.families.llama import Constants

MODEL_TYPES = ("gemma2", "gemma3_text")
read = gemma.read

# The first is the norm that only these have: by it a file of tensors is told from Llama's.
NAMES = {
    "decoder": {
        "blocks.{i}.ffn_norm": "layers.{i}.pre_feedforward_layernorm",
        **{ours: theirs for ours, theirs in llama.NAMES["decoder"].items() if ours != "blocks.{i}.ffn_norm"},
        "blocks.{i}.attention_post_norm": "layers.{i}.post_attention_layernorm",
        "blocks.{i}.ffn_post_norm": "layers.{i}.post_feedforward_layernorm",
    }
}
PREFIXES = llama.PREFIXES
HEAD = llama.HEAD
CLASS = llama.CLASS
LOADED = llama.LOADED
SKIPPED = llama.SKIPPED
SINUSOIDS: dict[str, str] = {}
PROJECTORS: dict[str, tuple[str, ...]] = {}

PROCESSOR_FILES = ()
MEDIA: dict[str, str] = {}
MEDIA_TOKENS: tuple[str, ...] = ()
TIES_HEAD = True


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """config.json of the decoder alone. Towers are left out."""
    if not config.decoder.post_norms:
        raise ValueError("the gemma2 format cannot hold decoder.post_norms=False: take gemma")
    return gemma.text_config(config.decoder)


def processor_json(config: ModelConfig, data: DataConfig | None) -> dict[str, dict[str, Any]]:
    return {}


def constants(config: ModelConfig) -> Constants:
    return {}

"""PaliGemma 2: Gemma 2 with SigLIP and one linear. All but the names of its tensors stands in paligemma.py."""

from collections.abc import Mapping
from typing import Any

from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.families import gemma2, paligemma

MODEL_TYPES = ()  # its config.json has that of the first
FORMAT = "paligemma2"
NAMES = {**paligemma.NAMES, **gemma2.NAMES}
PREFIXES = paligemma.PREFIXES
HEAD = paligemma.HEAD
CLASS = paligemma.CLASS
LOADED = paligemma.LOADED
SKIPPED = paligemma.SKIPPED
SINUSOIDS = paligemma.SINUSOIDS
PROJECTORS = paligemma.PROJECTORS
PROCESSOR_FILES = paligemma.PROCESSOR_FILES
MEDIA = paligemma.MEDIA
MEDIA_TOKENS = paligemma.MEDIA_TOKENS
TIES_HEAD = True
read = paligemma.read
constants = paligemma.constants
processor_json = paligemma.processor_json
text_template = paligemma.text_template


def config_json(config: ModelConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Raises ValueError for a model that the format cannot hold."""
    return paligemma.write_model(config, ids, FORMAT, has_post_norms=True)


def prompt_keys(config: ModelConfig, data: DataConfig) -> dict[str, Any]:
    """What config.json says about prompts: nothing."""
    paligemma.require_prompts(FORMAT, data)
    return {}

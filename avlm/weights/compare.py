"""Whether our config and that of a source describe the same model."""

import dataclasses
from pathlib import Path
from typing import Any

from avlm.config.codec import CodecConfig
from avlm.config.connector import CrossConfig
from avlm.config.contrastive import ContrastiveConfig
from avlm.config.decoder import DecoderConfig
from avlm.config.model import AudioConfig, ModelConfig, ProjectorConfig, VisionConfig, VisionParts
from avlm.families.door import AnyConfig

NOT_COMPARED = {
    DecoderConfig: ("max_position",),
    VisionConfig: ("resample",),
    AudioConfig: ("window", "log_mel", "edge"),
    # Where random values begin, and what weighs a loss.
    ProjectorConfig: ("output_std",),
    CrossConfig: ("first_gate",),
    ContrastiveConfig: ("initial_scale", "initial_bias", "max_scale"),
    CodecConfig: ("text_weight", "audio_weight"),
}


def check_config(ours: AnyConfig, theirs: AnyConfig, origin: str | Path) -> None:
    """Raise ValueError with every key where our config describes a different model from ``theirs``, that of ``origin``.

    Two whole models are compared in the modules that both have, and must build the same number of vision layers. Not
    compared: ``max_position`` (ours may be shorter), what the audio tower is shown of a clip (``window``, ``log_mel``,
    ``edge``), ``resample``, where random values begin, weights of losses, and how an image is made a square; for a
    decoder alone M-RoPE, as text has one number on all axes; for a tower alone ``feature_layer``, ``deepstack_layers``,
    ``post_norm`` and ``pool``, which choose what we take from it, and ``max_positions``, as its positions are computed;
    where the other decoder is none of ours, what a projector does behind its resampler.
    """
    part = {DecoderConfig: "decoder", VisionConfig: "vision", AudioConfig: "audio", ModelConfig: "all"}[type(ours)]
    if part != "all" and isinstance(theirs, ModelConfig | VisionParts):
        theirs = getattr(theirs, part, None)
    is_whole = isinstance(ours, ModelConfig) and isinstance(theirs, ModelConfig | VisionParts)
    if type(ours) is not type(theirs) and not is_whole:
        found = "none" if theirs is None else f"a {type(theirs).__name__}"
        raise ValueError(f"{origin} holds {found}, not the {type(ours).__name__} that is needed")
    pairs = {part: (ours, theirs)}
    owners: tuple[ModelConfig | None, ModelConfig | None] = (None, None)
    if isinstance(ours, ModelConfig) and isinstance(theirs, ModelConfig | VisionParts):
        shared = [module for module in theirs.modules if getattr(ours, module) is not None]
        pairs = {module: (getattr(ours, module), getattr(theirs, module)) for module in shared}
        owners = (ours, theirs if isinstance(theirs, ModelConfig) else ours)
        if isinstance(theirs, VisionParts) and ours.vision_projector is not None:
            same = dataclasses.replace(ours.vision_projector, resampler=theirs.vision_projector.resampler)
            pairs["vision_projector"] = (ours.vision_projector, same)
    found = []
    for module, (mine, other) in pairs.items():
        found += _differences(module, _comparable(mine, owners[0]), _comparable(other, owners[1]))
        if module == "decoder" and mine.max_position > other.max_position:
            found.append(("decoder.max_position", mine.max_position, other.max_position))
    if found:
        listed = "; ".join(f"model.{key} is {value!r}, and there {wanted!r}" for key, value, wanted in found)
        raise ValueError(f"{origin} was made with different sizes: {listed}")


def _differences(module: str, ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, ours, theirs) of each value that differs. Of a config within it, of each of its own."""
    found = []
    for key, value in ours.items():
        other = theirs.get(key, value)  # a linear projector has no hidden_size: its type differs already
        if dataclasses.is_dataclass(value) and type(value) is type(other):
            found += _differences(f"{module}.{key}", vars(value), vars(other))
        elif value != other:
            found.append((f"{module}.{key}", value, other))
    return found


def _comparable(config: Any, owner: ModelConfig | None) -> dict[str, Any]:
    """The values of a module that have to agree. ``owner``: the whole model that it is a part of."""
    values = {}
    for field in dataclasses.fields(config):
        if field.name not in NOT_COMPARED.get(type(config), ()):
            values[field.name] = getattr(config, field.name)
    if isinstance(config, DecoderConfig) and owner is None:
        del values["mrope_sections"], values["mrope_interleaved"]
    if isinstance(config, VisionConfig):
        values["resize"] = "area" if config.any_grid else "to a square"
        del values["feature_layer"]
        if owner is None:
            del values["post_norm"], values["deepstack_layers"]
        else:
            values["num_layers"] = config.num_blocks
    if isinstance(config, AudioConfig) and owner is None:
        del values["pool"], values["max_positions"]
    if isinstance(config, ProjectorConfig):
        values["hidden_size"] = config.hidden_size or owner.decoder.hidden_size
        if config.type == "linear":
            del values["hidden_size"]
    return values

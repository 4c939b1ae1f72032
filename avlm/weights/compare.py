"""Whether our config and that of a source describe the same model."""

import dataclasses
from pathlib import Path
from typing import Any

from avlm.config.model import AudioConfig, DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig
from avlm.families.door import AnyConfig

NOT_COMPARED = ("max_position", "window", "resize", "resample")


def check_config(ours: AnyConfig, theirs: AnyConfig, origin: str | Path) -> None:
    """Raise ValueError with the key where our config describes a different model from ``theirs``, that of ``origin``.

    Two whole models are compared in the modules that both have. Not compared: ``max_position`` (ours may be shorter),
    ``window``, ``resize``, ``resample``, and for a tower alone ``feature_layer`` and ``post_norm``, which choose what
    we take from it. Two whole models must build the same number of vision layers.
    """
    part = {DecoderConfig: "decoder", VisionConfig: "vision", AudioConfig: "audio", ModelConfig: "all"}[type(ours)]
    if part != "all" and isinstance(theirs, ModelConfig):
        theirs = getattr(theirs, part)
    if type(ours) is not type(theirs):
        found = "none" if theirs is None else f"a {type(theirs).__name__}"
        raise ValueError(f"{origin} holds {found}, not the {type(ours).__name__} that is needed")
    if part != "all":
        _check_module(part, _comparable(ours, None), _comparable(theirs, None), origin)
        _check_length(ours, theirs, origin)
        return
    for module in theirs.modules:
        if getattr(ours, module) is not None:
            mine = _comparable(getattr(ours, module), ours)
            other = _comparable(getattr(theirs, module), theirs)
            _check_module(module, mine, other, origin)
    _check_length(ours.decoder, theirs.decoder, origin)


def _check_module(module: str, ours: dict[str, Any], theirs: dict[str, Any], origin: str | Path) -> None:
    for key, value in ours.items():
        if value != theirs[key]:
            raise ValueError(f"model.{module}.{key} is {value!r}, and {origin} was made with {theirs[key]!r}")


def _check_length(ours: AnyConfig, theirs: AnyConfig, origin: str | Path) -> None:
    if isinstance(ours, DecoderConfig) and ours.max_position > theirs.max_position:
        raise ValueError(
            f"model.decoder.max_position is {ours.max_position}, and {origin} was made for {theirs.max_position}"
        )


def _comparable(config: Any, owner: ModelConfig | None) -> dict[str, Any]:
    """The values of a module that have to agree. ``owner``: the whole model that it is a part of."""
    values = {}
    for field in dataclasses.fields(config):
        if field.name not in NOT_COMPARED:
            values[field.name] = getattr(config, field.name)
    if isinstance(config, VisionConfig):
        del values["feature_layer"]
        if owner is None:
            del values["post_norm"]
        else:
            values["num_layers"] = config.num_blocks
    if isinstance(config, ProjectorConfig):
        values["hidden_size"] = config.hidden_size or owner.decoder.hidden_size
        if config.type == "linear":
            del values["hidden_size"]
    return values

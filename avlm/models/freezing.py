"""What a stage trains, parameter by parameter.

    train                       modules by name, a tower with its adapters; "lora" is the adapters of all towers
    freeze_language_model ...   NeMo's five flags instead: they freeze modules, and everything else trains, adapters too
    freeze_params               then SALM's lists of regular expressions, matched from the start of a parameter's name:
    prevent_freeze_params       the first freezes what matches, never adapters; the second makes it train after all

A frozen parameter has no gradient and no optimizer state.
"""

import difflib
import re
from collections.abc import Collection

from avlm.config.contrastive import ALIGNMENT
from avlm.config.model import MODULES, ModelConfig
from avlm.config.run import FREEZE_FLAGS, StageConfig
from avlm.config.values import shown
from avlm.models.avlm import AVLM
from avlm.models.lora import collapse, frozen_base, is_adapter
from avlm.models.shapes import Shapes


def freeze(model: AVLM, stage: StageConfig) -> list[str]:
    """Require gradients of the parameters that the stage trains, and of no others. Returns the modules that train,
    "lora" for adapters."""
    trained = trained_names(stage, model.config, [name for name, _ in model.named_parameters()])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return parts_of(trained)


def parts_of(names: Collection[str]) -> list[str]:
    """The modules that parameters belong to, "lora" for adapters."""
    parts = {"lora" if is_adapter(name) else name.split(".")[0] for name in names}
    return [part for part in (*MODULES, *ALIGNMENT, "lora") if part in parts]


def trained_names(stage: StageConfig, model: ModelConfig, names: Collection[str]) -> set[str]:
    """The parameters among ``names`` that a stage trains. Raises ValueError for a stage that cannot be run."""
    trained = {name for name in names if _is_chosen(name, stage)}
    for pattern in stage.freeze_params:
        found = matching(pattern, f"stage {stage.name}: freeze_params", names)
        trained -= {name for name in found if not is_adapter(name)}
    for pattern in stage.prevent_freeze_params:
        trained |= set(matching(pattern, f"stage {stage.name}: prevent_freeze_params", names))
    trained = {name for name in trained if name.split(".")[0] not in stage.idle}
    if not trained:
        raise ValueError(f"stage {stage.name} trains nothing: every parameter is frozen")
    if model.lora and model.lora.base == "bf16":
        refused = sorted(trained & frozen_base(names))
        if refused:
            raise ValueError(
                f"stage {stage.name} trains {refused[0]} and {len(refused) - 1} more of a tower with adapters, which "
                "model.lora.base=bf16 holds without float32: set it to fp32, or train lora and not the tower"
            )
    return trained


def _is_chosen(name: str, stage: StageConfig) -> bool:
    module = name.split(".")[0]
    if stage.train is not None:
        if is_adapter(name) and "lora" in stage.train:
            return True
        return module in stage.train
    if is_adapter(name):
        return True
    frozen = {module for flag, module in FREEZE_FLAGS.items() if getattr(stage, flag)}
    return module not in frozen


def matching(pattern: str, key: str, names: Collection[str], what: str = "parameter") -> list[str]:
    """The names that a regular expression matches from their start; ValueError for none. ``key`` is where the config
    holds it."""
    try:
        found = [name for name in names if re.match(pattern, name)]
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{key} holds {shown(repr(pattern))}, which is not a regular expression: {error}") from None
    if not found:
        known = sorted({collapse(name) for name in names})
        plain = re.sub(r"[\\^$+?()\[\]|]", "", pattern)
        near = difflib.get_close_matches(plain, known, n=4, cutoff=0.3) or known[:8]
        raise ValueError(
            f"{key} holds {shown(repr(pattern))}, which matches no {what}; the nearest are {shown(near, 400)}"
        )
    return found


def trained_shapes(stage: StageConfig, model: ModelConfig, shapes: Shapes) -> Shapes:
    return {name: shapes[name] for name in trained_names(stage, model, shapes)}

"""The decoder's adapters as a PEFT folder, adapter_model.safetensors and adapter_config.json, in and out."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from avlm.config.model import ModelConfig, shown
from avlm.config.run import Config
from avlm.families.door import hugging_face_name
from avlm.models.freezing import trained_names
from avlm.models.lora import is_adapter
from avlm.storage.model_folder import read_json
from avlm.storage.weight_files import ADAPTER, choose
from avlm.weights.folder import resolve
from avlm.weights.sources import Source, read_files

LEAVES = {"down.weight": "lora_A.weight", "up.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
# What of PEFT we do not compute, and the values under which there is none of it; the first is the default.
ACCEPTED = {"peft_type": ("LORA",), "bias": ("none",), "fan_in_fan_out": (False,), "lora_bias": (False,)}
ACCEPTED |= {"init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}  # the others change the base
ABSENT = "rank_pattern alpha_pattern modules_to_save trainable_token_indices target_parameters layer_replication"
ABSENT += " alora_invocation_tokens use_qalora use_bdlora arrow_config kasa_config monteclora_config"
ACCEPTED |= dict.fromkeys(ABSENT.split(), (None, False, {}, []))


def peft_names(names: Iterable[str]) -> dict[str, str]:
    """Our names of the decoder's adapters among ``names`` -> PEFT's."""
    found = {}
    for name in names:
        if name.startswith("decoder.") and is_adapter(name):
            path, _, part = name.removeprefix("decoder.").partition(".lora_")
            found[name] = f"{PREFIX}model.{hugging_face_name('decoder', path)}.{LEAVES[part]}"
    return found


def open_adapter(given: str | Path, config: ModelConfig, names: Iterable[str]) -> Source:
    """A PEFT folder under our ``names``; ValueError where it computes something else than ``config``."""
    folder = resolve(given)
    if not (folder / CONFIG).is_file() or not any((folder / name).is_file() for name in ADAPTER):
        raise FileNotFoundError(f"{folder} is no PEFT folder: it wants {CONFIG} and {' or '.join(ADAPTER)}")
    ours = {theirs: name for name, theirs in peft_names(names).items()}
    if config.lora is None or not ours:
        raise ValueError(f"init_from.adapter is {str(given)!r}, and the decoder has no adapters (model.lora)")
    keys = read_json(folder / CONFIG)
    for key, values in ACCEPTED.items():
        if keys.get(key, values[0]) not in values:
            raise ValueError(f"{folder / CONFIG}: {key}={shown(repr(keys[key]))} is not implemented")
    for name, theirs, default in (
        ("rank", "r", 8),
        ("alpha", "lora_alpha", 8),
        ("rslora", "use_rslora", False),
        ("dora", "use_dora", False),
    ):
        if keys.get(theirs, default) != getattr(config.lora, name):
            raise ValueError(
                f"model.lora.{name} is {getattr(config.lora, name)!r}, and {folder} was made with "
                f"{theirs}={shown(repr(keys.get(theirs, default)))}"
            )
    files = choose(folder, ADAPTER)
    tensors = read_files(folder, files)
    return Source(folder, {ours.get(name, name): tensor for name, tensor in tensors.items()}, None, True, files)


def adapter_keys(config: ModelConfig, names: Iterable[str], base: str | None) -> dict[str, Any]:
    """adapter_config.json of the adapters ``names``, on the decoder ``base``."""
    found = peft_names(names).values()
    targets = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in found}
    leaves = {target.rpartition(".")[2] for target in targets}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": config.lora.dropout,
        "use_rslora": config.lora.rslora,
        "use_dora": config.lora.dora,
        "target_modules": sorted(leaves if len(targets) == len(leaves) * config.decoder.num_layers else targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def left_behind(config: Config, names: Collection[str]) -> list[str]:
    """Modules, and adapters of them, that a PEFT folder lacks of a run's parameters ``names``: all but the decoder's
    adapters, and a decoder that no stage trains, as it is the base."""
    trained = set().union(*(trained_names(stage, config.model, names) for stage in config.stages))
    beside = trained - peft_names(names).keys()
    left = [name for name in names if not name.startswith("decoder.") or name in beside]
    parts = [(name.partition(".")[0], is_adapter(name)) for name in left]
    return [f"adapters of {module}" if adapters else module for module, adapters in dict.fromkeys(parts)]

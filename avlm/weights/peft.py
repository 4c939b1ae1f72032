"""The decoder's adapters as a PEFT folder, adapter_model.safetensors and adapter_config.json, in and out."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from avlm.config.model import ModelConfig, shown
from avlm.config.run import Config
from avlm.families.door import hugging_face_name
from avlm.families.keys import require_accepted
from avlm.models.freezing import trained_names
from avlm.models.lora import is_adapter
from avlm.storage.model_folder import read_json
from avlm.storage.weight_files import ADAPTER, choose
from avlm.weights.folder import resolve
from avlm.weights.sources import Source, read_files

LEAVES = {"down.weight": "lora_A.weight", "up.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
FIELDS = {"rank": ("r", 8), "alpha": ("lora_alpha", 8)}  # our field of LoraConfig -> their key and its default
FIELDS |= {"rslora": ("use_rslora", False), "dora": ("use_dora", False)}
# PEFT options that we do not implement, with the values that disable them (default first).
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
            theirs = hugging_face_name("decoder", path)
            found[name] = f"{PREFIX}model.{theirs}.{LEAVES[part]}"
    return found


def open_adapter(given: str | Path, config: ModelConfig, names: Iterable[str]) -> Source:
    """A PEFT folder under our ``names``; ValueError where it computes something different from ``config``."""
    folder = resolve(given)
    if not (folder / CONFIG).is_file() or not any((folder / name).is_file() for name in ADAPTER):
        raise FileNotFoundError(f"{folder} is not a PEFT folder: it must hold {CONFIG} and {' or '.join(ADAPTER)}")
    ours = {theirs: name for name, theirs in peft_names(names).items()}
    if config.lora is None or not ours:
        raise ValueError(f"init_from.adapter is {str(given)!r}, and the decoder has no adapters (model.lora)")
    keys = read_json(folder / CONFIG)
    try:
        require_accepted(keys, ACCEPTED)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    for field, (key, default) in FIELDS.items():
        value, theirs = getattr(config.lora, field), keys.get(key, default)
        if theirs != value:
            raise ValueError(f"model.lora.{field} is {value!r}, and {folder} was made with {key}={shown(repr(theirs))}")
    files = choose(folder, ADAPTER)
    tensors = {}
    for name, tensor in read_files(folder, files).items():
        tensors[ours.get(name, name)] = tensor
    return Source(folder, tensors, None, True, files)


def adapter_keys(config: ModelConfig, names: Iterable[str], base: str | None) -> dict[str, Any]:
    """adapter_config.json of the adapters ``names``, on the decoder ``base``."""
    targets, leaves = set(), set()
    for name in peft_names(names).values():
        target = name.removeprefix(PREFIX).rpartition(".lora_")[0]
        targets.add(target)
        leaves.add(target.rpartition(".")[2])
    in_every_layer = len(targets) == len(leaves) * config.decoder.num_layers
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        **{key: getattr(config.lora, field) for field, (key, _) in FIELDS.items()},
        "lora_dropout": config.lora.dropout,
        "target_modules": sorted(leaves if in_every_layer else targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def left_behind(config: Config, names: Collection[str]) -> list[str]:
    """The modules, and adapters of modules, among a run's parameters ``names`` that a PEFT folder lacks: everything
    except the decoder's adapters, and except a decoder that no stage trains, because that is the base."""
    trained: set[str] = set()
    for stage in config.stages:
        trained |= trained_names(stage, config.model, names)
    held = peft_names(names)
    left = []
    for name in names:
        module = name.partition(".")[0]
        if module != "decoder" or (name in trained and name not in held):
            left.append(f"adapters of {module}" if is_adapter(name) else module)
    return list(dict.fromkeys(left))

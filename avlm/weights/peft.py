"""Adapters as a PEFT folder, adapter_model.safetensors and adapter_config.json, in and out."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from avlm.config.model import ModelConfig
from avlm.config.run import Config
from avlm.config.values import shown
from avlm.families.door import (
    FAMILIES,
    FORMATS,
    TEXT_FORMATS,
    family_of,
    has_name,
    hugging_face_name,
    is_outside,
    shares_tensor,
)
from avlm.families.keys import require_accepted
from avlm.models.freezing import trained_names
from avlm.models.lora import is_adapter
from avlm.storage.hub import resolve
from avlm.storage.model_folder import read_json
from avlm.storage.run_folder import is_run
from avlm.storage.weight_files import ADAPTER, choose, local
from avlm.weights.folder import is_own
from avlm.weights.sources import Source, in_our_order, read_files

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


@dataclass(frozen=True)
class Base:
    """The model that adapters belong to."""

    format: str = "decoder"  # a key of FORMATS, which says what its class calls its modules
    name: str | None = None  # its folder or Hub name, None if it has none
    whole: tuple[str, ...] = ()  # the projectors that the run changed, which the folder of the adapters holds whole


def base_of(config: Config, names: Collection[str], format: str | None, name: str | None) -> Base:
    """The base of a run's adapters, among its parameters ``names``.

    ``format`` and ``name`` are what the user asked for. By default the base is what the model as a whole is: one of
    a family, or a decoder. Raises ValueError where it cannot be that, or where a folder of adapters could not hold what
    the run has trained.
    """
    if not any(is_adapter(each) for each in names):
        raise ValueError("the adapter format holds adapters, and the model has none (model.lora is null)")
    instead = "--format avlm writes everything with adapters merged"
    if format not in TEXT_FORMATS:
        alone = next((each for each in TEXT_FORMATS if _obstacle(each, config.model) is None), "decoder")
        instead = f"--onto {alone} writes the adapters of the decoder alone, {instead}"
    if format is None:
        format = _format_of(config, instead)
    elif reason := _obstacle(format, config.model):
        raise ValueError(f"the base of the adapters cannot be a {format}: {reason}; {instead}")
    held = FORMATS[format].LOADED
    trained: set[str] = set()
    for stage in config.stages:
        trained |= trained_names(stage, config.model, names)
    for each in sorted(trained):
        module = each.partition(".")[0]
        if module in held and not is_adapter(each) and not module.endswith("_projector"):
            raise ValueError(
                f"the run trains {module} itself ({each}), not just adapters on it, and a folder of adapters cannot "
                f"hold that: --format {format} writes the whole model with its adapters merged"
            )
    own = _published(config, format)
    for each in names:
        is_projector = not is_adapter(each) and each.partition(".")[0].endswith("_projector")
        if is_projector and not held_whole(each) and (each in trained or own is None):
            raise ValueError(
                f"{each} is trained or not that of a base, and a folder of adapters cannot hold what is no module of "
                f"transformers: freeze it by freeze_params, or --format {format} writes the whole model"
            )
    is_of_base = own is not None and config.init_from.adapter is None  # a folder of adapters may have brought another
    whole = []
    for module in held:
        is_changed = not is_of_base or any(each.startswith(f"{module}.") for each in trained)
        if module.endswith("_projector") and is_changed:
            whole.append(module)
    return Base(format, name or own, tuple(whole))


def _format_of(config: Config, instead: str) -> str:
    """The format of the folder that a run began with, or the first that holds exactly the modules of its model.
    ValueError with what keeps it out of each."""
    model, own = config.model, _family_of_start(config)
    obstacles = {}
    for format, family in sorted(FORMATS.items(), key=lambda each: each[1] is not own):
        if set(family.LOADED) == set(model.modules):
            obstacles[format] = _obstacle(format, model)
            if obstacles[format] is None:
                return format
    listed = ", nor ".join(f"a {format}: {reason}" for format, reason in obstacles.items())
    raise ValueError(f"the base of the adapters cannot be {listed}; {instead}")


def _family_of_start(config: Config) -> ModuleType | None:
    """None if it did not begin with one model of Hugging Face that lies here."""
    name = config.init_from.all
    path = None if name is None else local(name) / "config.json"
    if path is None or not path.is_file():
        return None
    keys = read_json(path)
    return None if is_own(keys) else family_of(keys)


def _obstacle(format: str, model: ModelConfig) -> str | None:
    """Why a format cannot hold a model on which PEFT can put adapters, or None."""
    if FORMATS[format].CLASS is None:
        return "transformers has no class for it"
    try:
        FORMATS[format].config_json(replace(model, lora=None), dict.fromkeys(FORMATS[format].MEDIA_TOKENS, 0))
    except ValueError as error:
        return str(error)
    return None


def _published(config: Config, format: str) -> str | None:
    """What ``init_from`` names, if that is one model of this format which transformers can load."""
    init_from = config.init_from
    parts = [part for part in FORMATS[format].LOADED if getattr(init_from, part, None) is not None]
    if format in TEXT_FORMATS and (parts or config.model.modalities):
        name = init_from.decoder
    else:
        name = None if parts else init_from.all
    if name is None:
        return None
    path = local(name)
    is_ours = is_run(path) or path.is_file()
    if (path / "config.json").is_file():
        is_ours = is_own(read_json(path / "config.json"))
    return None if is_ours else name


def peft_names(names: Iterable[str], base: Base) -> dict[str, str]:
    """Our names of what a folder of adapters holds, among ``names`` -> PEFT's."""
    family = FORMATS[base.format]
    found = {}
    for name in names:
        module = name.partition(".")[0]
        if module in family.LOADED and (is_adapter(name) or (module in base.whole and held_whole(name))):
            found[name] = _peft_name(family, name, family.LOADED[module])
    return found


def held_whole(name: str) -> bool:
    """Whether a folder of adapters can hold our parameter as it is: one of a projector, in a module of transformers."""
    module, _, rest = name.partition(".")
    known = [family for family in FAMILIES if has_name(family, module, rest)]
    return module.endswith("_projector") and not any(is_outside(family, module, rest) for family in known)


def _peft_name(family: ModuleType, name: str, prefix: str) -> str:
    module, _, rest = name.partition(".")
    if not is_adapter(name):
        return f"{PREFIX}{prefix}{hugging_face_name(family, module, rest)}"
    path, _, part = rest.partition(".lora_")
    theirs = hugging_face_name(family, module, path)
    if module != "decoder" and not path.startswith("blocks."):
        raise ValueError(f"{module}.{path} is a convolution in transformers, whose adapters have another form")
    if shares_tensor(family, module, path):
        raise ValueError(
            f"{module}.{path} has adapters, and in transformers it is a part of {theirs}, whose adapters have another "
            "form: a format of whole models merges them"
        )
    return f"{PREFIX}{prefix}{theirs}.{LEAVES[part]}"


def open_adapter(given: str | Path, config: ModelConfig, names: Iterable[str]) -> Source:
    """A PEFT folder under our ``names``, whatever class of ``avlm.families`` it belongs to; ValueError where it
    computes something different from ``config``."""
    folder = resolve(given)
    if not (folder / CONFIG).is_file() or not any((folder / name).is_file() for name in ADAPTER):
        raise FileNotFoundError(f"{folder} is not a PEFT folder: it must hold {CONFIG} and {' or '.join(ADAPTER)}")
    if config.lora is None:
        raise ValueError(f"init_from.adapter is {str(given)!r}, and the model has no adapters (model.lora is null)")
    keys = read_json(folder / CONFIG)
    try:
        _require_known(keys, config)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    for field, (key, default) in FIELDS.items():
        value, theirs = getattr(config.lora, field), keys.get(key, default)
        if theirs != value:
            raise ValueError(f"model.lora.{field} is {value!r}, and {folder} was made with {key}={shown(repr(theirs))}")
    ours = {}
    families: dict[str, ModuleType] = {}
    for name in names:
        for family in FAMILIES:
            found = _peft_names_in(family, name)
            ours |= found
            families |= dict.fromkeys(found, family)
    files = choose(folder, ADAPTER)
    tensors = {}
    for name, tensor in read_files(folder, files).items():
        own = ours.get(name, name)
        tensors[own] = in_our_order(tensor, families[name], own) if name in ours else tensor
    return Source(folder, tensors, None, True, files)


def _peft_names_in(family: ModuleType, name: str) -> dict[str, str]:
    """PEFT's names for a parameter of ours in a family -> ours; none for what its folders of adapters cannot hold."""
    module, _, rest = name.partition(".")
    path = rest.partition(".lora_")[0]
    is_held = path.startswith("blocks.") if is_adapter(name) else held_whole(name)
    if not is_held or not has_name(family, module, path) or (is_adapter(name) and shares_tensor(family, module, path)):
        return {}
    return {_peft_name(family, name, prefix): name for prefix in family.PREFIXES[module]}


def _require_known(keys: dict[str, Any], config: ModelConfig) -> None:
    """ValueError for options of PEFT that we do not implement. Of whole modules only a projector is."""
    saved = keys.get("modules_to_save")
    if isinstance(saved, list) and saved:
        meant = [_projectors_called(str(name), config) for name in saved]
        if any(len(modules) > 1 for modules in meant):
            raise ValueError("it holds a projector (modules_to_save), and the model has two that it could be")
        if all(meant):
            keys = {**keys, "modules_to_save": None}
    require_accepted(keys, ACCEPTED)


def _projectors_called(name: str, config: ModelConfig) -> set[str]:
    """The projectors of a model that PEFT's name of a module may mean."""
    found = set()
    for family in FORMATS.values():
        for module, theirs in family.PROJECTORS.items():
            known = "|".join(re.escape(each).replace(r"\{i\}", r"\d+") for each in theirs)
            if getattr(config, module) is not None and re.fullmatch(rf"(.*\.)?({known})", name):
                found.add(module)
    return found


def adapter_keys(config: ModelConfig, names: Iterable[str], base: Base) -> dict[str, Any]:
    """adapter_config.json of the adapters ``names``. ValueError for adapters that PEFT would not put where ours are."""
    decoder = config.decoder
    for name in names:
        layer = re.fullmatch(r"decoder\.blocks\.(\d+)\.ffn\.(gate|up|down)\.lora_\w+(\.weight)?", name)
        if layer and decoder.experts is not None and not decoder.has_experts(int(layer[1])):
            raise ValueError(
                f"{name}: beside experts PEFT reads adapters of dense layers as those of experts. Export the merged "
                "model instead, or train adapters of [decoder.*.q, decoder.*.k, decoder.*.v, decoder.*.o]"
            )
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        **{key: getattr(config.lora, field) for field, (key, _) in FIELDS.items()},
        "lora_dropout": config.lora.dropout,
        "target_modules": _targets(config, [name for name in names if is_adapter(name)], base),
        "modules_to_save": _projectors(config, base) if base.whole else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _projectors(config: ModelConfig, base: Base) -> list[str]:
    """The modules that make up the projectors which the folder of the adapters holds."""
    found = []
    for module in base.whole:
        for name in FORMATS[base.format].PROJECTORS[module]:
            numbers = range(len(config.vision.deepstack_layers)) if "{i}" in name else [0]
            found += [name.replace("{i}", str(i)) for i in numbers]
    return found


def _targets(config: ModelConfig, names: list[str], base: Base) -> list[str] | str:
    """The linears that have adapters, as PEFT finds them. A bare decoder gets the leaves of their names, which every
    program knows. The linears of a tower have the same leaves, so a whole model gets a regular expression."""
    layers: dict[tuple[str, str], set[str]] = defaultdict(set)  # (module, name of a linear with {i} for its layer)
    for name, theirs in peft_names(names, base).items():
        path = theirs.removeprefix(PREFIX).rpartition(".lora_")[0]
        layer = name.split(".")[2]
        layers[name.partition(".")[0], path.replace(f".layers.{layer}.", ".layers.{i}.")].add(layer)
    patterns, leaves = set(), set()
    for (module, path), numbers in layers.items():
        chosen = r"\d+"
        if len(numbers) == getattr(config, module).num_layers:
            leaves.add(path.rpartition(".")[2])
        else:
            chosen = f"({'|'.join(sorted(numbers, key=int))})"
        patterns.add(re.escape(path).replace(re.escape("{i}"), chosen))
    if base.format in TEXT_FORMATS and len(leaves) == len(patterns):
        return sorted(leaves)
    return "|".join(sorted(patterns))


def left_behind(names: Iterable[str], base: Base) -> list[str]:
    """The modules, and adapters of modules, among a run's parameters ``names`` that neither the base nor the folder of
    adapters has."""
    held = FORMATS[base.format].LOADED
    left = []
    for name in names:
        module = name.partition(".")[0]
        if module not in held:
            left.append(f"adapters of {module}" if is_adapter(name) else module)
    return list(dict.fromkeys(left))

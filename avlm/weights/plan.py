"""Which tensor of which source becomes which parameter: everything that ``init_from`` can get wrong, found before a
weight is read.

Every tensor of a source is taken, or skipped with a reason that the report counts, or named by ``allow_unused``. Every
parameter of a module that a source and the model share is in the source, or named by ``allow_missing``. Anything else
is an error. Adapters come from a source that has some, and start anew from one that has none.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from avlm.config.model import MODULES, AudioConfig, DecoderConfig, ModelConfig, ProjectorConfig, VisionConfig, shown
from avlm.config.run import InitFrom
from avlm.families.pretrained import AnyConfig, may_be_on_hub
from avlm.families.tables import LAYOUTS, SKIPPED, hugging_face_name
from avlm.models.freezing import matching
from avlm.models.lora import is_adapter
from avlm.models.whisper import sinusoids
from avlm.storage.run_folder import is_run, read_run
from avlm.storage.weight_files import WeightFiles, local
from avlm.weights.peft import open_adapter
from avlm.weights.sources import Source, check_shape, open_source

TIED = "a head tied to the embedding"
ENTRIES = ("all", "decoder", "vision", "audio", "adapter")  # a tower's own source wins over the whole model's
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Report:
    """What one entry of ``init_from`` gives: our names of the loaded tensors; skipped tensors by reason; and how many
    parameters of which part no entry gives."""

    entry: str
    path: Path
    names: list[str]
    total: int  # tensors in the source
    skipped: dict[str, int]
    anew: dict[str, int]
    files: WeightFiles | None = None  # of a model folder

    def __str__(self) -> str:
        skipped, anew = (
            ", ".join(f"{count} of {what}" for what, count in counts.items()) for counts in (self.skipped, self.anew)
        )
        files = f" ({self.files})" if self.files else ""
        return (
            f"{self.entry} from {self.path}{files}: {len(self.names)} of {self.total} tensors loaded, skipped: "
            f"{skipped or 'none'}" + (f"; parameters that start anew: {anew}" if anew else "")
        )


@dataclass(frozen=True)
class Plan:
    source: Source
    chosen: dict[str, str]  # our parameter -> tensor of the source
    report: Report


def check(config: ModelConfig, shapes: Shapes, init_from: InitFrom) -> None:
    """Raise ValueError or FileNotFoundError for what is known to be wrong without fetching anything from the Hub."""
    given = _given(init_from)
    here = {entry: path for entry, path in given.items() if local(path).exists()}
    for path in set(given.values()) - set(here.values()):
        if not may_be_on_hub(path):
            entry = next(entry for entry in given if given[entry] == path)
            raise FileNotFoundError(
                f"init_from.{entry} is {shown(path)}, and there is nothing: give a folder, file or Hub name"
            )
    if here == given:
        plan(config, shapes, init_from)
        return
    for entry, path in here.items():  # without the others nothing can be said of the allow lists
        theirs = None if entry == "adapter" else open_source(path).config
        if theirs is not None:
            check_config(config if entry == "all" else getattr(config, entry), theirs, path)


def pinned(init_from: InitFrom) -> InitFrom:
    """Runs replaced by their newest checkpoints, for all ranks to read the same while a run is still writing."""
    runs = {entry: local(path) for entry, path in _given(init_from).items() if entry != "adapter"}
    return replace(init_from, **{entry: str(read_run(path)[1]) for entry, path in runs.items() if is_run(path)})


def _given(init_from: InitFrom) -> dict[str, str]:
    return {entry: getattr(init_from, entry) for entry in ENTRIES if getattr(init_from, entry) is not None}


def plan(config: ModelConfig, shapes: Shapes, init_from: InitFrom) -> list[Plan]:
    """A plan for every entry that is given. ``shapes`` are those of all parameters of the model.

    Raises ValueError or FileNotFoundError.
    """
    given = _given(init_from)
    for entry in given:
        if entry in ("decoder", "vision", "audio") and getattr(config, entry) is None:
            raise ValueError(f"init_from.{entry} is {given[entry]!r}, and model.{entry} is null")
    names = list(shapes)
    sources = {
        entry: open_adapter(path, config, names) if entry == "adapter" else open_source(path)
        for entry, path in given.items()
    }
    held = [name for source in sources.values() for name in source.tensors]
    key = "init_from.allow_unused"
    left_out = {name for pattern in init_from.allow_unused for name in matching(pattern, key, held, "tensor")}
    key = "init_from.allow_missing"
    optional = {name for pattern in init_from.allow_missing for name in matching(pattern, key, names)}
    plans = [_plan(entry, source, config, shapes, left_out, optional) for entry, source in sources.items()]
    absent = [name for name in names if not any(name in plan.chosen for plan in plans)]
    for pattern in init_from.allow_missing:
        matching(pattern, key, absent, "parameter that the sources lack")
    return [replace(plan, report=replace(plan.report, anew=_parts(absent, plan.report.entry))) for plan in plans]


def check_config(ours: AnyConfig, theirs: AnyConfig, origin: str | Path) -> None:
    """Raise ValueError with the key where our config describes another model than ``theirs``, that of ``origin``.

    Of a whole model the modules that both have are compared. Not compared: ``max_position`` (ours may be shorter),
    ``window``, ``log_mel``, ``resize``, ``resample``, and for a plain tower ``feature_layer`` and ``post_norm``, which
    choose what is taken from it. In a whole model the number of vision layers that are built counts.
    """
    part = {DecoderConfig: "decoder", VisionConfig: "vision", AudioConfig: "audio", ModelConfig: "all"}[type(ours)]
    whole = isinstance(ours, ModelConfig)
    owner = theirs
    if isinstance(theirs, ModelConfig) and not whole:
        theirs = getattr(theirs, part)
    if type(ours) is not type(theirs):
        found = "none" if theirs is None else f"a {type(theirs).__name__}"
        raise ValueError(f"{origin} holds {found}, and a {type(ours).__name__} is asked for")
    shared = [module for module in theirs.modules if getattr(ours, module)] if whole else [part]
    for module in shared:
        mine, other = (getattr(ours, module), getattr(theirs, module)) if whole else (ours, theirs)
        a, b = _comparable(mine, ours, whole), _comparable(other, owner, whole)
        for key in a:
            if a[key] != b[key]:
                raise ValueError(f"model.{module}.{key} is {a[key]!r}, and {origin} was made with {b[key]!r}")
        if isinstance(mine, DecoderConfig) and mine.max_position > other.max_position:
            raise ValueError(
                f"model.decoder.max_position is {mine.max_position}, and {origin} was made for {other.max_position}"
            )


def _comparable(config: Any, owner: Any, whole: bool) -> dict[str, Any]:
    values = dict(vars(config))
    for key in ("max_position", "window", "log_mel", "resize", "resample"):
        values.pop(key, None)
    if isinstance(config, VisionConfig):
        feature_layer, post_norm = values.pop("feature_layer"), values.pop("post_norm")
        if whole:
            values["num_layers"] += 1 + feature_layer
            values["post_norm"] = post_norm
    if isinstance(config, ProjectorConfig):
        values["hidden_size"] = config.hidden_size or owner.decoder.hidden_size
        if config.type == "linear":
            del values["hidden_size"]
    return {key: value for key, value in values.items() if not key.startswith("_")}


def _parts(absent: list[str], entry: str) -> dict[str, int]:
    of_entry = [name for name in absent if entry in ("all", name.split(".")[0])]
    return dict(Counter("adapters" if is_adapter(name) else name.split(".")[0] for name in of_entry))


def _plan(
    entry: str, source: Source, config: ModelConfig, shapes: Shapes, left_out: set[str], optional: set[str]
) -> Plan:
    held = {name: tensor for name, tensor in source.tensors.items() if name not in left_out}
    if source.config is not None:
        check_config(config if entry == "all" else getattr(config, entry), source.config, source.path)
    prefixes = _prefixes(entry, source, held)
    modules = [name for name in prefixes if getattr(config, name) and entry in ("all", "adapter", name)]
    if not modules:
        raise ValueError(f"init_from.{entry}: {source.path} holds no module that it would give")
    kinds = {entry == "adapter", _brings_adapters(source, held, config, modules)}
    chosen = {}
    for name in shapes:
        if name.split(".")[0] not in modules or is_adapter(name) not in kinds:
            continue
        theirs = name if source.own_names else _file_name(name, prefixes, held)
        if theirs in held:
            check_shape(name, shapes[name], held[theirs], f"{source.path}: {theirs}")
            chosen[name] = theirs
        elif name not in optional:
            raise ValueError(
                f"{source.path} has no tensor {theirs} for {name} {tuple(shapes[name])}: where that is to start anew, "
                "name it in init_from.allow_missing"
            )
    if "audio" in modules and not source.own_names:
        _check_sinusoids(held, prefixes["audio"], source.path)
    theirs = {} if source.own_names else prefixes
    reasons = {name: _skip_reason(name, entry, config, theirs) for name in sorted(held.keys() - chosen.values())}
    for name, reason in reasons.items():
        if reason == TIED and not source.own_names:
            _check_tied(name, chosen.get("decoder.embedding.weight"), held, source.path)
    extra = [
        f"{shown(name, 100)} {tuple(held[name].get_shape())}" for name, reason in reasons.items() if reason is None
    ]
    if extra:
        raise ValueError(
            f"{source.path} has {len(extra)} tensors that the model has no place for: {', '.join(extra[:5])}; those to "
            "leave out have to be named in init_from.allow_unused"
        )
    skipped = Counter(reasons.values())
    if len(held) < len(source.tensors):
        skipped["init_from.allow_unused"] = len(source.tensors) - len(held)
    total = len(source.tensors)
    return Plan(source, chosen, Report(entry, source.path, list(chosen), total, dict(skipped), {}, source.files))


def _prefixes(entry: str, source: Source, held: Mapping) -> dict[str, str]:
    """Where the modules of a source stand in it."""
    if source.own_names:
        return {name: f"{name}." for name in MODULES if any(each.startswith(f"{name}.") for each in held)}
    if source.config is None:  # a file of tensors
        found = {name: prefix for name in MODULES if (prefix := _prefix(name, held)) is not None}
        return {name: prefix for name, prefix in found.items() if name.removesuffix("_projector") in found}
    modules = source.config.modules if isinstance(source.config, ModelConfig) else [entry]
    found = {name: _prefix(name, held) for name in modules}
    for name, prefix in found.items():
        if prefix is None:
            anchor, prefixes = LAYOUTS[name]
            raise ValueError(f"{source.path} has no tensor {anchor}, under any of {prefixes}")
    return found


def _prefix(module: str, held: Mapping) -> str | None:
    anchor, prefixes = LAYOUTS[module]
    return next((prefix for prefix in prefixes if prefix + anchor in held), None)


def _file_name(name: str, prefixes: dict[str, str], held: Mapping) -> str:
    module, _, rest = name.partition(".")
    theirs = hugging_face_name(module, rest)
    if name == "decoder.head.weight":
        return theirs if theirs in held else f"language_model.{theirs}"
    return prefixes[module] + theirs


def _brings_adapters(source: Source, held: Mapping, config: ModelConfig, modules: list[str]) -> bool:
    """Whether a source has adapters of these modules, which have to be ours."""
    if not source.own_names or not any(is_adapter(name) and name.split(".")[0] in modules for name in held):
        return False
    if config.lora is None:
        raise ValueError(
            f"{source.path} has adapters, and model.lora is null: give the model those adapters, export the run, which "
            "merges them, or name them in init_from.allow_unused"
        )
    theirs = source.config.lora if isinstance(source.config, ModelConfig) else None
    for key in ("rank", "alpha", "rslora", "dora") if theirs else ():
        if getattr(theirs, key) != getattr(config.lora, key):
            raise ValueError(
                f"model.lora.{key} is {getattr(config.lora, key)!r}, and the adapters of {source.path} were made with "
                f"{getattr(theirs, key)!r}"
            )
    return True


def _check_sinusoids(held: Mapping, prefix: str, path: Path) -> None:
    name = f"{prefix}embed_positions.weight"
    if name in held:
        table = held[name][:].float()
        distance = (table - sinusoids(torch.arange(table.shape[0]), table.shape[1])).abs().max().item()
        if distance > 4e-3:  # bf16 rounds by 2e-3
            raise ValueError(f"{path}: {name} is {distance:.2g} away from Whisper's sinusoids, which we compute")


def _check_tied(head: str, embedding: str | None, held: Mapping, path: Path) -> None:
    rows = slice(256)  # all of a head's rows move when it trains
    if embedding is not None and not held[head][rows].equal(held[embedding][rows]):
        raise ValueError(
            f"{path}: {head} is not the embedding, to which tie_embedding (tie_word_embeddings in config.json) ties "
            "the head: make that false, or leave the head out by init_from.allow_unused"
        )


def _skip_reason(name: str, entry: str, config: ModelConfig, prefixes: dict[str, str]) -> str | None:
    """Why a tensor of the source is not loaded, or None where nothing excuses it."""
    if name in ("lm_head.weight", "language_model.lm_head.weight", "decoder.head.weight"):
        if entry not in ("all", "decoder"):
            return "other modules"
        return TIED if config.decoder.tie_embedding else None
    if not prefixes:  # our names
        return "other modules" if entry in MODULES and not name.startswith(f"{entry}.") else None
    for module, prefix in prefixes.items():
        if entry not in ("all", module):
            if name.startswith(prefix):
                return "other modules"
            continue
        rest = name.removeprefix(prefix)
        layer = re.match(r"encoder\.layers\.(\d+)\.", rest)
        if module == "vision" and layer and int(layer[1]) > config.vision.num_layers + config.vision.feature_layer:
            return "layers above feature_layer"
        for pattern, reason in SKIPPED[module]:
            if re.match(pattern, rest):
                return reason
    return None

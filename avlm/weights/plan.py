"""Which tensor of which source becomes which parameter. Every mistake in ``init_from`` is found here, from the
headers and indices of files alone, before any weight is read.

Every tensor of a source is loaded, or skipped with a reason that the report counts, or named by ``allow_unused``. Every
parameter of a module that a source and the model share is in the source, or named by ``allow_missing``. Anything else
is an error. Adapters are loaded if the source has them, and initialised otherwise.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from avlm.config.model import MODULES, ModelConfig, VisionParts
from avlm.config.run import InitFrom
from avlm.config.values import shown
from avlm.families.door import (
    EXPERT,
    HEADS,
    SINUSOIDS,
    AnyConfig,
    anchor,
    find,
    full_name,
    is_part,
    row_order,
    skip_reason,
    starts_at_random,
)
from avlm.models.freezing import matching
from avlm.models.lora import is_adapter
from avlm.models.shapes import Shapes
from avlm.models.whisper import sinusoids
from avlm.storage.hub import may_be_on_hub
from avlm.storage.run_folder import is_run, read_run
from avlm.storage.weight_files import WeightFiles, local
from avlm.weights import conformer, experts
from avlm.weights.compare import check_config
from avlm.weights.peft import held_whole, open_adapter
from avlm.weights.sources import Rows, Source, check_shape, in_our_order, open_source

OWN_HEAD = "decoder.head.weight"
TIED = "a head tied to the embedding"
ENTRIES = ("all", "decoder", "vision", "audio", "adapter")  # a tower's own source wins over the whole model's


@dataclass(frozen=True)
class Report:
    """What one entry of ``init_from`` provides: our names of the loaded parameters, how many tensors of the source are
    loaded and how many skipped, by reason; and by module the number of parameters that no entry provides, which are
    initialised."""

    entry: str
    path: Path
    names: list[str]
    loaded: int
    total: int  # tensors in the source
    skipped: dict[str, int]
    initialised: dict[str, int]
    files: WeightFiles | None = None  # of a model folder
    elsewhere: dict[str, str] = field(default_factory=dict)  # module that it leaves to another folder -> that one

    def __str__(self) -> str:
        line = f"{self.entry} from {self.path}"
        if self.files:
            line += f" ({self.files})"
        for module, folder in self.elsewhere.items():
            line += f" and its {module} from {folder}"
        line += f": {self.loaded} of {self.total} tensors loaded, skipped: {_counted(self.skipped) or 'none'}"
        if self.initialised:
            line += f"; parameters initialised from scratch: {_counted(self.initialised)}"
        return line


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} ({what})" for what, count in counts.items())


class Chosen(NamedTuple):
    names: tuple[str, ...]  # of tensors of the source
    tensor: Any  # that tensor, those rows of it that a parameter takes, or several as one


class Place(NamedTuple):
    """Where a module lies in a file of Hugging Face's."""

    family: ModuleType  # which names its tensors
    prefix: str  # of their names


@dataclass(frozen=True)
class LoadPlan:
    source: Source
    chosen: dict[str, Chosen]  # by our parameter
    report: Report


def check(config: ModelConfig, shapes: Shapes, init_from: InitFrom) -> None:
    """Raise ValueError or FileNotFoundError for errors that can be found without fetching anything from the Hub."""
    given = _given(init_from)
    here = {}
    for entry, path in given.items():
        if local(path).exists():
            here[entry] = path
        elif not may_be_on_hub(path):
            raise FileNotFoundError(
                f"init_from.{entry} is {shown(path)}, which does not exist: give a folder, a file or a Hub name"
            )
    if here == given:
        load_plans(config, shapes, init_from)
        return
    for entry, path in here.items():  # the allow lists can only be checked with all sources
        if entry == "adapter":
            continue
        theirs = open_source(path).config
        if theirs is not None:
            check_config(config if entry == "all" else getattr(config, entry), theirs, path)


def pinned(init_from: InitFrom) -> InitFrom:
    """Runs replaced by their newest checkpoints, so that all ranks read the same one while a run is still writing."""
    newest = {}
    for entry, path in _given(init_from).items():
        if entry != "adapter" and is_run(local(path)):
            newest[entry] = str(read_run(local(path))[1])
    return replace(init_from, **newest)


def _given(init_from: InitFrom) -> dict[str, str]:
    paths = {entry: getattr(init_from, entry) for entry in ENTRIES}
    return {entry: path for entry, path in paths.items() if path is not None}


def load_plans(config: ModelConfig, shapes: Shapes, init_from: InitFrom) -> list[LoadPlan]:
    """A plan for every entry that is given. ``shapes`` are those of all parameters of the model.

    Raises ValueError or FileNotFoundError.
    """
    names = list(shapes)
    sources: dict[str, Source] = {}
    for entry, path in _given(init_from).items():
        if entry == "adapter":
            sources[entry] = open_adapter(path, config, names)
        elif entry != "all" and getattr(config, entry) is None:
            raise ValueError(f"init_from.{entry} is {path!r}, and model.{entry} is null")
        else:
            sources[entry] = open_source(path)
    held = [name for source in sources.values() for name in source.tensors]
    left_out: set[str] = set()
    for pattern in init_from.allow_unused:
        left_out.update(matching(pattern, "init_from.allow_unused", held, "tensor"))
    optional: set[str] = set()
    for pattern in init_from.allow_missing:
        optional.update(matching(pattern, "init_from.allow_missing", names))
    plans, loaded = [], set()
    for entry, source in sources.items():
        plan = _load_plan(entry, source, config, shapes, left_out, optional)
        plans.append(plan)
        loaded |= plan.chosen.keys()
    absent = [name for name in names if name not in loaded]
    for pattern in init_from.allow_missing:
        matching(pattern, "init_from.allow_missing", absent, "parameter that the sources lack")
    return [replace(plan, report=_with_absent(plan.report, absent)) for plan in plans]


def _with_absent(report: Report, absent: list[str]) -> Report:
    parts: Counter[str] = Counter()
    for name in absent:
        module = name.split(".")[0]
        if report.entry in ("all", module):
            parts["adapters" if is_adapter(name) else module] += 1
    return replace(report, initialised=dict(parts))


def _load_plan(
    entry: str, source: Source, config: ModelConfig, shapes: Shapes, left_out: set[str], optional: set[str]
) -> LoadPlan:
    held = {name: tensor for name, tensor in source.tensors.items() if name not in left_out}
    if source.config is not None:
        check_config(config if entry == "all" else getattr(config, entry), source.config, source.path)
    places = {} if source.own_names else _places(entry, source, held, config)
    there = {name.partition(".")[0] for name in held} if source.own_names else places.keys()
    modules = [module for module in config.modules if module in there and entry in ("all", "adapter", module)]
    if not modules:
        raise ValueError(f"init_from.{entry}: {source.path} holds no module that this entry could provide")
    has_adapters = _brings_adapters(source, held, config, modules)
    names = {}
    for name in shapes:
        is_wanted = has_adapters
        if not is_adapter(name):  # a folder of adapters may hold a projector as well
            is_wanted = entry != "adapter" or held_whole(name)
        module = name.split(".")[0]
        is_absent = module in places and starts_at_random(places[module].family, name, shapes, held)
        if module in modules and is_wanted and not is_absent:
            names[name] = name if source.own_names else _file_name(name, places, held)
    chosen = _choose(names, shapes, source.path, held, optional, places)
    if not source.own_names:
        _check_sinusoids(held, {name: places[name].prefix for name in modules}, source.path)
    skipped = _skipped(entry, source, config, places, held, chosen)
    if len(held) < len(source.tensors):
        skipped["init_from.allow_unused"] = len(source.tensors) - len(held)
    counts = (len(_names_in(chosen)), len(source.tensors), dict(skipped), {})
    return LoadPlan(source, chosen, Report(entry, source.path, list(chosen), *counts, source.files, source.elsewhere))


def _places(entry: str, source: Source, held: Mapping, config: ModelConfig) -> dict[str, Place]:
    """Module -> where a source has it."""
    places = {module: Place(*found) for module, found in source.places.items()}
    if places:
        return places
    if source.config is None:  # a file of tensors
        for module in MODULES:
            found = find(module, held, None)
            tower = module.removesuffix("_projector")  # without it a projector could be either tower's
            if found is not None and (tower == module or tower in places):
                places[module] = Place(*found)
        return places
    assert source.family is not None
    for module in source.config.modules if isinstance(source.config, ModelConfig | VisionParts) else [entry]:
        found = find(module, held, source.family)
        if found is None and getattr(config, module) is None:  # left out by init_from.allow_unused
            continue
        if found is None:
            prefixes = source.family.PREFIXES[module]
            raise ValueError(f"{source.path} has no tensor {anchor(source.family, module)}, under any of {prefixes}")
        places[module] = Place(*found)
    return places


def _file_name(name: str, places: Mapping[str, Place], held: Mapping) -> str:
    module, _, rest = name.partition(".")
    family, prefix = places[module]
    if name == OWN_HEAD:
        return next((head for head in HEADS if head in held), family.HEAD)
    return full_name(family, module, rest, prefix)


def _parts(names: Mapping[str, str], places: Mapping[str, Place]) -> dict[str, list[str]]:
    """Their name -> the parameters of ours that are its rows, one after the other."""
    parts: dict[str, list[str]] = {}
    for name, theirs in names.items():
        parts.setdefault(theirs, []).append(name)
    for several in parts.values():
        if len(several) > 1:
            module = several[0].partition(".")[0]
            family = places[module].family
            several.sort(key=lambda name: row_order(family, module, name.partition(".")[2]))
    return parts


def _choose(
    names: Mapping[str, str],
    shapes: Shapes,
    path: Path,
    held: Mapping,
    optional: set[str],
    places: Mapping[str, Place],
) -> dict[str, Chosen]:
    """The tensor for each of our parameters, which has its name in ``names``. Parameters with one name get the rows of
    that tensor, one after the other."""
    parts = _parts(names, places)
    chosen = {}
    for name, theirs in names.items():
        asked = (name, theirs, tuple(shapes[name]), held, path)
        if found := experts.find(*asked) or conformer.find(*asked):
            chosen[name] = Chosen(*found)
            continue
        if theirs not in held:
            if name in optional:
                continue
            raise ValueError(
                f"{path} has no tensor {theirs.replace(EXPERT, '0')} for {name} {tuple(shapes[name])}: to initialise "
                "it from scratch, name it in init_from.allow_missing"
            )
        tensor = held[theirs]
        if len(parts[theirs]) > 1:
            number, there = sum(shapes[part][0] for part in parts[theirs]), tuple(tensor.get_shape())
            if there[:1] != (number,):
                raise ValueError(f"{path}: {theirs} has shape {there}, and {', '.join(parts[theirs])} {number} rows")
            before = parts[theirs][: parts[theirs].index(name)]
            tensor = Rows(tensor, sum(shapes[part][0] for part in before), shapes[name][0])
        if (module := name.partition(".")[0]) in places:
            tensor = in_our_order(tensor, places[module].family, name)
        check_shape(name, shapes[name], tensor, f"{path}: {theirs}")
        chosen[name] = Chosen((theirs,), tensor)
    return chosen


def _names_in(chosen: Mapping[str, Chosen]) -> set[str]:
    """Tensors of the source that parameters take."""
    return {name for each in chosen.values() for name in each.names}


def _brings_adapters(source: Source, held: Mapping, config: ModelConfig, modules: list[str]) -> bool:
    """Whether a source has adapters of these modules. ValueError where they are not those of ``config``."""
    adapted = {name.split(".")[0] for name in held if is_adapter(name)}
    if not source.own_names or not adapted & set(modules):
        return False
    if config.lora is None:
        raise ValueError(
            f"{source.path} has adapters, and model.lora is null: give the model those adapters, export the run, which "
            "merges them, or name them in init_from.allow_unused"
        )
    if isinstance(source.config, ModelConfig) and source.config.lora is not None:
        for key in ("rank", "alpha", "rslora", "dora"):
            ours, theirs = getattr(config.lora, key), getattr(source.config.lora, key)
            if ours != theirs:
                raise ValueError(
                    f"model.lora.{key} is {ours!r}, and the adapters of {source.path} were made with {theirs!r}"
                )
    return True


def _check_sinusoids(held: Mapping, prefixes: dict[str, str], path: Path) -> None:
    for module, table_name in SINUSOIDS.items():
        name = prefixes.get(module, "") + table_name
        if module not in prefixes or name not in held:
            continue
        table_TD = held[name][:].float()
        ours_TD = sinusoids(torch.arange(table_TD.shape[0]), table_TD.shape[1])
        distance = (table_TD - ours_TD).abs().max().item()
        if distance > 4e-3:  # bf16 rounds by 2e-3
            raise ValueError(f"{path}: {name} is {distance:.2g} away from Whisper's sinusoids, which we compute")


def _skipped(
    entry: str,
    source: Source,
    config: ModelConfig,
    places: Mapping[str, Place],
    held: Mapping,
    chosen: dict[str, Chosen],
) -> Counter[str]:
    """The number of tensors that are not loaded, by reason. ValueError if any has no accepted reason."""
    reasons: Counter[str] = Counter()
    extra = []
    for name in sorted(held.keys() - _names_in(chosen)):
        if name in (*HEADS, OWN_HEAD) and not isinstance(source.config, VisionParts):
            reason = _reason_for_head(entry, config)
        elif source.own_names:
            is_other = entry in MODULES and not name.startswith(f"{entry}.")
            reason = "other modules" if is_other else None
        else:
            reason = _reason_for_foreign(name, entry, config, source, places)
        if reason is None:
            extra.append(f"{shown(name, 100)} {tuple(held[name].get_shape())}")
            continue
        if reason == TIED and not source.own_names:
            _check_tied(name, chosen.get("decoder.embedding.weight"), held, source.path)
        reasons[reason] += 1
    if extra:
        raise ValueError(
            f"{source.path} has {len(extra)} tensors that the model has no place for: {', '.join(extra[:5])}; name "
            "those to leave out in init_from.allow_unused"
        )
    return reasons


def _reason_for_head(entry: str, config: ModelConfig) -> str | None:
    if entry not in ("all", "decoder"):
        return "other modules"
    return TIED if config.decoder.tie_embedding else None


def _reason_for_foreign(
    name: str, entry: str, config: ModelConfig, source: Source, places: Mapping[str, Place]
) -> str | None:
    for module, (family, prefix) in places.items():
        rest = name.removeprefix(prefix)
        reason = None
        if entry in ("all", module):
            unused = _unused_layers(config, source.config) if module == "vision" else range(0)
            reason = skip_reason(family, module, rest, unused)
        elif is_part(family, module, name, prefix):
            reason = "other modules"
        if reason is not None:
            return reason
    return None


def _unused_layers(config: ModelConfig, theirs: AnyConfig | None) -> range:
    """The layers of a source's vision tower that lie above our feature_layer."""
    vision = theirs.vision if isinstance(theirs, ModelConfig | VisionParts) else theirs
    if config.vision is None:
        return range(0)
    return range(config.vision.num_blocks, (vision or config.vision).num_layers)


def _check_tied(head: str, embedding: Chosen | None, held: Mapping, path: Path) -> None:
    rows = slice(256)  # all of a head's rows move when it trains
    if embedding is not None and not held[head][rows].equal(embedding.tensor[rows]):
        raise ValueError(
            f"{path}: {head} differs from the embedding, but tie_embedding (tie_word_embeddings in config.json) "
            "is true: make that false, or leave the head out by init_from.allow_unused"
        )

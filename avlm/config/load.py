"""A run's YAML file with ``section.key=value`` overrides -> Config, and back.

A key that is unknown, missing, of the wrong type or out of range is an error that names it. Files are bounded: in
bytes, in depth, and in the number of values once aliases are written out.
"""

import dataclasses
import datetime
import difflib
import json
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from avlm.config.run import Config
from avlm.config.values import first_error, shown

MAX_BYTES, MAX_VALUES, MAX_DEPTH = 2**18, 10_000, 50  # shipped configs: 4 KB, 100, 5
SHARED = ("optimizer", "data")  # sections of the run that are the defaults of every stage
LENGTHS = {"steps": "epochs", "epochs": "steps"}  # of a stage
# What other trainers call things -> what to write here.
ELSEWHERE = {
    "batch_size": "data.seq_length tokens a row, train.rows_per_step rows of all ranks",
    "epochs": "stages.NAME.epochs",
    "fp16": "train.precision=bf16",
    "bf16": "train.precision=bf16",
    "from": "model.from",
    "gradient_accumulation_steps": "train.accumulate",
    "global_batch_size": "data.seq_length tokens a row, train.rows_per_step rows of all ranks",
    "gradient_checkpointing": "train.recompute.decoder=full",
    "learning_rate": "optimizer.lr",
    "lora": "model.lora",
    "lr": "optimizer.lr",
    "max_length": "data.seq_length",
    "max_steps": "stages.NAME.steps",
    "model_name_or_path": "model.from",
    "num_epochs": "stages.NAME.epochs",
    "num_train_epochs": "stages.NAME.epochs",
    "per_device_train_batch_size": "data.seq_length tokens a row, train.accumulate rows of each data rank",
    "sound": "data.video.audio",  # as it was called
    "save_steps": "checkpoint.every",
    "eval_steps": "train.validate_every",
    "logging_steps": "train.log_every",
    "steps": "stages.NAME.steps",
    "warmup_steps": "optimizer.warmup_steps",
    "weight_decay": "optimizer.weight_decay",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The checked config of a YAML file whose model is written out, as that of a run folder is; one with ``from`` is
    opened by ``avlm.weights.model_from``. ValueError or FileNotFoundError with one line for the user."""
    return resolve_config(read_tree(path, overrides), str(path))


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The keys of a YAML file with its overrides, not checked yet. Its run is runs/NAME_OF_THE_FILE unless it says
    another ``output_dir``."""
    path = Path(path)
    try:
        is_there = path.is_file()
    except (OSError, ValueError):  # no file can have that name
        is_there = False
    if not is_there:
        raise FileNotFoundError(f"no config file {shown(str(path))}")
    tree = {"output_dir": f"runs/{path.stem}", **read_yaml(path)}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ValueError(f"override {shown(override)!r} is not of the form section.key=value")
        _set(tree, key.split("."), parse_yaml(text, f"override {shown(override)!r}"))
    return tree


def resolve_config(tree: dict[str, Any], origin: str) -> Config:
    """Check a parsed tree. The run's ``optimizer`` and ``data`` are the defaults of every stage."""
    resolved = {key: value for key, value in tree.items() if key not in SHARED}
    if isinstance(tree.get("resume"), str):
        resolved["resume"] = {"checkpoint": tree["resume"]}
    stages = tree.get("stages")
    if isinstance(stages, list) and len(stages) <= 1000:
        resolved["stages"] = [_with_defaults(stage, tree) for stage in stages]
    try:
        return TypeAdapter(Config).validate_json(json.dumps(resolved, default=str))  # strict types, as JSON has them
    except ValidationError as error:
        raise ValueError(f"{origin}: {_explain(error, tree)}") from None


def _with_defaults(stage: Any, tree: dict[str, Any]) -> Any:
    if not isinstance(stage, dict):
        return stage
    merged = {key: merge(tree.get(key, {}), stage.get(key, {})) for key in SHARED}
    own = stage.get("data")
    if isinstance(own, dict) and "train" in own:  # a stage's blend of sources takes the place of the run's
        merged["data"]["train"] = own["train"]
    return {**stage, **merged}


def to_dict(value: Any) -> dict[str, Any]:
    """The config as plain data; ``resolve_config(to_dict(config))`` gives it back."""
    return dataclasses.asdict(value)


def dump_config(value: Any) -> str:
    return yaml.safe_dump(to_dict(value), sort_keys=False, width=120)


def read_yaml(path: Path, max_bytes: int = MAX_BYTES, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """Keys and plain values of a YAML file. ValueError with one line if it holds anything else."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ValueError(f"{path} has {size:,} bytes: more than {max_bytes:,} are not read")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    tree = parse_yaml(text, str(path), max_values)
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold keys and values, not {type(tree).__name__}")
    return tree


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: 1e-3 is a number. A key that a mapping has twice is an error."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                first = lines.get((key.tag, key.value))
                if first is not None:
                    raise ValueError(f"the key {shown(key.value)!r} is on line {first} and on line {line}")
                lines[key.tag, key.value] = line
        return node


_FLOAT = re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d+)([eE][-+]?\d+)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_yaml(text: str, origin: str, max_values: int = MAX_VALUES) -> Any:
    """A YAML text as fresh dicts, lists, strings, numbers and None. Every alias becomes a copy."""
    try:
        tree = yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError(f"{origin} is nested deeper than {MAX_DEPTH} levels") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{origin} is not valid YAML: {shown(' '.join(str(error).split()), 300)}") from None
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        # PyYAML's own errors for values that do not fit their tag
        raise ValueError(f"{origin} is not valid YAML: {shown(' '.join(str(error).split()))}") from None
    return _plain(tree, origin, max_values)


def _plain(tree: Any, origin: str, max_values: int) -> Any:
    left = max_values

    def copy(value: Any, where: str, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"{origin} holds more than {max_values:,} values, with aliases written out")
        if depth > MAX_DEPTH:
            raise ValueError(f"{origin} is nested deeper than {MAX_DEPTH} levels, or in itself")
        if isinstance(value, list):
            return [copy(item, f"{where}.{i}"[-100:], depth + 1) for i, item in enumerate(value)]
        if not isinstance(value, dict):
            return _scalar(value, origin, where)
        copied = {}
        for key, item in value.items():
            name = _scalar(key, origin, where or "a key")
            copied[name] = copy(item, f"{where}.{name}"[-100:].strip("."), depth + 1)
        return copied

    return copy(tree, "", 0)


def _scalar(value: Any, origin: str, where: str) -> str | int | float | bool | None:
    if isinstance(value, datetime.date):  # datetimes too
        return str(value)
    if isinstance(value, int) and value.bit_length() > 64:
        raise ValueError(f"{origin}: {shown(where)} is a number of {value.bit_length():,} bits")
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{origin}: {shown(where)} holds half of a surrogate pair, which is not valid text")
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError(
            f"{origin}: {shown(where)} is a YAML {type(value).__name__}: give a text, number, list or keys"
        )
    return value


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    """Override one value. In ``stages.NAME.key``, NAME is the name of a stage, whose steps take the place of its epochs
    and the other way round."""
    for i, key in enumerate(keys):
        where = shown(".".join(keys[:i]))
        if isinstance(tree, list):
            named = [item for item in tree if isinstance(item, dict) and item.get("name") == key]
            if not named:
                names = [item["name"] for item in tree if isinstance(item, dict) and "name" in item]
                raise ValueError(f"there is no stage {shown(key)!r}: {shown(names)}")
            if i == len(keys) - 1:
                raise ValueError(
                    f"{where}.{shown(key)} is a whole stage: give one of its keys, {where}.{shown(key)}.KEY=value"
                )
            tree = named[0]
        elif not isinstance(tree, dict):
            raise ValueError(f"{where} is a single value and has no key {shown(key)!r}")
        elif i < len(keys) - 1:
            tree = tree.setdefault(key, {})
        else:
            tree[key] = value
            if keys[0] == "stages" and i == 2 and key in LENGTHS:
                tree.pop(LENGTHS[key], None)


def merge(base: Any, over: Any) -> Any:
    """``over``, with the keys of ``base`` that it lacks, at every depth."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {**base, **{key: merge(base.get(key), value) for key, value in over.items()}}


def _explain(error: ValidationError, tree: dict[str, Any]) -> str:
    """One line for the first error of pydantic, with the full key and the nearest known one."""
    first = error.errors()[0]
    loc = _as_written(first["loc"], tree)
    where = shown(".".join(str(part) for part in loc))
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(first["loc"][:-1])
        name = str(first["loc"][-1])[:100]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        if name in ELSEWHERE and ELSEWHERE[name] != where:
            hint = f"here: {ELSEWHERE[name]}"
        return f"unknown key {where} ({hint})"
    if first["type"] in ("missing", "missing_argument"):
        return f"missing key {where}"
    return first_error(error, loc)


def _as_written(loc: tuple, tree: dict[str, Any]) -> tuple:
    """The key as the file and overrides have it: stages by their names, and a value that a stage inherits under the
    run's own ``optimizer`` or ``data``."""
    if len(loc) < 2 or loc[0] != "stages" or not isinstance(loc[1], int):
        return loc
    _, index, *keys = loc
    stage = tree["stages"][index]
    is_inherited = len(keys) > 1 and keys[0] in SHARED and _holds(tree, keys) and not _holds(stage, keys)
    if is_inherited:
        return tuple(keys)
    name = stage.get("name") if isinstance(stage, dict) else None
    return ("stages", name if isinstance(name, str) else index, *keys)


def _holds(tree: Any, keys: list[str | int]) -> bool:
    try:
        for key in keys:
            tree = tree[key]
    except (LookupError, TypeError):
        return False
    return True


def _known_keys(loc: tuple) -> list[str]:
    """The keys that a section of the file may have."""
    cls: Any = Config
    for part in loc:
        if isinstance(part, str) and dataclasses.is_dataclass(cls):
            cls = _dataclass_in(typing.get_type_hints(cls).get(part))
    if not dataclasses.is_dataclass(cls):
        return []
    names = [field.name for field in dataclasses.fields(cls)]
    return [*names, *SHARED] if cls is Config else names


def _dataclass_in(hint: Any) -> Any:
    """The config class in a type such as ``list[StageConfig]`` or ``LoraConfig | None``."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    for part in typing.get_args(hint):
        found = _dataclass_in(part)
        if found:
            return found
    return None

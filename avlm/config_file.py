"""A run's YAML file -> Config, with ``section.key=value`` overrides; and back.

A key that does not exist, is missing or has the wrong type is an error that names it.
"""

import dataclasses
import difflib
import json
import re
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from avlm.config import Config


def load(path: str | Path, overrides: list[str] = ()) -> Config:
    """The checked config of a YAML file. Raises ValueError or FileNotFoundError with one line for the user."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no config file {path}")
    tree = _parse(path.read_text(), str(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold keys and values, not {type(tree).__name__}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} is not of the form section.key=value")
        _set(tree, key.split("."), _parse(text, override))
    return resolve(tree, str(path))


def resolve(tree: dict[str, Any], origin: str) -> Config:
    """Check a parsed tree. The run's ``optimizer`` and ``data`` are the defaults of every stage's own."""
    tree = dict(tree)
    shared = {"optimizer": tree.pop("optimizer", {}), "data": tree.pop("data", {})}
    if isinstance(tree.get("stages"), list):
        tree["stages"] = [
            {**stage, **{key: _merge(shared[key], stage.get(key, {})) for key in shared}}
            if isinstance(stage, dict)
            else stage
            for stage in tree["stages"]
        ]
    try:
        return TypeAdapter(Config).validate_json(json.dumps(tree, default=str))  # strict types, as JSON has them
    except ValidationError as error:
        raise ValueError(f"{origin}: {_explain(error.errors()[0])}") from None


def to_dict(value: Any) -> dict[str, Any]:
    """The config as plain data; ``resolve(to_dict(config))`` gives it back."""
    return dataclasses.asdict(value)


def dump(value: Any) -> str:
    return yaml.safe_dump(to_dict(value), sort_keys=False, width=120)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: 1e-3 is a number."""


_FLOAT = re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d+)([eE][-+]?\d+)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _parse(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from None


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    """Override one value; ``stages.NAME.key`` reaches into the stage of that name."""
    for i, key in enumerate(keys[:-1]):
        if isinstance(tree, list):
            named = [item for item in tree if item.get("name") == key]
            if not named:
                raise ValueError(f"there is no stage {key!r}: {[item.get('name') for item in tree]}")
            tree = named[0]
        else:
            tree = tree.setdefault(key, {})
        if not isinstance(tree, dict | list):
            raise ValueError(f"{'.'.join(keys[: i + 1])} is a value, it has no key {keys[i + 1]!r}")
    tree[keys[-1]] = value


def _merge(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {**base, **{key: _merge(base.get(key), value) for key, value in over.items()}}


def _explain(error: dict[str, Any]) -> str:
    """One line for the first thing that pydantic found, with the full key and the nearest known one."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        return f"unknown key {where}" + (f" (did you mean {near[0]}?)" if near else f" (known: {', '.join(known)})")
    if error["type"] in ("missing", "missing_argument"):
        return f"missing key {where}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" + ("" if error["type"] == "value_error" else f", got {error['input']!r}")


def _known_keys(loc: tuple) -> list[str]:
    cls: Any = Config
    for part in loc:
        if isinstance(part, str) and dataclasses.is_dataclass(cls):
            hints = typing.get_type_hints(cls)
            if part in hints:
                options = [a for a in (hints[part], *typing.get_args(hints[part])) if dataclasses.is_dataclass(a)]
                cls = options[0] if options else hints[part]
        elif isinstance(part, int):
            cls = typing.get_args(cls)[0] if typing.get_args(cls) else cls
    return [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []

"""What Energon is about to open, checked before it does: it imports and calls what a file of a dataset names.

Of a prepared folder its dataset.yaml, split.yaml and .info.json; of a blend its YAML, and all that it names in turn.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ryml
from megatron.energon.eyaml import load_yaml

from avlm.config.load import MAX_BYTES, read_yaml
from avlm.config.model import shown

MAX_PARTS, MAX_SHARDS = 10_000, 1_000_000  # datasets of a blend, files that one name with braces stands for


def check_source(path: Path, inside: tuple[Path, ...] = (), splits: str | None = None) -> int:
    """Refuse what is no prepared crude dataset or blend of them, and whatever would make Energon run foreign code.

    ``inside``: the blends that name it; ``splits``: the file of its splits, where one of them says which. Returns the
    number of datasets and blends that Energon would open.
    """
    if path.is_dir():
        _check_folder(path, splits)
        return 1
    if path.suffix != ".yaml" or not path.is_file():
        raise FileNotFoundError(f"no Energon dataset {shown(str(path))}: give a prepared folder or a .yaml blend")
    if path.resolve() in inside:
        raise ValueError(f"{inside[-1]} names {path.name}, which it is itself a part of")
    found = _read_yaml(path)
    kind = (found.pop("__module__", None), found.pop("__class__", None))
    if kind not in (("megatron.energon", "Metadataset"), ("megatron.energon", "MetadatasetV2")):
        raise ValueError(f"{path} must be of megatron.energon's class MetadatasetV2, not {shown(kind)}")
    _refuse_code(found, path)
    num_opened = 1
    for (inner, config), times in Counter(_parts(found, path)).items():
        num_opened += times * check_source(path.parent / inner, (*inside, path.resolve()), config)
        if num_opened > MAX_PARTS:
            raise ValueError(f"{path} names more than {MAX_PARTS:,} datasets, those of the blends in it included")
    return num_opened


def _check_folder(folder: Path, splits: str | None) -> None:
    meta = folder / ".nv-meta"
    config = meta / "dataset.yaml"
    if not config.is_file():
        raise ValueError(f"{folder} is no Energon dataset: run `energon prepare {folder}` (crude)")
    found = _read_yaml(config)
    kind = (found.pop("__module__", None), found.pop("__class__", None))
    if kind != ("megatron.energon", "CrudeWebdataset") or set(found) - {"subflavors"}:
        named = shown({"__module__": kind[0], "__class__": kind[1], **found})
        raise ValueError(f"{config} must name megatron.energon's CrudeWebdataset and nothing else, not {named}")
    _refuse_code(found, config)
    others = [] if splits else ["split.json"]  # where Energon looks as well
    for names in ([splits or "split.yaml", *others], [".info.json", ".info.yaml"]):
        file = next((meta / name for name in names if (meta / name).is_file()), meta / names[0])
        if not file.is_file():
            raise ValueError(f"{file} is missing: run `energon prepare {folder}`")
        _refuse_code(found := _read_yaml(file), file)
        counts = found.get("shard_counts")
        for name, count in counts.items() if isinstance(counts, dict) else ():
            if type(count) is not int or not 0 <= count < 2**40:
                raise ValueError(
                    f"{file}: {shown(name)} has {shown(repr(count))} samples: run `energon prepare {folder}`"
                )
        for text in _texts(found):
            if _num_expanded(text) > MAX_SHARDS:
                raise ValueError(f"{file}: {shown(text)!r} stands for more than {MAX_SHARDS:,} files")


def _read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML or JSON file as Energon's own parser finds them: what is checked is what it would act on."""
    try:
        if path.suffix == ".yaml" and path.stat().st_size <= MAX_BYTES:
            read_yaml(path, max_values=MAX_BYTES)  # its errors say where
        found = json.loads(path.read_bytes()) if path.suffix == ".json" else load_yaml(path.read_bytes())
    except (RecursionError, json.JSONDecodeError, UnicodeDecodeError, AttributeError, ryml.ExceptionBasic) as error:
        reason = shown(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise ValueError(f"{path} is not valid YAML or JSON: {reason}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold keys and values, not {shown(found, 80)}")
    return found


def _refuse_code(tree: Any, origin: Path) -> None:
    """Energon imports and calls what __module__ and __function__ or __class__ name, at any depth."""
    trees = [tree]
    while trees:
        tree = trees.pop()
        for key in tree if isinstance(tree, dict) else ():
            if str(key).startswith("__"):
                raise ValueError(f"{origin}: {shown(str(key))!r} is not supported: it could name code to run")
        trees += tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()


def _parts(tree: Any, origin: Path) -> Iterator[tuple[str, str | None]]:
    """Every dataset that a blend names, with the file of its splits where the blend says that."""
    refused = [key for key in ("joiner", "join", "aux", "dataset_config") if isinstance(tree, dict) and key in tree]
    if refused:
        raise ValueError(f"{origin}: {refused[0]!r} is not supported")
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        if key in ("weight", "repetitions") and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ValueError(f"{origin}: {key}={shown(repr(value))} is no number above 0")  # 0 repetitions never end
        if key == "path":
            splits = tree.get("split_config")
            for text in (value, splits or "split.yaml"):
                if not isinstance(text, str) or "://" in text or "\0" in text:
                    raise ValueError(f"{origin} names {shown(text)}, which is no path of a file or folder here")
            if splits is not None and Path(splits).name != splits:
                raise ValueError(f"{origin}: split_config={shown(splits)!r} lies outside of the dataset's .nv-meta")
            yield value, splits
        elif key != "subflavors":
            yield from _parts(value, origin)


def _texts(tree: Any) -> Iterator[str]:
    trees = [tree]
    while trees:
        tree = trees.pop()
        if isinstance(tree, str):
            yield tree
        trees += [*tree, *tree.values()] if isinstance(tree, dict) else tree if isinstance(tree, list) else ()


def _num_expanded(text: str) -> int:
    """An upper bound of the names that braces in a text stand for: name_{000..127}.tar, {a,b}.tar."""
    spans = [abs(int(b) - int(a)) + 1 for a, b in re.findall(r"\{(-?\d{1,18})\.\.(-?\d{1,18})", text)]
    return math.prod(spans) * math.prod(2 + group.count(",") for group in re.findall(r"\{[^{}]*,[^{}]*", text))

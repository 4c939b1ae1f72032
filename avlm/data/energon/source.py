"""Checks what Energon is about to open: it imports and calls whatever a file of a dataset names.

Of a prepared folder that is its dataset.yaml, split.yaml and .info.json; of a blend its YAML, and all that it names.
A folder or a blend lies here, or in a bucket under its msc:// path.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ryml
from megatron.energon.epathlib import EPath
from megatron.energon.eyaml import load_yaml
from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta

from avlm.config.load import MAX_BYTES, read_yaml
from avlm.config.run import is_json
from avlm.config.values import shown

MAX_PARTS = 10_000  # datasets of a blend
MAX_SHARDS = 1_000_000  # files that one name with braces stands for
SHARDS_THAT_ARE_WEIGHED = 16
REMOTE = "msc://"  # what paths of Multi-Storage Client begin with
NOT_SUPPORTED = ("joiner", "join", "aux", "dataset_config")  # keys of a blend


Place = Path | EPath


def path_of(source: str) -> Place:
    """ValueError for a remote path that Energon does not read."""
    if "://" not in source:
        return Path(source)
    if not source.startswith(REMOTE):
        raise ValueError(
            f"{shown(source)} is no path here: Energon reads a bucket as msc://PROFILE/path, by a profile of "
            "Multi-Storage Client's config (docs/data.md)"
        )
    try:
        return EPath(source)
    except (ValueError, LookupError, TypeError, OSError, ImportError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"Multi-Storage Client cannot open {shown(source)}: {shown(lines[0])}") from None


def check_source(path: Place, inside: tuple[Place, ...] = (), splits: str | None = None) -> int:
    """Refuse everything but prepared crude datasets and blends of them, and whatever would make Energon run foreign
    code.

    ``inside``: the blends that name this source; ``splits``: the file of its splits, if one of them names it. Returns
    the number of datasets and blends that Energon would open. ValueError or FileNotFoundError for a refused one.
    """
    if path.is_dir():
        _check_folder(path, splits)
        return 1
    if not path.name.endswith(".yaml") or not path.is_file():
        raise FileNotFoundError(f"no Energon dataset {shown(str(path))}: give a prepared folder or a .yaml blend")
    own = path.resolve() if isinstance(path, Path) else path
    if own in inside:
        raise ValueError(f"{inside[-1]} names {path.name}, which it is itself a part of")
    found = _read_yaml(path)
    kind = (found.pop("__module__", None), found.pop("__class__", None))
    if kind not in (("megatron.energon", "Metadataset"), ("megatron.energon", "MetadatasetV2")):
        raise ValueError(f"{path} must be of megatron.energon's class MetadatasetV2, not {shown(kind)}")
    _refuse_code(found, path)
    num_opened = 1
    for (part, splits_of_part, _), times in Counter(_parts(found, path)).items():
        num_opened += times * check_source(_part_of(path, part), (*inside, own), splits_of_part)
        if num_opened > MAX_PARTS:
            raise ValueError(f"{path} names more than {MAX_PARTS:,} datasets, those of the blends in it included")
    return num_opened


def count_samples(path: Place, split: str, splits: str | None = None) -> int:
    """Samples in a split of a folder, or of the sets of a blend, each once. The source has passed ``check_source``."""
    if path.is_dir():
        meta = WebdatasetMeta.from_config(EPath(path), split_part=split, split_config=splits)
        return sum(shard.count for shard in meta.shards)
    found = _read_yaml(path)["splits"][split]
    parts = set(_parts(found, path))
    return sum(count_samples(_part_of(path, part), of_part or split, file) for part, file, of_part in parts)


def bytes_per_sample(path: Place, split: str, splits: str | None = None) -> float:
    """The mean over the first shards of a folder, or of the set of a blend where it is largest. The source has passed
    ``check_source``."""
    if path.is_dir():
        meta = WebdatasetMeta.from_config(EPath(path), split_part=split, split_config=splits)
        shards = [shard for shard in meta.shards[:SHARDS_THAT_ARE_WEIGHED] if shard.count]
        return sum(shard.path.size() for shard in shards) / max(sum(shard.count for shard in shards), 1)
    found = _read_yaml(path)["splits"][split]
    parts = set(_parts(found, path))
    return max(bytes_per_sample(_part_of(path, part), of_part or split, file) for part, file, of_part in parts)


def _part_of(blend: Place, part: str) -> Place:
    return path_of(part) if part.startswith(REMOTE) else blend.parent / part


def _check_folder(folder: Place, splits: str | None) -> None:
    meta = folder / ".nv-meta"
    config = meta / "dataset.yaml"
    if not config.is_file():
        raise ValueError(f"{folder} is no Energon dataset: {_remedy(folder)}")
    found = _read_yaml(config)
    kind = (found.pop("__module__", None), found.pop("__class__", None))
    if kind != ("megatron.energon", "CrudeWebdataset") or set(found) - {"subflavors"}:
        named = shown({"__module__": kind[0], "__class__": kind[1], **found})
        raise ValueError(f"{config} must name megatron.energon's CrudeWebdataset and nothing else, not {named}")
    _refuse_code(found, config)
    split_names = [splits] if splits else ["split.yaml", "split.json"]
    for names in (split_names, [".info.json", ".info.yaml"]):
        present = [meta / name for name in names if (meta / name).is_file()]
        if not present:
            raise ValueError(f"{meta / names[0]} is missing: {_remedy(folder)}")
        _check_meta_file(present[0], folder)


def _remedy(folder: Place) -> str:
    """What to do about a folder that is not prepared."""
    if not isinstance(folder, Path):
        return "prepare it before it is copied there, by python -m avlm.data.shard"
    if any(folder.glob("*.tar")):
        return f"run python -m avlm.data.shard --prepare {folder}"
    files = sorted(path for path in folder.iterdir() if is_json(path.name))
    files.sort(key=lambda path: path.stem != "train")
    if files:
        return f"give {files[0]}"
    return "it holds neither shards (.tar) nor a .json or .jsonl file"


def _check_meta_file(file: Place, folder: Place) -> None:
    found = _read_yaml(file)
    _refuse_code(found, file)
    counts = found.get("shard_counts")
    if isinstance(counts, dict):
        for name, count in counts.items():
            if type(count) is not int or not 0 <= count < 2**40:
                raise ValueError(f"{file}: {shown(name)} has {shown(repr(count))} samples: {_remedy(folder)}")
    for text in _texts(found):
        if _num_expanded(text) > MAX_SHARDS:
            raise ValueError(f"{file}: {shown(text)!r} stands for more than {MAX_SHARDS:,} files")


def _read_yaml(path: Place) -> dict[str, Any]:
    """The keys of a YAML or JSON file as Energon's own parser finds them, so that the check sees what it acts on."""
    try:
        if isinstance(path, Path) and path.suffix == ".yaml" and path.stat().st_size <= MAX_BYTES:
            read_yaml(path, max_values=MAX_BYTES)  # its errors name the place
        parse = json.loads if path.name.endswith(".json") else load_yaml
        found = parse(path.read_bytes())
    except (RecursionError, json.JSONDecodeError, UnicodeDecodeError, AttributeError, ryml.ExceptionBasic) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{path} is not valid YAML or JSON: {shown(lines[0])}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold keys and values, not {shown(found, 80)}")
    return found


def _nodes(tree: Any) -> Iterator[Any]:
    """Every value of a tree, and every key, at any depth; without recursion, as a file may be nested very deep."""
    left = [tree]
    while left:
        node = left.pop()
        yield node
        if isinstance(node, dict):
            left += [*node, *node.values()]
        elif isinstance(node, list):
            left += node


def _refuse_code(tree: Any, origin: Place) -> None:
    """Energon imports and calls what __module__ and __function__ or __class__ name, at any depth."""
    for node in _nodes(tree):
        for key in node if isinstance(node, dict) else ():
            if str(key).startswith("__"):
                raise ValueError(f"{origin}: {shown(str(key))!r} is not supported: it could name code to run")


def _parts(tree: Any, origin: Place) -> Iterator[tuple[str, str | None, str | None]]:
    """Every dataset that a blend names, with the file of its splits and the split if the blend names those too."""
    if isinstance(tree, list):
        for value in tree:
            yield from _parts(value, origin)
    if not isinstance(tree, dict):
        return
    for key in NOT_SUPPORTED:
        if key in tree:
            raise ValueError(f"{origin}: {key!r} is not supported")
    for key, value in tree.items():
        if key in ("weight", "repetitions") and not _is_positive(value):  # 0 repetitions never end
            raise ValueError(f"{origin}: {key}={shown(repr(value))} is no number above 0")
        if key == "path":
            yield _checked_path(tree, origin)
        elif key != "subflavors":
            yield from _parts(value, origin)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def _checked_path(entry: dict[str, Any], origin: Place) -> tuple[str, str | None, str | None]:
    """(path, file of the splits, split) of a dataset in a blend."""
    path = entry["path"]
    splits = entry.get("split_config")
    for text in (path, splits or "split.yaml"):
        if not isinstance(text, str) or "://" in text.removeprefix(REMOTE) or "\0" in text:
            raise ValueError(f"{origin} names {shown(text)}, which is no path of a file or folder here")
    if splits is not None and Path(splits).name != splits:
        raise ValueError(f"{origin}: split_config={shown(splits)!r} lies outside of the dataset's .nv-meta")
    split = entry.get("split_part")
    if split is not None and not isinstance(split, str):
        raise ValueError(f"{origin}: split_part={shown(split)} is no name of a split")
    return path, splits, split


def _texts(tree: Any) -> Iterator[str]:
    return (node for node in _nodes(tree) if isinstance(node, str))


def _num_expanded(text: str) -> int:
    """An upper bound of the names that braces in a text stand for: name_{000..127}.tar, {a,b}.tar."""
    count = 1
    for first, last in re.findall(r"\{(-?\d{1,18})\.\.(-?\d{1,18})", text):
        count *= abs(int(last) - int(first)) + 1
    for group in re.findall(r"\{[^{}]*,[^{}]*", text):
        count *= 2 + group.count(",")
    return count

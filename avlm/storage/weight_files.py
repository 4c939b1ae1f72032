"""Which files of a model folder hold its weights: those that transformers and PEFT would read, in their order.

One file counts before shards, safetensors before pickles, whatever else lies beside them: a fine-tune is often saved
over a folder of older shards. What is passed over is named in the report.
"""

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from avlm.config.model import shown
from avlm.storage.model_folder import read_json

INDEX = ".index.json"
MODEL = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
WEIGHTS = (*("*.safetensors", "*.gguf", "pytorch_model*.bin", "adapter_model*.bin"), f"*{INDEX}")


@dataclass(frozen=True)
class WeightFiles:
    """Files of a folder that are read, in that order; others that look like weights; tensor -> file of an index."""

    read: list[str]
    aside: list[str] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return _few(self.read) + (f", leaving aside {_few(self.aside)}" if self.aside else "")


def local(given: str | Path) -> Path:
    """A path that a user gave, with ~ written out. ValueError where nothing can have that name."""
    try:
        path = Path(given).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{shown(str(given))} is no path: {getattr(error, 'strerror', None) or error}") from None
    return path


def choose(folder: Path, kind: tuple[str, ...] = MODEL) -> WeightFiles:
    """Raises FileNotFoundError or ValueError where the first of them that is there is not whole."""
    order = _order(folder, kind)
    first = next((name for name in order if (folder / name).is_file()), None)
    there = sorted(path.name for path in folder.iterdir() if any(fnmatch.fnmatch(path.name, each) for each in WEIGHTS))
    if first is None:
        for name in order:
            if (folder / name).is_symlink():  # a cache of the Hub whose file is gone
                raise FileNotFoundError(f"{folder / name} is a link to a file that is not there: download it again")
        beside = f": there is {_few(there)}" if there else ""
        raise FileNotFoundError(f"no {' or '.join(order)} in {folder}{beside}")
    places = read_index(folder / first) if first.endswith(INDEX) else {}
    files = sorted(set(places.values())) or [first]
    for name in files:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: {first} names it")
    return WeightFiles(files, [name for name in there if name not in (*files, first)], places)


def _order(folder: Path, kind: tuple[str, ...]) -> tuple[str, ...]:
    """``kind``, or the one file that a config.json names in its place."""
    path = folder / "config.json"
    named = read_json(path).get("transformers_weights") if kind is MODEL and path.is_file() else None
    if named is None:
        return kind
    if (
        not isinstance(named, str)
        or not _is_plain(named)
        or not named.endswith((".safetensors", f".safetensors{INDEX}"))
    ):
        raise ValueError(f"{path}: transformers_weights={shown(repr(named))} is no safetensors file of the folder")
    return (named,)


def read_index(path: Path) -> dict[str, str]:
    """Tensor -> file of an index of shards."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{path} holds no weight_map that says which tensor is in which file")
    for tensor, name in places.items():
        if not isinstance(name, str) or not _is_plain(name):
            raise ValueError(f"{path} says that {shown(tensor, 100)} is in {shown(repr(name))}, no file of the folder")
    return places


def to_fetch(folder: Path) -> Iterator[list[str]]:
    """What of a folder on the Hub to fetch into ``folder``, step by step; its small files are there already."""
    kinds = [MODEL] if (folder / "config.json").is_file() else []
    for kind in [*kinds, ADAPTER] if (folder / "adapter_config.json").is_file() else kinds:
        for name in _order(folder, kind):
            if not name.endswith(INDEX):
                yield [name]
            if (folder / name).is_file():
                if name.endswith(INDEX):
                    yield sorted(set(read_index(folder / name).values()))
                break


def _is_plain(name: str) -> bool:
    return Path(name).name == name and name.isprintable() and len(name.encode()) < 256


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]} to {names[-1]} ({len(names)} files)"

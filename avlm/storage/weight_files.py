"""Which files of a model folder hold its weights: those that transformers and PEFT would read, in their order, then
those of llama.cpp.

A single file is preferred to shards, and safetensors to pickles, whatever else lies next to them: a fine-tune is often
saved over a folder of older shards. The report names what is left unread.
"""

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from avlm.config.values import shown
from avlm.storage.model_folder import read_json

INDEX = ".index.json"
GGUF = ("model.gguf", "mmproj.gguf")  # of our own export: the decoder; towers and projectors, if it has any
MODEL = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}", GGUF[0])
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
LIKE_WEIGHTS = ("*.safetensors", "*.gguf", "pytorch_model*.bin", "adapter_model*.bin", f"*{INDEX}")


@dataclass(frozen=True)
class WeightFiles:
    read: list[str]  # in this order
    unread: list[str] = field(default_factory=list)  # others that look like weights
    places: dict[str, str] = field(default_factory=dict)  # tensor -> file, from an index

    def __str__(self) -> str:
        read = _few(self.read)
        return f"{read}, leaving {_few(self.unread)} unread" if self.unread else read


def local(given: str | Path) -> Path:
    """A path that a user gave, with ~ expanded. ValueError if no file can have that name."""
    try:
        path = Path(given).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{shown(str(given))} is not a valid path: {getattr(error, 'strerror', None) or error}"
        ) from None
    return path


def choose(folder: Path, kind: tuple[str, ...] = MODEL) -> WeightFiles:
    """The first of ``kind`` that exists. Raises FileNotFoundError or ValueError if it is incomplete."""
    order = _order(folder, kind)
    like_weights = []
    for path in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in LIKE_WEIGHTS):
            like_weights.append(path.name)
    first = _first(folder, order)
    if first is None:
        for name in order:
            if (folder / name).is_symlink():  # the Hub's cache after its file was deleted
                raise FileNotFoundError(f"{folder / name} is a link to a file that is not there: download it again")
        there = f": there is {_few(like_weights)}" if like_weights else ""
        raise FileNotFoundError(f"no {' or '.join(order)} in {folder}{there}")
    places = read_index(folder / first) if first.endswith(INDEX) else {}
    files = sorted(set(places.values())) or [first]
    if first == GGUF[0]:
        files = [name for name in GGUF if (folder / name).is_file()]
    for name in files:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: {first} names it")
    unread = [name for name in like_weights if name not in files and name != first]
    return WeightFiles(files, unread, places)


def _first(folder: Path, order: tuple[str, ...]) -> str | None:
    return next((name for name in order if (folder / name).is_file()), None)


def _order(folder: Path, kind: tuple[str, ...]) -> tuple[str, ...]:
    """``kind``, or the one file that a config.json names instead."""
    path = folder / "config.json"
    if kind is not MODEL or not path.is_file():
        return kind
    named = read_json(path).get("transformers_weights")
    if named is None:
        return kind
    endings = (".safetensors", f".safetensors{INDEX}")
    if not _is_plain(named) or not named.endswith(endings):
        raise ValueError(f"{path}: transformers_weights={shown(repr(named))} is not a safetensors file of the folder")
    return (named,)


def read_index(path: Path) -> dict[str, str]:
    """Tensor -> file of an index of shards."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{path} holds no weight_map that maps each tensor to its file")
    for tensor, name in places.items():
        if not _is_plain(name):
            raise ValueError(f"{path} puts {shown(tensor, 100)} in {shown(repr(name))}, not a file of the folder")
    return places


def to_fetch(folder: Path) -> Iterator[list[str]]:
    """The weight files of a folder on the Hub to fetch into ``folder``, which has the small files already. They come in
    steps, because an index has to be read before the files that it names are known."""
    kinds = {"config.json": MODEL, "adapter_config.json": ADAPTER}
    for config, kind in kinds.items():
        if not (folder / config).is_file():
            continue
        for name in _order(folder, kind):
            if not name.endswith(INDEX):
                yield list(GGUF) if name == GGUF[0] else [name]
            elif (folder / name).is_file():
                yield sorted(set(read_index(folder / name).values()))
            if (folder / name).is_file():
                break


def _is_plain(name: object) -> bool:
    """Whether it can be the name of a file, and is not a path."""
    return isinstance(name, str) and Path(name).name == name and name.isprintable() and len(name.encode()) < 256


def _few(names: list[str]) -> str:
    if len(names) < 4:
        return ", ".join(names)
    return f"{names[0]} to {names[-1]} ({len(names)} files)"

"""Sources of Hugging Face's datasets library: ``hf://NAME?split=train&name=CONFIG&revision=REVISION&streaming=true``.

NAME is a folder or a file here (parquet, or what ``save_to_disk`` wrote), else a data set of the Hub. The library
converts it to Arrow once, in its cache, under a lock that the processes of a machine share; what is opened is
memory-mapped. A set that streams is read from where it lies. No code of a data set is run, and no medium is decoded.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, IterableDataset, ReadInstruction
from huggingface_hub.errors import HfHubHTTPError
from pyarrow import ArrowException, parquet

from avlm.config.run import hf_name
from avlm.config.values import shown
from avlm.storage.hub import local, may_be_on_hub

KEYS = ("split", "name", "revision", "streaming")


@dataclass(frozen=True)
class Source:
    """``name``: as ``data.columns`` and errors call it; ``config``: which of the sets that a name of the Hub stands
    for; ``split``: with slices, such as train[:100]; "" for the only one."""

    name: str
    split: str = ""
    config: str | None = None
    revision: str | None = None
    streaming: bool = False

    @property
    def path(self) -> Path:
        return local(self.name)

    @property
    def label(self) -> str:
        """What the keys of its samples begin with."""
        return f"{self.path.name}/{self.split}" if self.split else self.path.name


def parse(source: str) -> Source:
    """The parts of an hf:// source, as they stand: nothing in them is escaped."""
    _, _, query = source.partition("?")
    given: dict[str, str] = {}
    for item in query.split("&") if query else ():
        key, _, value = item.partition("=")
        if key not in KEYS or not value or key in given:
            raise ValueError(f"{shown(source)}: {shown(item)!r} is not read: give each of {', '.join(KEYS)} once")
        given[key] = value
    streaming = given.get("streaming", "false")
    if streaming not in ("true", "false"):
        raise ValueError(f"{shown(source)}: streaming must be true or false, not {shown(streaming)}")
    name = hf_name(source)
    if not name:
        raise ValueError(f"{shown(source)} names no data set: give hf://NAME?split=train")
    return Source(name, given.get("split", ""), given.get("name"), given.get("revision"), streaming == "true")


def open_set(source: Source) -> Dataset | IterableDataset:
    """The split of a source. ValueError or FileNotFoundError in one line for what cannot be opened."""
    if not source.path.exists() and not may_be_on_hub(source.name):
        raise FileNotFoundError(
            f"no folder or file {shown(source.name)} (a data set of the Hub has a name of the form owner/set)"
        )
    try:
        if _is_empty(source.path):
            raise ValueError("it holds no rows")
        if (source.path / "state.json").is_file() or (source.path / "dataset_dict.json").is_file():
            found = _saved(source)
        else:
            found = _loaded(source)
    except (ConnectionError, HfHubHTTPError) as error:
        raise ValueError(
            f"{shown(source.name)} is not here and could not be fetched from the Hub ({_line(error)}); download it "
            "elsewhere and give the folder"
        ) from None
    except (ValueError, LookupError, TypeError, OSError, AssertionError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"hf://{shown(source.name)} cannot be opened: {_line(error)}") from None
    if isinstance(found, dict):
        raise ValueError(f"hf://{shown(source.name)} has several splits, say which: {', '.join(found)}")
    return found


def _loaded(source: Source) -> Any:
    path, files = source.name, None
    if source.path.is_dir():
        path = str(source.path.resolve())
    elif source.path.exists():
        if source.path.suffix not in (".parquet", ".arrow"):
            raise ValueError(f"a file must be of parquet or Arrow, not {source.path.name}")
        path, files = source.path.suffix.removeprefix("."), str(source.path.resolve())
    if source.streaming and "[" in source.split:
        raise ValueError(f"streaming reads whole splits, not {shown(source.split)}: leave out streaming, or the slice")
    found = datasets.load_dataset(
        path,
        name=source.config,
        data_files=files,
        split=source.split or None,
        revision=source.revision,
        streaming=source.streaming,
    )
    return next(iter(found.values())) if isinstance(found, dict) and len(found) == 1 else found


def _saved(source: Source) -> Any:
    """What save_to_disk wrote. It takes names of splits like all others, and slices of them."""
    if source.streaming or source.config or source.revision:
        raise ValueError("a folder of save_to_disk has splits only: leave out name, revision and streaming")
    found = datasets.load_from_disk(str(source.path))
    splits = dict(found) if isinstance(found, dict) else {str(found.split or "train"): found}
    if not source.split:
        return next(iter(splits.values())) if len(splits) == 1 else splits
    sizes = {name: len(split) for name, split in splits.items()}
    parts = ReadInstruction.from_spec(source.split).to_absolute(sizes)
    return datasets.concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _is_empty(path: Path) -> bool:
    """Whether a folder or file here is a set without rows, which the library does not open."""
    state = path / "state.json"
    if state.is_file():
        return not json.loads(state.read_text()).get("_data_files", True)
    files = [*path.rglob("*.parquet")]
    if path.suffix == ".parquet" and path.is_file():
        files = [path]
    try:
        return bool(files) and not any(parquet.read_metadata(file).num_rows for file in files)
    except (ArrowException, OSError):  # which the library then tells
        return False


def labels_of(found: Dataset | IterableDataset) -> dict[str, list[str]]:
    """The names of the numbers in each column of classes."""
    features = found.features or {}
    return {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}


def _line(error: BaseException) -> str:
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__:
        error = error.__cause__  # its own text only says that there was one
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shown(lines[0])

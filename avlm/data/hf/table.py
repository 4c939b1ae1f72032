"""A set whose rows are found by their number: memory-mapped Arrow files."""

from datasets import Dataset, IterableDataset

from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.data.hf.columns import Columns
from avlm.data.hf.source import Source, labels_of, open_set
from avlm.data.media_folder import MediaFolder
from avlm.data.sample import Sample


class Table:
    """Samples of a set, by number."""

    def __init__(self, source: Source, data: DataConfig) -> None:
        self.source = source
        found = open_set(source)
        self.columns = columns_of(source, found, data)
        # Rows of Arrow hold media as the set has them, in any place, without decoding.
        self._rows = found.select_columns(self.columns.read).with_format("arrow")
        if len(self) == 0:
            raise ValueError(f"hf://{source.name} holds no rows in {source.split or 'its split'}")

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, number: int) -> Sample:
        [row] = self._rows[number].to_pylist()
        return self.columns.sample(row, self.key(number))

    def key(self, number: int) -> str:
        """Counted from 1, as the samples of files are."""
        return f"{self.source.label}:{number + 1}"


def columns_of(source: Source, found: Dataset | IterableDataset, data: DataConfig) -> Columns:
    """How the rows of a set become samples. ValueError if they do not."""
    own = source.path if source.path.is_dir() else source.path.parent
    media = MediaFolder(own, data).read if data.media_root or source.path.exists() else _refuse
    try:
        return Columns(data.columns.get(source.name), found.column_names or [], labels_of(found), media)
    except ValueError as error:
        raise ValueError(f"hf://{source.name}: {error}") from None


def _refuse(name: str) -> bytes:
    raise ValueError(f"{shown(name)} is a path without bytes: set data.media_root to the folder that holds it")

"""What ``energon prepare`` and its questions do for a folder of crude shards."""

import contextlib
import io
import re
from pathlib import Path

import yaml
from megatron.energon.flavors import BaseWebdatasetFactory

from avlm.config.values import shown

CRUDE = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}


SPLITS = ("train", "val", "test")


def prepare(folder: Path, split: str) -> None:
    """Index all shards of a folder. Those whose names begin with a split belong to it, and all others to ``split``."""
    others = f"{split}.*|(?!{'|'.join(SPLITS)}).*"
    index(folder, [(each, others if each == split else f"{each}.*") for each in SPLITS])


def index(folder: Path, parts: list[tuple[str, str]]) -> None:
    """``parts``: (split, regular expression of its shards' names)."""
    shards = sorted(path.name for path in folder.glob("*.tar"))
    parts = [(split, names) for split, names in parts if any(re.match(names, shard) for shard in shards)]
    if not shards:
        raise FileNotFoundError(f"{folder} holds no shards (.tar)")
    kind = folder / ".nv-meta" / "dataset.yaml"
    if kind.is_file() and yaml.safe_load(kind.read_text()) != CRUDE:
        raise ValueError(f"{kind} names another kind of dataset than {shown(CRUDE)}: move it away")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            BaseWebdatasetFactory.prepare_dataset(
                folder, shards, split_parts_patterns=parts, shuffle_seed=None, workers=1
            )
        except SystemExit:
            raise ValueError(f"{folder} cannot be prepared: {' '.join(said.getvalue().split())[:300]}") from None
    kind.write_text(yaml.safe_dump(CRUDE, sort_keys=False))

"""A part of a larger model, written back into it. What the larger one has besides comes from its folder."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from avlm.config.values import counted, shown
from avlm.families.door import WITHIN
from avlm.storage.hub import resolve
from avlm.storage.model_folder import Lazy, read_json
from avlm.storage.weight_files import choose
from avlm.weights.sources import read_files


class Whole:
    """The folder of a larger model, around a part of a format. ValueError if it is no such model."""

    def __init__(self, format: str, name: str):
        if format not in WITHIN:
            raise ValueError(f"--whole {shown(name)} is for --format {' or '.join(WITHIN)}, and the format is {format}")
        self.family: ModuleType = WITHIN[format]
        self.folder = resolve(name)
        self.keys = read_json(self.folder / "config.json")
        model_type, wanted = self.keys.get("model_type"), self.family.WHOLE
        if model_type != wanted:
            raise ValueError(f"--whole {shown(name)} is a {shown(model_type)}, and {format} is a part of {wanted}")
        for file in self.family.WHOLE_FILES:
            if not (self.folder / file).is_file():
                raise ValueError(f"{self.folder} lacks {file}, which transformers reads with the whole model: add it")

    def config_json(self, part: Mapping[str, Any]) -> dict[str, Any]:
        key = self.family.WHOLE_KEY
        return {**self.keys, key: {**(self.keys.get(key) or {}), **part}}

    def tensors(self, part: Mapping[str, Lazy], constants: Mapping[str, Any]) -> dict[str, Lazy]:
        """The tensors of a part under the names that the whole has for them, and the others as they are stored.
        ``constants``: those of the part that only files have, which are better taken from the whole."""
        held = read_files(self.folder, choose(self.folder))
        own = {self.family.WHOLE_PREFIX + name: tensor for name, tensor in part.items() if name not in constants}
        for name, tensor in own.items():
            there = tuple(held[name].get_shape()) if name in held else None
            if there != tensor.shape:
                found = "none" if there is None else f"one of shape {there}"
                raise ValueError(f"{self.folder} has {found} for {name} {tensor.shape}: it is a model of other sizes")
        others = {name: _stored(tensor) for name, tensor in held.items() if name not in own}
        missing = [name for name in constants if self.family.WHOLE_PREFIX + name not in others]
        if missing:
            raise ValueError(f"{self.folder} lacks {counted(len(missing), 'tensor')}, the first {missing[0]}")
        return {**own, **others}

    def copy_files(self, folder: Path) -> None:
        for name in self.family.WHOLE_FILES:
            shutil.copyfile(self.folder / name, folder / name)


def _stored(source: Any) -> Lazy:
    def read() -> Tensor:
        return source[...] if not source.get_shape() else source[:]

    beginning = source[:0] if source.get_shape() else source[...]
    return Lazy(tuple(source.get_shape()), beginning.dtype, read)

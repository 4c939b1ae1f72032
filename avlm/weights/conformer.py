"""Tensors of Conformer blocks in files of Hugging Face's, which differ from ours in two ways.

    ours                     theirs
    conv.scale, conv.shift   a batch norm: weight, bias, running_mean, running_var
    conv.expand, project     convolutions of kernel 1: (O, I, 1) where a linear has (O, I)

    scale = weight / sqrt(var + eps)     shift = bias - mean * scale

What we write is a batch norm of mean 0 and variance 1, whose weight is scale * sqrt(1 + eps).
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avlm.families.parakeet import BATCH_NORM_EPS
from avlm.storage.model_folder import Lazy
from avlm.weights.sources import check_shape

NORM = ("weight", "bias", "running_mean", "running_var")
FOLDED = (".conv.scale", ".conv.shift")  # end names of ours
POINTWISE = (".conv.expand.weight", ".conv.project.weight")


class View:
    """A parameter of ours that is computed of tensors of a file, with the two calls of a safetensors slice. Only what
    is indexed is read."""

    def __init__(self, shape: tuple[int, ...], read: Callable[[Any], Tensor]):
        self.shape = shape
        self.read = read

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        return self.read(index if isinstance(index, tuple) else (index,))


def find(
    name: str, theirs: str, shape: tuple[int, ...], held: Mapping[str, Any], path: Path
) -> tuple[tuple[str, ...], Any] | None:
    """The tensors of a file that a parameter of ours is made of, and a view of them that has its shape. ``theirs``:
    what the file calls the first. None for any other parameter, and if the first is not there. ValueError for those
    that do not fit."""
    if theirs == name or theirs not in held:
        return None
    if name.endswith(POINTWISE):
        check_shape(name, (*shape, 1), held[theirs], f"{path}: {theirs}")
        return (theirs,), View(shape, lambda index: held[theirs][index].flatten(1))
    if not name.endswith(FOLDED):
        return None
    stem = theirs.rpartition(".")[0]
    names = tuple(f"{stem}.{leaf}" for leaf in NORM)
    for each in names:
        if each not in held:
            raise ValueError(f"{path} has no tensor {each}: the batch norm {stem} is not whole")
        check_shape(name, shape, held[each], f"{path}: {each}")

    def folded(index: tuple[slice, ...]) -> Tensor:
        weight, bias, mean, variance = (held[each][index].float() for each in names)
        scale = weight / torch.sqrt(variance + BATCH_NORM_EPS)
        return scale if name.endswith(".scale") else bias - mean * scale

    return names, View(shape, folded)


def written(name: str, theirs: str, tensor: Lazy) -> dict[str, Lazy]:
    """The tensors of a file that a parameter of ours becomes."""
    if name.endswith(POINTWISE):
        shape = (*tensor.shape, 1)
        return {theirs: tensor.changed(lambda matrix_OI: matrix_OI[..., None], shape=shape)}
    if name.endswith(".conv.scale"):
        stem = theirs.rpartition(".")[0]
        unit = math.sqrt(1 + BATCH_NORM_EPS)
        return {
            theirs: tensor.changed(lambda scale_D: scale_D * unit),
            f"{stem}.running_mean": tensor.changed(torch.zeros_like),
            f"{stem}.running_var": tensor.changed(torch.ones_like),
            f"{stem}.num_batches_tracked": Lazy((), torch.int64, lambda: torch.tensor(0)),
        }
    return {theirs: tensor}

"""The linears of experts in files of Hugging Face's: a tensor for each expert, or one of all experts of a layer.

    ours                    gate, up (N, F, D)                             down (N, D, F)
    one for each expert     experts.{e}.gate_proj.weight, up_proj (F, D)   experts.{e}.down_proj.weight (D, F)
    of all, as computed     experts.gate_up_proj (N, 2F, D)                experts.down_proj (N, D, F)
    of all, turned          experts.gate_up_proj (N, D, 2F)                experts.down_proj (N, F, D)

The Hub's Qwen3-MoE has the first, transformers 5 the second, the Hub's Qwen3-VL-MoE the third. We read all of them.

N experts   F intermediate   D hidden
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avlm.families.door import EXPERT, of_all_experts
from avlm.storage.model_folder import Lazy
from avlm.weights.sources import Rows, Stacked, Turned, check_shape

Shape = tuple[int, ...]


def find(
    name: str, theirs: str, shape: Shape, held: Mapping[str, Any], path: Path
) -> tuple[tuple[str, ...], Any] | None:
    """The tensors of a file that hold a parameter of ours, and a view of them that has its shape. ``theirs``: what they
    are called. None for a parameter that is none of experts, and if there is neither the first expert's tensor nor one
    of all. ValueError for those that do not fit."""
    if EXPERT not in theirs:
        return None
    whole = of_all_experts(theirs)
    if whole in held:
        view = _of_all(theirs, shape, held, path)
        check_shape(name, shape, view, f"{path}: {whole}")
        return (whole,), view
    names = tuple(theirs.replace(EXPERT, str(number)) for number in range(shape[0]))
    if names[0] not in held:
        return None
    for each in names:
        if each not in held:
            raise ValueError(f"{path} has no tensor {each}, and the decoder has {shape[0]} experts")
        there = tuple(held[each].get_shape())
        if there != shape[1:]:
            raise ValueError(f"{path}: {each} has shape {there}, and an expert of the decoder {shape[1:]}")
        check_shape(name, shape[1:], held[each], f"{path}: {each}")
    return names, Stacked([held[each] for each in names])


def _of_all(theirs: str, shape: Shape, held: Mapping[str, Any], path: Path) -> Any:
    is_down = theirs.endswith("down_proj.weight")
    num, lines, columns = shape
    inner, hidden = (columns, lines) if is_down else (lines, columns)
    name = of_all_experts(theirs)
    wanted = {"gate_up_proj": (num, 2 * inner, hidden), "down_proj": (num, hidden, inner)}
    stem = name.rpartition(".")[0]
    there = {leaf: tuple(held[f"{stem}.{leaf}"].get_shape()) for leaf in wanted if f"{stem}.{leaf}" in held}
    own = wanted[name.rpartition(".")[2]]
    found = there[name.rpartition(".")[2]]
    if found not in (own, _turned(own)):
        raise ValueError(f"{path}: {name} has shape {found}, and the decoder needs {own} or {_turned(own)}")
    # One of the two may be square. They lie the same way, so the other tells.
    fits_as_is = all(seen == wanted[leaf] for leaf, seen in there.items())
    fits_turned = all(seen == _turned(wanted[leaf]) for leaf, seen in there.items())
    if fits_as_is == fits_turned:
        seen = ", ".join(f"{leaf} {size}" for leaf, size in there.items())
        why = "could lie either way" if fits_as_is else "do not lie the same way"
        raise ValueError(f"{path}: {stem} has {seen}, which {why}: save it with a tensor for each expert")
    whole = Turned(held[name]) if fits_turned else held[name]
    if is_down:
        return whole
    return Rows(whole, inner if ".up_proj." in theirs else 0, inner, dim=1)


def _turned(shape: Shape) -> Shape:
    return shape[0], shape[2], shape[1]


class LastRead:
    """The tensor that was read last, for those that take their part of it one after the other."""

    def __init__(self) -> None:
        self.source: Lazy | None = None
        self.value = torch.empty(0)

    def part(self, source: Lazy, number: int) -> Tensor:
        if self.source is not source:
            self.value = torch.empty(0)  # before the next is read
            self.value, self.source = source.read(), source
        return self.value[number].clone()


def of_each(theirs: str, tensor: Lazy, last: LastRead) -> dict[str, Lazy]:
    """A parameter of ours as a tensor for each expert."""
    parts = {}
    for number in range(tensor.shape[0]):
        read = functools.partial(last.part, tensor, number)
        parts[theirs.replace(EXPERT, str(number))] = Lazy(tensor.shape[1:], tensor.dtype, read)
    return parts


def turned(tensor: Lazy) -> Lazy:
    """A parameter of ours as it lies in a tensor of all experts that is turned."""
    return tensor.changed(functools.partial(torch.transpose, dim0=1, dim1=2), shape=_turned(tensor.shape))

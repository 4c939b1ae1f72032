"""Codes of speech in a packed row.

F rows with codes   K codes of a row
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from avlm.config.model import ModelConfig
from avlm.models.movable import Movable

Step = tuple[str, tuple[str, ...]]  # as in avlm.models.costs


@dataclass(frozen=True)
class Codes(Movable):
    """Codes of speech of rows, for a model that has a codec; there may be none.

    rows       int64 (F,): where in token_T, ascending; each of them has a target
    before_FK  int64: the codes of the row before, which are added to the input
    code_FK    int64: those of the row, which are learned
    """

    rows: Tensor
    before_FK: Tensor
    code_FK: Tensor

    @staticmethod
    def none(model: ModelConfig) -> "Codes | None":
        if model.codec is None:
            return None
        nothing = torch.empty(0, model.codec.num_codebooks, dtype=torch.int64)
        return Codes(torch.arange(0), nothing, nothing)


def code_counts(num_rows: int, num_codes: int) -> dict[str, int]:
    """Of rows with codes of speech, each a document of the depth decoder."""
    pairs = num_rows * num_codes * (num_codes + 1) // 2
    return {"code_rows": num_rows, "codes": num_rows * num_codes, "code_pairs": pairs}


def codec_steps(num_codebooks: int, decoder: Iterable[Step]) -> Iterator[Step]:
    """The steps of a codec as ``avlm.models.costs`` counts them, of those of a decoder with the sizes of its own."""
    yield "", ("embedding",)
    yield "codes", ("into",)
    of_codes = {"tokens": "codes", "token_pairs": "code_pairs"}
    for count, paths in decoder:
        if paths[0].startswith("blocks."):
            yield of_codes.get(count, count), paths
    yield "", ("norm",)
    for k in range(num_codebooks):
        yield "code_rows", (f"heads.{k}",)

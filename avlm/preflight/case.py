"""A stage of a run on a layout of ranks: which parameters train, and what of them a rank holds."""

import math
from dataclasses import dataclass
from functools import cached_property

from avlm.config.decoder import ExpertsConfig
from avlm.config.model import ModelConfig
from avlm.config.run import Config, Recompute, StageConfig
from avlm.models.costs import largest_block
from avlm.models.freezing import trained_shapes
from avlm.models.shapes import Shapes
from avlm.preflight.layout import Layout


@dataclass(frozen=True)
class Case:
    """A stage of a run on a layout of ranks."""

    config: Config
    stage: StageConfig
    layout: Layout
    shapes: Shapes

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def itemsize(self) -> int:
        return self.layout.dtype.itemsize

    @property
    def tokens(self) -> int:
        """Tokens of a row on a rank."""
        return self.stage.data.seq_length // self.layout.context

    @cached_property
    def trained(self) -> Shapes:
        return trained_shapes(self.stage, self.model, self.shapes)

    def recompute(self, module: str) -> Recompute:
        return getattr(self.config.train.recompute, "decoder" if module == "cross" else module)

    def numbers(self, prefix: str) -> int:
        """How many numbers the parameters with this prefix hold on a rank that has gathered them."""
        return sum(math.prod(self.layout.share(name, shape)) for name, shape in _having(self.shapes, prefix))

    def trained_numbers(self, prefix: str) -> int:
        return sum(math.prod(self.layout.share(name, shape)) for name, shape in _having(self.trained, prefix))

    def gathered_bytes(self, prefix: str) -> int:
        """Of units of FSDP that are gathered."""
        total = 0
        for name, shape in _having(self.shapes, prefix):
            total += self.layout.gathered(name) * math.prod(self.layout.share(name, shape))
        return total

    def largest_block(self, module: str) -> str:
        """The prefix of its parameters."""
        return f"{largest_block(module, self.model)}."

    def experts_of(self, block: str) -> ExpertsConfig | None:
        """``block``: the path of a block of the decoder."""
        decoder = self.model.decoder
        return decoder.experts if decoder.has_experts(int(block.rpartition(".")[2])) else None


def _having(shapes: Shapes, prefix: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, shape) for name, shape in shapes.items() if name.startswith(prefix)]

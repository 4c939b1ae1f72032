"""How long a step spends in each part of the model: forward, backward and recomputation.

A step is cut at marks. A part begins where its forward is called, and again where the gradient of its output arrives;
what follows, up to the next mark, is its time. So the parts' seconds add up to the step's, without the wait for data.
On a GPU a mark is an event of the stream that computes: nothing waits for it. What a part waits for (other ranks, the
host) is its time as well.
"""

import itertools
import time
from functools import partial

import torch
from torch import Tensor, nn

from avlm.models.avlm import AVLM

REST = "optimizer"  # gradient sums that come after the backward, clipping, the optimizer
Mark = tuple[str, float | torch.cuda.Event]


class PartClock:
    """Marks of one step at a time, between ``start`` and ``stop``; what runs at other times leaves none."""

    def __init__(self, model: AVLM, device: torch.device):
        self.device = device
        self.marks: list[Mark] | None = None
        parts = dict(model.named_children())
        for name, module in [*parts.items(), ("head", model.decoder.head), ("decoder", model.decoder.embedding)]:
            module.register_forward_pre_hook(partial(self._forward, name))
            module.register_forward_hook(partial(self._output, name))

    def start(self) -> None:
        self.marks = []
        self._mark(REST)

    def end_of_backward(self) -> None:
        self._mark(REST)

    def stop(self) -> list[Mark]:
        """The step's marks in order, for ``seconds``; none without ``start``."""
        self._mark("")
        marks, self.marks = self.marks or [], None
        return marks

    def _mark(self, name: str) -> None:
        if self.marks is None:
            return
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((name, now))

    def _forward(self, name: str, module: nn.Module, inputs: tuple) -> None:
        self._mark(name)

    def _output(self, name: str, module: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if self.marks is not None and first.requires_grad:
            first.register_hook(lambda _: self._mark(name))


def seconds(marks: list[Mark]) -> dict[str, float]:
    """Part -> seconds. The device must have passed the last mark."""
    total: dict[str, float] = {}
    for (name, begin), (_, end) in itertools.pairwise(marks):
        passed = end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
        total[name] = total.get(name, 0.0) + passed
    return total

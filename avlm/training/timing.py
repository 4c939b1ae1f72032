"""How long a step spends in each part of the model: forward, backward and recomputation.

A step is cut at marks. A part begins where its forward is called, and again where the gradient of its output arrives;
what follows, up to the next mark, is its time: so the parts' seconds add up to those of ``train_step``. What a part
waits for is its time as well: the host, other ranks, its weights. (Of media that were encoded elsewhere, the gradients'
way back is the projector's.) On a GPU a mark is an event of the stream that computes, and nothing waits for it.
"""

import itertools
import time
from functools import partial

import torch
from torch import Tensor, nn

from avlm.models.avlm import AVLM

REST = "other"  # the batch on its way to the device, clipping, the optimizer, the sum of losses
Mark = tuple[str, float | torch.cuda.Event]


class PartClock:
    """Marks of one step at a time, between ``start`` and ``stop``; what runs at other times leaves none."""

    def __init__(self, model: AVLM, device: torch.device):
        self.device = device
        self.marks: list[Mark] | None = None
        # Before the hooks of FSDP2, so that a part waits for its own weights. The root's hold the embedding.
        model.register_forward_pre_hook(partial(self._forward, "decoder"), prepend=True)
        inner = (("head", model.decoder.head), ("decoder", model.decoder.embedding))
        for name, module in (*model.named_children(), *inner):
            module.register_forward_pre_hook(partial(self._forward, name), prepend=True)
            module.register_forward_hook(partial(self._output, name), prepend=True)

    def start(self) -> None:
        self.marks = []
        self._mark(REST)

    def end_of_backward(self) -> None:
        self._mark(REST)

    def stop(self) -> list[Mark]:
        """The step's marks in order, for ``seconds``; none without ``start``."""
        self._mark("")  # an end, and no part's beginning
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

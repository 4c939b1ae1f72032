"""``debug.profile``: what chosen ranks did in some steps of a run, for reading later.

<run>/profile/
    step_00000003_rank_00000.json.gz          Chrome trace, for ui.perfetto.dev; avlm.training.profile reads it
    step_00000003_rank_00000_memory.pickle    of a GPU: every allocation, for docs.pytorch.org/memory_viz
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.autograd.profiler import record_function

from avlm.config.run import DebugConfig
from avlm.models.avlm import AVLM
from avlm.parallel.mesh import World

PART = "avlm/"  # begins the name of a part of the model in a trace
STEP = "avlm step"
MOST_ALLOCATIONS = 100_000  # that a memory snapshot remembers


class Profiler:
    """Traces the steps of ``debug.profile`` on the ranks that it names. Parts of the model are marked by hooks, which
    are there in these steps alone."""

    def __init__(self, debug: DebugConfig, world: World, model: AVLM, run: Path) -> None:
        self.steps = range(0)
        if debug.profile is not None and world.rank in debug.profile_ranks:
            first, count = debug.profile
            self.steps = range(first, first + count)
        self.world = world
        self.model = model
        self.folder = run / "profile"
        self.profile: torch.profiler.profile | None = None

    def step(self, number: int) -> None:
        """Step ``number`` begins, counted from 1."""
        if self.profile is not None:
            self.mark.__exit__(None, None, None)
        if number not in self.steps:
            self.end()
            return
        if self.profile is None:
            self._begin(number)
        self.mark = record_function(f"{STEP} {number}")
        self.mark.__enter__()

    def end(self) -> None:
        """No more steps: write what was seen of them."""
        if self.profile is None:
            return
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
            torch.cuda.memory._dump_snapshot(f"{self.path}_memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        self.profile.stop()
        self.profile.export_chrome_trace(f"{self.path}.json.gz")
        self.profile = None
        for hook in self.hooks:
            hook.remove()

    def _begin(self, number: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"step_{number:08d}_rank_{self.world.rank:05d}"
        self.hooks = [hook for name, module in parts(self.model) for hook in _marked(module, PART + name)]
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.world.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)
        self.profile = torch.profiler.profile(activities=activities, acc_events=True)
        self.profile.start()


def parts(model: AVLM) -> Iterator[tuple[str, nn.Module]]:
    """What a trace names: towers, projectors, and what lies in the decoder; and the blocks of all of them."""
    for name, module in model.named_children():
        inner = list(module.named_children())
        yield from ((f"{name}.{each}", child) for each, child in inner if name == "decoder" and each != "blocks")
        yield from ((f"{name}.blocks.{i}", block) for i, block in enumerate(getattr(module, "blocks", ())))
        yield name, module


def _marked(module: nn.Module, name: str) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that mark the forward of a module. Gathering and freeing its weights, in hooks of FSDP, lies outside."""
    marks: list[record_function] = []

    def before(module: nn.Module, inputs: tuple) -> None:
        marks.append(record_function(name))
        marks[-1].__enter__()

    def after(module: nn.Module, inputs: tuple, output: object) -> None:
        marks.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after, prepend=True)]

"""What happens between two steps, on every rank before the same one."""

import gc
from pathlib import Path

from torch.optim import AdamW

from avlm.config.run import Config
from avlm.models.avlm import AVLM
from avlm.parallel.mesh import World
from avlm.training.log import Log
from avlm.training.profiler import Profiler

STEPS_PER_COLLECTION = 50


class Between:
    """The steps of one stage: tells the watch that one begins, collects garbage, profiles, times updates.

    A collection of the oldest generation takes as long as some steps, and Python would begin it on each rank at another
    step, where all others wait. So it is left to ``step``, and what is there before the first step is not looked at
    again. The young generations are collected as usual.
    """

    def __init__(self, config: Config, world: World, model: AVLM, adam: AdamW, log: Log, first_step: int) -> None:
        self.world = world
        self.first_step = first_step
        self.profiler = Profiler(config.debug, world, model, Path(config.output_dir))
        log.slowest.time_updates(adam)
        world.watch.enter("start", first_step + 1)
        gc.collect()
        gc.freeze()
        young, middle, _ = gc.get_threshold()
        gc.set_threshold(young, middle, 2**31 - 1)

    def step(self, done: int) -> None:
        """Called before every step; ``done``: steps of the run so far."""
        if done > self.first_step:  # the first step of a stage belongs to its start: its blocks are compiled
            self.world.watch.enter("step", done + 1)
        if done % STEPS_PER_COLLECTION == 0:
            gc.collect()
        self.profiler.step(done + 1)

    def end(self) -> None:
        """After the last step."""
        self.profiler.end()

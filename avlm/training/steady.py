"""What happens between two steps, on every rank before the same one."""

import gc

from avlm.parallel.mesh import World

STEPS_PER_COLLECTION = 50


class Between:
    """The steps of one stage: tells the watch that one begins, and collects garbage.

    A collection of the oldest generation takes as long as some steps, and Python would begin it on each rank at another
    step, where all others wait. So it is left to ``step``, and what is there before the first step is not looked at
    again. The young generations are collected as usual.
    """

    def __init__(self, world: World, first_step: int) -> None:
        self.world = world
        self.first_step = first_step
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

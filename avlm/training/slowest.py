"""Which rank the others wait for: what each rank did alone in its last steps, compared at the steps that are shown.

A step takes all ranks the same time, as they wait for each other in it. So what is compared is time in which a rank
waits for no other: for its data, and in the optimizer's update, which is slow where a GPU or a whole machine is slow.
"""

import socket
import statistics
import time

import torch

from avlm.parallel.mesh import World
from avlm.storage.run_folder import Record

SHARE_OF_STEP = 0.1  # by which a rank's time has to exceed the median's
SHARE_OF_MEMORY = 0.2
WORDS = {
    "data_seconds": "waits {value:.2f} s for data",
    "update_seconds": "takes {value:.2f} s for the update",
    "memory_gib": "has used {value:.1f} GiB",
}


class Slowest:
    """The measurements of this rank since the last comparison."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.waits: list[float] = []
        self.updates: list = []  # (begin, end) of each

    def time_updates(self, adam: torch.optim.Optimizer) -> None:
        adam.register_step_pre_hook(lambda *_: self.updates.append([self._now()]))
        adam.register_step_post_hook(lambda *_: self.updates[-1].append(self._now()))

    def compare(self, record: Record) -> tuple[dict[str, float], str]:
        """For metrics.jsonl and the console: the rank that is worst in something, where that costs the others time or
        takes memory; most often none. Called by all ranks when their device has finished the steps."""
        data_seconds = statistics.mean(self.waits) if self.world.leads_row else None  # the others wait for this rank
        own = {
            "host": socket.gethostname(),
            "data_seconds": data_seconds,
            "update_seconds": statistics.mean(self._seconds(*update) for update in self.updates),
            "memory_gib": record["memory_gib"],
        }
        self.waits, self.updates = [], []
        everyone = self.world.gather(own)
        found = {}
        words = []
        for name, template in WORDS.items():
            values = {rank: of_rank[name] for rank, of_rank in enumerate(everyone) if of_rank[name] is not None}
            usual = statistics.median(values.values())
            rank = max(values, key=values.__getitem__)
            bound = SHARE_OF_MEMORY * usual if name == "memory_gib" else SHARE_OF_STEP * record["step_seconds"]
            if values[rank] - usual > bound:
                found |= {f"worst/{name}": values[rank], f"worst/{name}/rank": rank}
                words.append(f"rank {rank} on {everyone[rank]['host']} {template.format(value=values[rank])}")
        return found, ", ".join(words)

    def _now(self) -> torch.cuda.Event | float:
        if self.world.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
        return end - begin if self.world.device.type == "cpu" else begin.elapsed_time(end) / 1000

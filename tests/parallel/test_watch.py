"""A rank that hangs is named within ``parallel.timeouts``."""

import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.distributed.distributed_c10d import _world

from avlm.config.parallel import ParallelConfig, TimeoutsConfig
from avlm.parallel import mesh
from avlm.parallel.watch import LATER, Beat, Watch, missing
from avlm.storage.run_folder import read_records
from tests.parallel.spawn import run_ranks
from tests.training.test_train import ENVIRONMENT, ROOT, command, wait_until, write_config

WAITS = "in step 7 at sum (avlm/parallel/mesh.py:83)"


@pytest.mark.parametrize(
    "after, line",
    [
        ({2: Beat(4, "b", WAITS)}, f"rank 2 on b was last {WAITS}, and does not answer"),
        ({2: None}, "rank 2 has not begun, and does not answer"),
        (
            {2: Beat(7, "b", "in step 7 at read (avlm/data/jsonl.py:9)")},
            f"rank 2 on b is in step 7 at read (avlm/data/jsonl.py:9); the others are {WAITS}",
        ),
        ({}, f"all 4 ranks are {WAITS}: the network between them, or a kernel, does not end"),
    ],
    ids=["stopped", "never there", "elsewhere", "together"],
)
def test_the_rank_that_the_others_wait_for_is_named(after, line):
    before = [Beat(4, host, WAITS) for host in "aabb"]
    beats = [after.get(rank, Beat(7, host, WAITS)) for rank, host in enumerate("aabb")]
    assert missing(before, beats) == line


def test_of_two_ranks_at_different_places_none_is_said_to_be_the_odd_one():
    """One waits for its loader, and the other one for its row."""
    before = [Beat(4, "a", WAITS)] * 2
    beats = [Beat(7, "a", "in step 7 at __iter__ (avlm/data/rows.py:73)"), Beat(7, "a", WAITS)]
    line = f"ranks are at different places: rank 0 on a is {beats[0].doing}, rank 1 on a is {WAITS}"
    assert missing(before, beats) == line


def bounds_at_the_start(folder: Path) -> set[float]:
    """Seconds, of all groups."""
    timeouts = TimeoutsConfig(start=5000.0)
    world = mesh.start(ParallelConfig(context=2, timeouts=timeouts), torch.device("cpu"), folder)
    group_of_a_stage = world.new_group("context")
    world.watch.enter("start", 1)
    groups = list(_world.pg_map)
    assert group_of_a_stage in groups
    world.watch.end()
    return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}


def test_torch_does_not_end_a_start_before_its_time_is_up(tmp_path):
    """It gives gloo 30 minutes, and NCCL 10."""
    assert run_ranks(bounds_at_the_start, 2, tmp_path) == [{5000 + LATER}] * 2


def test_where_a_rank_is_is_where_the_thread_is_that_it_waits_for():
    """It loads rows, or writes a checkpoint: the others wait for them in the same line as this rank."""
    watch, gate = Watch(), threading.Event()

    def read_a_disk_that_hangs() -> str:
        gate.wait()
        return "a row"

    places = []
    timer = threading.Timer(0.2, lambda: (places.append(watch._place()), gate.set()))
    timer.start()
    assert watch.result(ThreadPoolExecutor(1, "rows").submit(read_a_disk_that_hangs), "rows") == "a row"
    timer.join()
    assert places[0].startswith("read_a_disk_that_hangs (tests/parallel/test_watch.py:")


def rank_of(pid: str) -> int:
    """That of a child of torchrun."""
    text = Path(f"/proc/{pid}/environ").read_text()
    return int(dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry).get("RANK", -1))


def test_a_rank_that_stops_in_a_step_is_named_and_the_others_leave_their_stacks(tmp_path):
    stages = [{"name": "all", "steps": 10_000, "train": ["decoder"]}]
    path = write_config(tmp_path, stages=stages, train={"precision": "fp32"}, checkpoint={"every": 10_000})
    launch = command(path, "parallel.timeouts.step=3", ranks=2)
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(launch, cwd=ROOT, env=ENVIRONMENT, **pipes)
    wait_until(lambda: len(read_records(tmp_path / "run" / "metrics.jsonl")) > 2 or process.poll() is not None)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    [pid] = [int(child) for child in children if rank_of(child) == 1]
    os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    wait_until(lambda: list(tmp_path.glob("run/hang/*/gloo_0.json")) or process.poll() is not None, 60)
    time.sleep(4)  # the line comes after the files
    os.kill(pid, signal.SIGKILL)  # torchrun would give it 30 seconds
    _, errors = process.communicate(timeout=60)
    [line] = [line for line in errors.splitlines() if line.startswith("error: no progress")]
    assert "for 3 s (parallel.timeouts.step): rank 1 on " in line and ", and does not answer; stacks" in line, line
    assert time.monotonic() - stopped < 40
    [stacks] = tmp_path.glob("run/hang/step_*/stacks_00000.txt")
    assert "in train_step" in stacks.read_text() or "in sum" in stacks.read_text()

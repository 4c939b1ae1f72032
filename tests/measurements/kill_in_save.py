"""kill -9 at random moments of a run of two ranks that saves in the background: nothing that was complete is lost, and
the losses and weights at the end are those of a run that was never interrupted, bit for bit.

    python -m tests.measurements.kill_in_save [KILLS]

Kills both ranks, or one at random, 50 times (KILLS), most often while a checkpoint is being written.
"""

import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import yaml

import train
from avlm.config.load import load_config
from avlm.process.exit import run_command
from avlm.storage.checkpoint_files import MARKER
from avlm.storage.run_folder import complete_checkpoints, read_progress, read_records
from avlm.weights.sources import open_checkpoint
from tests.parallel.small import TREE

STEPS_OF_A_KILL = 3  # the run is this many times as long as there are kills, so that it is not over too early
DECODER = {**TREE["model"]["decoder"], "hidden_size": 256, "intermediate_size": 512}
FOREVER = 120.0  # seconds, for what takes one


def write_config(folder: Path, steps: int, **changes) -> Path:
    first, second = steps // 2, steps - steps // 2
    tree = {
        **{**TREE, "output_dir": str(folder / "run"), "device": "cpu"},
        "model": {**TREE["model"], "decoder": DECODER},
        "data": {"train": "synthetic:documents=2,images=2,clips=1,seconds=1", "seq_length": 64, "num_workers": 0},
        "stages": [
            {"name": "align", "steps": first, "train": ["vision_projector", "audio_projector"]},
            {"name": "all", "steps": second, "train": ["decoder", "vision_projector"]},
        ],
        "train": {"precision": "fp32"},
        "checkpoint": {"every": 2, "keep": 1, "async_save": True, **changes},
    }
    folder.mkdir(parents=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(config: Path) -> list[multiprocessing.Process]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")  # a fork of a process that ran a backward cannot run one
    context.set_forkserver_preload(["train"])
    ranks = [context.Process(target=_rank, args=(config, rank, port), daemon=True) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    return ranks


def _rank(config: Path, rank: int, port: int) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(os.open(config.with_name("out.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    run_command(lambda: train.main(load_config(config)))


def wait_until(condition, ranks: list[multiprocessing.Process]) -> None:
    """Until it is so, or a rank ends."""
    deadline = time.monotonic() + FOREVER
    while not condition() and all(rank.is_alive() for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def newest(run: Path) -> int:
    done = complete_checkpoints(run)
    return read_progress(done[-1]).step if done else 0


def changed(folder: Path) -> int:
    """When a folder last changed, in ns; 0 if there is none."""
    try:
        return folder.stat().st_ctime_ns
    except FileNotFoundError:
        return 0


def is_writing(run: Path) -> bool:
    return any(not (folder / MARKER).exists() for folder in run.glob("checkpoints/step_*") if int(folder.name[5:]) > 0)


def kill_once(config: Path, generator: random.Random) -> str:
    """Start the run, kill it, and return at which moment. AssertionError if a complete checkpoint was lost."""
    run = config.parent / "run"
    begun = newest(run)
    path = run / "checkpoints" / f"step_{begun + 2 * generator.randint(1, 2):08d}"
    remains = changed(path)  # of the kill before
    ranks = start(config)
    if generator.random() < 0.7:
        wait_until(lambda: changed(path) not in (0, remains), ranks)
        time.sleep(generator.uniform(0, 0.03))
    else:
        wait_until(lambda: newest(run) > begun, ranks)
        time.sleep(generator.uniform(0, 0.3))
    before = newest(run)
    moment = "while a checkpoint was written" if is_writing(run) else "between checkpoints"
    victims = ranks if generator.random() < 0.5 else [generator.choice(ranks)]
    for rank in victims:
        os.kill(rank.pid, signal.SIGKILL)
    for rank in ranks:
        rank.join(FOREVER)
        assert not rank.is_alive(), "a rank outlives the other"
    after = newest(run)
    assert after >= before >= begun, f"step {before} was complete, {after} is left"
    for path in complete_checkpoints(run)[-1:]:
        for stored in open_checkpoint(path).values():
            stored[:]  # with its checksum
    return moment


def result(run: Path) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    """(loss by step, weights at the end)."""
    losses = {row["step"]: row["loss"] for row in read_records(run / "metrics.jsonl") if "loss" in row}
    return losses, {name: stored[:] for name, stored in open_checkpoint(complete_checkpoints(run)[-1]).items()}


def to_end(config: Path) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    ranks = start(config)
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0, (config.parent / "out.txt").read_text()[-2000:]
    return result(config.parent / "run")


def try_kills(folder: Path, kills: int, seed: int = 0) -> Counter:
    """How many kills came at which moment. AssertionError unless the run ends as one that was never interrupted."""
    generator = random.Random(seed)
    steps = STEPS_OF_A_KILL * kills + 6
    expected_losses, expected = to_end(write_config(folder / "whole", steps, every=steps))
    config = write_config(folder / "killed", steps)
    moments = Counter()
    for _ in range(kills):
        if newest(config.parent / "run") >= steps - 4:
            break
        moments[kill_once(config, generator)] += 1
    losses, weights = to_end(config)
    assert losses == expected_losses and len(losses) == steps
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    return moments


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    with tempfile.TemporaryDirectory() as folder:
        moments = try_kills(Path(folder), kills)
    for moment, count in moments.items():
        print(f"{count} kills {moment}")
    print(
        f"{moments.total()} kills: no complete checkpoint was lost; losses and weights as without a kill, bit for bit"
    )


if __name__ == "__main__":
    main()

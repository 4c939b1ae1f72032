"""What a run does when something fails: ``python -m tests.measurements.faults [CASE ...]`` (all: 10 minutes).

Each case starts train.py as users do, does the damage, and prints how long it took, how it ended and what it said.

killed      a rank is killed in a step; the same command continues
restarted   the same, with --max-restarts
stopped     a rank is stopped in a step: parallel.timeouts
signalled   SIGTERM to every process, data workers too; the same command continues
replaced    of two launchers one is killed and started again, with and without TORCH_DISABLE_SHARE_RDZV_TCP_STORE
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from avlm.storage.run_folder import complete_checkpoints, read_records
from tests.training.test_train import ENVIRONMENT, ROOT, WORDS, text_data, wait_until, write_config

STEPS = 40
STAGES = [{"name": "all", "steps": STEPS, "train": ["decoder", "vision_projector"]}]
LAUNCHER = [sys.executable, "-m", "torch.distributed.run"]
STANDALONE = [*LAUNCHER, "--standalone", "--nproc-per-node", "3"]
STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


class Run:
    """One launcher, and what it wrote."""

    def __init__(self, folder: Path, launcher: list[str], *overrides: str, **environment: str) -> None:
        self.folder = folder / "run"
        self.log = folder / f"log_{time.monotonic_ns()}"
        command = [*launcher, "train.py", str(folder / "config.yaml"), *overrides]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=ENVIRONMENT | environment, stdout=log, stderr=subprocess.STDOUT
            )

    def losses(self) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in read_records(self.folder / "metrics.jsonl") if "loss" in row}

    def reach(self, step: int, seconds: float = 200) -> None:
        wait_until(lambda: len(self.losses()) >= step or self.process.poll() is not None, seconds)

    def children(self) -> list[int]:
        """Ranks and their data workers."""
        found, parents = [], [self.process.pid]
        while parents:
            listed = subprocess.run(["pgrep", "-P", ",".join(map(str, parents))], capture_output=True, text=True).stdout
            parents = [int(pid) for pid in listed.split()]
            found += parents
        return found

    def rank(self, number: int) -> int:
        """The process of a rank."""
        for pid in self.children():
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            if f"RANK={number}" in variables:
                return pid
        raise LookupError(f"no rank {number}")

    def said(self, *words: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if any(word in line for word in words)]


def prepared(folder: Path, **changes) -> dict[int, float]:
    """Write the config; the losses of an uninterrupted run."""
    write_config(folder, **({"stages": STAGES, "train": {"precision": "fp32", "log_every": 1}} | changes))
    whole = Run(folder, STANDALONE, f"output_dir={folder / 'whole'}")
    whole.folder = folder / "whole"
    assert whole.process.wait() == 0, whole.log.read_text()[-2000:]
    return whole.losses()


def continued(folder: Path, expected: dict[int, float]) -> str:
    again = Run(folder, STANDALONE)
    code = again.process.wait()
    [resumed] = again.said("resuming")
    return f"the same command: {resumed}; exit code {code}; losses bit for bit: {again.losses() == expected}"


def killed(folder: Path) -> None:
    expected = prepared(folder)
    run = Run(folder, STANDALONE)
    run.reach(9)
    began = time.monotonic()
    os.kill(run.rank(1), signal.SIGKILL)
    code = run.process.wait()
    print(f"  ended after {time.monotonic() - began:.1f} s with {code}; {run.said('error')[:2]}")
    print(f"  {continued(folder, expected)}")


def restarted(folder: Path) -> None:
    expected = prepared(folder)
    run = Run(folder, [*STANDALONE, "--max-restarts", "2"])
    run.reach(9)
    os.kill(run.rank(1), signal.SIGKILL)
    began = time.monotonic()
    wait_until(lambda: run.said("resuming") or run.process.poll() is not None)
    print(f"  resumed after {time.monotonic() - began:.1f} s: {run.said('resuming')}")
    print(f"  exit code {run.process.wait()}; losses bit for bit: {run.losses() == expected}")


def stopped(folder: Path) -> None:
    write_config(folder, stages=STAGES, train={"precision": "fp32"}, checkpoint={"every": 4, "keep": 2})
    run = Run(folder, STANDALONE, "parallel.timeouts.step=10", "stages.all.steps=100000")
    run.reach(9)
    began = time.monotonic()
    os.kill(run.rank(1), signal.SIGSTOP)
    wait_until(lambda: run.said("no progress") or run.process.poll() is not None)
    print(f"  said after {time.monotonic() - began:.1f} s: {run.said('no progress')}")
    code = run.process.wait()
    print(f"  ended after {time.monotonic() - began:.1f} s with {code}")
    print(f"  left {sorted(path.name for path in run.folder.glob('hang/*/*'))}")


def signalled(folder: Path) -> None:
    stages = [{**STAGES[0], "train": ["decoder"]}]
    expected = prepared(folder, data=text_data(folder), model=WORDS, stages=stages)
    run = Run(folder, STANDALONE)
    run.reach(9)
    began = time.monotonic()
    for pid in [*run.children(), run.process.pid]:
        os.kill(pid, signal.SIGTERM)
    code = run.process.wait()
    print(f"  ended after {time.monotonic() - began:.1f} s with {code}; {run.said('stopped by a signal')}")
    print(f"  complete checkpoints: {[path.name for path in complete_checkpoints(run.folder)]}")
    print(f"  {continued(folder, expected)}")


def replaced(folder: Path) -> None:
    for name, variables in {"as torch has it": {}, f"{STORE}=1": {STORE: "1"}}.items():
        place = folder / str(len(variables))
        write_config(place, stages=STAGES, train={"precision": "fp32", "log_every": 1}, checkpoint={"every": 4})
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        node = [*LAUNCHER, "--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-id", "faults"]
        node += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--max-restarts", "3"]
        first = Run(place, node, "stages.all.steps=400", **variables)
        time.sleep(3)  # so that it keeps the store
        second = Run(place, node, "stages.all.steps=400", **variables)
        first.reach(6)
        second.process.kill()
        second.process.wait()
        began = time.monotonic()
        time.sleep(5)
        again = Run(place, node, "stages.all.steps=400", **variables)
        codes = [run.process.wait(300) for run in (first, again)]
        seconds = time.monotonic() - began
        print(f"  {name}: {len(first.losses())} of 400 steps {seconds:.0f} s after the kill; exit codes {codes}")
        print(f"    {[line[:160] for line in first.said('resuming', 'wait timeout')][-1:]}")


CASES = [killed, restarted, stopped, signalled, replaced]


def main() -> None:
    names = sys.argv[1:] or [case.__name__ for case in CASES]
    for case in CASES:
        if case.__name__ in names:
            print(case.__name__, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                case(Path(folder))


if __name__ == "__main__":
    main()

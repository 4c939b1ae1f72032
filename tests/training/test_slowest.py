"""The rank that the others wait for is named where it matters."""

import time

import train
from avlm.config.load import load_config
from avlm.storage.run_folder import read_records
from avlm.training import slowest
from tests.parallel.spawn import run_ranks
from tests.training.test_train import write_config

STAGES = [{"name": "all", "steps": 4, "train": ["decoder"]}]


class Late:
    """Rows that come late."""

    def __init__(self, loader) -> None:
        self.loader = loader

    def __iter__(self):
        for row in self.loader:
            time.sleep(0.5)
            yield row

    def state(self):
        return self.loader.state()


def with_a_slow_loader(path) -> list[str]:
    """What the first rank says in a run in which rank 2 reads slowly."""
    lines = []
    opened = train.open_loader
    train.open_loader = lambda stream, state: (Late if stream.rank == 2 else lambda it: it)(opened(stream, state))
    slowest.socket.gethostname = lambda: "node7"
    train.Log._print = lambda log, line, file: lines.append(line)
    train.main(load_config(path))
    return lines


def test_a_rank_that_waits_for_its_data_is_named_at_log_steps_with_its_machine(tmp_path):
    path = write_config(tmp_path, stages=STAGES, train={"precision": "fp32", "log_every": 2})
    lines, _, _ = run_ranks(with_a_slow_loader, 3, path)
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["1/4", "2/4", "4/4"]
    assert "rank" not in steps[0] and all("rank 2 on node7 waits 0.5" in line for line in steps[1:]), steps
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    found = [record.get("worst/data_seconds/rank") for record in records]
    assert found == [None, 2, None, 2]
    assert 0.5 < records[1]["worst/data_seconds"] < 0.7

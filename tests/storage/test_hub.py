"""Models of the Hub, where several ranks of a machine need the same one."""

import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import huggingface_hub
import pytest

from avlm.storage.hub import resolve

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The file with a line for each rank that a hub of 0.3 seconds answers."""
    asked = tmp_path / "asked"
    asked.touch()

    def download(name, local_files_only, **patterns):
        with asked.open("a") as file:
            file.write("cache\n" if local_files_only else "hub\n")
        time.sleep(0 if local_files_only else 0.3)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    return asked


def start(count):
    ranks = [FORK.Process(target=resolve, args=("owner/model", False)) for _ in range(count)]
    for rank in ranks:
        rank.start()
    return ranks


def test_one_rank_of_a_machine_asks_the_hub_and_each_start_asks_again(asked, monkeypatch):
    for restart in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
        for rank in start(3):
            rank.join(20)
            assert rank.exitcode == 0
    assert asked.read_text().split() == ["hub", "cache", "cache"] * 2


def of_machine(name):
    os.uname = lambda: SimpleNamespace(nodename=name)
    resolve("owner/model", weights=False)


def test_machines_that_share_a_cache_ask_once_each(asked):
    ranks = [FORK.Process(target=of_machine, args=(name,)) for name in ("a", "b") * 3]
    for rank in ranks:
        rank.start()
        time.sleep(0.02)  # in this order
    for rank in ranks:
        rank.join(20)
        assert rank.exitcode == 0
    assert sorted(asked.read_text().split()) == ["cache"] * 4 + ["hub"] * 2


def test_a_rank_alone_asks_each_time_and_needs_no_lock(asked, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    for _ in range(2):
        resolve("owner/model", weights=False)
    assert asked.read_text().split() == ["hub", "hub"]
    assert not (asked.parent / "cache").exists()


def test_the_next_rank_asks_where_the_one_that_asked_was_killed(asked):
    [first] = start(1)
    while not asked.read_text():
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    [second] = start(1)
    second.join(20)
    assert second.exitcode == 0 and asked.read_text().split() == ["hub", "hub"]


def test_a_cache_that_nobody_may_write_is_read_without_a_lock(asked):
    (asked.parent / "cache").write_text("no folder")
    resolve("owner/model", weights=False)
    assert asked.read_text().split() == ["hub"]

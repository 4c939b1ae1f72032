"""Data workers: signals that ask a run to end, and samples that go bad while a checkpoint holds them back."""

import itertools
import json
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from avlm.data.loader import open_loader
from avlm.data.stream import Stream
from avlm.process import worker
from avlm.process.worker import STOPS
from tests.data.energon.test_loader import write_set
from tests.data.small_files import data, image_file, model, photo, write_tokenizer

WHERE = {"rank": 0, "world": 1, "seed": 1, "train": True}


@pytest.fixture
def records(tmp_path):
    """24 records, each with an image of its own."""
    lines = []
    for i in range(24):
        (tmp_path / f"{i}.png").write_bytes(image_file(photo(30, 30, i)))
        turns = [{"role": "user", "content": "<image> what?"}, {"role": "assistant", "content": "one " * (1 + i % 5)}]
        lines.append(json.dumps({"messages": turns, "images": [f"{i}.png"]}) + "\n")
    (tmp_path / "records.jsonl").write_text("".join(lines))
    return tmp_path / "records.jsonl"


@pytest.mark.parametrize("kind", ["jsonl", "energon"])
def test_workers_live_through_signals_that_go_to_a_whole_process_tree(tmp_path, records, kind):
    source = records
    if kind == "energon":
        source = tmp_path / "set"
        write_set(source, "train", 24)
    settings = data(write_tokenizer(tmp_path / "tokenizer"), num_workers=1, packing_buffer=4)
    rows = iter(open_loader(Stream(str(source), settings, model(), **WHERE)))
    next(rows)
    [worker] = multiprocessing.active_children()
    for number in STOPS:
        os.kill(worker.pid, number)
    assert len(list(itertools.islice(rows, 30))) == 30 and worker.is_alive()


def test_a_sample_that_a_resume_was_holding_and_that_is_gone_is_skipped_and_named(records, tmp_path):
    settings = data(write_tokenizer(tmp_path / "tokenizer"), seq_length=128, packing_buffer=8)
    stream = Stream(str(records), settings, model(), **WHERE)
    loader = open_loader(stream)
    for _ in iter(loader):
        state = json.loads(json.dumps(loader.state()))
        if held := [place for slot in state["slots"] for row in slot["rows"] for place in row]:
            break
    _, number = held[0]  # of the one source
    (tmp_path / f"{number}.png").unlink()
    first = next(iter(open_loader(stream, state)))
    assert [key for key, _ in first.skipped] == [f"records.jsonl:{number + 1}"] and first.keys


def exit_code_of_a_worker() -> int | None:
    process = multiprocessing.get_context("fork").Process(target=worker.start, args=(0,))
    process.start()
    process.join(30)
    return process.exitcode


def test_a_worker_that_a_thread_started_ends_without_an_error():
    """As those of rows that are fetched ahead are."""
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(exit_code_of_a_worker).result() == 0

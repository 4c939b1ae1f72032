"""Blends of sources by weight: JSON files and Energon folders, packed together."""

import json
from collections import Counter
from itertools import islice

import pytest

from avlm.config.load import resolve_config
from avlm.data.loader import open_loader
from avlm.data.redistribute import redistribute
from avlm.data.stream import Stream
from tests.data.energon.test_loader import content, keys, write_set
from tests.data.small_files import data, image_file, model, photo
from tests.data.test_redistribute import read
from tests.parallel.small import TREE

WEIGHTS = {"many.jsonl": 3, "few.json": 1, "shards": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blend")
    (folder / "a.png").write_bytes(image_file(photo(30, 20)))
    for name, count in (("many", 40), ("few", 5)):
        records = []
        for number in range(count):
            turns = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "one " * (number % 9 + 1)}]
            records.append({"conversations": turns, "image": "gone.png" if number == 3 else "a.png"})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / f"{name}.json").write_text(json.dumps(records))
    write_set(folder / "shards", "train", 30, bad=(8,))
    return folder


@pytest.fixture
def loader(folder, tokenizer_folder):
    def make(weights=WEIGHTS, *, rank=0, world=1, seed=1, state=None, **changes):
        sources = {str(folder / name): weight for name, weight in weights.items()}
        settings = data(tokenizer_folder, train=sources, packing_buffer=12, **changes)
        return open_loader(Stream(settings.train, settings, model(), rank, world, seed, True), state)

    return make


def source_of(key: str) -> str:
    return key.partition(":")[0] if ":" in key else "shards"


def test_samples_have_the_shares_of_the_weights_and_share_rows(loader):
    batches = list(islice(loader(), 40))
    read = [*keys(batches), *(key for batch in batches for key, _ in batch.skipped)]
    counts = Counter(source_of(key) for key in read)
    for name, weight in WEIGHTS.items():
        assert abs(counts[name] - weight / 6 * len(read)) < 12, "as many as a packing buffer may hold back"
    mixed = [len({source_of(key) for key in batch.keys}) for batch in batches]
    assert sum(mixed) / len(mixed) > 2
    assert {key for batch in batches for key, _ in batch.skipped} == {"many.jsonl:4", "few.json:4", "k0008"}
    order = lambda **options: keys(islice(loader(**options), 9))
    assert order() == order() != order(seed=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_blend_goes_on_with_the_very_same_rows(loader, workers):
    first = loader(num_workers=workers)
    rows = iter(first)
    for _ in range(5):
        next(rows)
    state = json.loads(json.dumps(first.state()))
    expected = [content(next(rows)) for _ in range(12)]
    resumed = loader(num_workers=workers, state=state)
    assert resumed.state() == state
    assert [content(batch) for batch in islice(resumed, 12)] == expected


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_other_ranks_continue_the_same_streams_of_a_blend(loader, workers):
    _, states = read(loader, world=2, workers=2)
    expected, _ = read(loader, world=2, workers=2, states=states)
    found, _ = read(loader, world=1, workers=workers, states=[redistribute(states, 0, 1, workers)], rows=8)
    assert sorted(found, key=repr) == sorted(expected, key=repr)


def test_ranks_read_different_samples_of_every_source(loader):
    ranks = [keys(islice(loader({"many.jsonl": 1, "shards": 1}, rank=r, world=2), 4)) for r in range(2)]
    assert not set(ranks[0]) & set(ranks[1])
    assert all({source_of(key) for key in rank} == {"many.jsonl", "shards"} for rank in ranks)


def test_what_a_blend_cannot_be_is_one_line(loader, folder):
    with pytest.raises(ValueError, match="synthetic rows are whole rows, which no blend can take samples from"):
        open_loader(Stream({"synthetic": 1}, data(folder), model(), 0, 1, 1, True))
    with pytest.raises(FileNotFoundError, match=r"no data file .*gone\.jsonl"):
        loader({"gone.jsonl": 1})
    with pytest.raises(ValueError, match="5 records, but 40 when the state was written"):
        loader({"few.json": 1}, state=loader({"many.jsonl": 1}).state())
    with pytest.raises(ValueError, match="holds 5 and 40 and 30 records, but 40 when the state was written"):
        loader(state=loader({"many.jsonl": 1}).state())
    for wrong in ({}, {"a.jsonl": 0}, {"a.jsonl": "much"}, {"a.jsonl": float("inf")}, ["a.jsonl"], 5):
        with pytest.raises(ValueError, match=r"^test: data\.train: give a source, or sources with weights") as error:
            resolve_config(TREE | {"data": {"train": wrong}}, "test")
        assert "\n" not in str(error.value)


def test_a_stage_has_its_own_blend_and_nothing_of_the_runs():
    stages = [{"name": name, "steps": 1, "train": ["decoder"]} for name in ("first", "last")]
    stages[1]["data"] = {"train": {"b.jsonl": 1}}
    config = resolve_config(TREE | {"data": {"train": {"a.jsonl": 3, "c": 0.5}}, "stages": stages}, "test")
    assert [stage.data.train for stage in config.stages] == [{"a.jsonl": 3.0, "c": 0.5}, {"b.jsonl": 1.0}]
    swapped = resolve_config(TREE | {"data": {"train": {"c": 0.5, "a.jsonl": 3}}, "stages": stages}, "test")
    assert list(swapped.stages[0].data.train) == ["a.jsonl", "c"], "a loader's state knows sources by their place"

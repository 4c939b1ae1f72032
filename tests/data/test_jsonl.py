import itertools
import json
from collections import Counter
from itertools import islice

import pytest
import torch

from avlm.data import jsonl
from avlm.data.loader import open_loader, open_samples
from avlm.data.stream import Stream
from avlm.models.batch import Batch
from tests.data.small_files import data, image_file, model, photo, tone

RECORDS = 23
BAD = {3: "2 <image> tags but 1 image", 11: "no media file"}


def record(number: int) -> dict:
    question = "<image><image>" if number == 3 else "<image><audio>" if number % 5 == 0 else "<image>"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "one " * (number + 1)}]
    image = "nowhere.png" if number == 11 else f"images/{number % 4}.png"
    return {"messages": messages, "images": [image], "audios": ["a.wav"] if number % 5 == 0 else []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    (folder / "images").mkdir()
    for number in range(4):
        (folder / f"images/{number}.png").write_bytes(image_file(photo(30, 20, number)))
    (folder / "a.wav").write_bytes(tone(0.3))
    records = [record(number) for number in range(RECORDS)]
    (folder / "set.jsonl").write_text("\n".join(json.dumps(r) for r in records))
    (folder / "set.json").write_text(json.dumps(records))
    (folder / "good.jsonl").write_text("".join(json.dumps(r) + "\n" for i, r in enumerate(records) if i not in BAD))
    (folder / "bad.jsonl").write_text("\n".join([json.dumps(records[3]), "", "{broken", ""]))
    return folder


@pytest.fixture
def loader(folder, tokenizer_folder):
    def make(file="set.jsonl", *, rank=0, world=1, seed=1, train=True, state=None, towers=None, **changes):
        settings = data(tokenizer_folder, **changes)
        stream = Stream(str(folder / file), settings, towers or model(), rank, world, seed, train)
        return open_loader(stream, state)

    return make


def content(batch: Batch) -> tuple:
    tensors = (batch.token_T, batch.target_R, batch.image.values, batch.audio.values)
    sums = tuple(tensor.sum().item() for tensor in tensors)
    return batch.keys, sums, batch.skipped, batch.read


def keys(batches) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def test_every_sample_is_read_once_an_epoch_over_all_ranks(loader):
    ranks = [keys(islice(loader("good.jsonl", rank=r, world=3, packing_buffer=1), 14)) for r in range(3)]
    epochs = [{key for rank in ranks for key in rank[i * 7 : i * 7 + 7]} for i in range(2)]
    assert [len(epoch) for epoch in epochs] == [21, 21]
    assert ranks[0][:7] != ranks[0][7:]


def test_the_order_follows_the_seed(loader):
    order = lambda seed: keys(islice(loader("good.jsonl", seed=seed, packing_buffer=1), 8))
    assert order(1) == order(1) != order(2)


def test_rows_of_training_are_full_and_no_sample_waits_for_ever(loader):
    batches = list(islice(loader("good.jsonl", packing_buffer=12), 60))
    held_back = [packed / 256 for packed in (batch.num_tokens for batch in batches)]
    assert sum(held_back) / len(held_back) > 0.93  # 0.86 if the last row of each buffer went out as it is
    counts = Counter(keys(batches))
    assert len(counts) == 21 and max(counts.values()) - min(counts.values()) <= 2


def test_more_workers_than_samples_work(loader, folder):
    (folder / "one.jsonl").write_text(json.dumps(record(1)))
    batches = list(islice(loader("one.jsonl", rank=1, world=2, num_workers=2), 3))
    assert sum(batch.read for batch in batches) >= 6


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_goes_on_with_the_very_same_rows(loader, workers):
    first = loader(num_workers=workers)
    rows = iter(first)
    for _ in range(5):
        next(rows)
    state = json.loads(json.dumps(first.state()))
    expected = [content(next(rows)) for _ in range(11)]
    resumed = loader(num_workers=workers, state=state)
    assert resumed.state() == state
    assert [content(batch) for batch in islice(resumed, 11)] == expected
    assert any(skipped for _, _, skipped, _ in expected)


def test_iterating_again_goes_on_after_the_last_row_used(loader):
    whole = [content(batch) for batch in islice(loader(num_workers=2), 6)]
    twice = loader(num_workers=2)
    assert [content(batch) for batch in [*islice(twice, 3), *islice(twice, 3)]] == whole


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_random_state_is_left_alone(loader, workers):
    before = torch.get_rng_state()
    list(islice(loader(num_workers=workers), 2))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"world": 2}, "is for world=1, this run has world=2"),
        ({"num_workers": 3}, "is for workers=0, this run has workers=3"),
        ({"seed": 2}, "is for seed=1"),
        ({"seq_length": 128}, "is for config="),
        ({"towers": model(stack=2)}, "is for config="),
        ({"file": "good.jsonl"}, "holds 21 records, but 23 when"),
    ],
)
def test_the_state_of_another_run_is_refused(loader, change, message):
    with pytest.raises(ValueError, match=message):
        loader(**change, state=loader().state())


def test_the_state_of_another_rank_is_refused(loader):
    with pytest.raises(ValueError, match="is for rank=0, this run has rank=1"):
        loader(rank=1, world=2, state=loader(world=2).state())


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_skipped_named_and_counted(loader, workers):
    batches = list(loader(train=False, num_workers=workers))
    skipped = dict(pair for batch in batches for pair in batch.skipped)
    assert sorted(skipped) == ["set.jsonl:12", "set.jsonl:4"]
    assert all(BAD[int(key.partition(":")[2]) - 1] in reason for key, reason in skipped.items())
    assert sum(batch.read for batch in batches) == RECORDS
    assert len(keys(batches)) == RECORDS - 2


def test_validation_is_finite_and_the_same_each_time_and_split_over_ranks(loader):
    ranks = [loader(rank=r, world=3, train=False, num_workers=1) for r in range(3)]
    once, again = ([keys(rank) for rank in ranks] for _ in range(2))
    assert once == again
    assert sorted(itertools.chain(*once)) == sorted(f"set.jsonl:{i + 1}" for i in range(RECORDS) if i not in BAD)


def test_a_rank_without_validation_samples_ends_at_once(loader):
    assert list(loader(rank=30, world=31, train=False)) == []


def test_json_and_jsonl_give_the_same_rows(loader):
    rows = lambda file: [content(batch)[1] for batch in islice(loader(file), 4)]
    assert rows("set.json") == rows("set.jsonl")


def test_records_of_an_array_are_found_wherever_blocks_of_the_file_end(tmp_path, monkeypatch):
    records = [{"id": 7, "text": 'ä € \\ "],[{'}, 1.5e-06, -3, [[], {}], None, "\ud800", {}]
    for block, indent, begin in itertools.product((1, 5, 64), (None, 2), (b"", b"\xef\xbb\xbf", b" \n")):
        monkeypatch.setattr(jsonl, "BLOCK", block)
        text = json.dumps(records, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
        (tmp_path / "a.json").write_bytes(begin + text + b"\n")
        found = jsonl.Records(tmp_path / "a.json", data(tmp_path))
        assert [found[number] for number in range(len(found))] == records
        for wrong in (text[:-1], text + b"x", text.replace(b"1.5e-06,", b"1.5e-06")):
            (tmp_path / "a.json").write_bytes(begin + wrong)
            with pytest.raises(ValueError) as error:
                jsonl.Records(tmp_path / "a.json", data(tmp_path))
            with pytest.raises(ValueError) as expected:
                json.loads(begin + wrong)
            assert str(error.value) == f"{tmp_path / 'a.json'} is not valid JSON: {expected.value}"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_without_one_good_sample_ends_the_run_with_one_line(loader, workers):
    with pytest.raises(ValueError, match=r"^no sample of .*bad\.jsonl can be used; bad\.jsonl:\d: .*$"):
        list(islice(loader("bad.jsonl", num_workers=workers), 1))


@pytest.mark.parametrize(
    "line, reason",
    [
        (json.dumps(record(1)).replace("one", "\\ud800", 1), "half of a surrogate pair"),
        (json.dumps(record(1) | {"answers": ["\ud800"]}), "half of a surrogate pair"),
        (json.dumps(record(1) | {"images": ["x" * 5000]}), "media file"),
        (json.dumps(record(1) | {"images": ["a\0b.png"]}), "/a b.png"),
        ("[" * 100_000 + "]" * 100_000, "is not valid JSON"),
    ],
    ids=["surrogate", "in an answer", "long name", "NUL in a name", "nested"],
)
def test_what_only_a_hostile_file_holds_is_skipped_too(loader, folder, line, reason):
    (folder / "hostile.jsonl").write_text(f"{json.dumps(record(1))}\n{line}\n")
    [batch] = loader("hostile.jsonl", train=False)
    assert batch.keys == ["hostile.jsonl:1"] and reason in batch.skipped[0][1]


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "images/../../secret.png"])
def test_names_that_lead_out_of_the_media_folder_are_refused(folder, tokenizer_folder, name):
    (folder.parent / "secret.png").write_bytes(image_file(photo(8, 8)))
    (folder / "evil.jsonl").write_text(json.dumps(record(1) | {"images": [name]}))
    with pytest.raises(ValueError, match="leads out of"):
        list(open_samples(str(folder / "evil.jsonl"), data(tokenizer_folder)))


def test_whole_names_in_the_media_folder_are_taken(folder, tokenizer_folder, tmp_path):
    name = str(folder / "images/1.png")
    (folder / "whole.jsonl").write_text(
        json.dumps(record(1) | {"images": ["/" + name]})
    )  # // is / in every file system
    (tmp_path / "whole.jsonl").write_text(json.dumps(record(1) | {"images": ["file://" + name]}))
    (tmp_path / "link").symlink_to(folder)
    read = lambda file, **changes: next(open_samples(str(file), data(tokenizer_folder, **changes))).images
    expected = [(folder / "images/1.png").read_bytes()]
    assert read(folder / "whole.jsonl") == read(folder / "whole.jsonl", media_root=str(tmp_path)) == expected
    for root in (folder, "/", tmp_path / "link"):  # what the refusal says to do
        assert read(tmp_path / "whole.jsonl", media_root=str(root)) == expected
    with pytest.raises(ValueError, match=r"leads out of .*: set data\.media_root to a folder that holds it"):
        read(tmp_path / "whole.jsonl")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_in_any_way_and_blank_ones_are_none(folder, tokenizer_folder, end):
    lines = ["", json.dumps(record(1)), "", "  \t ", json.dumps(record(2)), "", ""]
    for number, text in enumerate((end.join(lines), "\ufeff" + end.join(lines[1:]), "\ufeff" + end.join(lines))):
        (folder / f"lines{number}.jsonl").write_bytes(text.encode())
        samples = list(open_samples(str(folder / f"lines{number}.jsonl"), data(tokenizer_folder)))
        assert [sample.messages[1]["content"] for sample in samples] == ["one " * 2, "one " * 3]


def test_media_are_looked_up_in_media_root_and_bounded(loader, folder, tmp_path):
    (tmp_path / "moved.jsonl").write_text(json.dumps(record(1)))
    load = lambda **changes: list(loader(tmp_path / "moved.jsonl", train=False, media_root=str(folder), **changes))
    assert load()[0].keys == ["moved.jsonl:1"]
    assert "more than data.max_media_bytes=10" in load(max_media_bytes=10)[0].skipped[0][1]


def test_samples_of_an_evaluation_come_in_order_and_whole(folder, tokenizer_folder):
    samples = list(open_samples(str(folder / "good.jsonl"), data(tokenizer_folder)))
    assert [sample.key for sample in samples] == [f"good.jsonl:{i + 1}" for i in range(21)]
    assert samples[1].images == [(folder / "images/1.png").read_bytes()]
    with pytest.raises(ValueError, match=r"set\.jsonl:12: no media file"):
        list(open_samples(str(folder / "set.jsonl"), data(tokenizer_folder)))


def test_files_that_hold_no_records_are_refused(loader, tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.jsonl").write_text("\n")
    (tmp_path / "c.json").write_text("[")
    with pytest.raises(ValueError, match="must hold a list of records"):
        loader(tmp_path / "a.json")
    (tmp_path / "f.json").write_text(" [ ]\n")
    (tmp_path / "g.json").write_text("[1]", encoding="utf-16")
    for empty in ("b.jsonl", "f.json"):
        with pytest.raises(ValueError, match="holds no records"):
            loader(tmp_path / empty)
    with pytest.raises(ValueError, match=r"g\.json is not in UTF-8"):
        loader(tmp_path / "g.json")
    with pytest.raises(ValueError, match="is not valid JSON"):
        loader(tmp_path / "c.json")
    with pytest.raises(FileNotFoundError, match="no data file"):
        loader(tmp_path / "d.json")
    with pytest.raises(ValueError, match="is no Energon folder"):
        loader(tmp_path / "e.csv")

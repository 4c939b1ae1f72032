"""Sets of Hugging Face's datasets library: parquet files and Arrow folders of the forms that are on the Hub."""

import dataclasses
import json
from itertools import islice
from pathlib import Path

import datasets
import pyarrow
import pytest
import yaml
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Image, List, Value

from avlm.config.load import load_config, resolve_config
from avlm.data import inspect
from avlm.data.hf.columns import Columns
from avlm.data.hf.source import Source, parse
from avlm.data.hf.table import Table
from avlm.data.loader import open_loader, open_samples
from avlm.data.media import audio
from avlm.data.redistribute import redistribute
from avlm.data.stream import Stream
from avlm.preflight.check import check
from avlm.storage.run_folder import read_records
from tests.data.small_files import data, image_file, model, photo, tone, write_tokenizer
from tests.data.test_jsonl import content, keys
from tests.data.test_redistribute import read
from tests.parallel.small import TREE
from tests.parallel.spawn import run_ranks
from tests.training.test_train import TEXT_STAGE, WORDS, losses, train_to_end, write_config

ROWS = 30
DESCRIBE = {"image": "{image}", "question": "Describe this image.", "answer": "{text}"}
RECEIPT = {"image": "{image}", "question": "Read it.", "answer": "{ground_truth.gt_parse}"}
KINDS = {"JPEG": "jpg", "PNG": "png"}


def picture(number: int, kind: str = "PNG") -> dict:
    return {"bytes": image_file(photo(30, 20, number), kind), "path": f"{number}.{KINDS[kind]}"}


def rdr(rows: range) -> Dataset:
    """The form of quintend/rdr-items. Row 3 has no text."""
    columns = {
        "image": [picture(row % 5, "JPEG") for row in rows],
        "text": [None if row == 3 else "one " * (row % 9 + 1) for row in rows],
    }
    return Dataset.from_dict(columns, Features({"image": Image(), "text": Value("string")}))


def cord(rows: range) -> Dataset:
    """The form of naver-clova-ix/cord-v2."""
    receipt = [{"gt_parse": {"menu": [{"nm": "café", "price": str(row)}]}, "meta": {"image_id": row}} for row in rows]
    columns = {"image": [picture(row % 5) for row in rows], "ground_truth": [json.dumps(each) for each in receipt]}
    return Dataset.from_dict(columns, Features({"image": Image(), "ground_truth": Value("string")}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    datasets.disable_progress_bars()
    (folder / "rdr").mkdir()
    for shard in range(3):
        name = f"rdr/train-{shard:05d}-of-00003.parquet"
        rdr(range(10 * shard, 10 * shard + 10)).to_parquet(folder / name, batch_size=5)  # two row groups
    rdr(range(100, 107)).to_parquet(folder / "rdr/validation-00000-of-00001.parquet")
    cord(range(12)).to_parquet(folder / "cord.parquet")
    DatasetDict({"train": cord(range(12)), "test": cord(range(20, 24))}).save_to_disk(folder / "cord")
    yield folder
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture
def loader(folder, tokenizer_folder):
    def make(source="rdr?split=train", *, rank=0, world=1, seed=1, train=True, state=None, columns=None, **changes):
        names = {str(folder / name): texts for name, texts in (columns or {"rdr": DESCRIBE, "cord": RECEIPT}).items()}
        settings = data(tokenizer_folder, columns=names, **changes)
        stream = Stream(f"hf://{folder}/{source}", settings, model(), rank, world, seed, train)
        return open_loader(stream, state)

    return make


STREAMED = "rdr?split=train&streaming=true"
both = pytest.mark.parametrize("source", ["rdr?split=train", STREAMED])


def samples(folder: Path, tokenizer: Path, source: str, columns: dict | None = None, **changes) -> list:
    names = {} if columns is None else {str(folder / source.partition("?")[0]): columns}
    return list(open_samples(f"hf://{folder}/{source}", data(tokenizer, columns=names, **changes)))


@both
def test_a_set_of_images_and_texts_gets_its_question(folder, tokenizer_folder, source):
    source = source.replace("train", "validation", 1)
    found = samples(folder, tokenizer_folder, source, DESCRIBE)
    assert [turn["content"] for turn in found[0].messages] == ["<image>\nDescribe this image.", "one one "]
    assert [sample.images for sample in found] == [[picture(row % 5, "JPEG")["bytes"]] for row in range(100, 107)]
    plain = samples(folder, tokenizer_folder, source)
    assert [turn["content"] for turn in plain[0].messages] == ["<image>", "one one "], "captions, without a mapping"


@pytest.mark.parametrize("source", ["cord?split=train", "cord.parquet", "cord.parquet?split=train&streaming=true"])
def test_json_in_a_column_is_reached_into_and_written_as_text(folder, tokenizer_folder, source):
    found = samples(folder, tokenizer_folder, source, RECEIPT)
    assert len(found) == 12 and found[3].images == [picture(3)["bytes"]]
    assert found[3].messages[1]["content"] == '{"menu": [{"nm": "café", "price": "3"}]}'
    price = RECEIPT | {"answer": "{ground_truth.gt_parse.menu.0.nm}: {ground_truth.gt_parse.menu.0.price} {{EUR}}"}
    assert samples(folder, tokenizer_folder, source, price)[3].messages[1]["content"] == "café: 3 {EUR}"


def test_recordings_are_read_as_files_or_as_arrays(folder, tokenizer_folder):
    wave = [0.25, -0.5, 0.125] * 400
    file, array = {"bytes": tone(0.1), "path": "a.wav"}, {"array": wave, "sampling_rate": 8000}
    speech = Dataset.from_dict({"audio": [file], "text": ["one"]}).cast_column("audio", Audio(sampling_rate=16_000))
    speech.to_parquet(folder / "speech.parquet")
    Dataset.from_dict({"audio": [array], "text": ["one"]}).to_parquet(folder / "arrays.parquet")
    for source in ("speech.parquet", "speech.parquet?streaming=true"):
        [sample] = samples(folder, tokenizer_folder, source)
        assert sample.audios == [file["bytes"]] and sample.messages[0]["content"] == "<audio>"
    [sample] = samples(folder, tokenizer_folder, "arrays.parquet")
    assert len(audio.decode(sample.audios[0], 10.0)) == 2 * len(wave), "from 8 to 16 kHz"


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"array": [0.5], "sampling_rate": None}, "an audio array needs its sampling_rate in Hz, not None"),
        ({"array": [0.5], "sampling_rate": 0}, "an audio array needs its sampling_rate in Hz, not 0"),
        ({"array": [{"left": 1}], "sampling_rate": 8000}, "an audio array must hold numbers"),
        (2, "column audio holds 2, and its classes are 0 to 1"),
    ],
)
def test_a_cell_that_is_no_medium_or_class_makes_its_sample_bad(cell, message):
    columns = Columns(None, ["audio", "text"], {"audio": ["a.wav", "b.wav"]}, media=Path.read_bytes)
    with pytest.raises(ValueError, match=message):
        columns.sample({"audio": cell, "text": "one"}, "key")


def test_turns_with_lists_of_images_and_pairs_are_records(folder, tokenizer_folder):
    turns = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
    ]
    content = List({"type": Value("string"), "text": Value("string")})
    features = {"messages": List({"role": Value("string"), "content": content}), "images": List(Image())}
    rows = {"messages": [turns], "images": [[picture(1)]]}
    Dataset.from_dict(rows, Features(features)).save_to_disk(folder / "turns")
    [sample] = samples(folder, tokenizer_folder, "turns")
    assert sample.images == [picture(1)["bytes"]] and sample.messages[0]["content"] == "<image>\nwhat?"
    talk = [{"from": "human", "value": "<image><image> which?"}, {"from": "gpt", "value": "the first"}]
    rows = {"talk": [talk], "pictures": [[picture(1)["bytes"], picture(2)["bytes"]]], "junk": [1]}
    Dataset.from_dict(rows).to_parquet(folder / "talk.parquet")
    columns = {"conversations": "{talk}", "images": "{pictures}"}
    [sample] = samples(folder, tokenizer_folder, "talk.parquet", columns)
    assert sample.images == [picture(n)["bytes"] for n in (1, 2)]
    Dataset.from_dict(rows | {"talk": [json.dumps(talk)]}).to_parquet(folder / "json_talk.parquet")
    assert samples(folder, tokenizer_folder, "json_talk.parquet", columns)[0].messages == sample.messages
    features = Features(
        {"question": Value("string"), "kind": ClassLabel(names=["cat", "dog"]), "file": Value("string")}
    )
    rows = {"question": ["what?"], "kind": [1], "file": ["own"]}
    Dataset.from_dict(rows, features).to_parquet(folder / "classes.parquet")
    (folder / "own.png").write_bytes(picture(4)["bytes"])
    columns = {"question": "{question}", "answer": "a {kind}", "image": "{file}.png"}
    [sample] = samples(folder, tokenizer_folder, "classes.parquet", columns)
    assert sample.messages[1]["content"] == "a dog" and sample.images == [picture(4)["bytes"]]


@both
@pytest.mark.parametrize("world, workers", [(1, 1), (3, 1), (2, 4)])  # of 3 files in 6 row groups
def test_every_row_is_read_once_an_epoch_over_all_ranks(loader, source, world, workers):
    found = []
    for rank in range(world):
        rows = loader(source, rank=rank, world=world, train=False, num_workers=workers if workers > 1 else 0)
        found += [key for batch in rows for key in [*batch.keys, *(key for key, _ in batch.skipped)]]
    assert len(found) == len(set(found)) == ROWS


@both
def test_training_reads_each_row_once_an_epoch_in_an_order_of_the_seed(loader, source):
    order = lambda **options: [key for batch in islice(loader(source, **options), 2 * ROWS) for key in batch.keys]
    once = order(packing_buffer=1)
    first, second = once[: ROWS - 1], once[ROWS - 1 : 2 * ROWS - 2]  # one row is bad
    assert len(set(first)) == ROWS - 1 and set(first) == set(second) and first != second
    assert order(packing_buffer=1) == once != order(packing_buffer=1, seed=2)
    assert first != sorted(first)


def test_blocks_of_a_set_that_streams_are_bounded_in_bytes(loader):
    order = lambda **options: [key for batch in islice(loader(STREAMED, **options), ROWS // 2) for key in batch.keys]
    alone = order(packing_buffer=1, shuffle_buffer_bytes=1)
    assert alone == order(packing_buffer=1, shuffle_buffer=1) != order(packing_buffer=1, shuffle_buffer_bytes=10**6)


@both
@pytest.mark.parametrize("world, workers", [(1, 0), (2, 0), (4, 2)])  # 8 slots share the 6 row groups
def test_a_resumed_set_continues_with_the_very_same_rows(loader, source, world, workers):
    for rank in {0, world // 2}:
        first = loader(source, rank=rank, world=world, num_workers=workers)
        rows = iter(first)
        for _ in range(5):
            next(rows)
        state = json.loads(json.dumps(first.state()))
        expected = [content(next(rows)) for _ in range(11)]
        resumed = loader(source, rank=rank, world=world, num_workers=workers, state=state)
        assert resumed.state() == state
        assert [content(batch) for batch in islice(resumed, 11)] == expected


def test_a_set_that_streams_may_find_out_its_size_later(loader):
    state = loader(STREAMED).state()
    assert loader(STREAMED, state=state | {"records": [None]}).state()["records"] == [ROWS]
    with pytest.raises(ValueError, match="holds 30 records, but 31 when"):
        loader(STREAMED, state=state | {"records": [31]})


@both
def test_other_ranks_continue_the_same_streams(loader, source):
    make = lambda **options: loader(source, **options)
    _, states = read(make, world=2, workers=2)
    expected, _ = read(make, world=2, workers=2, states=states)
    found, _ = read(make, world=1, workers=4, states=[redistribute(states, 0, world=1, workers=4)], rows=8)
    assert sorted(found, key=repr) == sorted(expected, key=repr)


@both
def test_a_set_is_a_part_of_a_blend(folder, tokenizer_folder, source):
    (folder / "a.png").write_bytes(picture(0)["bytes"])
    (folder / "a.jsonl").write_text(json.dumps({"image": "a.png", "text": "one"}))
    sources = {str(folder / "a.jsonl"): 1.0, f"hf://{folder}/{source}": 3.0}
    settings = data(tokenizer_folder, train=sources, columns={str(folder / "rdr"): DESCRIBE})
    [*batches] = islice(open_loader(Stream(settings.train, settings, model(), 0, 1, 1, True)), 20)
    found = keys(batches)
    share = sum(key.startswith("a.jsonl") for key in found) / len(found)
    assert share == pytest.approx(1 / 4, abs=0.05)


def test_a_row_without_its_text_is_skipped_and_named(loader):
    skipped = [each for batch in loader(train=False) for each in batch.skipped]
    assert skipped == [("rdr/train:4", "answer must be a text, not None: give turns under messages")]


def test_slices_and_several_splits_are_those_of_the_library(folder, tokenizer_folder):
    count = lambda source, columns=DESCRIBE: len(samples(folder, tokenizer_folder, source, columns))
    assert count("rdr?split=validation[:2]") == 2
    assert count("rdr?split=validation[50%:]+validation[:1]") == 4
    assert count("cord?split=train[2:5]+test", RECEIPT) == 7
    assert count("rdr?split=validation&streaming=true") == 7


def test_opening_a_set_reads_no_media(folder, loader):
    """What is opened is mapped: no buffer of Arrow holds any of it."""
    loader()  # makes the files
    before = pyarrow.total_allocated_bytes()
    table = Table(Source(str(folder / "rdr"), "train"), data(folder))
    assert len(table) == ROWS and pyarrow.total_allocated_bytes() - before < 1000


@pytest.mark.parametrize(
    "source, message",
    [
        ("rdr?split=trian", r"Unknown split \"trian\"\. Should be one of \['train', 'validation'\]"),
        ("rdr?split=trian&streaming=true", r"Bad split: trian\. Available splits: \['train', 'validation'\]"),
        ("cord?split=trian", r"Unknown split \"trian\"\. Should be one of \['train', 'test'\]"),
        ("rdr", "has several splits, say which: train, validation"),
        ("cord", "has several splits, say which: train, test"),
        ("rdr?split=train[:3]&streaming=true", r"streaming reads whole splits, not train\[:3\]"),
        ("cord?split=train&streaming=true", "a folder of save_to_disk has splits only"),
        ("rdr?splits=train", "'splits=train' is not read: give each of split, name, revision, streaming once"),
        ("rdr?split=train&streaming=yes", "streaming must be true or false, not yes"),
        ("gone?split=train", "no folder or file .*gone"),
        ("text.txt", "must be of parquet or Arrow, not text.txt"),
        ("broken.parquet", r"cannot be opened: .*[Pp]arquet"),
        ("empty.parquet", r"empty\.parquet cannot be opened: it holds no rows"),
        ("empty.parquet?streaming=true", r"empty\.parquet cannot be opened: it holds no rows"),
        ("empty", r"empty cannot be opened: it holds no rows"),
    ],
)
def test_what_cannot_be_opened_is_one_line(loader, folder, source, message):
    (folder / "text.txt").write_text("one")
    (folder / "broken.parquet").write_bytes(b"one")
    empty = Dataset.from_dict(
        {"question": [], "answer": []}, Features(dict.fromkeys(("question", "answer"), Value("string")))
    )
    empty.to_parquet(folder / "empty.parquet")
    empty.save_to_disk(folder / "empty")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        loader(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"image": "{images}"}, r"image: there is no column 'images', only image, text$"),
        (
            {"image": "{image}", "answer": "text"},
            r"answer: text would be the same text in every sample: write \{text\}",
        ),
        ({"image": "{image!r}"}, "must hold a column and keys, nothing else"),
        ({"image": "{image"}, "has braces that are no {column}"),
    ],
)
def test_columns_that_are_not_there_are_one_line(loader, columns, message):
    with pytest.raises(ValueError, match=message):
        loader(columns={"rdr": columns})


def test_columns_that_are_no_record_ask_for_a_mapping(loader):
    with pytest.raises(ValueError, match="its columns are image, ground_truth, which are no record: say what is what"):
        loader("cord?split=train", columns={"rdr": DESCRIBE})


@pytest.mark.parametrize("source", ["hf://owner/set?split=train", "hf://owner/set?split=train&streaming=true"])
def test_without_a_network_a_name_of_the_hub_is_one_line(tokenizer_folder, source):
    with pytest.raises(ValueError, match=r"^owner/set is not here and could not be fetched from the Hub") as error:
        open_loader(Stream(source, data(tokenizer_folder), model(), 0, 1, 1, True))
    assert "\n" not in str(error.value)


def test_the_parts_of_a_source_are_taken_as_they_stand():
    expected = Source("owner/set", "train[:10%]+test", "en us", "main", True)
    assert parse("hf://owner/set?split=train[:10%]+test&name=en us&revision=main&streaming=true") == expected
    tree = TREE | {"data": {"train": "hf://owner/set?split=train", "columns": {"owner/sets": {"text": "{text}"}}}}
    with pytest.raises(
        ValueError, match=r"data\.columns names owner/sets, which is the NAME of no hf://NAME, and not owner/set:"
    ):
        resolve_config(tree, "test")


def test_a_run_trains_on_sets_validates_and_resumes_exactly(folder, tmp_path, monkeypatch):
    """A blend of a set that is mapped and one that streams, with answers to a held-out split."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    cord(range(12)).to_parquet(tmp_path / "own.parquet")
    sources = {f"hf://{folder}/rdr?split=train": 1, f"hf://{tmp_path}/own.parquet?streaming=true": 1}
    held_out = {"receipts": f"hf://{folder}/cord?split=test"}
    columns = {f"{folder}/rdr": DESCRIBE, f"{folder}/cord": RECEIPT, f"{tmp_path}/own.parquet": RECEIPT}
    settings = {"train": sources, "validation": held_out, "columns": columns, "num_workers": 0}
    settings |= {"tokenizer": str(write_tokenizer(tmp_path / "tokenizer")), "template": "chatml", "seq_length": 256}
    options = {
        **{"data": settings, "model": WORDS, "train": {"precision": "fp32", "validate_every": 3}},
        "stages": [{**TEXT_STAGE, "steps": 6, "train": ["decoder", "vision", "vision_projector"]}],
    }
    path = write_config(tmp_path / "whole", **options)
    assert check(load_config(path), world_size=1) == [None], "a file that streams does not say how many rows it has"
    run_ranks(train_to_end, 1, path, ("train.validate_answers=2",))
    again = write_config(tmp_path / "parts", **options)
    run_ranks(train_to_end, 1, again, ("train.stop_after=2",))
    run_ranks(train_to_end, 1, again)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    records = read_records(tmp_path / "whole/run/metrics.jsonl")
    assert all("val/receipts/exact_match" in each for each in records if "val/receipts/loss" in each)
    assert any("val/receipts/loss" in each for each in records)


@both
def test_a_set_is_shown_as_the_model_sees_it(folder, tokenizer_folder, tmp_path, capsys, source):
    settings = dataclasses.asdict(data(tokenizer_folder, columns={str(folder / "rdr"): DESCRIBE}))
    tree = {"output_dir": "x", "model": dataclasses.asdict(model()), "data": settings, "optimizer": {"lr": 1.0}}
    stages = [{"name": "first", "steps": 1, "train": ["decoder"]}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree | {"stages": stages}))
    inspect.main([str(tmp_path / "config.yaml"), f"data.train=hf://{folder}/{source}", "--count=1"])
    shown = capsys.readouterr().out
    assert "Describe this image.<|im_end|>\n<|im_start|>assistant\n[one " in shown
    assert f"hf://{folder}/{source}: 30 samples" in shown
    assert "skipped 1 sample: answer must be a text, not None" in shown

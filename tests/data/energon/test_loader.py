import io
import json
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from megatron.energon.epathlib import EPath
from megatron.energon.flavors import BaseWebdatasetFactory

from avlm.data.energon.samples import shuffled_samples
from avlm.data.energon.source import bytes_per_sample
from avlm.data.energon.state import from_json, to_json
from avlm.data.loader import open_loader, open_samples
from avlm.data.stream import Stream
from tests.data.small_files import data, image_file, model, photo, tone

CRUDE = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}


def write_set(folder: Path, split: str, count: int, first: int = 0, bad: tuple[int, ...] = (), shards: int = 2) -> None:
    """Crude samples kNNNN; bad ones lack their image."""
    folder.mkdir(parents=True)
    names = [f"shard_{s}.tar" for s in range(shards)]
    for s, name in enumerate(names):
        with tarfile.open(folder / name, "w") as tar:
            for i in range(s, count, shards):
                question = "<image><audio>" if i % 5 == 0 else "<image>"
                answer = {"role": "assistant", "content": "one " * (i % 20 + 1)}
                record = {"messages": [{"role": "user", "content": question}, answer], "images": ["image0.png"]}
                parts = {"json": json.dumps(record | {"audios": ["audio0.wav"] if i % 5 == 0 else []}).encode()}
                parts |= {} if i in bad else {"image0.png": image_file(photo(30, 20, i % 3))}
                parts |= {"audio0.wav": tone(0.1)} if i % 5 == 0 else {}
                for part, content in parts.items():
                    member = tarfile.TarInfo(f"k{first + i:04d}.{part}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    BaseWebdatasetFactory.prepare_dataset(
        EPath(folder), names, split_parts_patterns=[(split, ".*")], shuffle_seed=None, workers=1
    )
    (folder / ".nv-meta/dataset.yaml").write_text(yaml.safe_dump(CRUDE))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("energon")
    write_set(root / "a", "train", 30, bad=(3, 8))
    write_set(root / "b", "train", 30, first=100)
    write_set(root / "test", "val", 11, first=200)
    write_set(root / "few", "val", 2, first=600, shards=1)
    write_set(root / "two", "train", 2, first=300, shards=1)
    write_set(root / "broken", "train", 4, first=400, bad=(0, 1, 2, 3))
    blend = {"train": {"blend": [{"weight": 3, "path": "a"}, {"weight": 1, "path": "b"}]}}
    blend["val"] = {"blend": [{"weight": 1, "path": "test"}]}
    header = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
    (root / "blend.yaml").write_text(yaml.safe_dump(header | {"splits": blend}))
    return root


@pytest.fixture
def loader(root, tokenizer_folder):
    def make(name="blend.yaml", *, rank=0, world=1, train=True, state=None, **changes):
        settings = data(tokenizer_folder, **changes)
        return open_loader(Stream(str(root / name), settings, model(), rank, world, 1, train), state)

    return make


def content(batch) -> tuple:
    tensors = (batch.token_T, batch.target_R, batch.image.values, batch.audio.values)
    sums = tuple(tensor.sum().item() for tensor in tensors)
    return batch.keys, sums, batch.skipped, batch.read


def keys(batches) -> list[str]:
    return [key for batch in batches for key in batch.keys]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_goes_on_with_the_very_same_rows(loader, workers):
    first = loader(num_workers=workers)
    rows = iter(first)
    for _ in range(7):
        next(rows)
    state = json.loads(json.dumps(first.state()))
    expected = [content(next(rows)) for _ in range(14)]
    resumed = loader(num_workers=workers, state=state)
    assert resumed.state() == state
    assert [content(batch) for batch in islice(resumed, 14)] == expected
    assert any(skipped for _, _, skipped, _ in expected)


def test_rows_of_training_are_full_and_no_sample_waits_for_ever(loader):
    batches = list(islice(loader("b", packing_buffer=12), 60))
    assert sum(batch.num_tokens for batch in batches) / (60 * 256) > 0.93
    counts = Counter(keys(batches))
    assert max(counts.values()) - min(counts.values()) <= 2


def test_a_blend_draws_by_weight(loader):
    drawn = keys(islice(loader(), 60))
    assert 0.6 < sum(key < "k0100" for key in drawn) / len(drawn) < 0.85


def test_bad_samples_travel_with_the_rows_that_count_them(loader):
    batches = list(islice(loader("a"), 25))
    skipped = [pair for batch in batches for pair in batch.skipped]
    assert {key for key, _ in skipped} == {"k0003", "k0008"}
    assert "no part 'image0.png', only" in skipped[0][1]
    assert sum(batch.read for batch in batches) == len(keys(batches)) + len(skipped)


def test_ranks_read_different_samples(loader):
    ranks = [set(keys(islice(loader("b", rank=r, world=2), 10))) for r in range(2)]
    assert ranks[0] and ranks[1] and not ranks[0] & ranks[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_reads_everything_once_and_again_the_same(loader, workers):
    rank = loader(train=False, num_workers=workers)
    once, again = keys(rank), keys(rank)
    assert once == again and sorted(once) == [f"k{200 + i:04d}" for i in range(11)]
    cut = list(islice(rank, 1))
    assert keys(cut) == once[: len(keys(cut))] and keys(rank) == once


def test_short_ranks_of_validation_end_early(loader):
    ranks = [keys(loader("few", rank=r, world=3, train=False)) for r in range(3)]
    assert sorted(ranks) == [[], ["k0600"], ["k0601"]]


def test_the_global_random_state_is_left_alone(loader):
    before = torch.get_rng_state()
    list(islice(loader(), 2))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 4])
def test_a_worker_without_samples_is_named_in_one_line(loader, workers):
    with pytest.raises(ValueError, match=r"^.*too few samples: one of \d workers .* has none$"):
        list(
            islice(loader("two", rank=2 if workers == 0 else 0, world=3 if workers == 0 else 1, num_workers=workers), 8)
        )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_without_one_good_sample_ends_the_run_with_one_line(loader, workers):
    with pytest.raises(ValueError, match=r"^.*broken: none of 6 samples can be used; k040\d: sample has no part .*$"):
        list(islice(loader("broken", num_workers=workers), 1))


def test_sources_without_the_split_are_refused(loader):
    with pytest.raises(ValueError, match="has no split 'val'"):
        list(loader("two", train=False))
    with pytest.raises(ValueError, match="has no split 'train'"):
        loader("test")


def test_samples_of_an_evaluation_come_in_order(root, tokenizer_folder):
    samples = list(open_samples(str(root / "test"), data(tokenizer_folder)))
    assert sorted(sample.key for sample in samples) == [f"k{200 + i:04d}" for i in range(11)]
    assert samples == list(open_samples(str(root / "blend.yaml"), data(tokenizer_folder)))
    assert samples[0].images[0].startswith(b"\x89PNG")


def test_a_folder_that_brings_its_own_python_is_refused(loader, root):
    write_set(root / "evil", "train", 2, first=500)
    (root / "evil/.nv-meta/loader.py").write_text("raise SystemExit('executed')")
    for config in (
        CRUDE | {"part_filter": "loader.py:f"},
        CRUDE | {"__class__": "VQAWebdataset"},
        CRUDE | {"__module__": "x"},
    ):
        (root / "evil/.nv-meta/dataset.yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(ValueError, match=r"must name megatron\.energon's CrudeWebdataset and nothing else"):
            loader("evil")
        header = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
        (root / "outer.yaml").write_text(yaml.safe_dump(header | {"splits": {"train": {"path": "evil"}}}))
        with pytest.raises(ValueError, match=r"must name megatron\.energon's CrudeWebdataset and nothing else"):
            loader("outer.yaml")
    (root / "outer.yaml").write_text(yaml.safe_dump(header | {"splits": {"train": {"join": {}, "joiner": "x.py"}}}))
    with pytest.raises(ValueError, match="'joiner' is not supported"):
        loader("outer.yaml")


MARK = "{mark}"
CALL = {"__module__": "subprocess", "__function__": "getoutput", "cmd": f"touch {MARK}"}


@pytest.mark.parametrize(
    "place",
    [
        lambda code: ("evil/.nv-meta/dataset.yaml", CRUDE | {"subflavors": {"x": code}}),
        lambda code: ("evil/.nv-meta/dataset.yaml", CRUDE | {"subflavors": code}),
        lambda code: ("evil/.nv-meta/dataset.yaml", CRUDE | {"subflavors": {"x": [{"y": {"z": code}}]}}),
        lambda code: ("evil/.nv-meta/split.yaml", {"split_parts": {"train": [code]}, "exclude": []}),
        lambda code: ("evil/.nv-meta/split.yaml", {"split_parts": {"train": ["shard_0.tar"]}, "exclude": code}),
        lambda code: ("evil/.nv-meta/.info.json", {"shard_counts": {"shard_0.tar": 2}, "x": code}),
        lambda code: ("blend.yaml", {"splits": {"train": {"path": "evil", "subflavors": {"x": code}}}}),
        lambda code: ("blend.yaml", {"splits": {"train": {"blend": [{"path": "evil", "weight": code}]}}}),
        lambda code: ("blend.yaml", {"splits": {"train": code}}),
        lambda code: ("evil/.nv-meta/other.yaml", {"split_parts": {"train": code}, "exclude": []}),
    ],
)
def test_no_file_of_a_dataset_names_code_at_any_depth(place, tmp_path, tokenizer_folder, recwarn):
    write_set(tmp_path / "evil", "train", 2)
    header = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
    blend = {"splits": {"train": {"path": "evil", "split_config": "other.yaml"}}}
    splits = tmp_path / "evil/.nv-meta/split.yaml"
    (tmp_path / "evil/.nv-meta/other.yaml").write_text(splits.read_text())
    (tmp_path / "blend.yaml").write_text(yaml.safe_dump(header | blend))
    settings = data(tokenizer_folder)
    open_at = lambda name: open_loader(Stream(str(tmp_path / name), settings, model(), 0, 1, seed=1, train=True))
    for name in ("evil", "blend.yaml"):
        open_at(name)
    mark = tmp_path / "ran"
    file, tree = place(json.loads(json.dumps(CALL).replace(MARK, str(mark))))
    text = json.dumps(header | tree if file == "blend.yaml" else tree)
    for written in (text, text.replace('"__', '"\\x5f_')):  # JSON is YAML; an escape hides the name from a search
        if file.endswith(".json"):
            written = written.replace("\\x5f", "\\u005f")
        (tmp_path / file).write_text(written)
        with pytest.raises(ValueError, match=r"'__\w+__' is not supported: it could name code|must name|must be of"):
            open_at("blend.yaml" if "other" in file else file.partition("/")[0])
    assert not mark.exists()


def test_damaged_and_endless_descriptions_are_one_line_that_names_the_file(tmp_path, tokenizer_folder):
    write_set(tmp_path / "a", "train", 2)
    meta, kept = tmp_path / "a/.nv-meta", {}
    header = "__module__: megatron.energon\n__class__: MetadatasetV2\n"
    broken = {
        "dataset.yaml": [b"", b"- a", b"\xff\xfe", b"a: [1", b"[" * 2000, b"x" * 300_000],
        "split.yaml": [
            b"",
            b"[]",
            b"a: {b",
            b"split_parts: {train: ['s_{0..99999999}.tar']}",
            b"split_parts: {train: 5}",
        ],
        ".info.json": [b"", b"[]", b"{", b"[" * 100_000, b"{}", b'{"shard_counts": {"shard_0.tar": "x"}}', b"\xff"],
    }
    settings = data(tokenizer_folder)
    open_at = lambda name: open_loader(Stream(str(tmp_path / name), settings, model(), 0, 1, seed=1, train=True))
    for name, contents in broken.items():
        kept[name] = (meta / name).read_bytes()
        for content in contents:
            (meta / name).write_bytes(content)
            with pytest.raises(ValueError, match=str(tmp_path)) as error:
                open_at("a")
            assert "\n" not in str(error.value) and len(str(error.value)) < 500, content[:20]
        (meta / name).write_bytes(kept[name])
    open_at("a")
    blends = {
        "itself.yaml": "itself.yaml",
        "round.yaml": "trip.yaml",
        "trip.yaml": "round.yaml",
        "remote.yaml": "s3://a",
    }
    for name, inner in blends.items():
        (tmp_path / name).write_text(header + f"splits: {{train: {{path: '{inner}'}}}}")
    for name in blends:
        with pytest.raises(ValueError, match=r"is itself a part of|no path of a file or folder here"):
            open_at(name)
    for numbers in ("weight: 0", "weight: -1", "weight: x", "weight: 1, repetitions: -1", "weight: 1e999"):
        (tmp_path / "odd.yaml").write_text(header + f"splits: {{train: {{blend: [{{{numbers}, path: a}}]}}}}")
        with pytest.raises(ValueError, match="is no number above 0"):
            open_at("odd.yaml")
    for i in range(6):  # 10 of 10 of 10 ...
        inner = "a" if i == 0 else f"level{i - 1}.yaml"
        entries = ", ".join([f"{{weight: 1, path: {inner}}}"] * 10)
        (tmp_path / f"level{i}.yaml").write_text(header + f"splits: {{train: {{blend: [{entries}]}}}}")
    with pytest.raises(ValueError, match="names more than 10,000 datasets"):
        open_at("level5.yaml")


@pytest.mark.parametrize("split", ["val", "train"])
def test_a_damaged_shard_ends_training_and_evaluation_with_one_line(split, tmp_path, tokenizer_folder):
    write_set(tmp_path / "a", split, 6, shards=1)
    shard, info = tmp_path / "a/shard_0.tar", tmp_path / "a/.nv-meta/.info.json"
    whole, counts = shard.read_bytes(), info.read_text()
    for content, said in (
        (b"", counts),
        (whole[:2000], counts),
        (b"x" * len(whole), counts),
        (whole, counts.replace("6", "99")),
    ):
        shard.write_bytes(content)
        info.write_text(said)
        with pytest.raises(ValueError, match=r"/a(, k\d+)?: |/a is damaged: ") as error:
            if split == "val":
                list(open_samples(str(tmp_path / "a"), data(tokenizer_folder)))
            settings = data(tokenizer_folder, num_workers=0)
            stream = Stream(str(tmp_path / "a"), settings, model(), rank=0, world=1, seed=1, train=True)
            list(islice(open_loader(stream), 20))
        assert "\n" not in str(error.value)


def test_unprepared_folders_are_refused_with_the_mend(loader, root):
    (root / "raw").mkdir()
    for file, remedy in (
        ("notes.txt", r"raw is no Energon dataset: it holds neither shards \(\.tar\) nor a \.json or \.jsonl file$"),
        ("more.jsonl", r"give .*raw/more\.jsonl$"),
        ("train.jsonl", r"give .*raw/train\.jsonl$"),
        ("shard_0.tar", r"run python -m avlm\.data\.shard --prepare .*raw$"),
    ):
        (root / "raw" / file).touch()
        with pytest.raises(ValueError, match=remedy):
            loader("raw")
    with pytest.raises(FileNotFoundError, match="no Energon dataset"):
        loader("nowhere.yaml")


def test_state_survives_json(loader):
    rows = loader()
    next(iter(rows))
    saved = rows._loader.save_state_rank()
    assert repr(to_json(from_json(json.loads(json.dumps(to_json(saved)))))) == repr(to_json(saved))


def test_a_shuffle_buffer_holds_no_more_than_its_bytes(root, tokenizer_folder):
    source = str(root / "b")
    mean = bytes_per_sample(root / "b", "train")
    sizes = [path.stat().st_size for path in (root / "b").glob("*.tar")]
    assert 0 < mean <= sum(sizes) / 30
    held = [
        shuffled_samples(source, data(tokenizer_folder, shuffle_buffer=20, shuffle_buffer_bytes=int(n)))
        for n in (1, 5.5 * mean, 2**30)
    ]
    assert held == [1, 5, 20]

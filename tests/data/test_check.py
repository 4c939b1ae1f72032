"""What is found before ranks start in the data of every stage, in what is to be measured on validation sets, and in
checkpoint.best."""

import json
import re
import tarfile
from dataclasses import asdict, replace

import pytest

from avlm.config.load import resolve_config
from avlm.data.check import check_room_for_media
from avlm.data.rows import open_samples_of
from avlm.data.stream import Stream, fingerprint
from avlm.preflight.check import check
from tests.data.energon.test_loader import write_set
from tests.data.small_files import ANY_GRID, data, model, tone, write_tokenizer
from tests.parallel.small import TREE, make_config


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A config with the validation sets "good" and "two", and changes of its data, train and checkpoint."""
    folder = tmp_path_factory.mktemp("sets")
    turns = [{"role": "user", "content": "hello?"}, {"role": "assistant", "content": "hello"}]
    record = json.dumps({"messages": turns}) + "\n"
    (folder / "good.jsonl").write_text(record)
    (folder / "empty.jsonl").write_text("\n")
    (folder / "asked.jsonl").write_text(json.dumps({"messages": turns[:1]}) + "\n" + record)
    (folder / "silent.jsonl").write_text(json.dumps({"messages": turns, "images": ["gone.png"]}) + "\n")
    (folder / "text.yaml").write_text("captions and speech\n")
    (folder / "torn.yaml").write_text("splits: {train: [\n")
    (folder / "raw").mkdir()
    with tarfile.open(folder / "raw" / "shard_000.tar", "w") as shard:
        shard.add(folder / "good.jsonl", "0.json")
    write_set(folder / "prepared", "train", 2)
    write_set(folder / "held_out", "val", 2)
    tokenizer = str(write_tokenizer(folder / "tokenizer"))
    model = TREE["model"] | {"decoder": TREE["model"]["decoder"] | {"vocab_size": 400}}

    def make(sets=("good",), data=None, train=None, best=None, last=None):
        validation = {name: str(folder / f"{name}.jsonl") if name != "made" else "synthetic" for name in sets}
        data = {"train": "synthetic", "tokenizer": tokenizer, "template": "chatml", "seq_length": 64} | (data or {})
        changes = {"data": data | {"validation": validation}, "train": train or {}, "checkpoint": {"best": best}}
        if last:  # the data of a second stage
            stages = [{"name": name, "steps": 1, "train": ["decoder"]} for name in ("first", "last")]
            changes["stages"] = [stages[0], stages[1] | {"data": {"train": str(folder / last)}}]
        return resolve_config(TREE | {"model": model} | changes, "test")

    return make


ANSWERS = {"validate_answers": 2}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"train": ANSWERS, "data": {"metrics": {"good": ["wer", "cer"]}}, "best": "val/good/cer"},
        {"train": ANSWERS, "best": "val/good/exact_match"},
        {"best": "val/good/token_accuracy"},
        {"sets": ["asked"]},
        {"sets": ["empty"], "train": {"validate_every": 0}},
        {"last": "good.jsonl"},
        {"last": "asked.jsonl"},
        {"last": "prepared"},
    ],
)
def test_what_can_be_measured_passes(make, options):
    check(make(**options), world_size=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last": "gone.jsonl"}, r"stage last: no data at .*gone.jsonl"),
        ({"last": "empty.jsonl"}, r"stage last: data.train: .*empty.jsonl holds no records"),
        (
            {"last": "silent.jsonl"},
            r"last: data.train: no sample of .*silent.jsonl can be used; silent.jsonl:1: no media",
        ),
        (
            {"last": "raw"},
            r"last: data.train: .*raw is no Energon dataset: run python -m avlm.data.shard --prepare .*raw$",
        ),
        (
            {"last": "held_out"},
            r"last: data.train: .*held_out has no split 'train' that .*data.shard FILE .*--split train adds one",
        ),
        ({"last": "text.yaml"}, r"last: data.train: .*text.yaml must hold keys and values, not str"),
        ({"last": "torn.yaml"}, r"last: data.train: .*torn.yaml is not valid YAML: while parsing"),
        ({"sets": ["empty"]}, r"data.validation.empty: .*empty.jsonl holds no records"),
        (
            {"sets": ["asked"], "train": ANSWERS},
            r"asked.jsonl:1: its last two turns must be a user's and an assistant's",
        ),
        ({"sets": ["made"], "train": ANSWERS}, r"validation.made: synthetic samples have no answers: set train.valid"),
        ({"sets": ["gone"]}, r"no data at .*gone.jsonl"),
        (
            {"data": {"metrics": {"god": ["wer"]}}, "train": ANSWERS},
            r"metrics.god: data.validation has no such set \(it has good",
        ),
        ({"data": {"metrics": {"good": ["were"]}}, "train": ANSWERS}, r"names 'were', which is no metric .*mean wer\?"),
        ({"data": {"metrics": {"good": []}}, "train": ANSWERS}, r"metrics.good names no metric"),
        ({"data": {"metrics": {"good": ["wer"]}}}, r"metrics.good needs answers: set train.validate_answers"),
        (
            {"data": {"metrics": {"good": ["vqa_accuracy"]}}, "train": ANSWERS},
            r"validation.good: .*good.jsonl:1: vqa_accuracy needs 10 texts",
        ),
        ({"best": "val/god/loss"}, r"checkpoint.best=val/god/loss is not a value that .*did you mean val/good/loss\?"),
        (
            {"best": "val/good/wer"},
            r"val/good/wer is not a value that .*answers are not scored, because train.validate_an",
        ),
        (
            {"best": "val/good/wer", "train": ANSWERS},
            r"val/good/wer is not a value that validation reports: did you mean",
        ),
        (
            {"best": "loss", "sets": []},
            r"checkpoint.best=loss is not a value that validation reports: it reports nothing",
        ),
        ({"best": "val/good/loss", "train": {"validate_every": 0}}, r"needs validation, but train.validate_every=0"),
    ],
)
def test_what_cannot_is_one_line_that_names_it(make, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        check(make(**options), world_size=1)
    assert "\n" not in str(caught.value)


def test_bad_samples_are_told_before_ranks_start_by_their_reasons(make, tmp_path, capsys):
    """A set with audio for a model that has no tower for it."""
    turns = [{"from": "human", "value": "hello?"}, {"from": "gpt", "value": "hello"}]
    heard = [{"from": "human", "value": "<audio>hello?"}, {"from": "gpt", "value": "hello"}]
    (tmp_path / "a.wav").write_bytes(tone(0.1))
    records = [{"conversations": turns}] * 18 + [{"conversations": heard, "audio": "a.wav"}] * 18
    records += [{"conversations": turns, "image": "gone.png"}, {"conversations": turns, "image": "lost.png"}]

    def write(name, records):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(tmp_path / name)

    def deaf(config):
        stages = [replace(stage, train=["decoder"]) for stage in config.stages]
        return replace(config, model=replace(config.model, audio=None, audio_projector=None), stages=stages)

    config = make(data={"train": write("own.jsonl", records[8:28])}, train={"validate_every": 0})
    check(deaf(config), world_size=1)
    line = r"^warning: stage all: .*own\.jsonl: 10 of 20 samples: has 1 audio, but the model has no audio tower \(own"
    assert re.match(line + r"\.jsonl:\d+, own\.jsonl:\d+, own\.jsonl:\d+ and 7 more\)\n$", capsys.readouterr().err)
    mixed = {write("all.jsonl", records): 1, write("good.jsonl", records[:18]): 1}
    many = make(data={"train": mixed}, train={"validate_every": 0})
    check(many, world_size=1)
    said = capsys.readouterr().err
    assert re.search(r"all\.jsonl: 2 of 38 samples: no media file .*\.png \(all\.jsonl:3\d, all", said)
    assert "good" not in said
    with pytest.raises(ValueError, match=r"18 of 38 samples: has 1 audio.*; .*2 of 38 .*; more than data.max_bad_frac"):
        check(deaf(many), world_size=1)
    large = make(data={"train": write("large.jsonl", [*[{"conversations": turns}] * 19, {"text": "x"}] * 45)})
    check(large, world_size=1)
    assert re.search(r"large\.jsonl: \d of 100 samples looked at \(of 900\): the record has", capsys.readouterr().err)


def test_metrics_do_not_change_what_samples_encode_to(make):
    """A run goes on with other metrics: its loader state stays good."""
    one, other = make(train=ANSWERS), make(train=ANSWERS, data={"metrics": {"good": ["wer"]}})
    assert fingerprint(one.stages[0].data, one.model) == fingerprint(other.stages[0].data, other.model)


TALL = TREE["model"] | {"vision": asdict(ANY_GRID)}
HALVED = TREE["model"] | {
    "vision": TREE["model"]["vision"] | {"patch_size": 4},
    "vision_projector": {"halve_frames": "mean"},
}
FIXED = TREE["model"] | {"audio": TREE["model"]["audio"] | {"window": "fixed"}}


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            lambda: make_config(data={"train": "synthetic", "seq_length": 3}),
            r"the smallest image or frame takes 4 tokens, more than data\.seq_length=3: raise it, or model\.vision",
        ),
        (
            lambda: make_config(model=HALVED, data={"train": "synthetic", "seq_length": 3}),
            r"the smallest image or frame takes 4 tokens, more than data\.seq_length=3",
        ),
        (
            lambda: make_config(model=FIXED, data={"train": "synthetic", "seq_length": 15}),
            r"stage all: an audio window takes 25 tokens, more than data\.seq_length=15: raise it, or model\.audio",
        ),
        (
            lambda: make_config(model=TALL, data={"train": "synthetic", "seq_length": 9, "image_tokens": [9.5, 20]}),
            r"the smallest image or frame takes 10 tokens, more than data\.seq_length=9: raise it, or lower the least",
        ),
    ],
)
def test_a_row_that_is_too_short_for_media_is_named(make, line):
    with pytest.raises(ValueError, match=line):
        check_room_for_media(make())


def test_samples_of_a_training_source_are_counted_without_reading_them(tmp_path, tokenizer_folder):
    settings = data(tokenizer_folder)
    (tmp_path / "three.jsonl").write_text("{}\n\n{}\n{}\n")
    (tmp_path / "two.json").write_text("[{}, {}]")
    write_set(tmp_path / "five", "train", 5)
    write_set(tmp_path / "six", "train", 6)
    write_set(tmp_path / "held_out", "val", 7)
    blend = {"train": {"blend": [{"weight": 9, "path": "five"}, {"weight": 1, "path": "six"}]}}
    blend["val"] = {"path": "held_out"}
    header = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
    (tmp_path / "blend.yaml").write_text(json.dumps(header | {"splits": blend}))
    (tmp_path / "outer.yaml").write_text(json.dumps(header | {"splits": {"train": {"path": "blend.yaml"}}}))
    counts = {"three.jsonl": 3, "two.json": 2, "five": 5, "blend.yaml": 11, "outer.yaml": 11}

    def stream(source: str) -> Stream:
        return Stream(source, settings, model(), rank=0, world=1, seed=0, train=True)

    found = {}
    for name in counts:
        source = str(tmp_path / name)
        found[name] = open_samples_of(source, stream(source)).num_samples
    assert found == counts
    assert not stream("synthetic:images=2").has_samples


def test_windows_of_true_length_and_stages_of_text_may_have_short_rows():
    check_room_for_media(make_config(data={"train": "synthetic", "seq_length": 15}))
    text = [{"name": "text", "steps": 1, "train": ["decoder"]}]
    check_room_for_media(make_config(data={"train": "synthetic", "seq_length": 3}, stages=text))

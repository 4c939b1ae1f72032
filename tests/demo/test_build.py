"""The demo set: the committed bank, what is held out of training, and the files that are built from it."""

import hashlib
import io
import json
import multiprocessing
import re
import tarfile

import av
import numpy as np
import pytest
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_loader,
    get_train_dataset,
    get_val_dataset,
    stateless,
)
from tokenizers import Tokenizer

from avlm.demo import build as demo
from avlm.demo.bank import tasks
from avlm.demo.bank.bank import FOLDER, SAMPLE_RATE, VOICE_GROUPS, load
from avlm.demo.bank.draw import CANVAS, MOTIONS, NUM_FRAMES, UNHEARD_VOICE, move
from avlm.demo.bank.shards import encode
from avlm.demo.bank.tasks import NUMBERS, TASKS, THINGS, UNITS, compose

TINY = {
    "caption": {"train": 6, "test": 10},
    "video": {"train": 4, "test": 20, "test_sound": 2},
    "transcribe": {"train": 3, "test_human": 2},
    "text": {"train": 4, "test": 5},
}
TESTS = [(task, split) for task, splits in demo.SETS.items() for split in splits if split != "train"]


@pytest.fixture(scope="module")
def tiny_set(tmp_path_factory):
    return demo.build(tmp_path_factory.mktemp("demo") / "tiny", sets=TINY)


@pytest.fixture(scope="module")
def training_records():
    return {task: [compose(task, "train", index, load())[0] for index in range(250)] for task in TASKS}


def answer(record):
    return record["messages"][1]["content"]


def numbers(record):
    """The number words of the answer, whatever stands between them."""
    return tuple(NUMBERS.index(word) for word in re.findall("[a-z]+", answer(record)) if word in NUMBERS)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_committed_parts_are_those_of_the_notice():
    stated = re.findall(r"^([0-9a-f]{64})  (\S+)$", (FOLDER / "NOTICE").read_text(), re.M)
    assert sorted(part for _, part in stated) == ["digits.npz", "photos.npz", "speech.tar", "speech_human.tar"]
    for sha256, part in stated:
        assert hashlib.sha256((FOLDER / part).read_bytes()).hexdigest() == sha256, part


def test_the_bank_has_every_class_digit_and_voice():
    bank = load()
    assert bank.photos["train"].shape == (10, 300, 28, 28) and bank.photos["test"].shape == (10, 100, 28, 28)
    assert [sum(map(len, bank.numerals[split])) for split in ("train", "test")] == [1400, 397]
    assert list(bank.voices) == [voice for group in VOICE_GROUPS.values() for voice in group]
    for wave in (wave for words in bank.voices.values() for wave in words):
        assert wave.dtype == np.int16 and 0.2 < len(wave) / SAMPLE_RATE < 0.9
        assert abs(10 * np.log10(np.mean((wave / 32768) ** 2)) + 23) < 0.1  # dBFS


@pytest.mark.parametrize(("task", "split"), [*((task, "train") for task in TASKS), *TESTS])
def test_media_have_the_order_of_their_tags_and_answers_say_what_the_media_are(task, split):
    for index in range(12):
        record, media = compose(task, split, index, load())
        tags = re.findall(r"<(image|audio|video)>", record["messages"][0]["content"])
        assert [re.match("[a-z]+", name).group() for name in media] == tags
        for kind in ("image", "audio", "video"):
            assert record.get(f"{kind}s", []) == [name for name in media if name.startswith(kind)]
        sources = [source.split("/") for source in record["sources"]]
        names = [(THINGS if source[0] == "photo" else UNITS)[int(source[2])] for source in sources]
        if task != "joint":
            assert all(name in answer(record) for name in names)
        elif record["kind"] == "same":
            assert ("yes" in answer(record)) == (names[0] == names[1])
        else:
            assert numbers(record)[-1] == UNITS.index(names[0]) + UNITS.index(names[1])


def test_test_photos_and_numerals_are_in_no_training_sample(training_records):
    trained = {source for records in training_records.values() for record in records for source in record["sources"]}
    pictures = {source for source in trained if not source.startswith("voice")}
    assert all(source.split("/")[1] == "train" for source in pictures)
    for task, split in TESTS:
        for source in (source for index in range(40) for source in compose(task, split, index, load())[0]["sources"]):
            assert source.startswith("voice") or source not in trained


@pytest.mark.parametrize(("task", "split"), [("transcribe", "test_human"), ("two_sounds", "test"), ("text", "test")])
def test_test_strings_and_pairs_are_in_no_training_answer(task, split, training_records):
    """250 samples say little about 1,000 strings: the lists that training draws from are looked at as well."""
    assert not set(tasks.SEEN_STRINGS) & set(tasks.UNSEEN_STRINGS) and len(tasks.UNSEEN_STRINGS) == 100
    assert not set(tasks.SEEN_PAIRS) & set(tasks.UNSEEN_PAIRS) and len(tasks.UNSEEN_PAIRS) == 10
    for record in training_records[task]:
        assert numbers(record) not in tasks.UNSEEN_STRINGS
        if "two_sounds" in (record["task"], record["kind"]):  # the text task names what it rehearses
            assert numbers(record) not in tasks.UNSEEN_PAIRS
    tests = [compose(task, split, index, load())[0] for index in range(20)]
    tests = [record for record in tests if record["kind"] in ("three", "two", "transcribe", "two_sounds")]
    assert tests and all(numbers(record) in tasks.UNSEEN_STRINGS + tasks.UNSEEN_PAIRS for record in tests)


def test_a_thing_never_moves_in_its_held_out_way_in_training(training_records):
    def pair(record):
        facts = [value for modality, value in record["facts"] if modality != "audio"]
        return facts[0], facts[-1]

    assert not set(tasks.SEEN_MOTIONS) & set(tasks.UNSEEN_MOTIONS)
    assert len(tasks.SEEN_MOTIONS) + len(tasks.UNSEEN_MOTIONS) == len(THINGS) * len(MOTIONS)
    trained = {pair(record) for record in training_records["video"]}
    assert trained.isdisjoint(pair(compose("video", "test", index, load())[0]) for index in range(60))
    assert trained.issuperset(pair(compose("video", "test_seen", index, load())[0]) for index in range(60))


def test_one_voice_is_heard_in_no_training_sample(training_records):
    voices = {
        source.split("/")[1]
        for records in training_records.values()
        for source in (source for record in records for source in record["sources"])
        if source.startswith("voice")
    }
    assert UNHEARD_VOICE not in voices and len(voices) == 14
    for split, group in (("human", VOICE_GROUPS["human"]), ("unheard", (UNHEARD_VOICE,))):
        for source in (s for i in range(20) for s in compose("transcribe", f"test_{split}", i, load())[0]["sources"]):
            assert source.split("/")[1] in group


def test_frames_and_their_sound_decode_exactly():
    for index, split in ((0, "test"), (1, "test"), (0, "test_sound")):
        video = compose("video", split, index, load())[1]["video0.mkv"]
        assert video.frames_FHW.shape == (NUM_FRAMES, CANVAS, CANVAS)
        with av.open(io.BytesIO(encode(video))) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            np.testing.assert_array_equal(np.stack(frames), np.repeat(video.frames_FHW[..., None], 3, axis=-1))
            assert container.duration >= 1_000_000 and bool(container.streams.audio) == (split == "test_sound")
        if video.sound is not None:
            with av.open(io.BytesIO(encode(video))) as container:
                sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
            np.testing.assert_array_equal(sound, video.sound)


def test_frames_in_the_reverse_order_show_the_opposite_motion():
    photo_HW = load().photos["test"][8, 0]
    for motion in range(0, len(MOTIONS), 2):
        there, back = (move(photo_HW, way, np.random.default_rng(0)) for way in (motion, motion + 1))
        np.testing.assert_array_equal(there, back[::-1])


def test_written_sounds_differ_little_from_the_composed_ones():
    wave = compose("transcribe", "test_human", 0, load())[1]["audio0.wav"]
    with av.open(io.BytesIO(encode(wave))) as container:
        assert container.streams.audio[0].rate == SAMPLE_RATE
        read = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    assert 0 <= len(read) - len(wave) < 0.13 * SAMPLE_RATE
    error = read[: len(wave)].astype(float) - wave
    assert 10 * np.log10(np.mean(wave.astype(float) ** 2) / np.mean(error**2)) > 20


def test_chance_is_the_best_answer_without_a_modality():
    def record(image, audio, answer):
        facts = [("image", image), ("audio", audio)]
        return {"kind": "same", "facts": facts, "messages": [{}, {"content": answer}]}

    records = [record("a", "a", "yes"), record("a", "b", "no"), record("b", "b", "yes"), record("b", "c", "no")]
    # Whoever hears "a" or "c" knows the answer; the two who hear "b" can be right once.
    assert demo.chance(records) == {"count": 4, "blind": 0.5, "no_image": 0.75, "no_audio": 0.5}


@pytest.mark.parametrize(
    ("task", "split", "count", "expected"),
    [
        ("caption", "test", 400, {"blind": 0.1, "no_image": 0.1}),
        ("numeral", "test", 390, {"blind": 0.1, "no_image": 0.1}),
        # 54 pairs on 30 axes: whoever sees the axis but not the order of the frames is right 30 times in 54.
        ("video", "test_seen", 216, {"blind": 0.0185, "no_video": 0.0185, "no_order": 0.5556}),
        ("video", "test_sound", 540, {"blind": 0.0019, "no_video": 0.0185, "no_order": 0.5556, "no_audio": 0.1}),
        ("joint", "test_same", 180, {"blind": 0.05, "no_image": 0.5, "no_audio": 0.5}),
        ("joint", "test_sum", 200, {"blind": 0.1, "no_image": 0.1, "no_audio": 0.1}),
        ("mixed", "test", 200, {"blind": 0.01, "no_image": 0.1, "no_audio": 0.1}),
    ],
)
def test_no_balanced_test_set_can_be_answered_without_its_media(task, split, count, expected):
    records = [compose(task, split, index, load())[0] for index in range(count)]
    assert demo.chance(records) == {"count": count, **expected}


def test_the_tiny_set_is_the_same_bytes_each_time(tiny_set, tmp_path):
    first, second = files(tiny_set), files(demo.build(tmp_path / "tiny", sets=TINY))
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_keys_are_unique_and_every_part_is_listed_in_the_json(tiny_set):
    keys = []
    for path in tiny_set.glob("*/*/*.tar"):
        with tarfile.open(path) as tar:
            parts = {}
            for member in tar:
                key, name = member.name.split(".", 1)
                parts.setdefault(key, {})[name] = tar.extractfile(member).read()
        keys += parts
        for sample in parts.values():
            record = json.loads(sample.pop("json"))
            listed = [name for kind in ("images", "audios", "videos") for name in record.get(kind, [])]
            assert sorted(sample) == sorted(listed)
    assert len(keys) == len(set(keys)) == sum(count for splits in TINY.values() for count in splits.values())


def test_a_second_build_returns_at_once(tiny_set, monkeypatch):
    monkeypatch.setattr(demo, "fill", None)
    assert demo.build(tiny_set, sets=TINY) == tiny_set


def test_another_recipe_and_the_remains_of_a_build_that_died_are_replaced(tmp_path):
    one, other = {"text": {"train": 2, "test": 1}}, {"text": {"train": 3, "test": 1}}
    (tmp_path / ".set.unfinished" / "text").mkdir(parents=True)
    folder = demo.build(tmp_path / "set", sets=one)
    before = files(folder)
    assert files(demo.build(folder, sets=other)) != before


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("two years of work")
    with pytest.raises(ValueError, match="no demo set"):
        demo.build(tmp_path, sets=TINY)
    assert (tmp_path / "thesis.txt").exists()


def test_two_processes_that_build_at_once_give_one_good_set(tiny_set, tmp_path):
    context = multiprocessing.get_context("fork")
    builders = [context.Process(target=demo.build, args=(tmp_path / "tiny", 1, TINY)) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert [builder.exitcode for builder in builders] == [0, 0]
    assert files(tmp_path / "tiny") == files(tiny_set)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tiny.lock", "tiny"]


def test_energon_reads_the_sets_and_the_blends(tiny_set):
    def keys(dataset):
        return [key for batch, _ in zip(get_loader(dataset), range(40)) for key in batch]

    options = {"worker_config": WorkerConfig(rank=0, world_size=1, num_workers=0), "task_encoder": Raw()}
    test = keys(get_val_dataset(tiny_set / "video" / "test", batch_size=1, **options))
    assert test == [f"video_test_{index:06d}" for index in range(20)]
    shuffle = {"batch_size": 2, "shuffle_buffer_size": None, "max_samples_per_sequence": None}
    blend = keys(get_train_dataset(tiny_set / "finetune.yaml", **shuffle, **options))
    assert {key.rsplit("_", 2)[0] for key in blend} == TINY.keys() & demo.BLENDS["finetune"].keys()
    tests = keys(get_val_dataset(tiny_set / "finetune.yaml", batch_size=1, **options))
    assert len(tests) == sum(
        count for task in demo.BLENDS["finetune"] for split, count in TINY.get(task, {}).items() if split != "train"
    )


@edataclass
class Key(Sample):
    pass


@stateless
def cook(sample):
    return Key(**basic_sample_keys(sample))


class Raw(DefaultTaskEncoder):
    decoder = None
    cookers = [Cooker(cook)]

    def batch(self, samples):
        return [sample.__key__ for sample in samples]

    def encode_batch(self, batch):
        return batch


def test_every_word_of_an_answer_is_one_token(training_records, tmp_path):
    demo.write_tokenizer(
        tmp_path / "tokenizer", [record for records in training_records.values() for record in records]
    )
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() <= demo.VOCABULARY_SIZE
    special = [tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    assert special == [0, 1, 2]
    for word in (*UNITS, *MOTIONS, *(name for name in THINGS if name not in ("t-shirt", "ankle boot"))):
        assert len(tokenizer.encode(f"the {word}").ids) == 2, word
    text = "<|im_start|>user\nWrite down: three one seven<|im_end|>\n"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text

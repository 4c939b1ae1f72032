"""A config file says exactly what runs, and a mistake in it is named."""

import dataclasses
import time
import typing
from pathlib import Path

import pytest
import yaml

from avlm.config.decoder import DecoderConfig, RopeScaling
from avlm.config.load import _dataclass_in, dump_config, load_config
from avlm.config.media import VideoConfig
from avlm.config.model import LoraConfig, ModelConfig, ProjectorConfig, VisionConfig
from avlm.config.parallel import TimeoutsConfig
from avlm.config.run import (
    Config,
    DataConfig,
    InitFrom,
    OptimizerConfig,
    RecomputeConfig,
    StageConfig,
)
from tests.parallel.small import TREE

TINY = {
    "output_dir": "runs/x",
    "model": {
        "decoder": {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
        }
    },
    "data": {"train": "synthetic", "seq_length": 128},
    "optimizer": {"lr": 1e-3},
    "stages": [
        {"name": "one", "steps": 3, "train": ["decoder"]},
        {"name": "two", "steps": 2, "train": ["decoder"], "optimizer": {"lr": 1e-4}, "data": {"seq_length": 64}},
    ],
}


@pytest.fixture
def write(tmp_path):
    def write(text: str | dict = TINY) -> Path:
        path = tmp_path / "x.yaml"
        path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
        return path

    return write


def test_a_stage_inherits_what_it_does_not_set(write):
    loaded = load_config(write())
    assert [stage.optimizer.lr for stage in loaded.stages] == [1e-3, 1e-4]
    assert [stage.data.seq_length for stage in loaded.stages] == [128, 64]
    assert loaded.stages[1].data.train == "synthetic"
    assert loaded.total_steps == 5


def test_the_resolved_config_gives_itself_back(write, tmp_path):
    loaded = load_config(write())
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(loaded))
    assert load_config(again) == loaded


def test_a_config_from_before_may_say_whether_a_video_has_sound(write):
    for sound, audio in (("true", "after"), ("false", False)):
        loaded = load_config(write(), [f"stages.two.data.video.sound={sound}"])
        assert [stage.data.video.audio for stage in loaded.stages] == [False, audio]


def test_overrides_reach_sections_and_named_stages(write):
    loaded = load_config(
        write(), ["train.accumulate=4", "stages.two.steps=7", "stages.two.optimizer.lr=3e-5", "seed=9"]
    )
    assert (loaded.train.accumulate, loaded.stages[1].steps, loaded.stages[1].optimizer.lr, loaded.seed) == (
        4,
        7,
        3e-5,
        9,
    )


def test_epochs_of_the_command_line_take_the_place_of_a_files_steps(write, tmp_path):
    in_epochs = load_config(write(), ["stages.two.epochs=3"])
    assert [(stage.steps, stage.epochs) for stage in in_epochs.stages] == [(3, None), (0, 3.0)]
    in_steps = load_config(write(yaml.safe_load(dump_config(in_epochs))), ["stages.two.steps=7"])
    assert [(stage.steps, stage.epochs) for stage in in_steps.stages] == [(3, None), (7, None)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.decoder.hiden_size=32", "unknown key model.decoder.hiden_size (did you mean hidden_size?)"),
        ("train={rows_per_step: 8, accumulate: 2}", "train: rows_per_step=8 and accumulate=2 both say how many rows"),
        ("train.accumulate=0", "train.accumulate: Input should be greater than 0, got 0"),
        ("stages.one.steps=-1", "stages.one.steps: Input should be greater than or equal to 0, got -1"),
        ("stages.one.train=[]", "stages.one.train: List should have at least 1 item"),
        ("optimizer.lr=.nan", "optimizer.lr"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("model.decoder.num_heads=0", "model.decoder.num_heads: Input should be greater than 0"),
        ("trian.accumulate=2", "unknown key trian (did you mean train?)"),
        ("train.accumulate=two", "train.accumulate: Input should be a valid integer, got 'two'"),
        ("train.accumulate=true", "train.accumulate: Input should be a valid integer, got True"),
        ("stages.one.optimizer.learning_rate=1", "unknown key stages.one.optimizer.learning_rate"),
        ("model.decoder.num_heads=5", "num_heads=5"),
        ("model.decoder.num_kv_heads=3", "num_heads=4 is not divisible by num_kv_heads=3"),
        ("stages.three.steps=1", "there is no stage 'three': ['one', 'two']"),
        ("seed", "override 'seed' is not of the form section.key=value"),
        ("data.seq_length=9000", "data.seq_length=9000 exceeds model.decoder.max_position=8192"),
        ("stages.one.train=[vision]", "stage one names vision, which this model does not have"),
        ("model.audio_projector={}", "audio and audio_projector come together"),
        ("data.seq_lenght=9", "unknown key data.seq_lenght (did you mean seq_length?)"),
        ("data.num_workers=two", "x.yaml: data.num_workers: Input should be a valid integer, got 'two'"),
        ("data.video={audio: after, sound: true}", "unknown key data.video.sound (here: data.video.audio)"),
        ("data.video.sound=after", "unknown key data.video.sound (here: data.video.audio)"),
        ("data.video.audio=true", "data.video.audio: Input should be False, 'after', 'interleaved' or 'merged'"),
        ("data.video.frames=9", "unknown key data.video.frames (did you mean num_frames?)"),
        ("stages.one.data={video: {xyzzy: 9}}", "unknown key stages.one.data.video.xyzzy (known: num_frames, fps,"),
        ("model.lora={rnk: 9}", "unknown key model.lora.rnk (did you mean rank?)"),
        ("optimiser.lr=1", "unknown key optimiser (did you mean optimizer?)"),
        ("xyzzy=1", ", debug, optimizer, data)"),
        ("lr=1e-3", "unknown key lr (here: optimizer.lr)"),
        ("train.gradient_checkpointing=true", "(here: train.recompute.decoder=full)"),
        ("train.epochs=3", "unknown key train.epochs (here: stages.NAME.epochs)"),
        ("optimizer.learning_rate=1", "unknown key optimizer.learning_rate (here: optimizer.lr)"),
        ("stages.one.steps=0", "stages.one: missing key steps (or epochs)"),
        ("resume={allow: [optimizer.rl]}", "resume: allow names optimizer.rl, and only these may change: optimizer.lr"),
        ("stages.one=1", "stages.one is a whole stage: give one of its keys"),
        ("stages.0=1", "there is no stage '0': ['one', 'two']"),
        ("stages.=1", "is not of the form section.key=value"),
        ("stages.one.name.x=1", "stages.one.name is a single value and has no key 'x'"),
        ("seed=" + "[" * 3000, "is nested deeper than 50 levels"),
        ("seed=" + "9" * 5000, "is not valid YAML: Exceeds the limit"),
        ("data.template=" + "x" * 5000, "or 'tokenizer', got 'xxx"),
        ('data.template="a\\u2028\\e[2Jb"', r"got 'a\u2028\x1b[2Jb'"),
        (
            "data.template=lama3",
            "be 'plain', 'paligemma', 'llava', 'mistral', 'smolvlm', 'llama3', 'chatml' or 'tokenizer', got 'lama3'",
        ),
    ],
)
def test_a_mistake_is_named_in_one_line(write, override, message):
    with pytest.raises(ValueError) as error:
        load_config(write(), [override])
    assert message in str(error.value)
    assert str(error.value).isprintable() and len(str(error.value)) < 600


SECTIONS = {
    "": Config,
    "init_from": InitFrom,
    "model": ModelConfig,
    "model.decoder": DecoderConfig,
    "model.decoder.rope_scaling": RopeScaling,
    "model.vision": VisionConfig,
    "model.audio_projector": ProjectorConfig,
    "model.lora": LoraConfig,
    "data": DataConfig,
    "data.video": VideoConfig,
    "optimizer": OptimizerConfig,
    "stages.all": StageConfig,
    "stages.all.data": DataConfig,
    "stages.all.data.video": VideoConfig,
    "stages.all.optimizer": OptimizerConfig,
    "train.recompute": RecomputeConfig,
    "parallel.timeouts": TimeoutsConfig,
}


@pytest.mark.parametrize("section", SECTIONS)
def test_an_unknown_key_comes_with_all_keys_of_its_place(write, section):
    needed = [f"{key}={value}" for key, value in NEEDED.items() if section.startswith(key)]
    with pytest.raises(ValueError, match=r"unknown key .*\(known: ") as error:
        load_config(write(TREE), [*needed, f"{section}.qqqqqqq=1".strip(".")])
    listed = str(error.value).partition("(known: ")[2].removesuffix(")").split(", ")
    fields = [field.name for field in dataclasses.fields(SECTIONS[section])]
    assert listed == fields + ["optimizer", "data"] * (section == "")


def test_a_missing_key_is_named(write):
    tree = {**TINY, "model": {"decoder": {k: v for k, v in TINY["model"]["decoder"].items() if k != "num_layers"}}}
    with pytest.raises(ValueError, match=r"missing key model\.decoder\.num_layers"):
        load_config(write(tree))


def test_a_file_that_is_absent_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config file"):
        load_config(tmp_path / "absent.yaml")


OUT_OF_RANGE = """
    model.vision.mean=[0.5] model.vision.std=[0.5,0.5] model.vision.std=[0.0,0.0,0.0] model.vision.mean=[0.5,0.5,124.0]
    model.decoder.head_dim=-2 model.decoder.rope_theta=0.0 model.decoder.norm_eps=-1.0 model.decoder.num_layers=1000000
    model.decoder.hidden_size=9223372036854775808 model.vision_projector.hidden_size=-5 model.decoder.max_position=-1
    model.vision.feature_layer=1 model.audio.max_positions=-1 model.lora.alpha=-1 model.lora.dropout=1.0
    model.decoder.rope_scaling.factor=0 model.decoder.rope_scaling.low_freq_factor=4 model.vision.patch_size=17
    optimizer.lr=-1.0 optimizer.betas=[2.0,0.5] optimizer.betas=[0.9,-0.1] optimizer.eps=0.0 optimizer.clip_norm=-1.0
    optimizer.weight_decay=-1.0 optimizer.warmup_steps=-5 optimizer.lr_scale.vision=-1.0 optimizer.min_lr=-0.1
    optimizer.min_lr=1.0 data.num_workers=-1 data.video.num_frames=0 data.video.max_frames=0 data.shuffle_buffer=-1
    data.video.fps=0.0 data.max_media_bytes=-1 data.max_image_pixels=0 data.max_audio_seconds=-1.0
    data.max_bad_fraction=-1.0 data.max_bad_fraction=1.5 data.packing_buffer=0 train.validate_every=-1
    data.image_layout.min_tiles=0 data.image_layout.max_tiles=65
    train.validate_answers=-1 parallel.shard=0 parallel.shard=-2 seed=-1 checkpoint.keep=-1
    parallel.timeouts.step=0.5 debug.profile=[0,1]
"""
NEEDED = {
    "model.decoder.rope_scaling": "{factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_max_position: 8}",
    "model.lora": "{}",
}


@pytest.mark.parametrize("override", OUT_OF_RANGE.split())
def test_a_number_out_of_its_range_is_refused_with_its_key_and_value(write, override):
    needed = [f"{key}={value}" for key, value in NEEDED.items() if override.startswith(f"{key}.")]
    load_config(write(TREE), needed)
    with pytest.raises(ValueError, match=override.partition("=")[0].rpartition(".")[2] + "(=|.*, got )") as error:
        load_config(write(TREE), [*needed, override])
    assert str(error.value).isprintable()


def _unbounded(hint, bounds=frozenset()) -> bool:
    if typing.get_origin(hint) is typing.Annotated:
        base, *extras = typing.get_args(hint)
        return _unbounded(base, {type(limit).__name__ for extra in extras for limit in getattr(extra, "metadata", ())})
    if hint in (int, float):
        return not bounds & {"Gt", "Ge"} or (hint is int and not bounds & {"Lt", "Le"})
    return any(_unbounded(part) for part in typing.get_args(hint))


def test_every_number_of_the_config_has_a_range():
    """Integers from both sides, so that no product of sizes overflows."""
    classes, bare = [Config], []
    for cls in classes:
        hints = typing.get_type_hints(cls, include_extras=True)
        bare += [f"{cls.__name__}.{field.name}" for field in dataclasses.fields(cls) if _unbounded(hints[field.name])]
        classes += [c for f in hints.values() if (c := _dataclass_in(f)) and c not in classes]
    assert len(classes) == 35 and not bare


def test_clipping_is_switched_off_by_null_and_0_says_so(write):
    assert load_config(write(), ["optimizer.clip_norm=null"]).stages[0].optimizer.clip_norm is None
    with pytest.raises(ValueError, match=r"stages\.one\.optimizer: clip_norm=0 .* set clip_norm: null"):
        load_config(write(), ["optimizer.clip_norm=0"])


TENFOLD = "".join(f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
BROKEN = {
    "a date as a key": (b"2024-01-01: a", "missing key model"),
    "nested": (b"[" * 3000, "nested deeper than 50"),
    "a tag that does not fit": (b"a: !!timestamp x", "not valid YAML"),
    "a tag of an empty text": (b"a: !!int ''", "not valid YAML"),
    "a set": (b"a: !!set {x, y}", "a is a YAML set"),
    "itself": (b"data: &d {train: x, video: *d}", "nested deeper than 50 levels, or in itself"),
    "latin-1": ("# \xe4\na: 1".encode("latin1"), r"is not UTF-8 \(byte 2\)"),
    "aliases": (f"a: &a [{'x,' * 10}]\n{TENFOLD}".encode(), "holds more than 10,000 values"),
    "digits": (b"a: " + b"9" * 5000, "not valid YAML: Exceeds the limit"),
    "hexadecimal digits": (b"a: 0x" + b"9" * 5000, "a is a number of 20,000 bits"),
    "half a character": (b'a: "\\ud800"', "a holds half of a surrogate pair"),
    "bytes": (b"a: " + b"x" * 2**19, "has 524,291 bytes: more than 262,144 are not read"),
    "a key twice": (b"seed: 1\nresume: auto\nseed: 2", "the key 'seed' is on line 1 and on line 3"),
    "a list": (b"- a", "must hold keys and values, not list"),
    "open": (b"a: [1", "not valid YAML"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_short_line_that_names_it_in_bounded_time(name, tmp_path):
    raw, message = BROKEN[name]
    (tmp_path / "x.yaml").write_bytes(raw)
    begun = time.monotonic()
    with pytest.raises(ValueError, match=rf"x\.yaml.*{message}") as error:
        load_config(tmp_path / "x.yaml")
    assert str(error.value).isprintable() and len(str(error.value)) < 500 and time.monotonic() - begun < 10


def test_an_alias_is_a_copy_that_an_override_does_not_reach(write):
    text = yaml.safe_dump({**TINY, "stages": []}).replace("stages: []", "").replace("data:", "data: &data")
    text += "stages: [{name: a, steps: 1, train: [decoder], data: *data}, {name: b, steps: 1, train: [decoder]}]"
    loaded = load_config(write(text), ["stages.a.data.seq_length=32"])
    assert [stage.data.seq_length for stage in loaded.stages] == [32, 128]


def test_numbers_with_an_exponent_are_numbers(write):
    assert load_config(write(), ["optimizer.lr=1e-3", "optimizer.eps=1E-6"]).stages[0].optimizer.eps == 1e-6

"""A config file says exactly what runs, and a mistake in it is named."""

from pathlib import Path

import pytest
import yaml

from avlm import config_file

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
    loaded = config_file.load(write())
    assert [stage.optimizer.lr for stage in loaded.stages] == [1e-3, 1e-4]
    assert [stage.data.seq_length for stage in loaded.stages] == [128, 64]
    assert loaded.stages[1].data.train == "synthetic"
    assert loaded.total_steps == 5


def test_the_resolved_config_gives_itself_back(write, tmp_path):
    loaded = config_file.load(write())
    again = tmp_path / "again.yaml"
    again.write_text(config_file.dump(loaded))
    assert config_file.load(again) == loaded


def test_overrides_reach_sections_and_named_stages(write):
    loaded = config_file.load(
        write(), ["train.accumulate=4", "stages.two.steps=7", "stages.two.optimizer.lr=3e-5", "seed=9"]
    )
    assert (loaded.train.accumulate, loaded.stages[1].steps, loaded.stages[1].optimizer.lr, loaded.seed) == (
        4,
        7,
        3e-5,
        9,
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.decoder.hiden_size=32", "unknown key model.decoder.hiden_size (did you mean hidden_size?)"),
        ("train.accumulate=0", "train.accumulate: Input should be greater than 0, got 0"),
        ("stages.one.steps=-1", "stages.0.steps: Input should be greater than 0, got -1"),
        ("stages.one.train=[]", "stages.0.train: List should have at least 1 item"),
        ("optimizer.lr=.nan", "optimizer.lr"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("model.decoder.num_heads=0", "model.decoder.num_heads: Input should be greater than 0"),
        ("trian.accumulate=2", "unknown key trian (did you mean train?)"),
        ("train.accumulate=two", "train.accumulate: Input should be a valid integer, got 'two'"),
        ("train.accumulate=true", "train.accumulate: Input should be a valid integer, got True"),
        ("stages.one.optimizer.learning_rate=1", "unknown key stages.0.optimizer.learning_rate"),
        ("model.decoder.num_heads=5", "num_heads=5"),
        ("model.decoder.num_kv_heads=3", "num_heads=4 is not divisible by num_kv_heads=3"),
        ("stages.three.steps=1", "there is no stage 'three': ['one', 'two']"),
        ("seed", "override 'seed' is not of the form section.key=value"),
        ("data.seq_length=9000", "data.seq_length=9000 exceeds model.decoder.max_position=8192"),
        ("stages.one.train=[vision]", "stage one names vision, which this model does not have"),
        ("model.audio_projector={}", "audio and audio_projector come together"),
        (
            "data.template=lama3",
            "data.template: Input should be 'plain', 'llava', 'llama3', 'chatml' or 'tokenizer', got 'lama3'",
        ),
    ],
)
def test_a_mistake_is_named_in_one_line(write, override, message):
    with pytest.raises(ValueError) as error:
        config_file.load(write(), [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_key_is_named(write):
    tree = {**TINY, "model": {"decoder": {k: v for k, v in TINY["model"]["decoder"].items() if k != "num_layers"}}}
    with pytest.raises(ValueError, match=r"missing key model\.decoder\.num_layers"):
        config_file.load(write(tree))


def test_a_file_that_is_absent_or_broken_is_said_so(write, tmp_path):
    with pytest.raises(FileNotFoundError, match="no config file"):
        config_file.load(tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match="not valid YAML"):
        config_file.load(write("a: [1"))


def test_numbers_with_an_exponent_are_numbers(write):
    assert config_file.load(write(), ["optimizer.lr=1e-3", "optimizer.eps=1E-6"]).stages[0].optimizer.eps == 1e-6


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path):
    loaded = config_file.load(path)
    assert loaded.total_steps > 0
    assert path.read_text().startswith("# "), (
        "a config opens with what it is for, the command, hardware, time and result"
    )

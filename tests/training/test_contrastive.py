"""A contrastive stage as its users run it, the samples that it refuses, and what it counts."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from avlm.config.connector import CrossConfig
from avlm.config.load import load_config, resolve_config
from avlm.config.run import Config
from avlm.data.captions import EncodedPair, PairEncoder, encoder_of, pack_pairs
from avlm.data.sample import Sample
from avlm.data.stream import Stream
from avlm.evaluation.side_by_side import find_candidates
from avlm.models.costs import counts
from avlm.models.freezing import trained_names
from avlm.models.shapes import parameter_shapes
from avlm.storage.run_folder import read_records
from avlm.training import flops
from avlm.weights.export import export
from tests.data.small_files import image_file, photo, write_tokenizer
from tests.parallel.small import TREE, make_config
from tests.parallel.spawn import run_ranks
from tests.training.test_flops import counted
from tests.training.test_train import train_to_end, write_config

TEXT = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_layers": 1, "num_heads": 2}
MODEL = {
    **TREE["model"],
    "decoder": {**TREE["model"]["decoder"], "vocab_size": 400},
    "text": {**TEXT, "max_position": 12, "start_token": "<s>", "end_token": "</s>"},
    "contrastive": {"size": 16},
}
STAGE = {"name": "pairs", "objective": "contrastive", "steps": 12, "train": ["vision", "text", "contrastive"]}
COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250), "white": (250, 250, 250)}


def data_in(folder) -> dict:
    """Squares of four colours with their names."""
    lines = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (16, 16), colour).save(folder / f"{name}.png")
        lines += [json.dumps({"image": f"{name}.png", "caption": name})] * 4
    (folder / "squares.jsonl").write_text("\n".join(lines))
    path = str(folder / "squares.jsonl")
    tokenizer = str(write_tokenizer(folder / "tokenizer"))
    return {"train": path, "validation": {"squares": path}, "tokenizer": tokenizer, "seq_length": 128, "num_workers": 0}


def test_media_find_their_captions_after_a_few_steps_and_a_resumed_run_continues(tmp_path):
    changes = {
        **{"model": MODEL, "stages": [STAGE], "data": data_in(tmp_path), "checkpoint": {"every": 6, "keep": 5}},
        **{"train": {"validate_every": 6, "accumulate": 2}, "optimizer": {"lr": 3e-3, "warmup_steps": 2}},
    }
    path = write_config(tmp_path, **changes)
    run_ranks(train_to_end, 1, path, ("train.stop_after=6",))
    run_ranks(train_to_end, 1, path)
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    scores = [record for record in records if "val/squares/zero_shot" in record]
    steps = [record for record in records if "grad_norm" in record]
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert scores[-1]["val/squares/zero_shot"] == 1.0 and scores[-1]["val/squares/chance"] == 0.25
    assert scores[-1]["val/squares/loss"] < scores[0]["val/squares/loss"]
    assert steps[0]["targets/image"] == steps[0]["target_tokens"] > 8 and steps[0]["flops/text"] > 0
    assert "flops/decoder" not in steps[0]
    later = {**changes, "init_from": {"all": str(tmp_path / "run")}, "stages": [{**STAGE, "steps": 1}]}
    run_ranks(train_to_end, 1, write_config(tmp_path / "later", **later))
    [first, *_] = read_records(tmp_path / "later" / "run" / "metrics.jsonl")
    assert first["loss"] < steps[0]["loss"], "a later run takes all of it"
    with pytest.raises(ValueError, match="its last stage, pairs, is contrastive"):
        find_candidates([str(tmp_path / "run")], "latest", None)


def test_what_does_not_train_is_named():
    for train, objective in ((["decoder"], "contrastive"), (["text"], "answers")):
        stages = [{**STAGE, "train": train, "objective": objective}]
        with pytest.raises(ValueError, match=f"train names {train[0]}, which does not run with objective={objective}"):
            make_config(model=MODEL, stages=stages)
    with pytest.raises(ValueError, match=r"pairs: objective=contrastive needs model\.text"):
        make_config(stages=[{**STAGE, "train": ["vision"]}])
    stage = make_config(model=MODEL, stages=[{"name": "flags", "steps": 1, "freeze_vision_model": True}]).stages[0]
    model = make_config(model=MODEL, stages=[STAGE]).model
    trained = {name.split(".")[0] for name in trained_names(stage, model, parameter_shapes(model))}
    assert trained == {"decoder", "audio", "vision_projector", "audio_projector"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> PairEncoder:
    folder = tmp_path_factory.mktemp("pairs")
    data = {**data_in(folder), "template": "llava"}
    cfg = make_config(model=MODEL, stages=[STAGE], data=data)
    options = {"rank": 0, "world": 1, "seed": 0, "train": True, "objective": "contrastive"}
    found = encoder_of(Stream(cfg.stages[0].data.train, cfg.stages[0].data, cfg.model, **options))
    assert isinstance(found, PairEncoder)
    return found


def sample_of(caption: str, images: int = 1, role: str = "assistant") -> Sample:
    turns = [{"role": "user", "content": "<image>" * images}, {"role": role, "content": caption}]
    return Sample("key", turns, images=[image_file(photo(20, 20))] * images)


def test_a_pair_is_a_caption_between_its_tokens_and_takes_the_room_of_its_medium(encoder):
    pair = encoder.encode(sample_of("hello </s>"))
    start, *words, end = pair.token_T.tolist()
    assert (start, end) == (encoder.tokenizer.id_of("<s>"), encoder.tokenizer.id_of("</s>"))
    assert encoder.tokenizer.decode(words) == "hello </s>" and end not in words
    assert len(pair) == len(pair.token_T) + 4, "2 x 2 patches"
    assert pair.target_T.tolist() == [-100] * (len(words) + 1) + [end]
    text = replace(encoder.model.text, fill_token="</s>")
    filled = PairEncoder(replace(encoder.model, text=text), encoder.data, encoder.tokenizer).encode(sample_of("hello"))
    assert len(filled.token_T) == 12 and set(filled.token_T[-8:].tolist()) == {end}
    crossing = replace(encoder.model, cross=CrossConfig(every=1))  # where one token stands for an image
    assert len(PairEncoder(crossing, encoder.data, encoder.tokenizer).encode(sample_of("hello </s>"))) == len(pair)


@pytest.mark.parametrize(
    "sample, message",
    [
        (sample_of("hello", images=2), "needs samples of one medium, and this one has 2"),
        (sample_of("hello", images=0), "and this one has 0"),
        (sample_of("what " * 20), "caption takes .* tokens, more than model.text.max_position=12"),
        (sample_of("x" * 10**6), "caption of 1,000,000 characters"),
        (sample_of("  "), "no caption"),
        (sample_of("hello", role="user"), "its last turn is no text of the assistant"),
    ],
)
def test_a_sample_that_is_no_pair_is_refused_by_name(encoder, sample, message):
    with pytest.raises(ValueError, match=message):
        encoder.encode(sample)


def test_an_image_without_room_stands_next_to_its_caption_in_the_message(encoder):
    short = PairEncoder(encoder.model, replace(encoder.data, seq_length=4), encoder.tokenizer)
    with pytest.raises(ValueError, match=r"takes 4 tokens, after \d+ of its caption, more than data\.seq_length=4"):
        short.encode(sample_of("hello"))


def config_of(contrastive: dict, train: list[str]) -> Config:
    text = {**TEXT, "max_position": 16, "num_layers": 2, "causal": False}
    model = {**TREE["model"], "audio": None, "audio_projector": None, "text": text, "contrastive": contrastive}
    return resolve_config({**TREE, "model": model, "stages": [{**STAGE, "train": train}]}, "test")


@pytest.mark.parametrize(
    "contrastive, train",
    [
        ({"size": 20}, ["vision", "text", "contrastive"]),
        ({"size": 20}, ["text"]),
        ({"size": 24, "vision": {"pool": "attention", "projection": "none"}}, ["text", "contrastive"]),
        ({"size": 24, "loss": "sigmoid", "vision": {"pool": "attention"}}, ["vision", "contrastive"]),
    ],
)
def test_flops_are_those_that_pytorch_counts(contrastive, train, monkeypatch):
    cfg = config_of(contrastive, train)
    samples = []
    for _ in range(5):
        token_T = torch.randint(0, 96, (16,))
        patches = torch.randint(0, 255, (2, 2, 192), dtype=torch.uint8)
        samples.append(EncodedPair("", "image", token_T, token_T, {"image": [patches]}))
    batch = pack_pairs(samples, cfg.model)
    found = flops.by_module(flops.costs(cfg.model, cfg.stages[0], cfg.train.recompute), counts(batch))
    forward, backward, _ = counted(cfg, batch, monkeypatch)
    own = 2 * 5 * 5 * contrastive["size"]  # of one product of all embeddings, which are not counted
    blocks = 1 if contrastive.get("loss") else 2
    gradients = (
        2 * blocks if len(train) > 1 else 3
    )  # frozen media have none, but where they are side by side with texts
    assert sum(parts[0] for parts in found.values()) == forward - blocks * own
    assert sum(parts[1] for parts in found.values()) == backward - gradients * own


def test_only_our_own_format_keeps_what_compares(tmp_path):
    cfg = make_config(model=MODEL, stages=[STAGE])
    state = {name: torch.zeros(shape) for name, shape in parameter_shapes(cfg.model).items()}
    assert any(name.startswith("contrastive.") for name in export(cfg.model, state, tmp_path / "own"))
    served = export(cfg.model, state, tmp_path / "served", "transformers", data=load_data(tmp_path))
    assert len(served) > 0 and not any("contrastive" in name or name.startswith("text.") for name in served)


def load_data(folder):
    path = write_config(folder, model=MODEL, stages=[STAGE], data=data_in(folder))
    return load_config(path).stages[0].data

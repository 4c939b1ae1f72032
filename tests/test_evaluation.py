"""Validation and evaluation: the same forwards on every rank, and ablations that take away what they say."""

import json

import pytest
import torch

from avlm import config_file, evaluation
from avlm.data import open_samples
from avlm.data.chat import Tokenizer
from avlm.data.sample import SampleEncoder
from tests.data.media import film, image_file, picture, tone, write_tokenizer
from tests.parallel.small import TREE, build
from tests.parallel.spawn import run_ranks
from train import validate


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """One sample with a picture, one with a sound; validation of the first alone."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "a.png").write_bytes(image_file(picture(16, 16)))
    (folder / "b.wav").write_bytes(tone(0.3))
    records = [
        {"messages": turns("<image>\nhello?", "hello"), "images": ["a.png"]},
        {"messages": turns("<audio>\nworld?", "world"), "audios": ["b.wav"]},
    ]
    for count in (1, 2):
        lines = [json.dumps(record) + "\n" for record in records[:count]]
        (folder / f"{count}.jsonl").write_text("".join(lines))
    model = TREE["model"] | {"decoder": TREE["model"]["decoder"] | {"vocab_size": 400}}
    data = {
        **{"train": str(folder / "2.jsonl"), "validation": {"one": str(folder / "1.jsonl")}, "num_workers": 0},
        **{"tokenizer": str(write_tokenizer(folder / "tokenizer")), "template": "chatml", "seq_length": 128},
    }
    return config_file.resolve(TREE | {"model": model, "data": data, "train": {"validate_answers": 5}}, "test")


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def validate_and_answer(cfg):
    world, model = build(cfg)
    results = validate(model, cfg.stages[0], cfg, world)
    data = cfg.stages[0].data
    encoder = SampleEncoder(cfg.model, data, Tokenizer(data.tokenizer))
    with torch.no_grad():
        given = evaluation.answers(model, list(open_samples(data.train, data)), encoder, world)
    return results, given


def test_two_ranks_validate_one_sample_and_answer_as_one_process_does(cfg):
    [(alone, answers)] = run_ranks(validate_and_answer, 1, cfg)
    both = run_ranks(validate_and_answer, 2, cfg)
    assert alone.keys() == {"val/one/loss", "val/one/exact_match"} and len(answers) == 2
    for results, given in both:
        assert results == pytest.approx(alone, rel=1e-5)
        assert given == answers


@pytest.fixture(scope="module")
def encoder(cfg):
    data = cfg.stages[0].data
    return SampleEncoder(cfg.model, data, Tokenizer(data.tokenizer))


def test_an_ablation_takes_away_one_modality_and_nothing_else(encoder):
    media = {"images": [image_file(picture(16, 16))], "audios": [tone(0.3)]}
    prompt = encoder.prompt(turns("<image><audio>?", "")[:1], **media)
    blind, deaf = (evaluation.ablate(prompt, name, seed=0) for name in ("no_image", "no_audio"))
    assert prompt.pixels.float().std() > 1 and blind.pixels.float().std() == 0
    assert prompt.mels[0].std() > 0.1 and deaf.mels[0].std() == 0
    assert torch.equal(blind.mels[0], prompt.mels[0]) and torch.equal(deaf.pixels, prompt.pixels)
    assert torch.equal(blind.token_T, prompt.token_T) and torch.equal(deaf.token_T, prompt.token_T)


def test_shuffling_changes_the_order_of_frames_from_sample_to_sample(encoder):
    prompt = encoder.prompt(turns("<video>?", "")[:1], videos=[film(2)])
    orders = []
    for seed in range(5):
        shuffled = evaluation.ablate(prompt, "shuffled", seed).pixels
        orders.append([next(i for i, frame in enumerate(prompt.pixels) if torch.equal(frame, s)) for s in shuffled])
    assert all(sorted(order) == list(range(len(prompt.pixels))) for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_a_guesser_stays_below_the_bound_in_95_of_100_sets():
    hits = torch.rand(20_000, 200, generator=torch.Generator().manual_seed(0)) < 0.1
    below = (hits.float().mean(1) <= evaluation.bound(0.1, 200)).float().mean().item()
    assert 0.945 < below < 0.98


def test_the_report_marks_an_ablation_above_its_bound():
    result = {"task": "caption", "set": "test", "value": 0.8, "count": 100}
    result |= {"ablations": {"no_image": 0.4}, "ablation_chances": {"no_image": 0.1}}
    assert "40.0 % (chance 10.0 %) (!)" in evaluation.table([result])
    assert "(!)" not in evaluation.table([result | {"ablations": {"no_image": 0.1}}])

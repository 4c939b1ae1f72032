"""Validation and evaluation: the same forwards on every rank, and ablations that take away what they say."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import pytest
import torch

from avlm.config.load import resolve_config, to_dict
from avlm.data.loader import open_loader, open_samples
from avlm.data.sample import Sample, SampleEncoder
from avlm.data.stream import Stream
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation import answers as evaluation
from avlm.evaluation import scores as text_metrics
from avlm.evaluation.answers import ablate
from avlm.evaluation.report import bound, report, table
from avlm.evaluation.results import Asked, _chances, evaluate, possible_ablations
from avlm.evaluation.scores import cer, total
from avlm.evaluation.sets import find_sets
from avlm.evaluation.validation import judge, validate
from avlm.models.avlm import AVLM
from avlm.models.initial import init
from avlm.storage.run_folder import Progress
from avlm.training.log import Log
from tests.data.small_files import image_file, photo, tone, video_file, write_tokenizer
from tests.parallel.small import MODELS, TREE, build
from tests.parallel.spawn import run_ranks


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """One sample with a picture, one with a sound; validation of the first alone and of both. Prompts end in a
    sign, as answers go on with the last token (``quieten``) and blanks around them are taken away."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "a.png").write_bytes(image_file(photo(16, 16)))
    (folder / "b.wav").write_bytes(tone(0.3))
    records = [
        {"messages": turns("<image>\nhello?", "hello"), "images": ["a.png"]},
        {
            "messages": turns("<audio>\nworld?", "aaaa"),
            "audios": ["b.wav"],
            "answers": ["the world", "a globe"],
        },
    ]
    for count in (1, 2):
        lines = [json.dumps(record) + "\n" for record in records[:count]]
        (folder / f"{count}.jsonl").write_text("".join(lines))
    model = TREE["model"] | {"decoder": TREE["model"]["decoder"] | {"vocab_size": 400}}
    data = {
        **{"train": str(folder / "2.jsonl"), "num_workers": 0, "metrics": {"both": ["wer", "cer", "rouge_l"]}},
        "validation": {"one": str(folder / "1.jsonl"), "both": str(folder / "2.jsonl")},
        **{"tokenizer": str(write_tokenizer(folder / "tokenizer")), "template": "llava", "seq_length": 128},
    }
    train = {"validate_answers": 5, "validate_new_tokens": 8}
    return resolve_config(TREE | {"model": model, "data": data, "train": train, "output_dir": str(folder)}, "test")


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@torch.no_grad()
def quieten(model):
    """Blocks that add little: with a tied head the likeliest next token is often the one that is read."""
    for name, parameter in model.named_parameters():
        if name.endswith(("attention.o.weight", "ffn.down.weight")):
            parameter.mul_(0.01)


def validate_and_answer(cfg, tensor, step):
    cfg = dataclasses.replace(cfg, parallel=dataclasses.replace(cfg.parallel, tensor=tensor))
    world, model = build(cfg)
    quieten(model)
    log = Log(cfg, world, 0)
    results = validate(model, cfg.stages[0], cfg, world, log, step)
    data = cfg.stages[0].data
    encoder = SampleEncoder(cfg.model, data, Tokenizer(data.tokenizer))
    with torch.no_grad():
        given = evaluation.answers(model, list(open_samples(data.train, data)), encoder, world, max_new_tokens=16)
    return results, given


@pytest.fixture(scope="module")
def alone(cfg):
    """Validation and answers of one process."""
    [found] = run_ranks(validate_and_answer, 1, cfg, 1, 1)
    return found


@pytest.mark.parametrize("tensor", [1, 2])
def test_two_ranks_validate_one_sample_and_answer_as_one_process_does(cfg, alone, tensor):
    expected, answers = alone
    reported = {"one": ("loss", "token_accuracy", "exact_match")}
    reported["both"] = ("loss", "token_accuracy", "wer", "cer", "rouge_l")
    assert expected.keys() == {f"val/{name}/{metric}" for name in reported for metric in reported[name]}
    for results, given in run_ranks(validate_and_answer, 2, cfg, tensor, 1 + tensor):
        assert results == pytest.approx(expected, rel=1e-5)
        assert given == answers
    lines = [(Path(cfg.output_dir) / f"predictions/step_{step:08d}/both.jsonl").read_text() for step in (1, 1 + tensor)]
    assert lines[0] == lines[1]


def test_ranks_of_a_tensor_axis_answer_with_deepstack_and_m_rope_as_one_process_does(cfg, tmp_path):
    tree = to_dict(cfg)
    tree["model"] = {**MODELS["deep"], "decoder": {**MODELS["deep"]["decoder"], "vocab_size": 400}}
    tree["output_dir"] = str(tmp_path)
    deep = resolve_config(tree, "test")
    [(expected, answers)] = run_ranks(validate_and_answer, 1, deep, 1, 1)
    assert any(answers)
    for results, given in run_ranks(validate_and_answer, 2, deep, 2, 2):
        assert results == pytest.approx(expected, rel=1e-5)
        assert given == answers


def test_token_accuracy_is_the_share_of_targets_whose_logit_is_the_largest(cfg, alone):
    data = cfg.stages[0].data
    [row] = open_loader(Stream(data.train, data, cfg.model, rank=0, world=1, seed=1, train=False))
    model = AVLM(cfg.model)
    init(model, cfg.seed)
    quieten(model)
    with torch.no_grad():
        x_TD = model.hidden(row)
        logits_RV = model.decoder.norm(x_TD)[row.target_rows_R] @ model.decoder.head.weight.T
    expected = (logits_RV.argmax(1) == row.target_R).float().mean().item()
    assert 0 < expected < 1
    assert alone[0]["val/both/token_accuracy"] == pytest.approx(expected)


def test_predictions_are_written_with_their_references_and_values(cfg, alone):
    results, answers = alone
    path = Path(cfg.output_dir) / "predictions" / "step_00000001" / "both.jsonl"
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert (first["key"], first["question"], first["references"]) == ("2.jsonl:1", "<image>\nhello?", ["hello"])
    assert second["references"] == ["the world", "a globe"]
    for line, answer in zip((first, second), answers):
        assert line["cer"] == text_metrics.value(cer(line["prediction"], line["references"]))
        assert answer.startswith(line["prediction"][:4]), "the other answers have more tokens"
    assert first["prediction"] and second["prediction"], "otherwise this shows nothing"
    scores = [cer(line["prediction"], line["references"]) for line in (first, second)]
    assert results["val/both/cer"] == pytest.approx(total(scores))


def broken_sets(folder, messages):
    """Records that cannot be answered or scored, each with what is to be said."""
    good = {"messages": turns("hello?", "hello")}
    write = lambda name, *records: (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    write("question", good, {"messages": turns("hello?", "hello")[:1]})
    write("answers", good, good | {"answers": "hello"})
    write("people", good | {"answers": ["yes"] * 10}, good | {"answers": ["yes"] * 9})
    write("none", good)
    write("empty")
    (folder / "bad.png").write_bytes(b"no picture")
    write("picture", good, {"messages": turns("<image> hello?", "hello"), "images": ["bad.png"]})
    return {name: str(folder / f"{name}.jsonl") for name in messages}


MESSAGES = {
    "question": ("exact_match", r"question.jsonl:2: its last two turns must be a user's and an assistant's text"),
    "answers": ("exact_match", r"answers.jsonl:2: answers must be a list of texts, not 'hello'"),
    "people": ("vqa_accuracy", r'people.jsonl:2: vqa_accuracy needs 10 texts under "answers", .* there are 9$'),
    "none": ("vqa_accuracy", r'none.jsonl:1: vqa_accuracy needs 10 texts under "answers", .* there are none$'),
    "empty": ("exact_match", "empty.jsonl holds no records"),
    "picture": ("exact_match", "picture.jsonl:2: .* are not an image"),
}


def evaluate_each(cfg, sets):
    """What is said of each set."""
    world, model = build(cfg)
    data = cfg.stages[0].data
    encoder = SampleEncoder(model.config, data, Tokenizer(data.tokenizer))
    said = {}
    for name, source in sets.items():
        try:
            with torch.no_grad():
                asked = Asked([MESSAGES[name][0]], max_new_tokens=4)
                answered = lambda samples, ablation: evaluation.answers(
                    model, samples, encoder, world, ablation=ablation, max_new_tokens=4
                )
                evaluate(answered, data, name, source, world, asked)
        except ValueError as error:
            said[name] = str(error)
    return said


def test_a_sample_that_cannot_be_answered_or_scored_is_named(cfg, tmp_path):
    [said] = run_ranks(evaluate_each, 1, cfg, broken_sets(tmp_path, MESSAGES))
    assert said.keys() == MESSAGES.keys()
    for name, (_, message) in MESSAGES.items():
        assert re.search(message, said[name]) and "\n" not in said[name], said[name]


def evaluate_two(cfg, output):
    world, model = build(cfg)
    data = cfg.stages[0].data
    encoder = SampleEncoder(model.config, data, Tokenizer(data.tokenizer))
    with torch.no_grad():
        answered = lambda samples, ablation: evaluation.answers(
            model, samples, encoder, world, ablation=ablation, max_new_tokens=4
        )
        ask = functools.partial(evaluate, answered, data)
        default = ask("a/b", data.train, world, Asked(max_new_tokens=4))
        chosen = ask("c", data.train, world, Asked(["cer", "wer"], 1, 4), Path(output), 7)
    return default, chosen


def test_the_first_metric_is_the_one_that_ablations_are_scored_in(cfg, tmp_path):
    [(default, chosen)] = run_ranks(evaluate_two, 1, cfg, str(tmp_path))
    source = cfg.stages[0].data.train
    assert (default["source"], default["predictions"]) == (source, None)
    assert (chosen["source"], chosen["predictions"]) == (source, "predictions/step_00000007/c.jsonl")
    path = tmp_path / chosen["predictions"]
    assert (default["task"], default["set"], default["count"], default["metric"]) == ("a", "b", 2, "exact_match")
    assert default["metrics"].keys() == {"exact_match"} and default["ablations"].keys() == {"no_image", "no_audio"}
    assert (chosen["metric"], chosen["count"], list(chosen["metrics"])) == ("cer", 1, ["cer", "wer"])
    [line] = [json.loads(line) for line in path.read_text().splitlines()]
    assert line["cer"] == chosen["value"] == chosen["metrics"]["cer"]
    assert chosen["ablations"]["no_image"] > 0.5, "characters to edit of an untrained model, not a share of right ones"


def test_the_best_step_follows_the_metric():
    at = lambda step, **of: Progress(step=step, **of)
    higher = judge(at(2), {"val/a/wer": 0.5}, "val/a/wer")
    assert (higher.best_step, higher.best_value, higher.best_metric) == (2, 0.5, "val/a/wer")
    of = {"best_step": 2, "best_value": 0.5, "best_metric": "val/a/wer"}
    for value, expected in ((0.6, 2), (0.5, 2), (math.nan, 2), (0.4, 4)):
        assert judge(at(4, **of), {"val/a/wer": value}, "val/a/wer").best_step == expected
    for metric in ("token_accuracy", "exact_match", "vqa_accuracy", "rouge_l"):
        of["best_metric"] = f"val/a/{metric}"
        for value, expected in ((0.6, 4), (0.5, 2), (0.4, 2)):
            assert judge(at(4, **of), {f"val/a/{metric}": value}, f"val/a/{metric}").best_step == expected
    assert judge(at(4, **of), {"val/b/loss": 9.0}, "val/b/loss").best_step == 4, "another metric begins anew"
    assert judge(at(4, **of), {"val/b/loss": 9.0}, None).best_step == 2


@pytest.fixture(scope="module")
def encoder(cfg):
    data = cfg.stages[0].data
    return SampleEncoder(cfg.model, data, Tokenizer(data.tokenizer))


def test_an_ablation_takes_away_one_modality_and_nothing_else(encoder):
    tower = encoder.model.audio
    media = {"images": [image_file(photo(16, 16))], "audios": [tone(0.3)]}
    prompt = encoder.prompt(turns("<image><audio>?", "")[:1], **media)
    blind, deaf = (ablate(prompt, name, 0, tower) for name in ("no_image", "no_audio"))
    [seen], [grey] = prompt.media["image"], blind.media["image"]
    assert seen.float().std() > 1 and grey.float().std() == 0
    [heard], [silence] = prompt.media["audio"], deaf.media["audio"]
    assert heard.std() > 0.1 and heard.shape == silence.shape
    assert (silence == -1.5).all(), "the floor of a log-mel: (log10(1e-10) + 4) / 4"
    assert blind.media["audio"] is prompt.media["audio"] and deaf.media["image"] is prompt.media["image"]
    assert torch.equal(blind.token_T, prompt.token_T) and torch.equal(deaf.token_T, prompt.token_T)


def test_shuffling_changes_the_order_of_frames_from_sample_to_sample(encoder):
    prompt = encoder.prompt(turns("<video>?", "")[:1], videos=[video_file(2)])
    frames = prompt.media["image"]
    orders = []
    for seed in range(5):
        shuffled = ablate(prompt, "shuffled", seed, None).media["image"]
        orders.append([next(i for i, frame in enumerate(frames) if frame is s) for s in shuffled])
    assert all(sorted(order) == list(range(len(frames))) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    mixed = dataclasses.replace(prompt, media={"image": [frames[0][:1], *frames, frames[1][:1]]})
    shuffled = ablate(mixed, "shuffled", 1, None).media["image"]
    assert [frame.shape for frame in shuffled] == [frame.shape for frame in mixed.media["image"]]


def test_the_audio_of_a_video_can_be_taken_away_if_it_is_encoded(cfg):
    data = cfg.stages[0].data
    with_audio = dataclasses.replace(data, video=dataclasses.replace(data.video, audio="after"))
    loud = [Sample("loud", [], videos=[video_file(1, sound=True)])]
    silent = [Sample("silent", [], videos=[video_file(1)])]
    assert list(possible_ablations(loud, with_audio)) == ["no_image", "no_audio", "shuffled"]
    assert list(possible_ablations(silent, with_audio)) == ["no_image", "shuffled"]
    assert list(possible_ablations(loud, data)) == ["no_image", "shuffled"]


def test_a_guesser_stays_below_the_bound_in_95_of_100_sets():
    hits = torch.rand(20_000, 200, generator=torch.Generator().manual_seed(0)) < 0.1
    below = (hits.float().mean(1) <= bound(0.1, 200)).float().mean().item()
    assert 0.945 < below < 0.98


@pytest.mark.parametrize("chance", [0.0, 0.1, 0.5, 1.0])
def test_the_bound_of_a_large_set_is_that_of_the_normal_distribution(chance):
    expected = chance + 1.645 * math.sqrt(chance * (1 - chance) / 5000)
    assert bound(chance, 5000) == pytest.approx(expected, abs=3e-4)


def test_the_report_marks_an_ablation_above_its_bound():
    result = {"task": "caption", "set": "test", "metric": "exact_match", "value": 0.8, "count": 100, "kinds": []}
    result |= {
        "ablation_counts": {"no_image": 100},
        "ablations": {"no_image": 0.4},
        "ablation_chances": {"no_image": 0.1},
        "metrics": {"exact_match": 0.8},
    }
    assert "40.0 % (chance 10.0 %) (!)" in table([result])
    assert "(!)" not in table([result | {"ablations": {"no_image": 0.1}}])


def test_a_bar_in_an_answer_does_not_end_its_cell():
    example = {"key": "a", "question": "x|y?", "truth": "a\nb", "answer": "|"}
    result = {"task": "caption", "set": "test", "metric": "exact_match", "value": 0.8, "count": 100, "kinds": []}
    result |= {"ablations": {}, "ablation_chances": {}, "metrics": {"exact_match": 0.8}, "chance": None}
    assert "| caption/test | x\\|y? | a b | \\| |" in report([result | {"examples": [example]}])


def test_chances_are_those_of_the_whole_set(tmp_path):
    (tmp_path / "chance.json").write_text('{"count": 9, "blind": 0.5}')
    assert _chances(tmp_path, 9)["blind"] == 0.5
    assert _chances(tmp_path, 8) == _chances(tmp_path / "none", 9) == {}


def test_a_name_stands_for_one_set(tmp_path):
    (tmp_path / "a").mkdir()
    sets = [f"a={tmp_path / 'a'}", f"b={tmp_path}"]
    assert find_sets(sets) == {"a": str(tmp_path / "a"), "b": str(tmp_path)}
    with pytest.raises(ValueError, match=f"--data a={tmp_path}: a is {tmp_path / 'a'} already, give it another name"):
        find_sets([*sets, f"a={tmp_path}"])


def test_the_table_has_a_column_for_each_further_metric_of_any_set():
    first = {
        "task": "a",
        "set": "test",
        "metric": "exact_match",
        "value": 0.25,
        "count": 4,
        "ablations": {},
        "kinds": [],
    }
    second = first | {"task": "b", "metrics": {"exact_match": 0.25, "wer": 0.125}}
    head, _, a, b = table([first | {"metrics": {"exact_match": 0.25}}, second]).splitlines()
    assert head == "| task | set | samples | exact match | wer |", "what was not taken away has no column"
    assert a == "| a | test | 4 | **25.0 %** |  |" and b == "| b | test | 4 | **25.0 %** | 12.5 % |"

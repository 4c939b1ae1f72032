"""How long stages are, what may change when a run continues, and what the log says of it."""

from dataclasses import replace

import pytest
import yaml

from avlm.config.load import dump_config, load_config, resolve_config
from avlm.config.run import DataConfig
from avlm.data.bad_samples import Look
from avlm.data.sample import Sample
from avlm.storage.run_folder import Progress, folder_of, read_records
from avlm.training.console import answer_lines, clock, describe_length, ending
from avlm.training.epochs import Epoch, epoch_of, with_steps
from avlm.training.resume import check_resume
from tests.parallel.small import TREE, make_config
from tests.training.test_train import TEXT_STAGE, WORDS, run, text_data, write_config


def look(lengths, num_samples, bad=0, source="a.jsonl"):
    reasons = [("a:1", "broken")] * bad
    return Look(source, reasons, len(lengths) + bad, num_samples, lengths)


def epoch(num_samples, num_rows):
    return Epoch({"synthetic": num_samples}, num_rows)


def test_an_epoch_is_the_rows_that_its_samples_fill():
    data = DataConfig(train="a.jsonl", seq_length=100, packing_buffer=200)
    assert epoch_of(data, []) is None
    assert epoch_of(data, [look([60] * 20, 1000)]).num_rows == pytest.approx(1000), "two of 60 do not fit a row of 100"
    assert epoch_of(data, [look([50] * 20, 1000)]) == Epoch({"a.jsonl": 1000}, 500)
    assert epoch_of(data, [look([50] * 10, 1000, bad=10)]).num_rows == 250, "bad samples fill nothing"
    assert epoch_of(data, [look([10] * 5, 5)]).num_rows == 0.5, "a row holds two passes of a small set"
    narrow = replace(data, packing_buffer=5)
    assert epoch_of(narrow, [look([10] * 5, 5)]).num_rows == 1.0, "a row holds no more than the buffer"
    weights = {"a.jsonl": 3.0, "b.jsonl": 1.0}
    looks = [look([50] * 20, 100), look([25] * 20, 300, source="b.jsonl")]
    both = epoch_of(replace(data, train=weights), looks)
    assert both.num_samples == {"a.jsonl": 100, "b.jsonl": 300}
    assert both.num_rows == pytest.approx(400 * (0.75 * 50 + 0.25 * 25) / 100, rel=0.05)
    assert both.passes(2.0, {"a.jsonl": 0.75, "b.jsonl": 0.25}) == {"a.jsonl": 6.0, "b.jsonl": pytest.approx(2 / 3)}


def test_epochs_become_steps_which_a_run_keeps(tmp_path):
    stages = [{"name": "all", "epochs": 3, "train": ["decoder"]}]
    config = make_config(stages=stages, output_dir=str(tmp_path), train={"accumulate": 2})
    pass_ = epoch(100, 25.0)
    made = with_steps(config, [pass_], data_ranks=4)
    assert [stage.steps for stage in made.stages] == [10]
    (tmp_path / "config.yaml").write_text(dump_config(made))
    checkpoint = folder_of(tmp_path, 3)
    again = with_steps(config, [pass_], data_ranks=2, resumed=checkpoint)
    assert again == made, "with other ranks too"
    longer = resolve_config({**TREE, "stages": [{**stages[0], "epochs": 6}], "train": {"accumulate": 2}}, "test")
    assert with_steps(longer, [pass_], 4, checkpoint).total_steps == 19
    of_world = make_config(stages=stages, output_dir=str(tmp_path), train={"rows_per_step": 8})
    assert [with_steps(of_world, [pass_], ranks).total_steps for ranks in (1, 4, 8)] == [10, 10, 10]
    with pytest.raises(ValueError, match=r"stage all: epochs=3.0 of data whose end is not known: give steps"):
        with_steps(config, [None], 4)


@pytest.fixture
def saved(tmp_path):
    """The tree of a run that stands at its end, and its checkpoint."""
    tree = {**TREE, "output_dir": str(tmp_path)}
    path = folder_of(tmp_path, 20)
    path.mkdir(parents=True)
    (path / "complete").write_text('{"step": 20, "stage": 0, "stage_step": 20}')
    (tmp_path / "config.yaml").write_text(dump_config(resolve_config(tree, "test")))
    return tree, path


def test_the_last_stage_may_grow_and_the_optimizer_change_where_that_is_allowed(saved):
    tree, path = saved
    longer = {**tree, "stages": [{**TREE["stages"][0], "steps": 50}]}
    [note] = check_resume(resolve_config(longer, "test"), path, 1)
    assert note.startswith("stage all grows from 20 to 50 steps")
    faster = {**longer, "optimizer": {**TREE["optimizer"], "lr": 1.0}}
    with pytest.raises(
        ValueError, match=r"stages.all.optimizer.lr is 1.0.*permit it with resume=.allow: \[optimizer.lr"
    ):
        check_resume(resolve_config(faster, "test"), path, 1)
    faster["resume"] = {"allow": ["optimizer.lr"]}
    notes = check_resume(resolve_config(faster, "test"), path, 1)
    assert notes[1] == "stages.all.optimizer.lr changes from 0.003 to 1.0, which resume.allow permits"
    shorter = {**tree, "stages": [{**TREE["stages"][0], "steps": 10}]}
    with pytest.raises(ValueError, match=r"stages.all.steps is 10, .* take more of them"):
        check_resume(resolve_config(shorter, "test"), path, 1)


def test_a_resume_says_that_steps_have_other_rows(saved):
    tree, path = saved
    (path / "complete").write_text('{"step": 20, "stage": 0, "stage_step": 20, "rows_per_step": 12}')
    [note] = check_resume(resolve_config(tree, "test"), path, data_ranks=4)
    assert note.startswith("warning: a step has 4 rows (256 tokens) and had 12 rows (768 tokens)")
    assert note.endswith("train.rows_per_step=12 keeps it as it was")
    [note] = check_resume(resolve_config(tree, "test"), path, data_ranks=5)
    assert note.endswith("with the same learning rate"), "5 ranks cannot share 12 rows"
    same = resolve_config({**tree, "train": {"rows_per_step": 12}}, "test")
    assert all(check_resume(same, path, data_ranks) == [] for data_ranks in (1, 4, 12))


def test_seeing_each_sample_very_often_and_warming_up_to_the_end_are_warnings():
    [stage] = make_config().stages
    [line] = describe_length(stage, epoch(400, 20.0), rows_per_step=2)
    assert line == "400 samples, about 20 rows an epoch: 20 steps of 2 rows are 2.0 epochs"
    _, warning = describe_length(stage, epoch(1, 0.5), rows_per_step=1)
    assert warning == "warning: stage all sees each sample of synthetic about 40 times: lower its steps"
    assert describe_length(stage, None, 1) == []
    [blend] = make_config(data={**TREE["data"], "train": {"a.jsonl": 3, "b.jsonl": 1}}).stages
    _, drawn = describe_length(blend, Epoch({"a.jsonl": 100, "b.jsonl": 300}, 20.0), rows_per_step=2)
    assert drawn == "so it draws each sample of a.jsonl 6.0 times, of b.jsonl 0.7 times"
    [stage] = make_config(optimizer={"lr": 1.0, "warmup_steps": 11}).stages
    [warning] = describe_length(stage, None, 1)
    assert describe_length(make_config(optimizer={"lr": 1.0}).stages[0], None, 1) == [], "by default a tenth at most"
    assert warning.startswith("warning: the learning rate of stage all rises for 11 steps, of 20: lower optimizer.")


def test_answers_stand_next_to_the_truth_and_name_their_sample(tmp_path):
    turns = [{"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": "a cat"}]
    samples = [Sample(f"a.jsonl:{i}", turns, images=[b""], files=["cat.png"]) for i in range(1, 4)]
    lines = answer_lines(samples, ["a dog", "a cat", "x"], [["a cat"]] * 3, tmp_path)
    assert lines[0] == "  [a.jsonl:1, cat.png] <image> What is this? -> 'a dog', truth 'a cat'"
    assert len(lines) == 3 and lines[-1] == f"  all answers: {tmp_path}"


def test_times_are_clocks():
    assert [clock(seconds) for seconds in (0.4, 61, 3723)] == ["0:00", "1:01", "1:02:03"]


def test_a_run_that_ends_before_its_last_step_says_why():
    config = make_config(train={"stop_after": 5}, output_dir="x")
    first, _ = ending(config, Progress(step=5, stage_step=5), trained=True, seconds=7)
    assert first.startswith(f"ended by train.stop_after at step 5 of {config.total_steps} in 0:07: saved to x")
    first, _ = ending(make_config(), Progress(step=config.total_steps), trained=True, seconds=7)
    assert first.startswith("done in 0:07: saved to")


def test_a_run_says_how_long_it_is_where_it_ended_and_how_to_lengthen_it(tmp_path):
    stage = {**TEXT_STAGE, "epochs": 2}
    valid = {"validation": {"same": str(tmp_path / "text.jsonl")}}
    train = {"precision": "fp32", "log_every": 1, "validate_answers": 3, "validate_new_tokens": 4}
    data = text_data(tmp_path) | valid
    path = write_config(tmp_path, data=data, stages=[stage], model=WORDS, train=train)
    first = run(path)
    assert first.returncode == 0, first.stderr
    out = first.stdout
    assert "24 samples, about" in out and "are 2." in out and "left" in out
    assert "[text.jsonl:1] hello? -> " in out and "truth 'one two'" in out
    steps = load_config(tmp_path / "run" / "config.yaml").total_steps
    assert f"saved to {folder_of(tmp_path / 'run', steps)}" in out
    assert out.splitlines()[-1].startswith(f"try: python generate.py {tmp_path / 'run'}")
    assert read_records(tmp_path / "run" / "metrics.jsonl")[0]["epoch"] > 0

    again = run(path)
    assert f"is finished: all {steps} steps were done before" in again.stdout.splitlines()[-1]
    longer = yaml.safe_load(path.read_text())
    longer["stages"][0]["epochs"] = 4
    path.write_text(yaml.safe_dump(longer))
    more = run(path, "optimizer.lr=1e-4", "resume={allow: [optimizer.lr]}")
    assert f"stage words grows from {steps} to" in more.stdout and "stages.words.optimizer.lr changes" in more.stdout
    losses = [row for row in read_records(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(losses) > steps

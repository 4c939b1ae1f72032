"""metrics.jsonl survives a crash, and its plot shows every stage."""

import dataclasses
import json
import resource
import time
from types import SimpleNamespace

import pytest
import torch

from avlm.storage.run_folder import Progress, read_records
from avlm.training import curves
from avlm.training.log import Log, _cut, check_log
from tests.parallel.small import make_config, make_rows

WORLD = SimpleNamespace(is_first=True, size=1, device=torch.device("cpu"))


def rows(steps):
    return [{"step": s, "stage": "a" if s < 5 else "b", "loss": 1 / s, "loss/image": 2 / s} for s in steps]


def test_a_line_that_a_crash_cut_in_two_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(range(1, 4))) + '{"step": 4, "lo')
    assert [row["step"] for row in read_records(path)] == [1, 2, 3]


def test_a_resume_cuts_the_rows_that_it_writes_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(range(1, 9))))
    _cut(path, 5)
    assert [row["step"] for row in read_records(path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "line", [b"[1]", b'{"a": 1}', b'{"step": "x"}', b'{"st', b'{"step": 1, "a": "\xff"}', b"[" * 10**5]
)
def test_a_line_in_the_middle_that_is_no_row_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 .*: remove it$"):
        read_records(path)


def test_blocks_that_a_power_cut_left_empty_are_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + b"\0" * 20 + b'\n\n{"step": 2}\n')
    assert [row["step"] for row in read_records(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.fixture
def log(tmp_path):
    return Log(make_config(output_dir=str(tmp_path)), WORLD, 0)


def test_rows_wait_while_the_disk_is_full(log, capsys):
    log.write([{"step": 1}])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # a limit on the size of a file stands for the full disk: half a line can be written
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 5, limits[1]))
        log.write([{"step": 2}])
        log.write([{"step": 3}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [row["step"] for row in read_records(log.path)] == [1]
    assert capsys.readouterr().out.count("no space left on device") == 1
    log.write([{"step": 4}])
    assert [row["step"] for row in read_records(log.path)] == [1, 2, 3, 4]


def test_a_bad_sample_is_named_once_however_often_it_is_read(log, capsys):
    [row] = make_rows(make_config(), ["text"])
    row.skipped.extend([("a:1", "no picture"), ("a:2", "no picture"), ("a:1", "no picture")])
    log.skipped(row)
    log.skipped(row)
    assert capsys.readouterr().err == "skipped 2 samples: no picture (a:1, a:2)\n"


def test_tensorboard_gets_every_number_and_a_resumed_run_takes_the_place_of_what_it_repeats(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = make_config(output_dir=str(tmp_path), tensorboard=True)
    for first, values in ((0, {1: 5.0, 2: 4.0, 3: 3.0}), (2, {3: 2.5, 4: 2.0})):
        log = Log(config, WORLD, first)
        log.write([{"step": step, "stage": "a", "loss": loss} for step, loss in values.items()])
        log.close(Progress())
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 5.0), (2, 4.0), (3, 2.5), (4, 2.0)]


def test_the_time_left_counts_all_steps_that_are_fetched_together(log):
    log.records = [{"step": step, "stage": "a", "loss": 1.0, "grad_norm": 1.0, "lr": 1.0} for step in range(1, 11)]
    log.records[0]["tokens_per_second"] = 1.0
    log.training_since = time.perf_counter() - 10
    assert log._line(log.records[0]).endswith("0:10 elapsed, 0:19 left"), "19 steps are left, of a second each"


def test_a_missing_tensorboard_is_said_before_ranks_start(monkeypatch):
    config = make_config(tensorboard=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="tensorboard=true needs the package tensorboard: pip install tensorboard"):
        check_log(config)
    check_log(dataclasses.replace(config, tensorboard=False))


def test_a_curve_is_drawn_where_its_values_are():
    line = [float(i) for i in range(40)]
    assert curves.centred_means(line, 5) == pytest.approx(line)
    falling = [0.9**i for i in range(40)]
    means = curves.centred_means(falling, 5)
    assert (means[0], means[-1]) == pytest.approx((falling[0], falling[-1]))
    assert means[20] == pytest.approx(sum(falling[15:26]) / 11)


def test_a_curve_crosses_neither_a_gap_nor_the_end_of_a_stage():
    steps = [{"step": step, "stage": "a" if step <= 20 else "b"} for step in range(1, 31)]
    for record in steps:
        if record["step"] in (1, 2, 5, 14, 15, 19, 21):
            record["loss/image"] = 1.0
    found = [[record["step"] for record in stretch] for stretch in curves.stretches(steps, "loss/image")]
    assert found == [[1, 2, 5], [14, 15, 19], [21]]


def test_the_plot_shows_three_panels_or_all_and_names_what_is_no_run(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: give the folder of a run"):
        curves.plot(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no metrics\.jsonl"):
        curves.plot(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no steps yet"):
        curves.plot(tmp_path)
    of_step = {"lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 9.0, "data_seconds": 0.1, "step_seconds": 1.0}
    of_step |= {"padding": 0.1, "tokens": 8, "tokens/image": 4, "tokens/audio": 0, "flops": 4, "flops/vision": 4}
    lines = [row | of_step for row in rows(range(1, 9))] + [
        {"step": 8, "stage": "b", "val/x/loss": 0.5, "val/x/wer": 1.2, "val/x/exact_match": 0.4}
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    figures = []
    monkeypatch.setattr(curves.pyplot, "close", figures.append)
    for everything in (False, True):
        assert curves.plot(tmp_path, everything).read_bytes().startswith(b"\x89PNG")
    few, every = ([axes for axes in figure.axes if axes.get_legend()] for figure in figures)
    labels = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in every]
    assert labels[0] == ["all", "image", "val/x"]
    assert labels[1:3] == [["val/x/exact_match"], ["val/x/wer"]]
    assert labels[3] == ["learning rate", "gradient norm"]
    assert labels[4] == ["tokens/s without padding", "wait for data", "padding"]
    assert labels[5] == ["tokens/image", "flops/vision"]
    assert [axes.get_title() for axes in few] == [axes.get_title() for axes in every[:3]]
    colour = {line.get_label(): line.get_color() for axes in every for line in axes.lines}
    assert colour["image"] == colour["tokens/image"] == colour["flops/vision"] != colour["all"]
    assert colour["val/x"] == colour["val/x/exact_match"] == colour["val/x/wer"]
    for axes in every:  # no legend lies on the data
        assert axes.get_legend().get_window_extent().y1 <= axes.get_window_extent().y0
    assert figures[0].get_suptitle().startswith(f"{tmp_path.name}: pale lines are steps, bold ones means of up to 11")
    assert len(curves.panel_images(tmp_path)) == 3

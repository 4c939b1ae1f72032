"""metrics.jsonl survives a crash, and its plot shows every stage."""

import json

import pytest

from avlm import metrics, plots


def rows(steps):
    return [{"step": s, "stage": "a" if s < 5 else "b", "loss": 1 / s, "loss/image": 2 / s} for s in steps]


def test_a_line_that_a_crash_cut_in_two_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(range(1, 4))) + '{"step": 4, "lo')
    assert [row["step"] for row in metrics.read_rows(path)] == [1, 2, 3]


def test_a_resume_cuts_the_rows_that_it_writes_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(range(1, 9))))
    metrics._cut(path, 5)
    assert [row["step"] for row in metrics.read_rows(path)] == [1, 2, 3, 4, 5]


def test_the_plot_shows_every_curve_once_and_wants_steps(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds no steps yet"):
        plots.plot(tmp_path)
    of_step = {"lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 9.0, "data_seconds": 0.1, "step_seconds": 1.0}
    of_step |= {"padding": 0.1, "tokens": 8, "tokens/image": 4, "tokens/audio": 0, "flops": 4, "flops/decoder": 4}
    of_step |= {"seconds/decoder": 0.6, "seconds/other": 0.2}
    lines = [row | of_step for row in rows(range(1, 9))] + [
        {"step": 8, "stage": "b", "val/x/loss": 0.5, "val/x/wer": 0.2}
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    figures = []
    monkeypatch.setattr(plots.pyplot, "close", figures.append)
    assert plots.plot(tmp_path).read_bytes().startswith(b"\x89PNG")
    labels = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figures[0].axes[:6]]
    assert labels[0] == ["all", "image", "val/x"]
    assert labels[1] == ["learning rate", "gradient norm"]
    assert labels[2] == ["tokens/s without padding", "wait for data", "padding"]
    assert labels[3] == ["tokens/image", "tokens/audio", "flops/decoder"]
    assert labels[4:] == [["seconds/decoder", "seconds/other"], ["val/x/wer"]]
    decoder = figures[0].axes[4].lines[0].get_ydata()
    assert decoder == pytest.approx([75.0] * len(decoder))

"""metrics.jsonl survives a crash, and its plot shows every stage."""

import json

import pytest

from avlm import metrics


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


def test_the_plot_is_a_picture_and_wants_steps(tmp_path):
    with pytest.raises(ValueError, match="holds no steps yet"):
        metrics.plot(tmp_path)
    lines = [*rows(range(1, 9)), {"step": 8, "stage": "b", "val/x/loss": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert metrics.plot(tmp_path).read_bytes().startswith(b"\x89PNG")

"""How a command ends: exit codes, and errors of one line."""

import pytest

from avlm.process import exit
from avlm.process.exit import run_command


def fails(error: BaseException):
    """A command that raises."""

    def main() -> None:
        raise error

    return main


def test_an_error_that_only_a_later_rank_has_is_printed_by_it(monkeypatch, capsys):
    monkeypatch.setattr(exit, "ranks", lambda: (3, 4))
    monkeypatch.setattr(exit.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit) as ended:
        run_command(fails(FileNotFoundError("no data at /scratch/train.jsonl")))
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error (rank 3): no data at /scratch/train.jsonl\n"


def test_a_data_worker_that_died_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(fails(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")))
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: a data worker ended (DataLoader worker (pid 7) is killed by signal: Killed.)")
    assert line.count("\n") == 1


def test_a_data_worker_that_died_while_its_row_was_awaited_is_one_line_too(capsys):
    error = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    error.__cause__ = ConnectionRefusedError(111, "refused")
    with pytest.raises(SystemExit) as ended:
        run_command(fails(error))
    assert ended.value.code == 2 and "a data worker ended" in capsys.readouterr().err


def test_a_broken_pipe_that_is_not_the_output_is_an_error(monkeypatch, capfd):
    monkeypatch.setattr(exit.sys, "stdout", exit.sys.__stdout__)
    with pytest.raises(SystemExit) as ended:
        run_command(fails(BrokenPipeError(32, "Broken pipe")))
    assert ended.value.code == 2 and "Broken pipe" in capfd.readouterr().err


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a size that is wrong"):
        run_command(fails(RuntimeError("a size that is wrong")))

"""The comparison with other projectors, as far as it runs without a GPU."""

import csv

import pytest
import torch

from kernels.backend import INTERPRETED
from kernels.benchmark import __main__ as command
from kernels.benchmark import measure, projector, report
from kernels.benchmark.projector import Shape

PROVIDERS = tuple(projector.PROVIDERS)


@pytest.fixture
def few_shapes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(projector.SHAPES, "mlp", lambda: [Shape(images=2)])
    monkeypatch.setitem(projector.SHAPES, "placement", lambda: [Shape(images=2, tokens=64 * 40)])


def rows_of(shapes: str) -> dict[tuple[str, str], dict]:
    session = measure.start_session(0.001)
    return {
        (row["mode"], row["provider"]): row
        for rows in projector.run(projector.SHAPES[shapes](), ("fwd", "bwd"), session)
        for row in rows
    }


def test_arithmetic_is_that_of_the_products():
    small, large = projector.SHAPES["mlp"]()
    assert (small.rows, large.rows) == (16 * 576, 64 * 576)
    assert small.flops("fwd") == 2 * 9216 * 4096 * (1024 + 4096) == 386_547_056_640
    assert small.flops("full") - small.flops("fwd") == 2 * 9216 * 4096 * (1024 + 2 * 4096)
    assert large.flops("full") == 4 * small.flops("full")
    for shape in projector.SHAPES["placement"]():
        assert shape.rows <= shape.tokens and shape.tokens % 16384 == 0


@pytest.mark.parametrize("shapes", ["mlp", "placement"])
def test_every_provider_has_a_number_or_a_reason(shapes, few_shapes):
    rows = rows_of(shapes)
    assert list(rows) == [(mode, name) for mode in ("fwd", "full") for name in PROVIDERS]
    for (mode, _), row in rows.items():
        assert row["x"] == 18 and "a try of the command, not a measurement" in row["device"]
        if "reason" in row:
            continue
        assert row["ms_p50"] > 0 and row["tflops"] > 0 and row["peak_mib"] > 0 and row["error"] < 1e-5
        assert ("saved_mib" in row) == (mode == "full")
    for mode, name, reason in [
        ("full", "addmm gelu", "forward only"),
        ("fwd", "compile", "needs a GPU"),
        ("full", "max-autotune", "needs a GPU"),
    ]:
        assert rows[mode, name]["reason"] == reason
    assert ("reason" in rows["fwd", "eager masked_scatter"]) == (shapes == "mlp")
    assert {"ours", "eager"} <= {name for mode, name in rows if "reason" not in rows[mode, name]}
    z = 18 * 128 * 4 / 2**20
    if INTERPRETED:
        assert rows["full", "ours"]["saved_mib"] == pytest.approx(z)
    if shapes == "mlp":
        assert rows["full", "eager"]["saved_mib"] == pytest.approx(2 * z)


def test_a_wrong_provider_shows_a_large_error(few_shapes, monkeypatch):
    right = projector.PROVIDERS["eager"]
    wrong = lambda case, mode: lambda *weights: 1.1 * right(case, mode)(*weights)
    monkeypatch.setattr(projector, "PROVIDERS", {"wrong": wrong})
    for row in rows_of("placement").values():
        assert row["error"] == pytest.approx(0.1, rel=1e-3) and row["error_ratio"] > 1000


def test_the_command_writes_a_table_a_file_and_plots(few_shapes, tmp_path, capsys):
    command.main(["projector", "--shapes", "placement", "--csv", str(tmp_path), "--plot", "--seconds", "0.001"])
    rows = list(csv.DictReader((tmp_path / "projector_placement.csv").open()))
    assert tuple(rows[0]) == report.COLUMNS and [row["provider"] for row in rows] == 2 * list(PROVIDERS)
    assert {row["kernel"] for row in rows} == {"place_projected"}
    plots = {path.name for path in tmp_path.glob("*.png")}
    assert plots == {"projector_placement_fwd.png", "projector_placement_full.png"}
    shown = capsys.readouterr().out
    assert "device=cpu" in shown and "saved" in shown and "2 images 32 -> 128 -> 128" in shown

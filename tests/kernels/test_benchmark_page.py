"""python -m kernels.benchmark all: a folder with every row, plots and a page, what matters first, within its time."""

import csv
import re
import sys

import pytest
import torch
import triton

from avlm.models import decoder, rope
from kernels.benchmark import __main__ as command
from kernels.benchmark import elementwise, everything, page, report
from kernels.benchmark.everything import Part
from kernels.benchmark.peers import INSTALL, Unavailable, peer
from kernels.benchmark.suites import SUITES

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter's speed tells nothing")
PARTS = (
    Part("attention", "packed", ("fwd",), ("ours", "sdpa"), chosen=(1,)),
    Part("elementwise", "llama", providers=("eager",)),
)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(everything, "QUICK", PARTS)


def run(folder, *arguments) -> list[dict]:
    command.main(["all", "--quick", "--out", str(folder), "--seconds", "0.001", *arguments])
    return list(csv.DictReader((folder / "cpu" / "rows.csv").open()))


def test_the_folder_has_every_row_the_plots_and_a_page_that_shows_them(small, tmp_path):
    rows = run(tmp_path)
    folder = tmp_path / "cpu"
    assert {row["kernel"] for row in rows} == {"attention", "rms_norm", "rotate", "swiglu"}
    text = (folder / "README.md").read_text()
    assert {path.name for path in folder.glob("*.png")} == set(re.findall(r"\]\((\w+\.png)\)", text))
    assert "a try of the command, not a measurement" in text and "within 2 times" in text and "Not run" not in text
    titles = [line.removeprefix("### ") for line in text.splitlines() if line.startswith("### ")]
    assert len(titles) == 7 and titles[0].startswith("attention  fwd  documents 14/2 heads")
    assert "- sdpa flash (attention): no packed segments" in text
    assert "| elementwise" not in text and "| eager |" in text
    assert run(tmp_path) and (folder / "README.md").read_text().count("### ") == 7  # a second run replaces the first


def test_what_was_not_run_when_the_time_was_over_is_named(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(everything, "QUICK_SECONDS", 0)
    rows = run(tmp_path)
    assert {row["kernel"] for row in rows} == {"attention"}
    text = (tmp_path / "cpu" / "README.md").read_text()
    assert "- attention --shapes packed, shapes 1 of the set\n- elementwise --shapes llama\n" in text
    assert "the time is over" in capsys.readouterr().out


def test_every_part_names_a_set_shapes_and_providers_that_are_there():
    for part in everything.FULL + everything.QUICK:
        suite = SUITES[part.suite]
        shapes = list(suite.sets[part.shapes]())
        assert part.chosen is None or max(part.chosen) < len(shapes)
        assert any(name.startswith(part.providers) for name in suite.providers)
    sets = {(part.suite, part.shapes) for part in everything.FULL}
    assert sets == {(name, shapes) for name, suite in SUITES.items() for shapes in suite.sets}


def test_the_page_says_who_is_faster_among_those_that_are_right():
    common = {"kernel": "rotate", "mode": "fwd", "shape": "rows", "x": 1, "percent_of_bound": 50.0}
    rows = [
        {**common, "provider": "ours", "ms_p50": 2.0, "verdict": "ok"},
        {**common, "provider": "ours wrong", "ms_p50": 0.5, "verdict": "wrong"},
        {**common, "provider": "theirs", "ms_p50": 3.0, "verdict": "ok"},
        {**common, "provider": "theirs slow", "ms_p50": 4.0, "verdict": "ok"},
        {**common, "provider": "absent", "reason": "not here"},
    ]
    assert page._summary(rows).splitlines()[2:] == ["| rotate  fwd  rows  x 1 | 2 | 50 | theirs | 3 | 1.50 |"]


def test_elementwise_work_is_counted_in_tensors_read_and_written():
    norm, rotation, swiglu = SUITES["elementwise"].sets["llama"]()
    one = 8192 * 4096 * 2
    assert (norm.num_bytes("fwd", torch.bfloat16), norm.num_bytes("bwd", torch.bfloat16)) == (2 * one, 3 * one)
    assert rotation.num_bytes("fwd", torch.bfloat16) == rotation.num_bytes("bwd", torch.bfloat16) == 2 * one
    assert swiglu.num_bytes("bwd", torch.bfloat16) == 5 * 8192 * 14336 * 2


def test_elementwise_work_is_what_the_decoder_does_and_the_formula():
    norm = decoder.RMSNorm(8, elementwise.EPS)
    x_TD, x_THE = torch.randn(5, 8), torch.randn(5, 2, 4)
    angles = rope.rope_table(torch.rand(2), torch.arange(5))
    assert elementwise.DECODER["rms_norm"](x_TD, norm.weight).equal(norm(x_TD))
    assert elementwise.DECODER["rotate"](x_THE, *angles).equal(rope.rotate(x_THE, *angles))
    for kernel, inputs in (("rms_norm", (x_TD, norm.weight)), ("rotate", (x_THE, *angles))):
        outs = (forms[kernel](*inputs) for forms in (elementwise.DECODER, elementwise.FORMULAS))
        assert torch.allclose(*outs, atol=1e-6)


@pytest.mark.parametrize("module", [*INSTALL, "liger_kernel.transformers"])
def test_a_package_that_is_missing_says_how_to_install_it(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module.partition(".")[0], None)  # its import fails
    with pytest.raises(Unavailable) as error:
        peer(module)
    assert str(error.value).endswith(INSTALL[module if module in INSTALL else "liger_kernel"])


def test_the_csv_has_a_column_for_all_that_a_row_can_have(small, tmp_path):
    path = tmp_path / "rows.csv"
    report.open_csv(path)
    report.append_csv(path, [{"graph_ms": 1.0, "graph_reason": "", "verdict": "ok", "bound_by": "memory"}])
    assert next(csv.DictReader(path.open()))["graph_ms"] == "1"

"""python -m kernels.benchmark cross_entropy: what it counts, compares with and shows."""

import csv

import pytest
import torch
import torch.nn.functional as F

from kernels.benchmark import __main__ as command
from kernels.benchmark import cross_entropy as suite
from kernels.benchmark import measure

SHAPE = suite.Shape(name="small", rows=320, hidden=256, vocabulary=4800, share=0.3)


def test_the_benchmark_counts_the_rows_with_a_target():
    llama, _ = suite.SHAPES["llama"]()
    assert llama.num_targets == 2458 and llama.flops("fwd") == 2 * 2458 * 4096 * 128256
    assert llama.flops("full") == 3 * llama.flops("fwd")
    assert llama.num_bytes("full", torch.bfloat16) == 2 * 2 * (2458 + 128256) * 4096


def test_the_benchmark_gives_time_memory_and_error_of_each_provider_or_a_reason(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(suite.SHAPES, "llama", lambda: [SHAPE])
    command.main(["cross_entropy", "--seconds", "0.001", "--csv", str(tmp_path), "--plot"])
    assert "MiB" in capsys.readouterr().out
    plots = {path.name for path in tmp_path.glob("*.png")}
    assert plots == {f"cross_entropy_llama_{mode}.png" for mode in ("fwd", "full")}
    every = list(csv.DictReader((tmp_path / "cross_entropy_llama.csv").open()))
    assert [row["provider"] for row in every] == 2 * list(suite.PROVIDERS)
    rows = {row["provider"]: row for row in every if row["mode"] == "full"}
    assert rows["compile (all rows)"]["reason"] == "needs a GPU"
    for name in ("ours (rows dropped)", "ours (all rows)", "eager (all rows)", "checkpointed (rows dropped)"):
        row = {key: float(rows[name][key]) for key in ("ms_p50", "tflops", "error", "error_ratio", "peak_mib")}
        assert min(row.values()) > 0 and row["error"] < 1e-5 and row["error_ratio"] < 4
    ours, theirs = (float(rows[name]["peak_mib"]) for name in ("ours (rows dropped)", "eager (all rows)"))
    assert ours < theirs / 2


def test_the_benchmark_shows_a_wrong_provider(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    session = measure.start_session(0.001)
    monkeypatch.setattr(suite, "PROVIDERS", {"wrong": lambda case: lambda h, w: 1.1 * suite._ours(case)(h, w)})
    for [row] in suite.run([SHAPE], ("fwd", "bwd"), session):
        assert row["error"] == pytest.approx(0.1, rel=1e-3) and row["error_ratio"] > 1000


def test_the_benchmark_compares_with_the_formula():
    case = suite.make_case(SHAPE.tiny(), measure.start_session(0.001))
    leaves = [x.detach().double().requires_grad_() for x in case.leaves]
    loss = F.cross_entropy(F.linear(*leaves), case.target_T)
    gradients = torch.autograd.grad(loss, leaves)
    expected = [loss, *(x[of] for x, of in zip(gradients, suite.sample(case)))]
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(suite.formula(case), expected))

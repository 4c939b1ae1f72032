"""The comparison with other attention, as far as it runs without a GPU."""

import contextlib
import csv
import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
import triton

from kernels.attention import attention_reference
from kernels.benchmark import __main__ as command
from kernels.benchmark import attention, attention_providers, measure, report, timing
from kernels.benchmark.attention import CHUNK
from kernels.benchmark.attention_shapes import SHAPES, Shape, packed_documents
from kernels.segments import Segments

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter's speed tells nothing")
UNEQUAL = Shape(name="documents", lengths=(1024, 512), heads=16, kv_heads=8, head_dim=64, causal=True)
EQUAL = Shape(name="images", lengths=(512, 512), heads=8, kv_heads=8, head_dim=64)
NEWEST = Shape(name="batch 2", lengths=(1024, 1024), heads=16, kv_heads=8, head_dim=64, decode=True)
PROVIDERS = tuple(attention.PROVIDERS)


@pytest.fixture
def few_shapes(monkeypatch):
    """Two shapes to compare and one to decode, on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(SHAPES, "packed", lambda: [UNEQUAL, EQUAL])
    monkeypatch.setitem(SHAPES, "decode", lambda: [NEWEST])


def rows_of(shapes: str, *modes: str) -> dict[tuple[str, str, str], dict]:
    session = measure.start_session(0.001)
    rows = [row for some in attention.run(SHAPES[shapes](), modes, session) for row in some]
    return {(row["shape"], row["mode"], row["provider"]): row for row in rows}


def test_arithmetic_is_counted_per_segment_halved_when_causal_and_2_5_times_as_much_backward():
    sizes = {"name": "", "lengths": (2, 3), "heads": 2, "kv_heads": 1, "head_dim": 4}
    assert Shape(**sizes).flops("fwd") == 4 * (2 * 2 + 3 * 3) * 2 * 4 == 416
    assert Shape(**sizes, causal=True).flops("fwd") == 208
    assert Shape(**sizes).flops("bwd") == 1040
    (llama,) = (shape for shape in SHAPES["avlm"]() if shape.causal and shape.lengths == (4096,))
    assert llama.flops("fwd") == 137_438_953_472


def test_decoding_is_counted_in_bytes_of_cache_queries_and_outputs():
    shape = Shape(name="", lengths=(3, 5), heads=4, kv_heads=2, head_dim=8, decode=True)
    cache, queries = 8 * 2 * 8, 2 * 4 * 8
    assert shape.num_bytes("fwd", torch.bfloat16) == 2 * (2 * cache + 2 * queries)


def test_a_backward_moves_twice_the_tensors_of_a_forward_and_the_log_sum_exp():
    shape = Shape(lengths=(3, 5), heads=4, kv_heads=2, head_dim=8)
    q, k, lse = 8 * 4 * 8, 8 * 2 * 8, 4 * 8 * 4
    assert shape.num_bytes("fwd", torch.bfloat16) == 2 * (2 * q + 2 * k) + lse
    assert shape.num_bytes("bwd", torch.bfloat16) == 2 * (4 * q + 4 * k) + lse


@pytest.mark.parametrize("seed", range(20))
def test_packed_documents_fill_a_row_of_16k_with_lengths_in_range(seed):
    lengths = packed_documents(seed=seed)
    assert sum(lengths) == 16384 and all(200 <= length <= 4000 for length in lengths)
    assert lengths == packed_documents(seed=seed)


def test_the_convention_has_16k_tokens_and_a_width_of_2048():
    shapes = list(SHAPES["convention"]())
    assert {(shape.lengths[0], shape.head_dim, shape.causal) for shape in shapes} == set(
        itertools.product((512, 1024, 2048, 4096, 8192, 16384), (64, 128, 256), (False, True))
    )
    for shape in shapes:
        assert sum(shape.lengths) == 16384 and shape.heads * shape.head_dim == 2048


def test_the_command_writes_every_provider_with_a_number_or_a_reason(few_shapes, tmp_path, capsys):
    arguments = ["attention", "--shapes", "packed", "--csv", str(tmp_path / "new"), "--plot", "--seconds", "0.001"]
    command.main(arguments)
    path = tmp_path / "new" / "attention_packed.csv"
    rows = list(csv.DictReader(path.open()))
    assert tuple(rows[0]) == report.COLUMNS
    names = [(shape.name, mode, name) for shape in (UNEQUAL, EQUAL) for mode in ("fwd", "bwd") for name in PROVIDERS]
    assert [(row["shape"], row["mode"], row["provider"]) for row in rows] == names
    for row in rows:
        assert "a try of the command, not a measurement" in row["device"] and row["torch"] == torch.__version__
        assert bool(row["reason"]) != bool(row["ms_p50"])
        if not row["reason"]:
            assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
            assert float(row["tflops"]) > 0 and float(row["error"]) < 1e-5 and not row["percent_of_datasheet"]
            assert row["verdict"] == "ok" and float(row["peak_mib"]) > 0 and not row["graph_ms"]
    reasons = {(row["shape"], row["mode"], row["provider"]): row["reason"] for row in rows}
    assert reasons["documents", "fwd", "sdpa flash"] == "no packed segments"
    assert reasons["images", "fwd", "sdpa flash"] == reasons["images", "bwd", "sdpa flash"] == ""
    assert reasons["images", "bwd", "ours hopper"] == "forward only"
    assert reasons["images", "fwd", "flex"] == "needs a GPU"
    assert reasons["images", "fwd", "flash_attn 4"].endswith("pip install --pre flash-attn-4")
    shown = capsys.readouterr().out
    assert "device=cpu" in shown and "- no packed segments" in shown
    plots = {path.name for path in path.parent.glob("*.png")}
    assert plots == {
        f"attention_packed_{mode}_hd64_{mask}.png" for mode in ("fwd", "bwd") for mask in ("causal", "full")
    }
    command.main([*arguments[:-3], "--seconds", "0.001"])
    assert len(list(csv.DictReader(path.open()))) == 2 * len(rows)


def test_decoding_reports_traffic_against_a_copy(few_shapes):
    row = rows_of("decode", "fwd")["batch 2", "fwd", "ours"]
    assert row["gb_per_s"] > 0 and row["percent_of_copy"] > 0 and row["error"] < 1e-5 and "tflops" not in row


def test_a_wrong_provider_shows_a_large_error(few_shapes, monkeypatch):
    right = attention.PROVIDERS["ours"]

    def wrong(case, mode):
        run = right(case, mode)
        return lambda q, k, v: 1.1 * run(q, k, v)

    monkeypatch.setitem(attention.PROVIDERS, "wrong", wrong)
    monkeypatch.setitem(SHAPES, "packed", lambda: [UNEQUAL])
    rows = rows_of("packed", "fwd", "bwd")
    for mode in ("fwd", "bwd"):
        row = rows["documents", mode, "wrong"]
        assert row["error"] == pytest.approx(0.1, rel=1e-3) and row["error_ratio"] > 1000
        assert rows["documents", mode, "ours"]["error"] < 1e-6


def test_a_provider_that_fails_is_a_row_and_the_others_go_on(few_shapes, monkeypatch):
    def dies_later(case, mode):
        calls = itertools.count()

        def run(q, k, v):
            if next(calls):
                raise ZeroDivisionError("in the second call\nwith more lines")
            return q

        return run

    monkeypatch.setitem(attention.PROVIDERS, "refuses", lambda case, mode: 1 / 0)
    monkeypatch.setitem(attention.PROVIDERS, "dies later", dies_later)
    rows = rows_of("packed", "fwd")
    assert rows["documents", "fwd", "refuses"]["reason"] == "ZeroDivisionError: division by zero"
    assert rows["documents", "fwd", "dies later"]["reason"] == "ZeroDivisionError: in the second call"
    assert "reason" not in rows["documents", "fwd", "ours"] and "reason" not in rows["images", "fwd", "ours"]


def test_the_exact_values_are_those_of_the_reference_in_float64(monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 3)
    q, grad = (torch.randn(7, 2, 8, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(7, 1, 8, dtype=torch.float64) for _ in range(2))
    for causal in (False, True):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention_reference(*leaves, Segments.of([7]), causal=causal)
        dq, dk, dv = torch.autograd.grad(out, leaves, grad)
        exact = attention.formula(q.transpose(0, 1), k[:, 0], v[:, 0], grad.transpose(0, 1), causal, torch.float64)
        expected = {"out": out.transpose(0, 1), "dq": dq.transpose(0, 1), "dk": dk[:, 0], "dv": dv[:, 0]}
        for name, x in expected.items():
            assert torch.allclose(exact[name], x, atol=1e-12), name
    assert CHUNK * 32768 * 8 < 2**29  # bytes of one chunk's scores at the longest shape


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shape", [UNEQUAL, EQUAL, NEWEST], ids=lambda shape: shape.name)
def test_flex_attention_is_given_the_same_mask(shape, few_shapes, monkeypatch):
    """Its CPU path knows no gradients, so uncompiled and forward only."""
    case = attention.make_case(shape.tiny(), measure.start_session(0.001))
    monkeypatch.setattr(attention_providers, "_needs_gpu", lambda case: None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with torch._functorch.config.patch(donated_buffer=True):  # put back afterwards
        out = attention_providers.OTHERS["flex"](case, "fwd")(*(x.detach() for x in case.leaves))
    exact = attention_reference(*case.leaves, case.segments, segments_k=case.segments_k, causal=case.causal)
    assert torch.allclose(out, exact, atol=1e-5)


@pytest.mark.parametrize("shape", [replace(UNEQUAL, causal=False), EQUAL, NEWEST], ids=lambda shape: shape.name)
def test_nested_tensors_have_the_same_segments_and_repeat_the_keys_of_shared_heads(shape, few_shapes, monkeypatch):
    """By the math backend, which the CPU has for nested tensors without a mask."""
    monkeypatch.setattr(attention_providers, "_needs_gpu", lambda case: None)
    case = attention.make_case(shape.tiny(), measure.start_session(0.001))
    run = partial(attention_providers._nested, torch.nn.attention.SDPBackend.MATH)(case, "bwd")
    results = run(*case.leaves)
    exact = attention_reference(*case.leaves, case.segments, segments_k=case.segments_k, causal=case.causal)
    gradients = (torch.autograd.grad(out, case.leaves, case.grad_THE) for out in (results, exact))
    assert torch.allclose(results, exact, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))


def test_the_version_of_flash_attention_is_chosen_again_for_a_backward(few_shapes, monkeypatch):
    """Two providers take turns, and the choice is one for the whole process."""
    active, chosen = [None], []

    def choose(version):
        active[0] = version
        chosen.append(version)

    monkeypatch.setattr(attention_providers, "current_flash_attention_impl", lambda: active[0])
    monkeypatch.setattr(attention_providers, "activate_flash_attention_impl", choose)
    monkeypatch.setattr(attention_providers, "restore_flash_attention_impl", lambda: choose(None))
    monkeypatch.setattr(attention_providers, "peer", lambda module: None)
    case = attention.make_case(EQUAL.tiny(), measure.start_session(0.001))
    make = {
        version: partial(attention_providers._with_flash, version, attention_providers._ours)
        for version in (None, "FA3")
    }
    outs = {version: provider(case, "bwd")(*case.leaves) for version, provider in make.items()}
    assert chosen == ["FA3"]
    for version in (None, "FA3", "FA3"):
        outs[version].sum().backward(retain_graph=True)
    assert chosen == ["FA3", None, "FA3"]


def test_providers_take_turns(few_shapes):
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    timings, _ = timing.time_interleaved(functions, 0.001, "cpu")
    assert [name for name, _ in itertools.groupby(calls)] == ["a", "b"] * timing.ROUNDS
    assert set(timings["a"]) == {"ms_p50", "ms_p20", "ms_p80", "spread_percent"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["projectile"], "invalid choice: 'projectile'"),
        (["attention", "--shapes", "decode", "--lengths", "5,6"], "has 8192, 16384, 32768, 65536"),
        (["attention", "--shape", "lengths=4x2,heads=3,kv_heads=2,head_dim=8"], "kv_heads divide heads"),
        (["attention", "--shape", "lengths=4x2,head=3"], "'head=3' is none of name=..., lengths=..., heads=..."),
        (["attention", "--shape", "lengths=4x2"], "does not say heads, head_dim"),
        (["attention", "--shape", "lengths=four,heads=3"], "invalid literal"),
        (["projector", "--providers", "ours,theirs"], "no provider begins with 'theirs'; there are ours, eager"),
        (["attention", "--seconds", "0"], "must be a positive number of seconds, not 0"),
        (["attention", "--seconds", "soon"], "invalid seconds value: 'soon'"),
        (["attention", "--shapes", "decode", "--direction", "bwd"], "attention --shapes decode has no backward"),
    ],
)
def test_bad_arguments_are_answered_in_one_line(arguments, complaint, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert complaint in capsys.readouterr().err.splitlines()[-1]


def test_a_csv_of_other_columns_is_left_alone(tmp_path, capsys):
    path = tmp_path / "attention_convention.csv"
    path.write_text("kernel,ms\nattention,1\n")
    with pytest.raises(SystemExit):
        command.main(["attention", "--csv", str(tmp_path)])
    assert "move it away" in capsys.readouterr().err and path.read_text() == "kernel,ms\nattention,1\n"


def test_shapes_are_chosen_by_length_and_head_dim_and_providers_by_how_they_begin(few_shapes, tmp_path):
    arguments = [
        "attention",
        "--shapes",
        "packed",
        "--lengths",
        "512",
        "--head-dims",
        "64",
        "--providers",
        "ours,sdpa f",
    ]
    command.main([*arguments, "--csv", str(tmp_path), "--seconds", "0.001", "--direction", "fwd"])
    rows = list(csv.DictReader((tmp_path / "attention_packed.csv").open()))
    assert {row["shape"] for row in rows} == {"images"}
    assert [row["provider"] for row in rows] == [
        "ours",
        "ours deterministic",
        "ours triton",
        "ours hopper",
        "sdpa flash",
    ]


def test_own_shapes_of_any_dtype(few_shapes, tmp_path, capsys):
    shapes = ["lengths=4096x2+512,heads=32,kv_heads=8,head_dim=96,causal=1", "name=one,lengths=512,heads=8,head_dim=8"]
    arguments = [word for shape in shapes for word in ("--shape", shape)]
    command.main(["attention", *arguments, "--dtype", "bf16", "--csv", str(tmp_path), "--seconds", "0.001"])
    rows = list(csv.DictReader((tmp_path / "attention_own.csv").open()))
    cases = dict.fromkeys((row["shape"], row["x"], row["head_dim"], row["causal"], row["dtype"]) for row in rows)
    assert list(cases) == [("own shape", "64", "96", "True", "bfloat16"), ("one", "8", "8", "False", "bfloat16")]


@pytest.mark.parametrize("ours", [True, False])
def test_an_error_of_ours_above_twice_pytorchs_ends_with_status_1_after_all_rows(ours, few_shapes, monkeypatch, capsys):
    right, name = attention.PROVIDERS["ours"], "ours wrong" if ours else "theirs wrong"
    monkeypatch.setitem(attention.PROVIDERS, name, lambda case, mode: lambda *qkv: 1.1 * right(case, mode)(*qkv))
    arguments = ["attention", "--shapes", "packed", "--direction", "fwd", "--seconds", "0.001"]
    if ours:
        with pytest.raises(SystemExit) as end:
            command.main(arguments)
        assert end.value.code == 1
    else:
        command.main(arguments)
    shown = capsys.readouterr().out
    assert shown.count(f"  {name} ") == 2 and shown.count(" !") == 2
    assert shown.count(f"error: {name}: attention  fwd  ") == 2 * ours


def test_a_nan_is_wrong(few_shapes, monkeypatch):
    monkeypatch.setitem(attention.PROVIDERS, "nan", lambda case, mode: lambda q, k, v: q * torch.nan)
    assert rows_of("packed", "fwd")["images", "fwd", "nan"]["verdict"] == "wrong"


def test_the_roofline_is_that_of_the_data_sheet_where_the_card_is_known():
    sizes = dict(device="cuda", label="cuda", seconds=1.0, wanted=("",), gemm_tflops=700.0, copy_gb_per_s=4000.0)
    known = measure.Session(**sizes, dtype=torch.bfloat16, gpu="NVIDIA H200")
    row = measure.speed(2.0, known, flops=989.4e9, num_bytes=2.4e9)  # 1 ms of products, 0.5 ms of traffic
    assert row["bound_ms"] == pytest.approx(1.0) and row["percent_of_bound"] == pytest.approx(50)
    assert row["bound_by"] == "arithmetic" and row["percent_of_datasheet"] == pytest.approx(50)
    row = measure.speed(2.0, known, num_bytes=4.8e9)
    assert row["bound_by"] == "memory" and row["percent_of_bound"] == row["percent_of_datasheet"] == pytest.approx(50)
    for other in (
        measure.Session(**sizes, dtype=torch.bfloat16, gpu="a card of tomorrow"),
        measure.Session(**sizes, dtype=torch.float32, gpu="NVIDIA H200"),
    ):
        row = measure.speed(2.0, other, flops=700e9, num_bytes=1)
        assert row["bound_ms"] == pytest.approx(1.0) and "percent_of_datasheet" not in row


def test_a_call_that_cannot_be_captured_has_a_reason_and_others_the_time_of_the_replay(monkeypatch):
    """With stand-ins for CUDA's graphs, which a machine without a GPU does not have."""
    replays = []

    class Graph:
        def replay(self):
            replays.append(True)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "times_ms", lambda function, seconds, device: [function() or 3.0])
    assert timing.time_graph(lambda: None, 0.1) == {"graph_ms": 3.0} and replays == [True]
    assert timing.time_graph(lambda: 1 / 0, 0.1) == {"graph_reason": "ZeroDivisionError: division by zero"}

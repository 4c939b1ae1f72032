"""The self-test finds kernels that are wrong, names them, and lets the next row of the table take their place."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import attention_forward, attention_varlen, backend, check, cross_entropy_rows, dispatch
from kernels.check_cases import Sizes, cases
from tests.kernels.flash_stand_in import pretend, stand_in

needs_cpu = pytest.mark.skipif(backend.INTERPRETED, reason="in the interpreter our own kernels run")
SIZES = Sizes(lengths=(20, 1, 0, 9), repeats=2)
ATTENTION = ("attention_forward", "attention_backward")
HALF = torch.float16


@pytest.fixture(autouse=True)
def doubts_end_with_the_test():
    yield
    backend.trust_all()


def find(*operations, dtype=HALF, head_dim=16, sizes=SIZES):
    return check.run(cases(torch.device("cpu"), (dtype,), (head_dim,), sizes, operations), sizes.repeats)


def of_an_a100(*operations, **options):
    with stand_in(80):
        return find(*operations, **options)


def implementation(operation, head_dim=16):
    return backend.implementation(operation, torch.empty(1, dtype=HALF), head_dim)


def changed(monkeypatch, module, name, change):
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *inputs, **options: change(*original(*inputs, **options)))


@needs_cpu
def test_nothing_is_wrong_with_right_kernels():
    with stand_in(80) as calls:
        assert find(*dispatch.ATTENTION) == []
    assert "forward" in calls and "deterministic backward" in calls and "backward" in calls


@needs_cpu
@pytest.mark.parametrize(
    ("change", "operation", "result"),
    [
        (lambda out, lse: (out * 1.05, lse), "attention_forward", "out"),
        (lambda out, lse: (out, lse + 0.05), "attention_forward", "lse"),
        (lambda out, lse: (out, lse.masked_fill(lse == lse.max(), -torch.inf)), "attention_forward", "lse is -inf"),
        (lambda out, lse: (out.index_fill(0, torch.tensor(3), torch.nan), lse), "attention_forward", "out"),
    ],
)
def test_a_wrong_forward_is_named_with_its_error_and_replaced(monkeypatch, change, operation, result):
    changed(monkeypatch, attention_varlen, "forward", change)
    with stand_in(80):
        finding, *others = find(*ATTENTION)
        assert implementation("attention_forward") == "pytorch"
        reason = backend.row("attention_forward", 80, HALF, 16).reason
    assert others == []  # a forward in plain PyTorch brings its own backward
    assert (finding.operation, finding.implementation, finding.instead) == (operation, "varlen", "pytorch")
    assert finding.wrong.startswith(result)
    assert reason.startswith(f"varlen disagreed with PyTorch: {finding.wrong}; ")
    assert "varlen is wrong for causal attention, float16, head dim 16: " in str(finding)
    assert str(finding).endswith("pytorch runs in its place")


@needs_cpu
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_wrong_gradient_is_blamed_on_the_backward(monkeypatch, which):
    def change(*gradients):
        return tuple(x + 0.1 * (i == which) for i, x in enumerate(gradients))

    changed(monkeypatch, attention_varlen, "backward", change)
    found = of_an_a100(*dispatch.ATTENTION)
    assert [x.operation for x in found] == ["attention_backward", "block_backward"]
    assert all(x.wrong.startswith(("dq", "dk", "dv")[which] + " is off by") for x in found)


@needs_cpu
def test_results_that_do_not_repeat_are_wrong(monkeypatch):
    calls = []

    def drift(out, lse):
        calls.append(1)
        return out, lse + 1e-6 * len(calls)

    changed(monkeypatch, attention_varlen, "forward", drift)
    [finding] = of_an_a100(*ATTENTION)
    assert finding.wrong == "lse differs between calls with the same inputs"


@needs_cpu
def test_a_kernel_that_raises_is_replaced_by_the_next_row_of_the_table(monkeypatch):
    """On Hopper that is torch's kernel. No Triton runs on a CPU: its own error is what is found."""
    with stand_in(90) as calls:
        found = find("attention_forward", "attention_backward", "decode", head_dim=64)
        by = {x.operation: (x.implementation, x.instead) for x in found}
        assert implementation("attention_forward", 64) == implementation("attention_backward", 64) == "varlen"
    assert by["attention_forward"] == by["attention_backward"] == ("triton", "varlen")
    assert by["decode"] == ("triton", "pytorch")
    assert all("RuntimeError: 0 active drivers" in x.wrong for x in found)
    assert calls


@needs_cpu
def test_out_of_memory_is_nobody_s_fault(monkeypatch):
    def fail(*inputs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(attention_varlen, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        of_an_a100(*ATTENTION)


def test_random_numbers_of_the_run_stay_what_they_are():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with pretend(dispatch.CPU):
        find(*dispatch.OPERATIONS)
    assert torch.get_rng_state().equal(before)


def run_command(interpreted: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "kernels.check", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={"TRITON_INTERPRET": interpreted, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": "/tmp"},
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_that_there_is_nothing_to_compare():
    result = run_command("0")
    assert result.returncode == 0 and "only plain PyTorch runs here" in result.stdout


# In the interpreter, with our own kernels.


@pytest.mark.interpreter
def test_our_kernels_are_right():
    with_heads = (*dispatch.ATTENTION, "decode", dispatch.LSE_GRADIENT, dispatch.MASKED_ATTENTION)
    assert find(*with_heads, "cross_entropy", "projector") == []


@pytest.mark.interpreter
def test_a_wrong_kernel_of_ours_is_replaced(monkeypatch):
    changed(monkeypatch, attention_forward, "forward", lambda out, lse: (out * 1.05, lse))
    original = cross_entropy_rows._losses_triton
    monkeypatch.setattr(cross_entropy_rows, "_losses_triton", lambda *inputs: original(*inputs) + 1)
    found = find(*ATTENTION, "block_forward", "cross_entropy")
    assert [(x.operation, x.implementation, x.instead) for x in found] == [
        ("cross_entropy", "triton", "pytorch"),
        ("attention_forward", "triton", "pytorch"),
        ("block_forward", "triton", "pytorch"),
    ]
    assert find(*ATTENTION, "block_forward", "cross_entropy") == []


@pytest.mark.gpu
@pytest.mark.slow
def test_every_kernel_of_this_machine_agrees_with_pytorch():
    device = torch.device("cuda")
    assert check.run(cases(device, check.DTYPES, check.HEAD_DIMS, check.FULL), check.FULL.repeats) == []

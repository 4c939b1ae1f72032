"""The table of what runs where: its claims for every architecture, without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import backend, dispatch
from kernels.dispatch import ARCHITECTURES, ATTENTION, LSE_GRADIENT, MASKED_ATTENTION, OPERATIONS, ROWS, choose
from tests.kernels.flash_stand_in import pretend

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
GPUS = [arch for arch in ARCHITECTURES if arch > dispatch.INTERPRETER]


def runs(operation, arch, dtype, head_dim=None, **state):
    return choose(operation, arch, dtype, head_dim, **state).implementation


def test_every_case_has_an_answer_and_every_row_is_the_answer_to_a_case():
    """A row that decides nothing would be read in vain."""
    used = set()
    for operation in OPERATIONS:
        for arch in (*ARCHITECTURES, 70, 75, 87, 121):
            for dtype in (FP16, BF16, FP32, FP64):
                for head_dim in (1, 8, 20, 64, 72, 128, 200, 208, 256, 264, 320):
                    for flash in (None, "FA3", "FA4"):
                        used.add(choose(operation, arch, dtype, head_dim, flash=flash))
    assert used == set(ROWS)
    assert len({row.reason for row in ROWS}) >= len(ROWS) - 1  # the same limit holds on two ranges of architectures


@pytest.mark.parametrize("operation", ATTENTION)
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_half_precision_attention_is_ours_on_hopper_and_torch_s_elsewhere(operation, dtype):
    for head_dim in (64, 128, 256):
        ours = head_dim == 64 or operation.endswith("forward")  # its backward has five products
        assert runs(operation, 90, dtype, head_dim) == ("triton" if ours else "varlen")
        assert {runs(operation, arch, dtype, head_dim) for arch in (80, 86, 89, 100, 103, 120)} == {"varlen"}
    for head_dim in (8, 32, 72, 80, 96, 192, 248):
        assert runs(operation, 90, dtype, head_dim) == "varlen"  # no products of padding
    assert runs(operation, 90, dtype, 100) == "triton"  # no multiple of 8
    assert {runs(operation, arch, dtype, 100) for arch in GPUS if arch != 90} == {"pytorch"}
    assert {runs(operation, arch, dtype, 264) for arch in GPUS} == {"pytorch"}


def test_head_dims_that_fa2_cannot_train_on_small_cards_run_in_pytorch():
    """sdp_utils.cpp of torch: between 193 and 224 on sm_86, sm_89 and sm_120."""
    of = lambda head_dim: [runs("attention_backward", arch, BF16, head_dim) for arch in (80, 86, 89, 90, 100, 120)]
    assert of(192) == ["varlen"] * 6
    for head_dim in (200, 224):
        assert of(head_dim) == ["varlen", "pytorch", "pytorch", "varlen", "varlen", "pytorch"]
    assert of(232) == ["varlen"] * 6


@pytest.mark.parametrize("operation", [*ATTENTION, LSE_GRADIENT, MASKED_ATTENTION])
def test_attention_in_float32_is_ours_on_hopper_and_plain_elsewhere(operation):
    assert runs(operation, 90, FP32, 64) == runs(operation, 90, FP32, 256) == "triton"
    assert runs(operation, 90, FP32, 257) == "pytorch"
    assert {runs(operation, arch, FP32, 64) for arch in GPUS if arch != 90} == {"pytorch"}


def test_a_gradient_of_lse_never_goes_to_torch_s_kernels():
    for arch in (*ARCHITECTURES, 70):
        for head_dim in (64, 72, 100, 128):
            for flash in (None, "FA3", "FA4"):
                assert runs(LSE_GRADIENT, arch, BF16, head_dim, flash=flash) == ("triton" if arch == 90 else "pytorch")


def test_intervals_and_caps_never_go_to_torch_s_kernels():
    for arch in (*ARCHITECTURES, 70):
        for head_dim in (64, 72, 100, 128):
            for flash in (None, "FA3", "FA4"):
                found = runs(MASKED_ATTENTION, arch, BF16, head_dim, flash=flash)
                assert found == ("triton" if arch == 90 else "pytorch")


@pytest.mark.parametrize("flash", ["FA3", "FA4"])
def test_an_activated_flash_attention_takes_what_it_is_written_for(flash):
    for operation in ATTENTION:
        assert {runs(operation, 90, BF16, head_dim, flash=flash) for head_dim in (64, 128)} == {"varlen"}
        assert runs(operation, 90, torch.float32, 128, flash=flash) == "triton"


def test_loss_and_decoding_are_ours_on_every_gpu_from_the_a100_on():
    for arch in (*GPUS, 87, 121):
        for dtype in (FP16, BF16, FP32):
            assert runs("cross_entropy", arch, dtype) == runs("decode", arch, dtype, 128) == "triton"
    for arch in (70, 75, dispatch.CPU):
        assert runs("cross_entropy", arch, BF16) == runs("decode", arch, BF16, 128) == "pytorch"


def test_the_projector_is_ours_on_hopper_only():
    assert [arch for arch in GPUS if runs("projector", arch, BF16) == "triton"] == [90]


def test_float64_and_older_gpus_run_in_pytorch():
    for operation in OPERATIONS:
        assert {runs(operation, arch, FP64, 64) for arch in ARCHITECTURES} == {"pytorch"}
        assert {runs(operation, arch, BF16, 64) for arch in (60, 70, 75, dispatch.CPU)} == {"pytorch"}


def test_the_interpreter_runs_our_kernels_but_no_bfloat16():
    for operation in OPERATIONS:
        of = [runs(operation, dispatch.INTERPRETER, dtype, 64) for dtype in (FP16, FP32, BF16, FP64)]
        assert of == ["triton", "triton", "pytorch", "pytorch"]


def test_what_is_distrusted_is_passed_over_with_the_reason():
    wrong = {("attention_forward", "triton", BF16, 128): "triton disagreed"}
    row = choose("attention_forward", 90, BF16, 128, distrusted=wrong)
    assert row.implementation == "varlen" and row.reason.startswith("triton disagreed; FA2 has tiles")
    assert runs("attention_backward", 90, BF16, 64, distrusted=wrong) == "triton"
    wrong |= {("attention_forward", "varlen", BF16, 128): "varlen disagreed"}
    row = choose("attention_forward", 90, BF16, 128, distrusted=wrong)
    assert row.implementation == "pytorch" and row.reason.startswith("triton disagreed; varlen disagreed; ")
    assert runs("attention_forward", 90, BF16, 64, distrusted=wrong) == "triton"
    assert runs("attention_forward", 90, FP32, 128, distrusted=wrong) == "triton"


def test_integers_run_nowhere():
    with pytest.raises(ValueError, match=r"decode in torch\.int32 runs nowhere"):
        choose("decode", 90, torch.int32, 64)


def test_doubts_and_another_architecture_reach_the_callers(monkeypatch):
    x = torch.empty(1, dtype=BF16)
    with pretend(90):
        assert backend.implementation("attention_forward", x, 128) == "triton"
        backend.distrust(("attention_forward", "triton", BF16, 128), "disagreed with PyTorch: out is off by 1")
        assert backend.implementation("attention_forward", x, 128) == "varlen"
        reason = backend.row("attention_forward", 90, BF16, 128).reason
        assert reason.startswith("triton disagreed with PyTorch: out is off by 1; ")
        monkeypatch.setattr(backend, "current_flash_attention_impl", lambda: "FA3")
        assert backend.implementation("attention_backward", x, 128) == "varlen"
        backend.distrust(("attention_forward", "varlen", BF16, 128), "raised")
        for operation in ("attention_forward", "attention_backward", LSE_GRADIENT):
            assert backend.implementation(operation, x, 128) == "pytorch"  # connected by autograd
    if not backend.INTERPRETED:
        assert backend.implementation("attention_forward", x, 128) == "pytorch"


def test_a_distrusted_backward_does_not_serve_the_gradient_of_lse_or_intervals_either():
    x = torch.empty(1, dtype=BF16)
    with pretend(90):
        assert backend.implementation(LSE_GRADIENT, x, 64) == "triton"
        assert backend.implementation(MASKED_ATTENTION, x, 64) == "triton"
        backend.distrust(("attention_backward", "triton", BF16, 64), "raised")
        assert backend.implementation("attention_backward", x, 64) == "varlen"
        assert backend.implementation(LSE_GRADIENT, x, 64) == "pytorch"
        assert backend.implementation(MASKED_ATTENTION, x, 64) == "pytorch"


def test_a_compiled_function_asks_once_and_takes_the_answer_as_a_constant():
    asked = []

    def f(x):
        return x + (1 if backend.implementation("decode", x, x.shape[1]) == "triton" else 2)

    with pretend(80):
        torch._dynamo.reset()
        compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=lambda graph, _: asked.append(1) or graph)
        for rows in (3, 5, 9):
            assert compiled(torch.zeros(rows, 64, dtype=BF16)).eq(1).all()
        assert len(asked) == 1
        assert compiled(torch.zeros(3, 320, dtype=BF16)).eq(2).all()  # another head dim, another graph
        assert len(asked) == 2


def test_the_command_prints_the_table_and_this_machine_s_part_with_reasons():
    result = subprocess.run(
        [sys.executable, "-m", "kernels.backend"], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert result.returncode == 0, result.stderr
    table, own = result.stdout.split("This machine: ")
    head, names, *lines = table.splitlines()
    assert head.split() == [f"sm_{arch}" for arch in GPUS] and "H100" in names
    [line] = [line for line in lines if line.startswith("  bfloat16 64, 128, 256")]
    assert line.split()[-len(GPUS) :] == [runs("attention_forward", arch, BF16, 64) for arch in GPUS]
    for operation in OPERATIONS:
        assert operation in table and operation in own
    assert any(row.reason in own for row in ROWS)

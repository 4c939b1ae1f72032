"""The self-test at the start of a run: what one machine finds counts on all ranks."""

import os

import pytest
import torch

from avlm.parallel import mesh
from avlm.preflight import kernel_check
from avlm.process.launch import ranks
from kernels import attention_varlen, backend, check
from kernels.check_cases import Sizes
from tests.kernels.flash_stand_in import stand_in
from tests.parallel.spawn import run_ranks
from tests.preflight.test_memory import make_config

pytestmark = pytest.mark.skipif(backend.INTERPRETED, reason="in the interpreter our own kernels run")
CONFIG = make_config(("model.decoder.head_dim", 8), ("train.precision", "bf16"))
LIKE = torch.empty(1, dtype=torch.bfloat16)


def on_machines(config, is_wrong):
    """(lines, what then runs a forward of attention) on a rank that is a machine of its own: an A100, whose kernel is
    wrong or right."""
    world = mesh.start(config.parallel, torch.device("cpu"))
    os.environ["LOCAL_RANK"] = "0"
    check.QUICK = Sizes(lengths=(20, 1, 0, 9), repeats=2)
    kernel_check.operations = lambda *_: ("attention_forward", "attention_backward")
    original = attention_varlen.forward
    if is_wrong[ranks()[0]]:
        attention_varlen.forward = lambda *inputs: tuple(1.1 * x for x in original(*inputs))
    with stand_in(80):
        try:
            lines = kernel_check.agree(config, world)
        except ValueError as error:
            lines = [f"error: {error}"]
        runs = backend.implementation("attention_forward", LIKE, 8)
    mesh.stop()
    return lines, runs


def test_what_one_machine_finds_wrong_is_replaced_on_all():
    (lines, runs), others = run_ranks(on_machines, 2, CONFIG, [False, True])
    assert (lines, runs) == others
    [line, summary] = lines
    assert summary == "compared with plain PyTorch: attention_forward pytorch, attention_backward pytorch"
    assert line.startswith("WARNING: kernel attention_forward by varlen is wrong for causal attention, bfloat16, head ")
    assert line.endswith("; pytorch runs in its place") and runs == "pytorch"


def test_right_kernels_stay():
    line = "compared with plain PyTorch: attention_forward pytorch and varlen, attention_backward pytorch and varlen"
    assert run_ranks(on_machines, 2, CONFIG, [False, False]) == [([line], "varlen")] * 2


def test_strict_stops_all_ranks_in_one_line():
    strict = make_config(("model.decoder.head_dim", 8), ("train.precision", "bf16"), ("kernels", {"strict": True}))
    for [line], _ in run_ranks(on_machines, 2, strict, [True, False]):
        assert line.startswith("error: kernels.strict: attention_forward by varlen: out without gradients is off by ")
        assert "\n" not in line


def test_a_run_checks_what_it_calls():
    assert kernel_check.head_dims(CONFIG) == (8, 18)
    always = ("attention_forward", "attention_backward", "cross_entropy")
    assert kernel_check.operations(CONFIG, 1) == (*always, "projector")
    ring = make_config(("parallel.context", 2), ("parallel.context_mode", "ring"), ("train.validate_answers", 3))
    assert kernel_check.operations(ring, 2) == (*always, "block_forward", "block_backward", "decode", "projector")
    for key, value in (("sliding_window", 16), ("bidirectional", "prefix"), ("attention_softcap", 50.0)):
        masked = make_config((f"model.decoder.{key}", value))
        assert kernel_check.operations(masked, 1) == (*always, "masked_attention", "projector"), key


def test_flash_attention_that_is_not_installed_is_one_line():
    with pytest.raises(ValueError, match=r"^FA3 cannot be activated: No module named 'flash_attn_interface'$"):
        backend.activate_flash_attention("FA3", 90)
    with pytest.raises(ValueError, match=r"^FA3 does not run on sm_80: set kernels.flash_attention=FA2$"):
        backend.activate_flash_attention("FA3", 80)

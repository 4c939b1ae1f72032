"""What the compiler makes of every attention kernel that ships, for a Hopper GPU that need not be there.

``python -m tests.kernels.test_compiled`` prints it.
"""

import re
from dataclasses import dataclass, replace

import pytest
import torch

from kernels import attention_backward, attention_forward, attention_hopper, attention_statistics
from kernels.attention_configs import KEEPS_LATE_OPERANDS
from kernels.segments import Intervals, Segments
from tests.kernels.ahead_of_time import SHARED_MEMORY, Compiled, compiled_by
from tests.kernels.hazards import overwritten_in_ptx, overwritten_in_sass

pytestmark = pytest.mark.compiler
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ROWS = 4096
SEGMENTS = Segments.of([2000, 2096])
SEEN = replace(SEGMENTS, intervals=Intervals(*[torch.zeros(ROWS, dtype=torch.int32)] * 4))
SLOTS = replace(SEGMENTS, lengths=torch.tensor([1900, 2000], dtype=torch.int32))


@dataclass(frozen=True)
class Launch:
    """One way to call the kernels."""

    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    segments: Segments = SEGMENTS
    softcap: float | None = None
    part_of_a_ring: bool = False  # results of earlier keys, and gradients in float32
    deterministic: bool = False

    def __str__(self) -> str:
        options = {"slots": SLOTS, "intervals": SEEN}
        words = [name for name, segments in options.items() if segments is self.segments]
        words += ["causal" if self.causal else "full"] + ["softcap"] * (self.softcap is not None)
        words += ["ring"] * self.part_of_a_ring + ["deterministic"] * self.deterministic
        return f"{self.head_dim} {NAMES[self.dtype]} {' '.join(words)}"

    def tensors(self) -> list[torch.Tensor]:
        return [torch.empty(ROWS, heads, self.head_dim, dtype=self.dtype) for heads in (16, 8, 8)]

    def forward(self) -> None:
        q_THE = torch.empty(ROWS, 16, self.head_dim)
        earlier = (q_THE, torch.empty(16, ROWS)) if self.part_of_a_ring else None
        both = self.segments, self.segments
        attention_forward.forward(*self.tensors(), *both, self.causal, 0.1, earlier=earlier, softcap=self.softcap)

    def backward(self) -> None:
        q, k, v = self.tensors()
        statistics = attention_statistics.statistics(q, q, torch.empty(16, ROWS), None)
        dtype = torch.float32 if self.part_of_a_ring else None
        both = self.segments, self.segments
        options = self.causal, 0.1, self.deterministic, dtype, self.softcap
        attention_backward.backward(q, q, k, v, *statistics, *both, *options)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FORWARD = [
    *(Launch(E, dtype, causal) for E in (64, 128, 256) for dtype in (BF16, FP16) for causal in (False, True)),
    *(Launch(E, segments=SEEN, softcap=softcap) for E in (64, 128, 256) for softcap in (None, 50.0)),
    *(Launch(E, segments=SLOTS, part_of_a_ring=True) for E in (64, 128, 256)),
    *(Launch(E) for E in (20, 32, 80, 96)),
    *(Launch(E, FP32, causal) for E in (64, 128) for causal in (False, True)),
]
# dk and dv of 256 in half precision: ``kernels.dispatch`` takes FlashAttention-2.
BACKWARD = [
    *(Launch(E, dtype, causal) for E in (64, 128) for dtype in (BF16, FP16) for causal in (False, True)),
    *(Launch(E, segments=SEEN, softcap=softcap) for E in (64, 128) for softcap in (None, 50.0)),
    *(Launch(E, segments=SLOTS, part_of_a_ring=True) for E in (64, 128)),
    *(Launch(E) for E in (20, 32, 80, 96)),
    Launch(64, deterministic=True),
    *(Launch(E, FP32) for E in (64, 128)),
]


def rounds(code: Compiled) -> list[tuple[int, list[str]]]:
    """Of each loop that loads tiles: copies that are under way when it begins, and its copies, waits for them, and
    products in order."""
    words = {"async_tma_copy_global_to_local": "copy", "wait_barrier": "wait", "warp_group_dot ": "product"}
    pattern = re.compile("|".join(words))
    loops, before, open_at = [], 0, None
    for line in code.ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        found = pattern.search(line)
        word = words[found[0]] if found else None
        if open_at is None:
            if "scf.for" in line:
                open_at, body = indent, []
            elif word:
                before = before + 1 if word == "copy" else 0
        elif line.strip().startswith("}") and indent <= open_at:
            if "copy" in body:
                loops.append((before, body))
            before, open_at = 0, None
        elif word:
            body.append(word)
    return loops


def check(code: Compiled, dtype: torch.dtype) -> None:
    few = 8 if dtype == FP32 else 0  # float32 is there to be exact, not fast
    assert code.stack <= few, f"{code.stack} bytes of registers are spilled"
    assert code.shared <= SHARED_MEMORY[90]
    assert overwritten_in_ptx(code.ptx) == []
    assert overwritten_in_sass(code.sass) == []
    if code.name == "_statistics_kernel":
        return
    assert code.count("UTMALDG") > 0, "tiles come through the copy engine"
    assert (code.count("HGMMA") > 0) == (dtype != FP32), "products run on the tensor cores"
    if dtype != FP32:
        [(before, body)] = rounds(code)
        assert before == 2 * body.count("copy"), "a tile is asked for two rounds before it is used"
        assert body[0] == "wait" and body[-1] == "copy", "and copies run while the products do"


@pytest.mark.parametrize("launch", FORWARD, ids=str)
def test_forward(launch):
    [code] = compiled_by(launch.forward)
    check(code, launch.dtype)
    if KEEPS_LATE_OPERANDS and launch.head_dim > 64 and launch.dtype != FP32 and not launch.part_of_a_ring:
        assert code.exponentials_under_a_product() >= 16, "the softmax runs while the tensor cores work"
    if launch.head_dim <= 64 and launch.dtype != FP32:
        assert code.registers <= 128 and 2 * code.shared <= SHARED_MEMORY[90], "two programs share a multiprocessor"


@pytest.mark.parametrize("launch", BACKWARD, ids=str)
def test_backward(launch):
    one_pass = launch.head_dim <= 64 and launch.dtype != FP32 and not launch.deterministic and not launch.softcap
    codes = compiled_by(launch.backward)
    names = ["_statistics_kernel", "_keys_kernel"] + ["_queries_kernel"] * (not one_pass)
    assert [code.name for code in codes] == names
    for code in codes:
        check(code, launch.dtype)
    if one_pass:
        assert codes[1].count("UTMAREDG") > 0, "dq is added by the copy engine"
        assert codes[1].exponentials_under_a_product() >= 32, "the product of dk runs during the exponentials"


def test_an_operand_that_is_overwritten_is_found(monkeypatch):
    """A product's operand may not wait in registers over the end of a round (Triton before 3.8 overwrites it)."""
    late = attention_forward.forward_config(128, BF16, False) | dict(LATE_PV=True)
    monkeypatch.setattr(attention_forward, "forward_config", lambda *_: late)
    [code] = compiled_by(Launch(128).forward)
    found = bool(overwritten_in_ptx(code.ptx)), bool(overwritten_in_sass(code.sass))
    assert found == (not KEEPS_LATE_OPERANDS, not KEEPS_LATE_OPERANDS)
    # Without waits every compiler's code is wrong.
    assert overwritten_in_ptx(re.sub(r"wgmma\.wait_group\S+\s+\d", "wgmma.wait_group.sync.aligned 7", code.ptx))
    assert overwritten_in_sass(re.sub(r"(DEPBAR\S* \S+) 0x\w+", r"\1 0x7", code.sass))


@pytest.mark.parametrize(("head_dim", "causal"), [(64, False), (64, True), (128, False), (128, True)])
def test_the_second_tier(head_dim, causal):
    launch = Launch(head_dim, causal=causal)
    [code] = compiled_by(
        lambda: attention_hopper.forward(*launch.tensors(), SEGMENTS, SEGMENTS, causal, head_dim**-0.5)
    )
    assert code.stack == 0 and code.shared <= SHARED_MEMORY[90]
    assert overwritten_in_ptx(code.ptx) == [] and overwritten_in_sass(code.sass) == []
    assert code.count("HGMMA") and code.count("UTMALDG") and code.count("UTMASTG") and code.count("USETMAXREG")
    counts = code.exponentials_per_wait()
    assert len(counts) == 4 and min(counts) >= 32, "in both loops of both groups of warps"


if __name__ == "__main__":
    print("kernel            launch               registers  spilled  shared KB  copies ahead  exps under a product")
    for launch, run in [(x, x.forward) for x in FORWARD] + [(x, x.backward) for x in BACKWARD]:
        for code in compiled_by(run):
            ahead = "/".join(str(before) for before, _ in rounds(code))
            print(
                f"{code.name:<18}{launch!s:<34}{code.registers:>4}{code.stack:>9}{code.shared / 1024:>11.0f}"
                f"{ahead:>14}{code.exponentials_under_a_product():>10}"
            )

"""The Hopper kernel: what it refuses, what its machine code has to show, and, on such a GPU, the formula."""

import re
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from kernels import attention_hopper
from kernels.attention import attention_with_lse_reference
from kernels.segments import Segments
from tests.kernels.ahead_of_time import SHARED_MEMORY, Compiled, compile_for_hopper

CONFIGURATIONS = pytest.mark.parametrize(("head_dim", "causal"), [(64, False), (64, True), (128, False), (128, True)])
EXPONENTIALS = 64  # of a thread and block: 64 * 128 scores by 128 threads

# name: (query lengths, key lengths or None for the same)
LAYOUTS = {
    "one": ([577], None),
    "several": ([130, 1, 64, 333, 129], None),
    "empty ones": ([0, 70, 0, 128, 0], None),
    "fewer queries": ([3, 200, 65], [300, 513, 66]),
    "more queries": ([300, 260], [100, 1]),
    "no keys": ([40, 30, 150], [0, 500, 0]),
    "no keys at all": ([40, 200], [0, 0]),
}


def inputs(lengths: list[int], lengths_k: list[int] | None, head_dim: int, device: str = "cuda"):
    """q, k, v as slices of one tensor where that is possible, six heads for two, and their segments."""
    segments = Segments.of(lengths, device)
    segments_k = segments if lengths_k is None else Segments.of(lengths_k, device)
    draw = lambda rows: torch.randn(rows, 10, head_dim, dtype=torch.bfloat16, device=device)
    q = qkv = draw(sum(lengths))
    kv = qkv if lengths_k is None else draw(sum(lengths_k))
    return q[:, :6], kv[:, 6:8], kv[:, 8:], segments, segments_k


def in_the_same_dtype(q, k, v, segments: Segments, segments_k: Segments, causal: bool, scale: float) -> Tensor:
    """out_THE as PyTorch computes the formula in bfloat16."""
    out = torch.zeros_like(q)
    for (q_start, Q), (k_start, L) in zip(segments.spans, segments_k.spans):
        k_HLE, v_HLE = (x[k_start : k_start + L].repeat_interleave(3, 1).transpose(0, 1) for x in (k, v))
        s_HQL = scale * (q[q_start : q_start + Q].transpose(0, 1) @ k_HLE.mT)
        if causal:
            s_HQL = s_HQL.masked_fill(s_HQL.new_ones(Q, L).bool().triu(L - Q + 1), -torch.inf)
        out[q_start : q_start + Q] = (s_HQL.softmax(-1).nan_to_num(0.0) @ v_HLE).transpose(0, 1)
    return out


@lru_cache
def compiled(head_dim: int, causal: bool) -> Compiled:
    tile = lambda rows: f"tensordesc<bf16[1, 1, {rows}, 1, {head_dim}],{attention_hopper.TILE_LAYOUT!r}>"
    types = {"q_desc": tile(64), "k_desc": tile(128), "v_desc": tile(128), "out_desc": tile(64)}
    types |= {"lse_ptr": "*fp32", "cu_q_ptr": "*i32", "cu_k_ptr": "*i32", "scale_log2": "fp32"}
    types |= dict.fromkeys(("N", "T", "GROUP"), "i32")
    aligned = ["lse_ptr", "cu_q_ptr", "cu_k_ptr"]
    options = {"num_warps": 4, "maxnreg": attention_hopper.REGISTERS}
    return compile_for_hopper(attention_hopper.forward_kernel, types, {"CAUSAL": causal}, aligned, **options)


def instructions(sass: str) -> list[str]:
    """Without addresses and predicates."""
    return [re.sub(r"^@!?U?P\S+\s+", "", text) for text in re.findall(r"/\*\w{4,}\*/\s+([^;]*?)\s*;", sass)]


def pending(instruction: str) -> int | None:
    """How many products may stay in flight after a wait; None if it is none."""
    wait = re.match(r"WARPGROUP\.DEPBAR\S* \S+ (0x\w+)", instruction)
    return int(wait[1], 16) if wait else None


def exponentials_per_wait(sass: str) -> list[int]:
    """Between each wait for QK, which leaves PV in flight, and the wait for PV that follows."""
    counts, in_flight = [], False
    for instruction in instructions(sass):
        if (left := pending(instruction)) is not None:
            in_flight = left > 0
            counts += [0] if in_flight else []
        elif in_flight and instruction.startswith("MUFU.EX2"):
            counts[-1] += 1
    return counts


def overwritten_operands(sass: str) -> list[str]:
    """Instructions that write a register from which a product in flight reads (as in Triton's issue 9433)."""
    found, groups, group = [], [], set()
    for instruction in instructions(sass):
        if instruction.startswith("HGMMA"):
            if operand := re.search(r", R(\d+), gdesc", instruction):
                group = group | set(range(int(operand[1]), int(operand[1]) + 4))
            if instruction.endswith("gsb0"):
                groups, group = [*groups, group], set()
        elif (left := pending(instruction)) is not None:
            groups = groups[len(groups) - left :]
        elif written := re.match(r"(\S+)\s+(?:PT?\d?, )?R(\d+),", instruction):
            width = 2 if ".64" in written[1] or ".WIDE" in written[1] else 1
            if group.union(*groups) & set(range(int(written[2]), int(written[2]) + width)):
                found.append(instruction)
    return found


@pytest.mark.compiler
@CONFIGURATIONS
def test_it_compiles_to_specialised_warps_without_spills(head_dim, causal):
    code = compiled(head_dim, causal)
    assert code.stack == 0 and code.shared <= SHARED_MEMORY
    assert code.count("HGMMA") and code.count("UTMALDG") and code.count("UTMASTG") and code.count("USETMAXREG")


@pytest.mark.compiler
@CONFIGURATIONS
def test_exponentials_run_under_a_product_in_every_loop_of_every_consumer(head_dim, causal):
    code = compiled(head_dim, causal)
    counts = exponentials_per_wait(code.sass)
    assert len(counts) == 4 and min(counts) >= EXPONENTIALS // 2, counts
    assert code.exps_under_product() >= EXPONENTIALS // 2


@pytest.mark.compiler
@CONFIGURATIONS
def test_nothing_writes_the_probabilities_while_a_product_reads_them(head_dim, causal):
    sass = compiled(head_dim, causal).sass
    assert overwritten_operands(sass) == []
    assert overwritten_operands(sass.replace("gsb0, 0x0", "gsb0, 0x1"))  # it would be seen


def test_other_inputs_are_refused_by_name():
    q, k, v, segments, _ = inputs([5, 3], None, 64, "cpu")
    forward = lambda *x, segments=segments: attention_hopper.forward(*x, segments, segments, True, 0.125)
    with pytest.raises(ValueError, match=r"bfloat16 and float16, not torch\.float32"):
        forward(q.float(), k.float(), v.float())
    with pytest.raises(ValueError, match="head dims 64 and 128, not 32"):
        forward(q[..., :32], k[..., :32], v[..., :32])
    with pytest.raises(ValueError, match=r"Segments\.lengths"):
        forward(q, k, v, segments=Segments(segments.cu_seqlens, 5, torch.tensor([2, 3], dtype=torch.int32)))
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        forward(q, torch.zeros(8, 2, 65, dtype=torch.bfloat16)[..., :64], v)


@pytest.fixture
def hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@CONFIGURATIONS
def test_out_and_lse_follow_the_formula(head_dim, causal, layout, hopper):
    q, k, v, segments, segments_k = inputs(*LAYOUTS[layout], head_dim)
    scale = head_dim**-0.5
    exact, exact_lse = attention_with_lse_reference(
        *(x.double() for x in (q, k, v)), segments, causal=causal, segments_k=segments_k, scale=scale
    )
    allowed = 2 * (in_the_same_dtype(q, k, v, segments, segments_k, causal, scale) - exact).abs().max()
    out, lse = attention_hopper.forward(q, k, v, segments, segments_k, causal, scale)
    assert out.dtype == torch.bfloat16 and (out - exact).abs().max() <= allowed
    assert lse.dtype == torch.float32 and torch.allclose(lse, exact_lse, rtol=0, atol=1e-3)


@pytest.mark.gpu
@CONFIGURATIONS
def test_nan_in_other_segments_does_not_leak(head_dim, causal, hopper):
    q, k, v, segments, _ = inputs([100, 190, 77], None, head_dim)
    clean, clean_lse = attention_hopper.forward(q, k, v, segments, segments, causal, 0.1)
    for x in (q, k, v):
        x[:100], x[290:] = torch.nan, torch.nan
    out, lse = attention_hopper.forward(q, k, v, segments, segments, causal, 0.1)
    assert out[100:290].equal(clean[100:290]) and lse[:, 100:290].equal(clean_lse[:, 100:290])

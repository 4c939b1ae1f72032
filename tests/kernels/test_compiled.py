"""What the compiler makes of every attention kernel that ships, for a Hopper GPU that need not be there."""

import pytest
import torch

from kernels import attention_backward, attention_forward, attention_tiles
from tests.kernels.ahead_of_time import SHARED_MEMORY, Compiled, compile_for_hopper

pytestmark = pytest.mark.compiler
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
OPTIONS = ("num_warps", "num_stages", "maxnreg")

# Spilled bytes per thread that we live with, by (kernel, head dim, dtype): float32 is there to be exact, not fast.
SPILLS = {
    ("forward", 256, "fp32"): 256,
    ("keys", 256, "fp32"): 464,
    ("keys", 256, "bf16"): 96,
    ("queries", 256, "fp32"): 408,
}
SHAPES = [(E, dtype) for E in (64, 128, 256) for dtype in (torch.bfloat16, torch.float32)][:5]


def compiled(kernel, config: dict, dtype: torch.dtype, rows: dict[str, str], causal: bool, **constants) -> Compiled:
    """The kernel with one of our configurations. ``rows``: which tile size each descriptor loads."""
    config, name = dict(config), NAMES[dtype]
    options = {key: config.pop(key) for key in OPTIONS if key in config}
    types = {f"{x}_desc": f"tensordesc<{name}[{config[size]},{config['BLOCK_E']}]>" for x, size in rows.items()}
    if constants.get("ADD_DQ"):
        types["dq_desc"] = types["dq_desc"].replace(name, "fp32")
    constants |= dict(CAUSAL=causal, PRECISION=attention_tiles.precision(dtype), **config)
    constants |= dict.fromkeys(("used_q_ptr", "used_k_ptr"))
    outputs = {f"{x}_ptr": f"*{name}" for x in ("out", "dq", "dk", "dv")}
    floats = {f"{x}_ptr": "*fp32" for x in ("lse", "lse2", "delta")}
    numbers = dict(cu_q_ptr="*i32", cu_k_ptr="*i32", T="i32", N="i32", ROWS="i32", heads_per_key="i32")
    every = outputs | floats | numbers | dict(scale="fp32", scale_log2="fp32")
    types |= {p.name: every[p.name] for p in kernel.params if p.name not in types and p.name not in constants}
    aligned = [name for name, kind in types.items() if kind.startswith("*")]
    return compile_for_hopper(kernel, types, constants, aligned, **options)


def check(result: Compiled, kernel: str, E: int, dtype: torch.dtype) -> None:
    assert result.stack <= SPILLS.get((kernel, E, NAMES[dtype]), 0), f"{result.stack} bytes spilled"
    assert result.shared <= SHARED_MEMORY
    assert result.count("UTMALDG") > 0, "tiles come through the copy engine"
    assert (result.count("HGMMA") > 0) == (dtype != torch.float32), "products run on the tensor cores"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("E", "dtype"), SHAPES)
def test_the_forward_keeps_the_tensor_cores_busy_during_the_softmax(E, dtype, causal):
    config = attention_tiles.forward_config(E, dtype)
    rows = dict(q="BLOCK_M", k="BLOCK_N", v="BLOCK_N")
    nothing = dict(earlier_out_ptr=None, earlier_lse_ptr=None)
    result = compiled(attention_forward._forward_kernel, config, dtype, rows, causal, H=16, E=E, **nothing)
    check(result, "forward", E, dtype)
    if dtype == torch.bfloat16:
        exponentials = config["BLOCK_M"] * config["BLOCK_N"] // (32 * config["num_warps"])  # of a thread, in one round
        assert result.exps_under_product() >= exponentials


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("E", "dtype"), SHAPES)
def test_dk_and_dv_and_dq(E, dtype, causal):
    add_dq = attention_tiles.one_pass(E, dtype)
    rows = dict(q="BLOCK_M", k="BLOCK_N", v="BLOCK_N", dout="BLOCK_M") | (dict(dq="BLOCK_M") if add_dq else {})
    constants = dict(K=8, E=E, ADD_DQ=add_dq) | ({} if add_dq else dict(dq_desc=None))
    config = attention_tiles.keys_config(E, dtype)
    result = compiled(attention_backward._keys_kernel, config, dtype, rows, causal, **constants)
    check(result, "keys", E, dtype)
    assert (result.count("UTMAREDG") > 0) == add_dq
    if config["LATE_DK"]:
        assert result.exps_under_product() >= config["BLOCK_M"] * config["BLOCK_N"] // (32 * config["num_warps"])


@pytest.mark.parametrize(("E", "dtype"), SHAPES)
def test_dq_of_the_two_pass_form(E, dtype):
    rows = dict(q="BLOCK_M", k="BLOCK_N", v="BLOCK_N", dout="BLOCK_M")
    config = attention_tiles.queries_config(E, dtype)
    check(compiled(attention_backward._queries_kernel, config, dtype, rows, True, H=16, E=E), "queries", E, dtype)


def test_half_precision_compiles_like_bfloat16():
    rows = dict(q="BLOCK_M", k="BLOCK_N", v="BLOCK_N")
    config = attention_tiles.forward_config(64, torch.float16)
    nothing = dict(earlier_out_ptr=None, earlier_lse_ptr=None)
    result = compiled(attention_forward._forward_kernel, config, torch.float16, rows, True, H=16, E=64, **nothing)
    check(result, "forward", 64, torch.float16)

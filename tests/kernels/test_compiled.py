"""What the compiler makes of every attention kernel that ships, for a Hopper GPU that need not be there.

``python -m tests.kernels.test_compiled`` prints it.
"""

import pytest
import torch

from kernels import attention_backward, attention_forward, attention_tiles
from tests.kernels.ahead_of_time import SHARED_MEMORY, Compiled, compile_for_hopper

pytestmark = pytest.mark.compiler
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
OPTIONS = ("num_warps", "num_stages", "maxnreg")

# float32 of head dim 256 does spill (some 500 bytes a thread): it is there to be exact, not fast.
SHAPES = [(64, torch.bfloat16), (64, torch.float32), (128, torch.bfloat16), (128, torch.float32), (256, torch.bfloat16)]


def compiled(
    kernel, config: dict, dtype: torch.dtype, rows: dict[str, str], causal: bool, earlier: bool = False, **constants
) -> Compiled:
    """The kernel with one of our configurations. ``rows``: which tile size each descriptor loads. ``earlier``: with
    slots and results of earlier keys, in float32."""
    config, name = dict(config), NAMES[dtype]
    options = {key: config.pop(key) for key in OPTIONS if key in config}
    types = {f"{x}_desc": f"tensordesc<{name}[{config[size]},{config['BLOCK_E']}]>" for x, size in rows.items()}
    if constants.get("ADD_DQ"):
        types["dq_desc"] = types["dq_desc"].replace(name, "fp32")
    constants |= dict(CAUSAL=causal, PRECISION=attention_tiles.precision(dtype), **config)
    extras = ("used_q_ptr", "used_k_ptr", "earlier_out_ptr", "earlier_lse_ptr")
    constants |= {p.name: None for p in kernel.params if p.name in extras and not earlier}
    outputs = {f"{x}_ptr": f"*{name}" for x in ("out", "dq", "dk", "dv")}
    floats = {f"{x}_ptr": "*fp32" for x in ("lse", "lse2", "delta")}
    numbers = dict(cu_q_ptr="*i32", cu_k_ptr="*i32", T="i32", N="i32", ROWS="i32", heads_per_key="i32")
    if earlier:
        outputs |= dict(out_ptr="*fp32", used_q_ptr="*i32", used_k_ptr="*i32")
        outputs |= dict(earlier_out_ptr="*fp32", earlier_lse_ptr="*fp32")
    every = outputs | floats | numbers | dict(scale="fp32", scale_log2="fp32")
    types |= {p.name: every[p.name] for p in kernel.params if p.name not in types and p.name not in constants}
    aligned = [name for name, kind in types.items() if kind.startswith("*")]
    return compile_for_hopper(kernel, types, constants, aligned, **options)


def forward(E: int, dtype: torch.dtype, causal: bool) -> Compiled:
    rows = dict(q="BLOCK_M", k="BLOCK_N", v="BLOCK_N")
    constants = dict(H=16, E=E)
    config = attention_tiles.forward_config(E, dtype)
    return compiled(attention_forward._forward_kernel, config, dtype, rows, causal, **constants)


def keys(E: int, dtype: torch.dtype, causal: bool) -> Compiled:
    add_dq = attention_tiles.one_pass(E, dtype)
    rows = dict(q="BLOCK_M", k="BLOCK_N", v="BLOCK_N", dout="BLOCK_M") | (dict(dq="BLOCK_M") if add_dq else {})
    constants = dict(K=8, E=E, ADD_DQ=add_dq) | ({} if add_dq else dict(dq_desc=None))
    config = attention_tiles.keys_config(E, dtype)
    return compiled(attention_backward._keys_kernel, config, dtype, rows, causal, **constants)


def queries(E: int, dtype: torch.dtype, causal: bool) -> Compiled:
    rows = dict(q="BLOCK_M", k="BLOCK_N", v="BLOCK_N", dout="BLOCK_M")
    config = attention_tiles.queries_config(E, dtype)
    return compiled(attention_backward._queries_kernel, config, dtype, rows, causal, H=16, E=E)


def softmax_share(config: dict) -> int:
    """Exponentials of one thread for one pair of tiles."""
    return config["BLOCK_M"] * config["BLOCK_N"] // (32 * config["num_warps"])


def check(result: Compiled, dtype: torch.dtype) -> None:
    assert result.stack == 0, "registers are spilled"
    assert result.shared <= SHARED_MEMORY
    assert result.count("UTMALDG") > 0, "tiles come through the copy engine"
    assert (result.count("HGMMA") > 0) == (dtype != torch.float32), "products run on the tensor cores"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("E", "dtype"), SHAPES)
def test_the_forward_keeps_the_tensor_cores_busy_during_the_softmax(E, dtype, causal):
    result = forward(E, dtype, causal)
    check(result, dtype)
    if dtype == torch.bfloat16:
        assert result.exps_under_product() >= softmax_share(attention_tiles.forward_config(E, dtype))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("E", "dtype"), SHAPES)
def test_dk_and_dv_and_dq(E, dtype, causal):
    result, config = keys(E, dtype, causal), attention_tiles.keys_config(E, dtype)
    check(result, dtype)
    assert (result.count("UTMAREDG") > 0) == attention_tiles.one_pass(E, dtype)
    if config["LATE_DK"]:
        assert result.exps_under_product() >= softmax_share(config)


@pytest.mark.parametrize(("E", "dtype"), SHAPES)
def test_dq_of_the_two_pass_form(E, dtype):
    check(queries(E, dtype, True), dtype)


@pytest.mark.parametrize("E", [64, 128])
def test_forms_that_rings_and_caches_use(E):
    dtype, config = torch.bfloat16, attention_tiles.forward_config(E, torch.bfloat16)
    rows = dict(q="BLOCK_M", k="BLOCK_N", v="BLOCK_N")
    check(compiled(attention_forward._forward_kernel, config, dtype, rows, True, earlier=True, H=16, E=E), dtype)


def test_dk_and_dv_that_repeat_bit_for_bit():
    dtype, config = torch.bfloat16, attention_tiles.keys_config(64, torch.bfloat16)
    rows = dict(q="BLOCK_M", k="BLOCK_N", v="BLOCK_N", dout="BLOCK_M")
    constants = dict(K=8, E=64, ADD_DQ=False, dq_desc=None)
    check(compiled(attention_backward._keys_kernel, config, dtype, rows, True, **constants), dtype)


def test_half_precision_compiles_like_bfloat16():
    check(forward(64, torch.float16, True), torch.float16)


if __name__ == "__main__":
    print("kernel   head dim  mask    dtype  registers  spilled  shared KB  exponentials under a product")
    for kernel in (forward, keys, queries):
        for E, dtype in SHAPES:
            for causal in (False, True):
                r = kernel(E, dtype, causal)
                print(
                    f"{kernel.__name__:<9}{E:>8}  {'causal' if causal else 'full':<7} {NAMES[dtype]:<6}"
                    f"{r.registers:>9}{r.stack:>9}{r.shared / 1024:>11.0f}{r.exps_under_product():>10}"
                )

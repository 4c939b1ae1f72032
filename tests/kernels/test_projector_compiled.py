"""The projector under torch.compile, autograd and checkpoints, and what becomes of its kernels on Hopper."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import projector_gemm, projector_rows
from kernels.projector import place_projected, projector_mlp, projector_mlp_reference
from tests.kernels.ahead_of_time import SHARED_MEMORY, Compiled, compile_for_hopper
from tests.kernels.test_projector import DEVICE, distinct, tensors

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
interpreter = pytest.mark.interpreter


@interpreter
def test_the_ops_keep_their_promises_to_pytorch():
    into, x, w1, b1, w2, b2 = (x.detach() for x in tensors(9, 6, 5, 12, 7, 2))
    rows, source = distinct(9, 3), distinct(6, 3, 2)
    h, z = projector_gemm.up(x, source, w1, b1, True)
    for op, arguments in [
        (projector_gemm.up, (x, source, w1, b1, True)),
        (projector_gemm.up, (x, None, w1[:, :5].contiguous(), b1, False)),
        (projector_gemm.down, (into, rows, h, w2, b2)),
        (projector_gemm.dgelu, (into[:3], w2, z, True)),
        (projector_gemm.dgelu, (into[:3], w2, z, False)),
        (projector_rows.gather_rows, (into, rows, torch.float16, True)),
        (projector_rows.gather_rows, (into, rows, torch.float32, False)),
        (projector_rows.scatter_rows, (into, rows, None)),
        (projector_rows.scatter_rows, (into, rows, into[:3].clone())),
    ]:
        torch.library.opcheck(op, arguments)


@interpreter
def test_a_compiled_model_has_no_graph_break():
    """Two placements in a row, of the same weights, as of images and sound; as many rows as there are."""
    leaves, scale = tensors(40, 30, 8, 16, 24, 2), torch.randn(24, device=DEVICE)

    def embed(into, x, w1, b1, w2, b2, rows, source):
        out = place_projected(into * scale, rows[0], x * 2, w1, b1, w2, b2, source_RS=source)
        return place_projected(out, rows[1], x - 1, w1, b1, w2, b2, source_RS=source) * scale

    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager")
    for R in (7, 5):
        arguments = (torch.stack([distinct(40, R), distinct(40, R)]), distinct(30, R, 2))
        results = [function(*leaves, *arguments) for function in (embed, compiled)]
        assert torch.allclose(*results, atol=1e-5)
        for a, b in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in results)):
            assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


@interpreter
def test_a_compiled_function_leaves_parameters_alone():
    leaves, rows = tensors(9, 3, 8, 16, 24), distinct(9, 3)
    before = leaves[0].detach().clone()
    out = torch.compile(place_projected, fullgraph=True, backend="aot_eager")(leaves[0], rows, *leaves[1:])
    assert leaves[0].equal(before) and torch.allclose(out, place_projected(before, rows, *leaves[1:]), atol=1e-5)


@interpreter
def test_one_tensor_in_two_places_gets_the_gradients_of_both():
    w, b = torch.randn(8, 8, device=DEVICE, requires_grad=True), torch.randn(8, device=DEVICE, requires_grad=True)
    x = torch.randn(5, 8, device=DEVICE)
    compiled = torch.compile(projector_mlp, fullgraph=True, backend="aot_eager")
    results = [f(x, w, b, w, b).square().sum() for f in (projector_mlp_reference, projector_mlp, compiled)]
    expected, *others = [torch.autograd.grad(loss, (w, b)) for loss in results]
    for gradients in others:
        assert all(torch.allclose(a, e, rtol=1e-4, atol=1e-4) for a, e in zip(gradients, expected))


@interpreter
def test_checkpointing_and_torch_func_and_a_kept_graph_give_the_same_bits():
    leaves, rows, source = tensors(9, 6, 8, 16, 24, 2), distinct(9, 3), distinct(6, 3, 2)
    loss = lambda into, *rest: place_projected(into * 2, rows, *rest, source_RS=source).square().sum()
    kept = loss(*leaves)
    expected = torch.autograd.grad(kept, leaves, retain_graph=True)
    others = [
        torch.autograd.grad(kept, leaves),
        torch.autograd.grad(checkpoint(loss, *leaves, use_reentrant=False), leaves),
        torch.func.grad(loss, argnums=tuple(range(6)))(*leaves),
    ]
    for gradients in others:
        assert all(a.equal(b) for a, b in zip(gradients, expected))


@interpreter
def test_a_second_derivative_is_refused():
    leaves = tensors(1, 5, 8, 16, 24)[1:]
    [gradient] = torch.autograd.grad(projector_mlp(*leaves).square().sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def compiled(kernel, dtype: torch.dtype, absent: tuple[str, ...] = (), **constants) -> Compiled:
    """A kernel of the projector as it ships, without the arguments that are ``absent``. It spills nothing and fits."""
    config = projector_gemm.config(dtype, reads_z=kernel is projector_gemm._dgelu_kernel)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    name = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]
    M, N, K = config["BLOCK_M"], config["BLOCK_N"], config.pop("BLOCK_K")
    box = lambda rows, columns: f"tensordesc<{name}[{rows},{columns}]>"
    types = dict(x=box(M, K), dy_desc=box(M, K), w1_desc=box(N, K), w2_desc=box(N, K))
    types |= dict.fromkeys(("z_desc", "dz_desc", "h_desc"), box(M, N // 2))
    types |= dict.fromkeys(("b1_ptr", "b2_ptr", "into_ptr"), f"*{name}")
    types |= dict(source_ptr="*i64", rows_ptr="*i64", db1_ptr="*fp32", into_stride="i32", R="i32", P="i32", T="i32")
    if kernel is projector_gemm._down_kernel:
        types["h_desc"] = box(M, K)
    elif kernel is projector_gemm._dgelu_kernel:
        types["w2_desc"] = box(K, N)
    elif "source_ptr" not in absent:
        types["x"] = f"*{name}"
    constants |= config | dict.fromkeys(absent)
    types = {p.name: types[p.name] for p in kernel.params if p.name not in constants}
    aligned = [key for key, kind in types.items() if kind.startswith("*") or key == "into_stride"]
    result = compile_for_hopper(kernel, types, constants, aligned, **options)
    assert result.stack == 0, f"{result.stack} bytes spilled"
    assert result.shared <= SHARED_MEMORY
    assert (result.count("HGMMA") > 0) == (dtype != FP32), "products run on the tensor cores"
    assert result.count("UTMALDG") > 0, "tiles come through the copy engine"
    # A wait that leaves one product in flight: the next tiles are asked for while the tensor cores work.
    assert ("WARPGROUP.DEPBAR.LE gsb0, 0x1" in result.sass) == (dtype != FP32)
    return result


@pytest.mark.compiler
@pytest.mark.parametrize(("C", "S", "dtype"), [(1024, 1, BF16), (1280, 8, BF16), (1000, 1, FP16), (1024, 1, FP32)])
def test_rows_are_gathered_past_the_registers(C, S, dtype):
    code = compiled(projector_gemm._up_kernel, dtype, C=C, S=S, F=4096)
    assert "LDGSTS.E.BYPASS.128" in code.sass


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_rows_in_place_come_through_the_copy_engine(dtype):
    assert "LDGSTS" not in compiled(projector_gemm._up_kernel, dtype, ("source_ptr",), C=1024, S=1, F=4096).sass


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_results_are_placed_16_bytes_at_a_time(dtype):
    code = compiled(projector_gemm._down_kernel, dtype, F=4096, D=4096)
    assert code.sass.count("STG.E.128") == code.count("STG")


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_gelu_is_computed_once_for_both_of_its_uses(dtype):
    config = projector_gemm.config(dtype)
    code = compiled(projector_gemm._dgelu_kernel, dtype, F=4096, D=4096)
    elements = config["BLOCK_M"] * config["BLOCK_N"] // (32 * config["num_warps"])  # of a thread
    assert code.sass.count("MUFU.EX2") == 2 * elements  # an exponential in erf, another in the density


@pytest.mark.compiler
def test_rows_are_copied_16_bytes_at_a_time():
    types = dict(x_ptr="*bf16", index_ptr="*i64", out_ptr="*bf16", R="i32", P="i32")
    tile = dict(projector_rows.TILE)
    options = dict(num_warps=tile.pop("num_warps"))
    for kernel, more, absent in [
        (projector_rows._gather_kernel, dict(sum_ptr="*fp32"), {}),
        (projector_rows._scatter_kernel, dict(out_stride="i32"), {}),
        (projector_rows._scatter_kernel, dict(out_stride="i32"), dict(x_ptr=None)),
    ]:
        given = {key: kind for key, kind in (types | more).items() if key not in absent}
        aligned = [key for key, kind in given.items() if kind.startswith("*") or key == "out_stride"]
        code = compile_for_hopper(kernel, given, dict(W=4096, **tile, **absent), aligned, **options)
        assert code.stack == 0 and code.sass.count("STG.E.128") == code.count("STG")
        assert "LDG.E.128" in code.sass or absent

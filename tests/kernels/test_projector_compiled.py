"""The projector under torch.compile, autograd and checkpoints."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import projector_gemm, projector_rows
from kernels.projector import place_projected, projector_mlp, projector_mlp_reference
from tests.kernels.test_projector import DEVICE, distinct, tensors

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

"""Linear cross entropy under torch.compile, torch.func and checkpoints."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import cross_entropy
from kernels.cross_entropy import linear_cross_entropy
from tests.kernels.test_cross_entropy import DEVICE, _memory_starts_as_nan, inputs  # noqa: F401 (a fixture)


@pytest.mark.parametrize(("softcap", "wanted"), [(3.0, True), (None, False)])
def test_the_op_keeps_its_promises_to_torch(softcap, wanted):
    hidden, weight, target = inputs(5, 30)
    torch.library.opcheck(cross_entropy._op, (hidden.detach(), weight.detach(), target, softcap, wanted, wanted))


def test_a_compiled_head_with_tied_weights_has_no_graph_break():
    weight = torch.randn(30, 16, device=DEVICE, requires_grad=True)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def step(token, target):
        return linear_cross_entropy(torch.tanh(weight[token]), weight, target, softcap=20)[0] / 3

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for R in (7, 9):
        token, target = torch.randint(30, (2, R), device=DEVICE)
        losses = [f(token, target) for f in (step, compiled)]
        gradients = [torch.autograd.grad(loss, weight)[0] for loss in losses]
        assert torch.allclose(*losses) and torch.allclose(*gradients, atol=1e-6)
        if R == 7:
            graphs.clear()
    assert not graphs, "compiled again for another number of rows"


def test_checkpointing_and_torch_func_see_one_op():
    hidden, weight, target = inputs(9, 37)
    run = lambda hidden, weight: linear_cross_entropy(hidden, weight, target)[0] / 3
    expected = torch.autograd.grad(run(hidden, weight), (hidden, weight))
    kept = torch.autograd.grad(checkpoint(run, hidden, weight, use_reentrant=False), (hidden, weight))
    functional = torch.func.grad(run, argnums=(0, 1))(hidden, weight)
    assert all(a.equal(b) and a.equal(c) for a, b, c in zip(expected, kept, functional))

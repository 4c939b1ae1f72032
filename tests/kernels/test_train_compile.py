"""train.compile on the path that a GPU takes, in Triton's interpreter: blocks that call the attention op, with and
without gradients. The reference is left out of graphs, so a run on CPUs does not show any of this."""

import functools
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from avlm.config.run import RecomputeConfig
from avlm.models.avlm import AVLM
from avlm.models.initial import init
from avlm.models.rope import rope_frequencies, rope_table
from avlm.parallel.recompute import apply_recompute
from kernels.segments import Segments
from tests.parallel.small import make_config, make_rows

pytestmark = pytest.mark.interpreter
DOCUMENTS = [5, 1, 13, 2, 14, 3, 7, 8, 11, 9]  # in rows of 16 tokens


@pytest.fixture
def graphs(monkeypatch) -> CompileCounterWithBackend:
    """Blocks are traced, but not compiled to machine code; counts their graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


def built(frozen: str = "", recompute: str = "none") -> tuple[AVLM, AVLM]:
    """A model, and the same with compiled blocks."""
    cfg = make_config()
    plain, compiled = AVLM(cfg.model), AVLM(cfg.model)
    init(plain, seed=0)
    compiled.load_state_dict(plain.state_dict())
    modes = RecomputeConfig(decoder=recompute, vision=recompute)
    apply_recompute(compiled, replace(cfg.train, compile=True, recompute=modes))
    for model in (plain, compiled):
        if frozen:
            getattr(model, frozen).requires_grad_(False)
    return plain, compiled


@pytest.mark.parametrize("learns", [True, False])
def test_any_number_of_documents_shares_one_graph_of_a_decoder_block(graphs, learns):
    plain, compiled = built()
    for count in DOCUMENTS:
        lengths = [1] * (count - 1) + [16 - count + 1]
        rope = rope_table(rope_frequencies(plain.config.decoder, "cpu"), torch.cat([torch.arange(n) for n in lengths]))
        x, segments = torch.randn(16, 32, requires_grad=learns), Segments.of(lengths)
        run = lambda model: model.decoder.blocks[0].forward(x, rope, segments, None)  # noqa: B023 (called at once)
        with torch.set_grad_enabled(learns):
            found = run(compiled)
            gradient = torch.autograd.grad(found.square().sum(), x)[0] if learns else None
            if count % 4 == 1:
                expected = run(plain)
                assert torch.allclose(found, expected, atol=1e-5), count
                if learns:
                    [of_plain] = torch.autograd.grad(expected.square().sum(), x)
                    assert torch.allclose(gradient, of_plain, rtol=1e-4, atol=1e-5), count
    assert graphs.frame_count == 1


@pytest.mark.parametrize(
    ("frozen", "recompute", "learns"),
    [("vision", "none", True), ("audio", "none", True), ("vision", "selective", True), ("decoder", "none", True)]
    + [("", "none", False), ("", "selective", False)],
)
def test_frozen_towers_and_validation_run_compiled(graphs, frozen, recompute, learns):
    plain, compiled = built(frozen, recompute)
    [row] = make_rows(make_config(), ["both"])
    with torch.set_grad_enabled(learns):
        losses = [model(row)[0] for model in (plain, compiled)]
    assert torch.allclose(*losses, rtol=1e-5) and graphs.frame_count > 0
    if learns:
        for loss in losses:
            loss.backward()
        pairs = list(zip(plain.parameters(), compiled.parameters()))
        assert all(a.grad is None and b.grad is None for a, b in pairs if not a.requires_grad)
        assert all(torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-4) for a, b in pairs if a.requires_grad)

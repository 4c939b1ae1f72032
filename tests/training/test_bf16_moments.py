"""AdamW with moments in bf16."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.placement_types import Replicate, Shard

from avlm.models.avlm import AVLM
from avlm.models.initial import init
from avlm.parallel.mesh import lay_out
from avlm.training import bf16_moments, optimizer
from avlm.training.bf16_moments import BF16MomentsAdamW, hashed, local, places, rounded
from tests.parallel.small import make_config, make_rows
from tests.parallel.spawn import run_ranks


def bits_of(count: int, step: int = 1) -> torch.Tensor:
    return hashed(torch.arange(count), 7, torch.tensor(float(step)))


def test_a_number_is_rounded_to_a_neighbour_and_right_on_average():
    x = torch.tensor(1.0 + 2**-7 * 0.3)
    found = rounded(x.expand(2**16), bits_of(2**16) & 0xFFFF).float()
    assert set(found.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert found.mean().item() == pytest.approx(x.item(), abs=2**-7 * 0.01)
    exact = torch.tensor([0.0, -2.5, 1e-30], dtype=torch.bfloat16).float()
    assert torch.equal(rounded(exact, torch.full((3,), 0xFFFF)).float(), exact)


def test_bits_differ_from_step_to_step_and_are_even():
    one, two = bits_of(2**16), bits_of(2**16, step=2)
    for bits in (one, two, one ^ two, one[1:] ^ one[:-1]):
        shares = torch.stack([(bits >> i & 1).float().mean() for i in range(32)])
        assert (shares - 0.5).abs().max() < 0.01


def test_a_moment_reaches_the_square_of_a_gradient_that_has_shrunk():
    """With b2 = 0.999 a moment that is rounded to the nearest would stay where it was."""
    weight = nn.Parameter(torch.zeros(4096))
    [state] = [{"step": torch.zeros(()), "exp_avg": torch.zeros(4096), "exp_avg_sq": torch.zeros(4096)}]
    state = {name: value.bfloat16() if value.ndim else value for name, value in state.items()}
    adam = BF16MomentsAdamW([{"params": [weight], "keys": [1]}], lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)
    adam.state[weight] = state
    nearest = torch.full((), 4.0, dtype=torch.bfloat16)
    state["exp_avg_sq"].fill_(4.0)
    for _ in range(3000):
        weight.grad = torch.full((4096,), 1.0)
        adam.step()
        nearest = (nearest.float() * 0.999 + 0.001).bfloat16()
    expected = 1.0 + 3.0 * 0.999**3000
    assert state["exp_avg_sq"].float().mean().item() == pytest.approx(expected, rel=0.01)
    assert nearest.item() > 1.5 * expected


def losses_of(moments: str) -> list[float]:
    cfg = make_config()
    model = AVLM(cfg.model)
    init(model)
    settings = replace(cfg.stages[0].optimizer, lr=3e-3, moments=moments)
    adam = optimizer.build(model, settings)
    rows = make_rows(cfg, ["both", "image", "audio"])
    found = []
    for step in range(30):
        optimizer.schedule(adam, settings, step, 30)
        loss = sum(model(row)[0] for row in rows) / sum(len(row.target_R) for row in rows)
        loss.backward()
        adam.step()
        adam.zero_grad()
        found.append(loss.item())
    return found


def test_a_model_learns_as_with_moments_in_float32():
    exact, rough = losses_of("fp32"), losses_of("bf16")
    assert exact[-1] < 0.7 * exact[0]
    assert rough == pytest.approx(exact, rel=5e-3)
    assert rough != exact


def steps_on(shape, piece):
    """A parameter of 7 x 8 numbers after three steps, whole, laid out as weights of the decoder are."""
    bf16_moments.PIECE = piece
    dist.init_process_group("gloo")
    world = lay_out(shape, torch.device("cpu"))
    mesh = world.decoder_mesh["shard_context", "tensor"]
    found = []
    for placements in ([Shard(0), Shard(1)], [Shard(0), Replicate()]):
        weight = nn.Parameter(distribute_tensor(torch.linspace(-1, 1, 56).view(7, 8), mesh, placements))
        place = distribute_tensor(torch.arange(56).view(7, 8), mesh, placements)
        assert torch.equal(places(weight, 1, len(local(weight)) - 1), local(place)[1:])
        state = {"step": torch.zeros(())} | {
            name: torch.zeros_like(weight, dtype=torch.bfloat16) for name in ("exp_avg", "exp_avg_sq")
        }
        adam = BF16MomentsAdamW([{"params": [weight], "keys": [5]}], lr=0.1)
        adam.state[weight] = state
        for step in range(3):
            weight.grad = distribute_tensor(torch.linspace(step, 2, 56).sin().view(7, 8), mesh, placements)
            adam.step()
        found.append([tensor.full_tensor().float().tolist() for tensor in (weight.data, *list(state.values())[1:])])
    dist.destroy_process_group()
    return found


def test_every_layout_of_ranks_rounds_alike_and_so_do_pieces_of_a_parameter():
    [expected] = run_ranks(steps_on, 1, (1, 1, 1, 1), 2**23)
    for shape in ((1, 4, 1, 1), (1, 2, 1, 2)):
        for found in run_ranks(steps_on, 4, shape, 8):
            assert found == expected

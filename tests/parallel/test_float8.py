"""Products in float8: near those in bf16, alike on every layout."""

import functools

import pytest
import torch
import torch.distributed as dist

from avlm.parallel.apply import own_part
from avlm.parallel.check import check_layout
from tests.parallel.small import TREE, build, make_config, make_rows, whole
from tests.parallel.spawn import run_ranks

DECODER = {**TREE["model"]["decoder"], "hidden_size": 64, "num_kv_heads": 4, "num_layers": 1}
MODEL = {**TREE["model"], "decoder": DECODER}
# what differs from float8 on data ranks: settings of parallel, settings of train
CASES = {
    "exact": ({}, {"float8": False, "precision": "fp32"}),
    "float8": ({}, {}),
    "context": ({"context": 2, "context_mode": "ring"}, {}),
    "tensor": ({"tensor": 2}, {}),
    "recomputed": ({}, {"recompute": {"decoder": "selective"}}),
    "compiled": ({}, {"compile": True}),
}


def config(parallel, train):
    return make_config(model=MODEL, parallel=parallel, train={"precision": "bf16", "float8": True, **train})


def losses_and_gradients(cases):
    found = {}
    for name in cases:
        cfg = config(*CASES[name])
        world, model = build(cfg)
        rows = make_rows(cfg, ["both", "image"])
        total = torch.zeros(())
        for row in rows[world.data_rank :: world.data_size]:
            loss, _ = model(own_part(row, cfg.model, world))
            loss.backward()
            total += loss.detach().float() / world.shape["tensor"]
        dist.all_reduce(total)
        gradients = [whole(p.grad).float().flatten() for p in model.decoder.blocks.parameters()]
        found[name] = total.item(), torch.cat(gradients)
    dist.destroy_process_group()
    return {name: (loss, gradient.tolist()) for name, (loss, gradient) in found.items()}


@functools.cache
def alone():
    [found] = run_ranks(losses_and_gradients, 1, ("exact", "float8"))
    return {name: (loss, torch.tensor(gradient)) for name, (loss, gradient) in found.items()}


@functools.cache
def on_two_ranks():
    found = run_ranks(losses_and_gradients, 2, tuple(CASES)[1:])[0]
    return {name: (loss, torch.tensor(gradient)) for name, (loss, gradient) in found.items()}


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_losses_and_gradients_are_near_the_exact_ones():
    (exact, gradient), (rough, of_float8) = alone()["exact"], alone()["float8"]
    assert rough == pytest.approx(exact, rel=1e-2)
    assert 1e-3 < distance(of_float8, gradient) < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("name", tuple(CASES)[1:])
def test_layouts_recomputation_and_graphs_are_as_near_as_one_process(name):
    """In bf16 a sum in another order moves a number across a border of float8 now and then."""
    loss, gradient = on_two_ranks()[name]
    exact, of_exact = alone()["exact"]
    assert loss == pytest.approx(exact, rel=1e-2)
    assert distance(gradient, of_exact) < 1.2 * distance(alone()["float8"][1], of_exact)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {**MODEL, "lora": {"rank": 4}}}, "does not go with model.lora"),
        ({"model": {**MODEL, "decoder": {**DECODER, "intermediate_size": 40}}}, "intermediate_size gives one of 40"),
        ({"data": {"train": "synthetic", "seq_length": 72}}, "stage all has 72: change data.seq_length"),
    ],
)
def test_what_does_not_fit_is_one_line(changes, message):
    with pytest.raises(ValueError, match=message):
        check_layout(make_config(**{"model": MODEL, "train": {"float8": True}, **changes}), 1)

"""Experts that ranks share out: twenty steps as one process takes them, checkpoints on other layouts, tokens that no
two ranks have as many of, and layouts that do not fit. ``make equivalence`` compares gradients."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from avlm.config.decoder import DecoderConfig, ExpertsConfig
from avlm.config.run import CheckpointConfig
from avlm.models.avlm import AVLM
from avlm.models.batch import KINDS
from avlm.models.decoder import feed_forward
from avlm.models.initial import init
from avlm.models.moe import set_balance
from avlm.parallel import mesh
from avlm.parallel.apply import own_part
from avlm.parallel.check import check_layout
from avlm.parallel.experts import apply_experts, expert_mode
from avlm.storage.run_folder import Progress
from avlm.training import checkpoint, optimizer
from avlm.training.saving import Saver
from tests.parallel.small import MODELS, build, make_config, make_rows
from tests.parallel.spawn import run_ranks
from train import train_step

ROWS, HALF = 4, 10
LAYOUTS = {
    "gather": {"expert": 4, "expert_mode": "gather"},
    "exchange": {"expert": 4},
    "pairs": {"expert": 2, "tensor": 2, "context": 2, "context_mode": "ring"},
}


def config_of(layout, **train):
    train = {"balance_loss": 0.01, "rows_per_step": ROWS, **train}
    return make_config(model=MODELS["experts"], parallel=layout, train=train, seed=3)


def steps(layouts, run):
    """(loss, norm) of twenty steps, whose second half another layout takes, from the checkpoint of the first."""
    found = []
    for layout, first in zip(layouts, (0, HALF)):
        cfg = config_of(layout)
        world, model = build(cfg)
        adam = optimizer.build(model, cfg.stages[0].optimizer)
        if first:
            path = Path(run) / "checkpoints" / f"step_{HALF:08d}"
            checkpoint.load_model(path, model)
            checkpoint.load_optimizer(path, model, adam)
        set_balance(model, cfg.train.balance_loss, ROWS)
        for step in range(first, first + HALF):
            optimizer.schedule(adam, cfg.stages[0].optimizer, step, 2 * HALF)
            rows = make_rows(cfg, ["both", "text", "image", "audio"], seed=step % 2)
            num_targets = sum(len(row.target_R) for row in rows)
            own = [own_part(row, cfg.model, world) for row in rows[world.data_rank :: world.data_size]]
            values = train_step(model, own, num_targets, adam, 1.0, world)
            found.append((values[: len(KINDS)].sum().item() / num_targets, values[len(KINDS)].item()))
        if not first:
            Saver(Path(run), CheckpointConfig(), world).save(Progress(step=HALF), model, adam, {})
    mesh.stop()
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_ranks(steps, 1, ({}, {}), str(tmp_path_factory.mktemp("alone")))[0]


@pytest.mark.slow
@pytest.mark.parametrize("layouts", [("gather", "pairs")])
def test_twenty_steps_are_those_of_one_process_and_go_on_from_a_checkpoint_of_another_layout(layouts, alone, tmp_path):
    found = run_ranks(steps, 4, [LAYOUTS[name] for name in layouts], str(tmp_path))[0]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in alone], rel=1e-5)
    assert [norm for _, norm in found] == pytest.approx([norm for _, norm in alone], rel=1e-3)
    assert alone[-1][0] < 0.9 * alone[0][0]


FOUR = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2}
NONE = 4  # of four experts
# Tokens of each of two ranks, and their experts (any, or two); assignments that are then computed.
UNEVEN = [((5, 0), None, 10), ((0, 3), None, 6), ((0, 0), None, 0)]
EVEN = [((4, 4), None, 16), ((4, 4), [3, 2], 16), ((4, 4), [NONE, NONE], 0), ((0, 0), None, 0)]


def of_any_tokens(mode):
    """Whether outputs, gradients of tokens and of experts are those of one process, and how much was computed: in
    generation and in training."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    world = mesh.lay_out((1, 2, 1, 1), torch.device("cpu"), expert=2)
    config = DecoderConfig(**FOUR, experts=ExpertsConfig(num=4, per_token=2, intermediate_size=8))
    whole, shared = feed_forward(config, 0), feed_forward(config, 0)
    for parameter in whole.parameters():
        nn.init.normal_(parameter)
    shared.load_state_dict(whole.state_dict())
    whole, shared = whole.experts, nn.ModuleList([shared])
    apply_experts(shared, world.expert_mesh["expert"], world.group_of(2), mode)
    shared = shared[0].experts
    results = []
    for trains, cases in ((False, UNEVEN + EVEN), (True, EVEN)):
        for counts, chosen, _ in cases:
            x_TD = torch.randn(counts[world.rank], 16, requires_grad=trains)
            expert_TK = torch.stack([torch.randperm(4)[:2] for _ in x_TD]) if len(x_TD) else torch.empty(0, 2).long()
            if chosen and world.rank:
                expert_TK = torch.tensor(chosen).expand(len(x_TD), -1)
            elif chosen:
                expert_TK = torch.tensor([NONE, NONE] if chosen == [NONE, NONE] else [2, 3]).expand(len(x_TD), -1)
            weight_TK = torch.rand(len(x_TD), 2)
            found = []
            for experts in (shared, whole):
                with torch.set_grad_enabled(trains):
                    y_TD, num_computed = experts(x_TD, expert_TK, weight_TK)
                found.append([y_TD])
                if trains:
                    experts.zero_grad()
                    x_TD.grad = None
                    y_TD.square().sum().backward()
                    gradients = [p.grad for p in experts.parameters()]
                    if experts is shared:
                        count = num_computed
                        gradients = [gradient.full_tensor() for gradient in gradients]
                    else:
                        for gradient in gradients:
                            dist.all_reduce(gradient)
                    found[-1] += [x_TD.grad, *gradients]
                elif experts is shared:
                    count = num_computed
            same = all(torch.allclose(a, b, atol=1e-4, rtol=1e-5) for a, b in zip(*found, strict=True))
            results.append((same, sum(world.gather(int(count)))))
    mesh.stop()
    return results


@pytest.mark.parametrize("mode", ["gather", "exchange"])
def test_ranks_with_any_number_of_tokens_and_experts_with_none_have_the_numbers_of_one_process(mode):
    expected = [(True, computed) for *_, computed in UNEVEN + EVEN + EVEN]
    for results in run_ranks(of_any_tokens, 2, mode):
        assert results == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"parallel": {"expert": 3}},
            "parallel.expert=3 does not divide parallel.shard x context x tensor = 4",
        ),
        ({"parallel": {"expert": 4, "replicate": 2}}, "tensor = 2, the ranks that"),
        ({"model": MODELS["square"], "parallel": {"expert": 2}}, "parallel.expert=2 needs model.decoder.experts"),
        (
            {"model": MODELS["square"], "train": {"balance_loss": 0.1}},
            "train.balance_loss=0.1 needs model.decoder",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_named(changes, said):
    cfg = make_config(**{"model": MODELS["experts"], **changes})
    with pytest.raises(ValueError, match=said):
        check_layout(cfg, 4)


def test_experts_that_ranks_do_not_divide_are_named():
    experts = {**MODELS["experts"]["decoder"]["experts"], "num": 6}
    decoder = {**MODELS["experts"]["decoder"], "experts": experts}
    cfg = make_config(model={**MODELS["experts"], "decoder": decoder}, parallel={"expert": 4})
    with pytest.raises(ValueError, match=r"parallel\.expert=4 does not divide model\.decoder\.experts\.num=6"):
        check_layout(cfg, 4)


def test_auto_gathers_while_that_makes_little_room_in_vain():
    cfg = make_config(model=MODELS["experts"])
    of = lambda per_token, **parallel: expert_mode(
        replace(cfg.model.decoder, experts=replace(cfg.model.decoder.experts, per_token=per_token)),
        replace(cfg.parallel, **parallel),
    )
    assert (of(2), of(2, expert=2), of(4, expert=2), of(8, expert=4)) == ("none", "exchange", "gather", "gather")
    assert of(8, expert=8) == "exchange" and of(1, expert=4, expert_mode="gather") == "gather"


def test_one_process_starts_with_the_same_values(alone):
    """What all of the above is compared with is the plain model."""
    cfg = config_of({})
    model = AVLM(cfg.model)
    init(model, cfg.seed)
    rows = make_rows(cfg, ["both", "text", "image", "audio"], seed=0)
    loss = sum(model(row)[0].item() for row in rows) / sum(len(row.target_R) for row in rows)
    assert loss == pytest.approx(alone[0][0], rel=1e-6)

"""Which weights decay, how the learning rate moves, and what clipping does."""

import math
from dataclasses import replace

import pytest
import torch

from avlm.models import freezing
from avlm.models.avlm import AVLM
from avlm.models.initial import init
from avlm.training import optimizer
from tests.parallel.small import MODELS, make_config, make_rows


@pytest.fixture
def model():
    model = AVLM(make_config().model)
    init(model)
    return model


def config(**changes):
    return replace(make_config().stages[0].optimizer, **{"warmup_steps": 10, "lr": 1e-2, **changes})


def test_warmup_rises_to_lr_and_the_cosine_ends_at_min_lr(model):
    settings = config(min_lr=1e-3)
    adam = optimizer.build(model, settings)
    rates = [optimizer.schedule(adam, settings, step, 111) for step in range(111)]
    assert rates[0] == pytest.approx(1e-3) and rates[9] == pytest.approx(1e-2) and max(rates) == rates[10]
    assert rates[60] == pytest.approx((1e-2 + 1e-3) / 2, rel=0.05)
    assert rates[-1] == pytest.approx(1e-3, rel=0.01) and rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)


def test_a_module_may_learn_slower(model):
    adam = optimizer.build(model, config(lr_scale={"vision": 0.1}))
    optimizer.schedule(adam, config(), 50, 100)
    rates = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in adam.param_groups:
        rates |= {names[parameter].split(".")[0]: group["lr"] for parameter in group["params"]}
    assert rates["vision"] == pytest.approx(0.1 * rates["decoder"]) and rates["audio"] == rates["decoder"]


EXEMPT = ("bias", "norm.weight", "position", "class_token", "_scale", "newline")
EXEMPT += ("attention_gate.weight", "ffn_gate.weight", "conv.scale", "conv.shift")


@pytest.mark.parametrize("kind", MODELS)
def test_matrices_decay_and_norms_biases_positions_and_learned_rows_do_not(kind):
    model = AVLM(make_config(model=MODELS[kind]).model)
    adam = optimizer.build(model, config(weight_decay=0.5))
    decay = {parameter: group["weight_decay"] for group in adam.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        exempt = name.endswith(EXEMPT)
        assert decay[parameter] == (0.0 if exempt else 0.5), name


def test_what_is_frozen_has_neither_gradient_nor_optimizer_state(model):
    stage = replace(make_config().stages[0], train=["audio", "audio_projector"])
    freezing.freeze(model, stage)
    adam = optimizer.build(model, config())
    model(make_rows(make_config(), ["both"])[0])[0].backward()
    for name, parameter in model.named_parameters():
        trained = name.startswith("audio")
        assert (parameter.grad is not None) == trained == (parameter in adam.state), name


def test_clipping_keeps_the_direction_and_gives_the_norm_before(model):
    model(make_rows(make_config(), ["both"])[0])[0].backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    expected = math.sqrt(sum(g.square().sum().item() for g in before.values()))
    assert optimizer.clip_gradients(model, 1e9).item() == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())
    assert optimizer.clip_gradients(model, None).item() == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters()), "null: no clipping"
    optimizer.clip_gradients(model, expected / 4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, before[name] / 4)

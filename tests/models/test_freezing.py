"""What a stage trains: names, NeMo's flags, SALM's patterns; and what is refused."""

import dataclasses

import pytest
import yaml

from avlm.config.load import dump_config, resolve_config
from avlm.data.check import check_data
from avlm.models import freezing
from avlm.models.avlm import AVLM
from avlm.models.initial import init
from avlm.models.lora import is_adapter
from avlm.models.shapes import parameter_shapes
from avlm.parallel.check import check_layout
from avlm.preflight import memory
from avlm.training import optimizer
from tests.parallel.small import EVERYTHING, TREE, make_rows

LORA = {"rank": 4, "targets": ["decoder.*.q", "decoder.*.down", "vision.*.up"]}


def make(lora=LORA, **stage):
    tree = {**TREE, "model": {**TREE["model"], "lora": lora}}
    optimizer = stage.pop("optimizer", {})
    tree["parallel"] = stage.pop("parallel", {})
    return resolve_config({**tree, "stages": [{"name": "one", "steps": 4, "optimizer": optimizer, **stage}]}, "test")


def trained(cfg):
    return freezing.trained_names(cfg.stages[0], cfg.model, parameter_shapes(cfg.model))


def parts(cfg):
    names = trained(cfg)
    return {name.split(".")[0] for name in names if not is_adapter(name)}, sum(map(is_adapter, names))


ADAPTERS = 2 * (2 + 2 + 2)  # matrices of 2 blocks each


@pytest.mark.parametrize(
    ("stage", "modules", "num_adapters"),
    [
        ({"train": ["lora"]}, set(), ADAPTERS),
        ({"train": ["lora", "audio_projector"]}, {"audio_projector"}, ADAPTERS),
        ({"train": ["decoder"]}, {"decoder"}, 8),
        ({"train": ["vision_projector"]}, {"vision_projector"}, 0),
        ({"train": EVERYTHING}, set(EVERYTHING), ADAPTERS),
        ({"freeze_language_model": False}, set(EVERYTHING), ADAPTERS),
        (
            {"freeze_language_model": True, "freeze_vision_model": True, "freeze_audio_model": True},
            {"vision_projector", "audio_projector"},
            ADAPTERS,
        ),
        (
            {"freeze_vision_projection": True, "freeze_audio_projection": True},
            {"decoder", "vision", "audio"},
            ADAPTERS,
        ),
        ({"freeze_params": ["decoder", "vision[.]", "audio[.]"]}, {"vision_projector", "audio_projector"}, ADAPTERS),
    ],
)
def test_names_flags_and_patterns_say_what_trains(stage, modules, num_adapters):
    cfg = make(**stage)
    assert parts(cfg) == (modules, num_adapters)
    assert resolve_config(yaml.safe_load(dump_config(cfg)), "again") == cfg  # as a run folder holds it


def test_patterns_come_on_top_of_names_and_flags_and_prevention_wins():
    exempt = {"freeze_params": [r"decoder\..*"], "prevent_freeze_params": [r".+\.norm\.weight$", "audio.conv1.bias"]}
    names = trained(make(train=["decoder", "vision"], **exempt))
    assert {name for name in names if name.startswith(("decoder", "audio")) and not is_adapter(name)} == {
        *("decoder.norm.weight", "audio.norm.weight", "audio.conv1.bias")
    }
    assert "vision.position" in names and "decoder.blocks.0.attention.q.lora_up.weight" in names
    assert not any(name.startswith(("vision_projector", "audio_projector")) for name in names)
    flagged = trained(make(freeze_language_model=True, prevent_freeze_params=["decoder.embedding"]))
    assert {name for name in flagged if name.startswith("decoder") and not is_adapter(name)} == {
        "decoder.embedding.weight"
    }


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"train": ["decoder"], "freeze_audio_model": True}, "train and freeze_audio_model both say what trains"),
        ({}, "missing key train"),
        ({"train": ["lora"], "lora": None}, "stage one names lora, which this model does not have"),
        (
            {"train": ["decoder"], "lora": None, "optimizer": {"lr_scale": {"lora": 2.0}}},
            "names lora, which this model",
        ),
        ({"train": ["decoder"], "freeze_params": ["decoder"], "lora": None}, "stage one trains nothing"),
        ({"lora": None, "freeze_params": [".*"]}, "stage one trains nothing"),
        (
            {"train": ["decoder"], "freeze_params": [r"^decoder\.block\..+"]},
            r"freeze_params holds .*matches no parameter; the nearest are .*'decoder.blocks.\*",
        ),
        (
            {"train": ["decoder"], "prevent_freeze_params": ["vision.positions"]},
            r"matches no parameter.*vision.position",
        ),
        ({"train": ["decoder"], "freeze_params": ["decoder.(*"]}, "not a regular expression"),
        ({"train": ["decoder"], "lora": {**LORA, "base": "bf16"}}, "one trains decoder.*model.lora.base=bf16"),
        (
            {"train": ["lora"], "lora": {**LORA, "targets": ["decoder.*.query"]}},
            "'decoder.*.query', which matches no linear",
        ),
        ({"train": ["lora"], "parallel": {"tower_sharding": "replicate"}}, "replicate keeps frozen .* trains vision"),
        (
            {"train": ["lora"], "parallel": {"tensor": 2}, "lora": {**LORA, "dropout": 0.1}},
            "parallel.tensor=2 does not go with model.lora.dropout",
        ),
        (
            {"train": ["lora"], "parallel": {"tensor": 2}, "lora": {**LORA, "dora": True}},
            "parallel.tensor=2 does not go with model.lora.dora",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_a_run(stage, said):
    with pytest.raises(ValueError, match=said) as caught:
        config = make(**stage)
        check_layout(config, 2)
        check_data(config)
    assert "\n" not in str(caught.value)


def test_projectors_train_beside_adapters_and_nothing_else_has_gradient_or_state():
    """A frozen tower with adapters builds a graph; one without does not, and its projector still trains."""
    cfg = make(freeze_language_model=True, freeze_vision_model=True, freeze_audio_model=True)
    model = AVLM(cfg.model)
    init(model)
    assert freezing.freeze(model, cfg.stages[0]) == ["vision_projector", "audio_projector", "lora"]
    adam = optimizer.build(model, cfg.stages[0].optimizer)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer.schedule(adam, dataclasses.replace(cfg.stages[0].optimizer, warmup_steps=1), 1, 10)
    for _ in range(2):  # the first moves B alone: A has no part in the loss while B is zero
        model(make_rows(cfg, ["both"])[0])[0].backward()
        for name, parameter in model.named_parameters():
            free = "projector" in name or is_adapter(name)
            assert (parameter.grad is not None) == free == (parameter in adam.state), name
        adam.step()
        adam.zero_grad()
    for name, parameter in model.named_parameters():
        assert parameter.equal(before[name]) != ("projector" in name or is_adapter(name)), name


def test_adapters_decay_and_have_a_learning_rate_of_their_own():
    for scale, of_decoder, of_vision in (({"lora": 4.0, "vision": 0.5}, 4, 4), ({"vision": 0.5}, 1, 0.5)):
        cfg = make(train=["lora", "vision_projector"], optimizer={"lr_scale": scale, "weight_decay": 0.2})
        model = AVLM(cfg.model)
        freezing.freeze(model, cfg.stages[0])
        adam = optimizer.build(model, cfg.stages[0].optimizer)
        optimizer.schedule(adam, cfg.stages[0].optimizer, 3, 4)
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = {names[parameter]: group for group in adam.param_groups for parameter in group["params"]}
        rate = groups["vision_projector.up.weight"]["lr"]
        assert groups["decoder.blocks.0.attention.q.lora_up.weight"]["lr"] == pytest.approx(of_decoder * rate)
        assert groups["vision.blocks.0.up.lora_down.weight"]["lr"] == pytest.approx(of_vision * rate)
        assert groups["vision.blocks.0.up.lora_down.weight"]["weight_decay"] == 0.2


def test_the_estimate_counts_adapters_and_halves_a_bf16_base():
    estimate = lambda cfg: memory.estimate(cfg, cfg.stages[0], 1, parameter_shapes(cfg.model)).device
    full, lora = estimate(make(lora=None, train=["decoder"])), estimate(make(train=["lora"]))
    half = estimate(make(train=["lora"], lora={**LORA, "base": "bf16"}))
    assert lora["gradients"] < 0.1 * full["gradients"] and lora["optimizer state"] == 2 * lora["gradients"]
    model = AVLM(make(train=["lora"]).model)
    adapters = sum(p.numel() for name, p in model.named_parameters() if is_adapter(name))
    assert lora["gradients"] == 4 * adapters
    without = (model.audio, model.vision_projector, model.audio_projector)
    kept = 4 * (adapters + sum(p.numel() for module in without for p in module.parameters()))
    assert half["parameters"] == (lora["parameters"] - kept) / 2 + kept

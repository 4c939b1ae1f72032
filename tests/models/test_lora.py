"""Adapters: the formula, what they are put on, how they start, what is dropped, and what PEFT makes of them."""

import dataclasses

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from avlm.config.load import resolve_config
from avlm.models.avlm import AVLM
from avlm.models.initial import init
from avlm.models.lora import LowRankLinear, is_adapter
from avlm.parallel.recompute import apply_recompute
from avlm.storage.model_folder import Lazy
from avlm.weights.export import export, merged
from avlm.weights.folder import read_config
from avlm.weights.load import init_weights, load_weights
from avlm.weights.peft import Base
from tests.models.handmade import assert_gradients_close, build, loaded, make_batch
from tests.parallel.small import TREE, make_rows

EVERYWHERE = ["decoder.*.q", "decoder.*.down", "vision.*.attention.?", "audio.*.up"]
KINDS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}


def make(lora, **decoder):
    model = {**TREE["model"], "decoder": {**TREE["model"]["decoder"], **decoder}, "lora": lora}
    return resolve_config({**TREE, "model": model}, "test")


def only_adapters_train(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def gradients_of(model, loss):
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, trained.values())))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_model_begins_as_its_base(kind):
    cfg = make({"rank": 3, "targets": EVERYWHERE, **KINDS[kind]})
    plain, model = AVLM(dataclasses.replace(cfg.model, lora=None)), AVLM(cfg.model)
    init(plain, 4)
    init(model, 4)
    [row] = make_rows(cfg, ["both"])
    torch.testing.assert_close(model(row)[0], plain(row)[0])
    spread = torch.cat([p.flatten() * (3 * p.shape[1]) ** 0.5 for n, p in model.named_parameters() if "lora_down" in n])
    assert spread.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_merged_weights(kind):
    """An independent path: the plain model at W + s * B @ A, and the chain rule through that sum."""
    cfg = make({"rank": 4, "alpha": 6.0, "targets": EVERYWHERE, **KINDS[kind]})
    model, plain = build(cfg.model), AVLM(dataclasses.replace(cfg.model, lora=None))
    only_adapters_train(model)
    [row] = make_rows(cfg, ["both"])
    weights = {name: p for name, p in model.named_parameters() if not is_adapter(name)}
    scale = 6 / 4**0.5 if kind == "rslora" else 6 / 4
    for path, linear in model.named_modules():
        if isinstance(linear, LowRankLinear):
            weight = linear.weight + scale * linear.lora_up.weight @ linear.lora_down.weight
            if kind == "dora":
                weight = weight * (linear.lora_magnitude / weight.norm(dim=1).detach())[:, None]
            weights[f"{path}.weight"] = weight
    loss, expected = model(row)[0], torch.func.functional_call(plain, weights, (row,))[0]
    torch.testing.assert_close(loss, expected)
    found = gradients_of(model, loss)
    assert_gradients_close(found, gradients_of(model, expected))
    assert len(found) == (3 if kind == "dora" else 2) * (2 * 2 + 2 * 4 + 1)

    plain.load_state_dict(read_merged(model.state_dict(), cfg.model.lora))
    torch.testing.assert_close(plain(row)[0], loss)


def read_merged(state, lora, dtype=None):
    stored = {name: Lazy.of(tensor) for name, tensor in state.items()}
    return {name: tensor.read() for name, tensor in merged(stored, lora, dtype).items()}


def test_merging_is_exact_in_float32_and_then_rounded():
    cfg = make({"rank": 4, "targets": ["*.q"]})
    state = build(cfg.model).to(torch.bfloat16).state_dict()
    path = "vision.blocks.1.attention.q"
    base, down, up = (state[f"{path}{name}.weight"].float() for name in ("", ".lora_down", ".lora_up"))
    for dtype in (torch.float32, torch.bfloat16):
        found = read_merged(state, cfg.model.lora, dtype)
        assert found[f"{path}.weight"].equal((base + 32 / 4 * (up @ down)).to(dtype))
        assert found["vision.blocks.1.up.weight"].equal(state["vision.blocks.1.up.weight"])
        assert not any(is_adapter(name) for name in found)


def test_a_target_that_names_nothing_is_refused_with_the_nearest_names():
    for target, near in (
        ("decoder.*.q_proj", "decoder.blocks.*.attention.q"),
        ("audio.blocks.*.gate", "audio.blocks.*"),
    ):
        with pytest.raises(ValueError, match="matches no linear") as caught:
            AVLM(make({"targets": ["decoder.*.q", target]}).model)
        assert f"targets names {target!r}" in str(caught.value) and near in str(caught.value)
    with pytest.raises(ValueError, match="matches no linear"):  # their layers are fused, and they train whole
        AVLM(make({"targets": ["vision_projector.*"]}).model)


def test_a_whole_model_loads_strictly_into_one_with_adapters(tmp_path):
    cfg = make({"targets": EVERYWHERE})
    plain = build(dataclasses.replace(cfg.model, lora=None))
    export(plain.config, plain.state_dict(), tmp_path / "base")
    model = loaded(cfg.model, all=tmp_path / "base")
    for name, parameter in model.named_parameters():
        assert parameter.isnan().all() if is_adapter(name) else parameter.equal(plain.get_parameter(name)), name
    dora = AVLM(make({"targets": EVERYWHERE, "dora": True}).model)
    [report] = init_weights(dora, dataclasses.replace(cfg.init_from, all=str(tmp_path / "base")), seed=1)
    assert len(report.names) == len(list(plain.parameters()))
    linear = dora.decoder.blocks[1].attention.q
    torch.testing.assert_close(linear.lora_magnitude, plain.decoder.blocks[1].attention.q.weight.norm(dim=1))


def test_every_other_format_is_written_with_the_adapters_merged(tmp_path):
    cfg = make({"rank": 4, "targets": EVERYWHERE, "dora": True})
    model = build(cfg.model)
    export(cfg.model, model.state_dict(), tmp_path / "avlm")
    assert read_config(tmp_path / "avlm") == dataclasses.replace(cfg.model, lora=None)
    assert "lora" not in "".join(load_file(tmp_path / "avlm" / "model.safetensors"))
    [row] = make_rows(cfg, ["both"])
    torch.testing.assert_close(loaded(read_config(tmp_path / "avlm"), all=tmp_path / "avlm")(row)[0], model(row)[0])
    again = AVLM(cfg.model)
    load_weights(again, dataclasses.replace(cfg.init_from, all=str(tmp_path / "avlm")))  # to go on with adapters anew


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_our_adapters_onto_the_decoder_of_transformers(kind, tmp_path):
    targets = ["decoder.blocks.1.attention.q", "decoder.*.v"] if kind == "rslora" else ["decoder.*"]
    cfg = make({"rank": 4, "alpha": 6.0, "targets": targets, **KINDS[kind]}, vocab_size=61)
    model = build(cfg.model)
    plain = {name: tensor for name, tensor in model.state_dict().items() if not is_adapter(name)}
    export(dataclasses.replace(cfg.model, lora=None), plain, tmp_path / "base", "decoder")
    export(cfg.model, model.state_dict(), tmp_path / "adapter", "adapter", base=Base(name=str(tmp_path / "base")))
    export(cfg.model, model.state_dict(), tmp_path / "merged", "decoder")

    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    document = torch.randint(61, (40,)).tolist()
    batch = make_batch(cfg.model, [document])
    with torch.no_grad():
        x_TD = model.hidden(batch)
        ours = model.decoder.head(model.decoder.norm(x_TD), None)
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        for other in (theirs, merged):
            torch.testing.assert_close(other(torch.tensor([document])).logits[0], ours, atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")  # the very names and numbers that PEFT itself writes
    written = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("theirs", "adapter")]
    assert written[0].keys() == written[1].keys()
    assert all(tensor.equal(written[1][name]) for name, tensor in written[0].items())
    with pytest.raises(ValueError, match="is not empty"):
        export(cfg.model, model.state_dict(), tmp_path / "adapter", "adapter")


def test_the_adapter_format_wants_adapters_of_the_decoder(tmp_path):
    for lora in (None, {"targets": ["vision.*.up"]}):
        model = build(make(lora).model)
        with pytest.raises(ValueError, match="holds adapters onto decoder, and the model has none"):
            export(model.config, model.state_dict(), tmp_path / "out", "adapter")
    assert not (tmp_path / "out").exists()


def test_inputs_are_dropped_where_a_graph_is_built_and_nowhere_else():
    cfg = make({"rank": 4, "targets": EVERYWHERE, "dropout": 0.5})
    model, whole = build(cfg.model), AVLM(make({"rank": 4, "targets": EVERYWHERE}).model)
    whole.load_state_dict(model.state_dict())
    [row] = make_rows(cfg, ["both"])
    with torch.no_grad():
        assert model(row)[0].equal(whole(row)[0])  # validation and generation
    losses = torch.stack([model(row)[0] for _ in range(20)])
    assert losses.std() > 0
    linear, x_TI = model.decoder.blocks[0].attention.q, torch.ones(4000, 32)
    kept = (linear(x_TI) - torch.nn.functional.linear(x_TI, linear.weight)).mean(0)
    undropped = linear.lora_up(linear.lora_down(x_TI) * linear.scale).mean(0)
    assert (kept - undropped).norm() < 0.1 * undropped.norm()  # its mean is that of what is not dropped


@pytest.mark.parametrize(
    ("mode", "compiled"),
    [("selective", False), ("selective", True), ("full", False), pytest.param("full", True, marks=pytest.mark.slow)],
)
def test_what_is_computed_again_drops_the_same_inputs(mode, compiled):
    cfg = make({"rank": 4, "targets": ["decoder.*"], "dropout": 0.5}, num_layers=1)
    model = build(cfg.model)
    only_adapters_train(model)
    [row] = make_rows(cfg, ["text"])
    recompute = dataclasses.replace(cfg.train.recompute, decoder=mode)
    apply_recompute(model, dataclasses.replace(cfg.train, compile=compiled, recompute=recompute))

    torch.manual_seed(3)
    found = gradients_of(model, model(row)[0])
    length = torch.stack([g.norm() for g in found.values()]).norm()
    direction = {name: g / length for name, g in found.items()}
    if compiled:  # by the slope of the loss: a compiled graph draws numbers of its own
        slope = (shifted(model, row, direction, 1e-2) - shifted(model, row, direction, -1e-2)) / 2e-2
        assert slope == pytest.approx(length.item(), rel=2e-2)
        return
    plain = AVLM(cfg.model)
    plain.load_state_dict(model.state_dict())
    only_adapters_train(plain)
    torch.manual_seed(3)
    assert_gradients_close(found, gradients_of(plain, plain(row)[0]))


def shifted(model, row, direction, step):
    """The loss ``step`` along ``direction``, with the random numbers of seed 3."""
    with torch.no_grad():
        for name, vector in direction.items():
            model.get_parameter(name).add_(vector, alpha=step)
    torch.manual_seed(3)
    loss = model(row)[0].item()
    with torch.no_grad():
        for name, vector in direction.items():
            model.get_parameter(name).sub_(vector, alpha=step)
    return loss

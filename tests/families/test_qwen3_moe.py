"""Qwen3-MoE and Qwen2-MoE against transformers: keys, tensors in each of their forms, logits, gradients, answers, and
exports."""

import dataclasses
import json
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from avlm.config.model import LoraConfig, ModelConfig
from avlm.config.run import InitFrom
from avlm.data.sample import EncodedSample
from avlm.evaluation.generation import generate
from avlm.families import llama
from avlm.models.avlm import AVLM
from avlm.models.batch import IGNORE
from avlm.models.shapes import parameter_shapes
from avlm.storage import model_folder
from avlm.weights import experts
from avlm.weights.export import export
from avlm.weights.folder import read_config
from avlm.weights.load import load_weights
from avlm.weights.peft import Base
from avlm.weights.plan import load_plans
from avlm.weights.sources import Whole
from tests.families.measured import all_gradients_close, close, note
from tests.models.handmade import adapted, loaded, make_batch, save

SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
    **{"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
CONFIGS = {
    "qwen3_moe": (transformers.Qwen3MoeConfig, {"head_dim": 12, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3_moe of every second layer": (transformers.Qwen3MoeConfig, {"decoder_sparse_step": 2}),
    "qwen2_moe": (transformers.Qwen2MoeConfig, {"shared_expert_intermediate_size": 40}),
}
TEXT = [3, 9, 12, 40, 5, 22, 8, 13]


def config_of(name: str) -> transformers.PretrainedConfig:
    kind, keys = CONFIGS[name]
    return kind(**SIZES, **keys)


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, tmp_path_factory):
    """(transformers' model, folder, our config)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    theirs = transformers.AutoModelForCausalLM.from_config(config_of(request.param))
    save(theirs, folder)
    return theirs, folder, ModelConfig(decoder=read_config(folder))


def logits_of(model: AVLM, text: list[int]) -> Tensor:
    hidden_TD = model.hidden(make_batch(model.config, [text]))
    return model.decoder.head(model.decoder.norm(hidden_TD), None)


# 1. Keys


def test_experts_are_read_in_both_dialects_and_come_back():
    for name, (kind, _) in CONFIGS.items():
        newer = config_of(name).to_dict()
        older = {key: value for key, value in newer.items() if key != "num_local_experts"} | {"num_experts": 6}
        assert name == "qwen2_moe" or newer["num_local_experts"] == 6
        config = llama.read(older)
        assert config.experts is not None and config.experts.num == 6 and llama.read(newer) == config
        written = llama.write(config)
        assert llama.read(written) == config
        again = kind(**written)  # what transformers reads in what we write
        assert llama.read(again.to_dict()) == config and again.num_experts == 6
        assert written["architectures"] == [f"{kind.__name__.removesuffix('Config')}ForCausalLM"]


def test_the_layers_with_experts_are_those_of_transformers():
    kind, keys = CONFIGS["qwen3_moe"]
    for extra, dense in (({}, [1]), ({"decoder_sparse_step": 2}, [0, 1, 2]), ({"decoder_sparse_step": 3}, [0, 1])):
        config = kind(**SIZES, **{**keys, **extra})
        found = llama.read(config.to_dict())
        layers = transformers.AutoModelForCausalLM.from_config(config).model.layers
        theirs = [i for i, layer in enumerate(layers) if not hasattr(layer.mlp, "experts")]
        assert theirs == dense == [i for i in range(3) if not found.has_experts(i)]
    assert llama.read({**SIZES, "model_type": "qwen3_moe", "mlp_only_layers": [0, 1, 2]}).experts is None


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
def test_absent_keys_have_the_defaults_of_their_class(name):
    defaults = CONFIGS[name][0]().to_dict()
    found = llama.read({"model_type": name})
    expected = llama.read(defaults)
    assert dataclasses.replace(found, rope_theta=2.0) == dataclasses.replace(expected, rope_theta=2.0)


def test_keys_that_we_compute_otherwise_are_refused():
    keys = {**SIZES, "model_type": "qwen3_moe"}
    for changes, message in (
        ({"num_local_experts": 8}, "num_experts=6 is not num_local_experts=8"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not implemented"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0 is not a number of layers"),
        ({"model_type": "qwen3"}, "num_experts=6 is not implemented"),
        ({"model_type": "qwen2_moe", "qkv_bias": False}, "qkv_bias=False is not implemented"),
    ):
        with pytest.raises(ValueError, match=message):
            llama.read({**keys, **changes})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts", 1),
        ("num_experts", -1),
        ("num_experts_per_tok", 0),
        ("num_experts_per_tok", 7),
        ("norm_topk_prob", None),
        ("moe_intermediate_size", 0),
        ("shared_expert_intermediate_size", -8),
    ],
)
def test_a_bad_value_is_refused_with_the_key_that_the_file_has(key, value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, "model_type": "qwen2_moe", key: value}))
    with pytest.raises(ValueError, match=rf"config\.json: {key}\W.*{value}\b") as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_experts_that_no_architecture_has_are_not_exported():
    config = llama.read({**SIZES, "model_type": "qwen3_moe"})
    for changes, message in (
        ({"qk_norm": False}, "have qk_norm without experts.shared_size"),
        ({"experts": dataclasses.replace(config.experts, shared_size=8)}, "have qk_norm without experts.shared_size"),
        ({"sliding_window": 8}, "no sliding_window"),
    ):
        with pytest.raises(ValueError, match=message):
            llama.write(dataclasses.replace(config, **changes))


# 2. Numbers


@torch.no_grad()
def test_logits_equal_those_of_transformers(case):
    theirs, folder, config = case
    ours = loaded(config, decoder=folder)
    close(logits_of(ours, TEXT), theirs(input_ids=torch.tensor([TEXT])).logits[0], "decoder logits")


def test_gradients_of_the_loss_equal_those_of_transformers(case):
    theirs, folder, config = case
    ours = loaded(config, decoder=folder)
    batch = make_batch(config, [TEXT])
    ours(batch)[0].backward()
    logits = theirs(input_ids=torch.tensor([TEXT])).logits[0]
    cross_entropy(logits[batch.target_rows_R], batch.target_R, reduction="sum").backward()
    all_gradients_close(ours, theirs, "decoder")
    theirs.zero_grad()


def test_greedy_answers_equal_those_of_transformers_token_for_token(case):
    theirs, folder, config = case
    ours = loaded(config, decoder=folder)
    samples = []
    for name, ids in (("a", TEXT), ("b", TEXT[2:5])):
        text_T = torch.tensor(ids)
        samples.append(EncodedSample(name, "text", text_T, torch.full_like(text_T, IGNORE)))
    for answer, sample in zip(generate(ours, samples, stop_ids=[], max_new_tokens=12), samples, strict=True):
        ids = sample.token_T[None]
        out = theirs.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
        assert answer.token_ids == out[0, ids.shape[1] :].tolist()
    note("decoder answers")


# 3. Tensors in and out


@pytest.mark.parametrize("targets", [[], ["decoder.*.attention.q"]], ids=["plain", "with adapters"])
@torch.no_grad()
def test_an_export_is_read_back_by_transformers_with_equal_logits(case, targets, tmp_path, monkeypatch):
    """In files so small that the experts of a layer lie in several."""
    _, folder, config = case
    monkeypatch.setattr(model_folder, "SHARD_BYTES", 20_000)
    ours = AVLM(config)
    if targets:
        ours = adapted(config, folder, targets, "decoder")
    else:
        ours = loaded(config, decoder=folder)
    export(ours.config, ours.state_dict(), tmp_path / "out", "decoder")
    back, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    close(logits_of(ours, TEXT), back(input_ids=torch.tensor([TEXT])).logits[0], "decoder export")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == load_file(folder / "model.safetensors").keys() and len(set(index.values())) >= 8
    assert read_config(tmp_path / "out") == config.decoder


def of_all(theirs, is_turned: bool) -> dict[str, Tensor]:
    """The tensors of a model in memory, those of all experts turned or not."""
    state = {}
    for name, tensor in theirs.state_dict().items():
        state[name] = tensor.mT.contiguous() if is_turned and ".experts." in name else tensor.clone()
    return state


@pytest.mark.parametrize("is_turned", [False, True])
def test_tensors_of_all_experts_load_as_those_of_each(case, is_turned, tmp_path):
    theirs, folder, config = case
    state = of_all(theirs, is_turned)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(state, tmp_path / "model.safetensors")
    one, other, file = AVLM(config), AVLM(config), AVLM(config)
    load_weights(one, InitFrom(decoder=str(folder)))
    [report] = load_weights(other, InitFrom(decoder=str(tmp_path)))
    assert report.loaded == report.total == len(state) and not report.skipped
    torch.save(state, tmp_path / "weights.pt")  # without a config the names tell the family
    load_weights(file, InitFrom(all=str(tmp_path / "weights.pt")))
    for a, b, c in zip(one.parameters(), other.parameters(), file.parameters()):
        assert a.equal(b) and a.equal(c)


def test_the_report_counts_every_tensor_of_an_expert(case):
    _, folder, config = case
    [report] = load_weights(AVLM(config), InitFrom(decoder=str(folder)))
    assert report.loaded == report.total == len(load_file(folder / "model.safetensors"))
    assert len(report.names) < report.total


def test_any_part_of_the_experts_is_read_alone(case, tmp_path):
    """As ranks read that hold some experts, some lines of each, or both."""
    theirs, folder, config = case
    whole = dict(loaded(config, decoder=folder).named_parameters())
    for name, state in (("each", None), ("all", of_all(theirs, False)), ("turned", of_all(theirs, True))):
        source = folder
        if state is not None:
            source = tmp_path / name
            source.mkdir()
            (source / "config.json").write_text((folder / "config.json").read_text())
            save_file(state, source / "model.safetensors")
        [plan] = load_plans(config, parameter_shapes(config), InitFrom(decoder=str(source)))
        for parameter, chosen in plan.chosen.items():
            if ".experts." not in parameter:
                continue
            for cut in ((slice(2, 5),), (slice(0, 6), slice(3, 11)), (slice(4, 6), slice(9, 20), slice(1, 7))):
                assert chosen.tensor[cut].equal(whole[parameter][cut]), (name, parameter, cut)


def edited(folder, target, change):
    """A copy of a folder with other tensors."""
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, target / "model.safetensors")
    return target


def test_experts_that_are_missing_wrong_or_too_many_are_named(case, tmp_path):
    _, folder, config = case
    name = next(key for key in load_file(folder / "model.safetensors") if ".experts.3.up_proj" in key)
    extra = name.replace(".3.", ".6.")

    def refused(said, change):
        broken = edited(folder, tmp_path / str(len(said)), change)
        with pytest.raises(ValueError, match=said) as error:
            load_weights(AVLM(config), InitFrom(decoder=str(broken)))
        assert "\n" not in str(error.value)

    refused(f"has no tensor {name}, and the decoder has 6 experts", lambda state: state.pop(name))
    cut = lambda state: state.update({name: state[name][1:].clone()})
    refused(f"{name} has shape .23, 32., and an expert of the decoder .24, 32.", cut)
    refused(f"no place for: {extra}", lambda state: state.update({extra: state[name].clone()}))
    layer = name.split("experts")[0]
    whole = lambda state: [state.pop(key) for key in list(state) if key.startswith(f"{layer}experts.")]
    refused(f"has no tensor {layer}experts.0.gate_proj.weight for decoder.blocks", whole)
    refused(f"{name} has dtype I8: quantised", lambda state: state.update({name: state[name].to(torch.int8)}))


def views(hidden: int, inner: int, is_turned: bool, left_out: str = "") -> tuple:
    """A view of each parameter of two experts that lie in tensors of all, and what it should be."""
    gate, up, down = torch.randn(2, inner, hidden), torch.randn(2, inner, hidden), torch.randn(2, hidden, inner)
    held = {"gate_up_proj": torch.cat([gate, up], 1), "down_proj": down}
    if is_turned:
        held = {key: tensor.mT for key, tensor in held.items()}
    held = {f"mlp.experts.{key}": Whole(tensor) for key, tensor in held.items() if key != left_out}
    found = []
    for leaf, tensor in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        if left_out.startswith(leaf[:2]):
            continue
        view = experts.find("ours", f"mlp.experts.{{e}}.{leaf}.weight", tuple(tensor.shape), held, "folder")
        found.append((view[1][:], tensor))
    return tuple(found)


@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize(("hidden", "inner"), [(8, 4), (8, 8), (8, 6)], ids=["square gate_up", "square down", "none"])
def test_the_way_in_which_experts_lie_is_told_by_both_tensors(hidden, inner, is_turned):
    for view, tensor in views(hidden, inner, is_turned):
        assert view.equal(tensor)


def test_experts_that_could_lie_either_way_are_refused():
    with pytest.raises(ValueError, match=r"gate_up_proj \(2, 8, 8\), which could lie either way"):
        views(8, 4, False, left_out="down_proj")
    gate_up, down = Whole(torch.randn(2, 12, 8)), Whole(torch.randn(2, 6, 8))
    held = {"mlp.experts.gate_up_proj": gate_up, "mlp.experts.down_proj": down}
    with pytest.raises(ValueError, match="do not lie the same way: save it with a tensor for each expert"):
        experts.find("ours", "mlp.experts.{e}.gate_proj.weight", (2, 6, 8), held, "folder")
    with pytest.raises(ValueError, match=r"has shape \(2, 12, 8\), and the decoder needs \(2, 14, 8\) or \(2, 8, 14\)"):
        experts.find("ours", "mlp.experts.{e}.gate_proj.weight", (2, 7, 8), held, "folder")


def test_ranks_that_share_an_export_write_what_one_would(case, tmp_path, monkeypatch):
    """The experts of a tensor lie in files of both ranks."""
    _, folder, config = case
    monkeypatch.setattr(model_folder, "SHARD_BYTES", 20_000)
    tensors = export(config, loaded(config, decoder=folder).state_dict(), tmp_path / "one", "decoder")
    (tmp_path / "two").mkdir()
    for rank in (1, 0):
        model_folder.write_tensors(tensors, tmp_path / "two", SimpleNamespace(rank=rank, size=2))
    files = sorted(path.name for path in (tmp_path / "one").glob("*.safetensors"))
    assert len(files) >= 8
    for name in files:
        one, two = (load_file(tmp_path / each / name) for each in ("one", "two"))
        assert one.keys() == two.keys() and all(one[key].equal(two[key]) for key in one)


def test_a_tensor_is_read_once_for_all_its_experts():
    reads = []
    tensors = [torch.randn(3, 2, 2), torch.randn(3, 2, 2)]
    lazy = []
    for number, tensor in enumerate(tensors):
        lazy.append(model_folder.Lazy((3, 2, 2), tensor.dtype, lambda i=number: reads.append(i) or tensors[i]))
    last = experts.LastRead()
    parts = [experts.of_each("experts.{e}.up_proj.weight", each, last) for each in lazy]
    for found, tensor in zip(parts, tensors):
        for number, part in enumerate(found.values()):
            assert part.read().equal(tensor[number])
    assert reads == [0, 1]


def test_adapters_on_experts_are_refused_with_what_to_name_instead():
    """Those of the default, too, where every layer has experts."""
    decoder = llama.read({**SIZES, "model_type": "qwen3_moe"})
    said = r"names 'decoder\.\*\.gate', which matches decoder\.blocks\.\*\.ffn\.experts\.gate: .*decoder\.\*\.o\]$"
    with pytest.raises(ValueError, match=said):
        AVLM(ModelConfig(decoder=decoder, lora=LoraConfig()))


def test_adapters_of_a_dense_layer_beside_experts_are_refused_in_a_folder_for_peft(tmp_path):
    """PEFT 0.21 takes their names for those of experts."""
    decoder = llama.read({**SIZES, "model_type": "qwen3_moe", "mlp_only_layers": [1]})
    lora = LoraConfig(rank=4, targets=["decoder.*.q", "decoder.blocks.1.ffn.up"])
    ours = AVLM(ModelConfig(decoder=decoder, lora=lora))
    with pytest.raises(ValueError, match=r"decoder\.blocks\.1\.ffn\.up\.lora_\w+.*: beside experts PEFT reads"):
        export(ours.config, ours.state_dict(), tmp_path / "out", "adapter", base=Base("decoder", "base"))


@torch.no_grad()
def test_adapters_on_attention_go_to_peft_and_back(tmp_path):
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config_of("qwen3_moe"))
    save(theirs, tmp_path / "base")
    config = ModelConfig(decoder=read_config(tmp_path / "base"))
    ours = adapted(config, tmp_path / "base", ["decoder.*.attention.*"], "decoder")
    export(ours.config, ours.state_dict(), tmp_path / "out", "adapter", base=Base("decoder", str(tmp_path / "base")))
    keys = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert keys["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    both = peft.PeftModel.from_pretrained(theirs, tmp_path / "out")
    close(logits_of(ours, TEXT), both(input_ids=torch.tensor([TEXT])).logits[0], "decoder adapters")
    again = AVLM(ours.config)
    load_weights(again, InitFrom(decoder=str(tmp_path / "base"), adapter=str(tmp_path / "out")))
    assert all(a.equal(b) for a, b in zip(again.parameters(), ours.parameters()))


def test_a_decoder_of_experts_has_published_sizes():
    """Qwen3-30B-A3B has by its model card 30.5 B parameters, 29.9 B without embeddings, and 3.3 B for a token."""
    published = {
        **{"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48},
        **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128},
        **{"num_experts_per_tok": 8, "moe_intermediate_size": 768, "model_type": "qwen3_moe"},
    }
    config = ModelConfig(decoder=llama.read(published))
    sizes = {name: torch.Size(shape).numel() for name, shape in parameter_shapes(config).items()}
    total = sum(sizes.values())
    of_experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert round(total / 1e9, 1) == 30.5 and round((total - 2 * 151936 * 2048) / 1e9, 1) == 29.9
    assert 3.3e9 < total - of_experts * (128 - 8) / 128 < 3.4e9

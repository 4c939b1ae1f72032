"""Loading of Hugging Face folders: strictness, dialects, refusals, shards."""

import dataclasses
import json
import re

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from avlm.config.model import ModelConfig
from avlm.config.run import InitFrom
from avlm.evaluation.generation import generate
from avlm.families.door import FORMATS
from avlm.models.avlm import AVLM
from avlm.storage.hub import resolve
from avlm.weights.compare import check_config
from avlm.weights.export import export
from avlm.weights.folder import read_config, stop_ids
from avlm.weights.load import init_weights, load_weights
from tests.families import test_mistral3
from tests.families.test_qwen_vl_keys import config_of, keys_of
from tests.models.handmade import build, loaded, save
from tests.models.sharded_load import load_and_answer, text_prompt
from tests.models.test_avlm import WHOLE, llava
from tests.parallel.spawn import run_ranks

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**keys) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **keys))


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    torch.manual_seed(0)
    return save(llama(), tmp_path_factory.mktemp("llama"))


def edit(folder, target, **changes):
    """A copy of a folder's config.json (and nothing else) with keys changed."""
    keys = json.loads((folder / "config.json").read_text())
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(json.dumps(keys | changes))
    return target


def test_both_dialects_of_rope_read_alike(llama_folder, tmp_path):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    new = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
    old = {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}}
    a = read_config(edit(llama_folder, tmp_path / "new", **new))
    b = read_config(edit(llama_folder, tmp_path / "old", **old))
    assert a == b and a.rope_theta == 5e5 and a.rope_scaling.original_max_position == 64


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}, "truncate=False"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}, "rope_parameters": None}, "longrope"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 2}}, "with the keys .*beta_fast"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": 4}, "sliding_window=4 is not implemented for llama"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        ({"model_type": "mistral", "sliding_window": 4, "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"] * 7}, "layer_types"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"model_type": "mixtral"}, "'mixtral' is not supported"),
        ({"model_type": "gemma4_text"}, "'gemma4_text' is not supported"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_not_implemented_is_refused_by_name(changes, named, llama_folder, tmp_path):
    with pytest.raises(ValueError, match=named):
        read_config(edit(llama_folder, tmp_path / "edited", **changes))


def test_windows_that_are_not_in_use_are_no_obstacle(llama_folder, tmp_path):
    qwen = {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 0}
    assert read_config(edit(llama_folder, tmp_path / "a", **qwen)).qkv_bias
    mistral = {"model_type": "mistral", "sliding_window": None}
    assert read_config(edit(llama_folder, tmp_path / "b", **mistral)).num_kv_heads == 2


def test_the_hubs_llava_with_defaults_left_out_is_vicuna_with_a_large_tower(tmp_path):
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "vocab_size": 32000}
    keys = {"model_type": "llava", "image_token_index": 32000, "text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    config = read_config(tmp_path)
    assert (config.decoder.vocab_size, config.decoder.num_layers, config.decoder.hidden_size) == (32064, 32, 4096)
    assert (config.decoder.rope_theta, config.decoder.tie_embedding) == (10_000.0, False)
    assert (config.vision.feature_layer, config.vision.num_layers, config.vision.norm_eps) == (-2, 24, 1e-5)
    refused = {
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": [-2, -5],
        "projector_hidden_act": "relu",
    }
    for key, value in refused.items():
        (tmp_path / "config.json").write_text(json.dumps({**keys, key: value}))
        with pytest.raises(ValueError, match=key):
            read_config(tmp_path)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_an_image_processor_is_read_or_refused_by_name(kind, tmp_path):
    processors = {"clip": transformers.CLIPImageProcessor, "siglip": transformers.SiglipImageProcessor}
    processors[kind]().save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    keys = json.loads(file.read_text())
    keys |= {"size": {"height": 224, "width": 224}} if kind == "siglip" else {}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": f"{kind}_vision_model", "image_size": 224}))
    for resample, name in ((3, "bicubic"), (2, "bilinear")):
        file.write_text(json.dumps(keys | {"resample": resample, "do_pad": None}))
        config = read_config(tmp_path)
        assert (config.resize, config.resample) == ("crop" if kind == "clip" else "stretch", name)
        assert (config.mean, config.std) == (keys["image_mean"], keys["image_std"])
    refused = {"resample": 0, "size": {"height": 256, "width": 256}, "do_normalize": False, "do_rescale": False}
    refused |= {"do_resize": False, "rescale_factor": 1.0, "do_pad": True}
    for key, value in refused.items():
        file.write_text(json.dumps(keys | {key: value}))
        with pytest.raises(ValueError, match=f"{key}=.* in preprocessor_config.json is not implemented"):
            read_config(tmp_path)
    sizes = {"crop": [(224, True), ({"shortest_edge": 224}, True)]}
    sizes |= {"stretch": [(224, False), ({"height": 224, "width": 224}, True), ([224, 224], False)]}
    for resize, given in sizes.items():
        for size, crops in given:
            file.write_text(json.dumps(keys | {"size": size, "do_center_crop": crops, "crop_size": 224}))
            assert read_config(tmp_path).resize == resize
    file.write_text(json.dumps(keys | {"size": {"shortest_edge": 224}, "do_center_crop": False}))
    with pytest.raises(ValueError, match="do_center_crop=False in preprocessor_config"):
        read_config(tmp_path)


def test_a_head_that_is_not_the_embedding_is_not_tied_silently(tmp_path):
    torch.manual_seed(0)
    save(llama(), tmp_path)
    edit(tmp_path, tmp_path, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head.weight differs from the embedding, but tie_embedding"):
        loaded(ModelConfig(decoder=read_config(tmp_path)), decoder=str(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    loaded(ModelConfig(decoder=read_config(tmp_path)), decoder=str(tmp_path))


def test_a_config_that_disagrees_with_the_folder_names_the_key(llama_folder):
    right = read_config(llama_folder)
    check = lambda ours: check_config(ours, right, llama_folder)
    check(right)
    check(dataclasses.replace(right, max_position=512))
    check_config(dataclasses.replace(WHOLE.audio, window="fixed"), WHOLE.audio, "a run")
    for key, value in (("rope_theta", 5e5), ("num_kv_heads", 4), ("tie_embedding", True), ("max_position", 4096)):
        with pytest.raises(ValueError, match=f"model.decoder.{key} is {value}"):
            check(dataclasses.replace(right, **{key: value}))
    with pytest.raises(ValueError, match="not the VisionConfig that is needed"):
        check(WHOLE.vision)
    whole = FORMATS["qwen2_5_vl"].read(keys_of("qwen2_5_vl"), {})
    plain = dataclasses.replace(whole.decoder, mrope_sections=None)
    check_config(plain, whole, "a text decoder of it")
    with pytest.raises(ValueError, match=r"model\.decoder\.mrope_sections is None, and there"):
        check_config(dataclasses.replace(whole, decoder=plain), whole, "a folder")
    check_config(dataclasses.replace(whole.vision, deepstack_layers=[1]), whole, "a tower of it")
    for key, value in (("window", 8), ("full_layers", [0]), ("gated", False)):
        with pytest.raises(ValueError, match=rf"model.vision.{key} is {re.escape(str(value))}"):
            check_config(dataclasses.replace(whole.vision, **{key: value}), whole, "a folder")


def test_a_flag_that_is_a_text_is_not_taken_for_true(llama_folder, tmp_path):
    """bool("false") is True, and a tied head is another model."""
    with pytest.raises(ValueError, match="tie_word_embeddings must be true or false, not 'false'"):
        read_config(edit(llama_folder, tmp_path / "tied", tie_word_embeddings="false"))


def test_stop_ids_come_from_the_generation_config_first(llama_folder, tmp_path):
    folder = edit(llama_folder, tmp_path / "stops", eos_token_id=2)
    assert stop_ids(folder) == [2]
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert stop_ids(folder) == [7, 9]
    assert stop_ids(edit(llama_folder, tmp_path / "none", eos_token_id=None)) == []


def test_a_name_that_is_neither_folder_nor_reachable_is_one_line(monkeypatch):
    with pytest.raises(FileNotFoundError, match="no model folder /nowhere"):
        resolve("/nowhere")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("no route\nx"))
    )
    with pytest.raises(ValueError, match=r"owner/model is not a local folder .*no route") as caught:
        resolve("owner/model")
    assert "\n" not in str(caught.value)


def test_missing_extra_and_misshapen_tensors_are_named(llama_folder, tmp_path):
    state = load_file(llama_folder / "model.safetensors")
    config = ModelConfig(decoder=read_config(llama_folder))
    name = "model.layers.1.mlp.up_proj.weight"
    broken = {
        "missing": {key: value for key, value in state.items() if key != name},
        "extra": state | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)},
        "misshapen": state | {name: torch.zeros(47, 32)},
    }
    said = {
        "missing": rf"no tensor {name} for decoder.blocks.1.ffn.up.weight \(48, 32\)",
        "extra": r"no place for: model.layers.0.self_attn.q_proj.bias \(32,\)",
        "misshapen": rf"{name} has shape \(47, 32\), and decoder.blocks.1.ffn.up.weight has \(48, 32\)",
    }
    for kind, tensors in broken.items():
        folder = edit(llama_folder, tmp_path / kind)
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(ValueError, match=said[kind]):
            loaded(config, decoder=folder)
    (tmp_path / "missing" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="cannot be read"):
        loaded(config, decoder=tmp_path / "missing")


def test_shards_and_pickles_load_like_one_file(llama_folder, tmp_path):
    config = ModelConfig(decoder=read_config(llama_folder))
    one = loaded(config, decoder=llama_folder)
    state = load_file(llama_folder / "model.safetensors")
    model = llama()
    model.load_state_dict(state)
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    pickle = edit(llama_folder, tmp_path / "pickle")
    torch.save(state, pickle / "pytorch_model.bin")
    for folder in (tmp_path / "shards", pickle):
        other = loaded(config, decoder=folder)
        assert all(a.equal(b) for a, b in zip(one.parameters(), other.parameters()))
    torch.save({"model": object()}, pickle / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        loaded(config, decoder=pickle)


def test_the_newer_key_layout_of_llava_and_its_parts_load(tmp_path):
    save(llava(), tmp_path / "old")
    new = edit(tmp_path / "old", tmp_path / "new")
    state = load_file(tmp_path / "old" / "model.safetensors")
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("language_model.lm_head", "lm_head").replace("language_model.model", "model.language_model")
        renamed[f"model.{name}" if name.startswith(("vision", "multi")) else name] = tensor
    save_file(renamed, new / "model.safetensors")
    config = read_config(tmp_path / "old")
    hub = edit(tmp_path / "old", tmp_path / "hub")  # with the prefix that the Hub's files have
    save_file(
        {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in state.items()},
        hub / "model.safetensors",
    )
    one = loaded(config, all=tmp_path / "old")
    for folder in (new, hub):
        assert all(a.equal(b) for a, b in zip(one.parameters(), loaded(config, all=folder).parameters()))
    [report] = load_weights(AVLM(config), InitFrom(vision=str(new)))
    assert report.skipped["other modules"] == 34 and len(report.names) == 2 * 16 + 5
    assert len(report.names) + sum(report.skipped.values()) == report.total
    assert "tensors loaded, skipped" in str(report)


def test_what_no_folder_gives_is_initialised(tmp_path):
    save(llava(), tmp_path)
    config = dataclasses.replace(read_config(tmp_path), audio=WHOLE.audio, audio_projector=WHOLE.audio_projector)
    model = AVLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    [report] = init_weights(model, InitFrom(all=str(tmp_path)), seed=1)
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    assert not any(name.startswith("audio") for name in report.names)


WHOLE_MODELS = {
    "with fused weights": lambda: transformers.Qwen2_5_VLForConditionalGeneration(config_of("qwen2_5_vl")),
    "with columns in another order": lambda: transformers.Mistral3ForConditionalGeneration(
        test_mistral3.config_of("mistral3")
    ),
}


@pytest.mark.parametrize("kind", ["ours", *WHOLE_MODELS])
def test_sharded_ranks_read_their_slices_and_answer_alike(kind, tmp_path):
    """Odd sizes: 61 vocabulary rows and a class token of one row on two ranks, which have different prompts. A third of
    a fused weight is cut among the ranks."""
    if kind == "ours":
        model = build(WHOLE)
        export(WHOLE, model.state_dict(), tmp_path / "model")
    else:
        save(WHOLE_MODELS[kind](), tmp_path / "model")
        model = loaded(read_config(tmp_path / "model"), all=tmp_path / "model")
    prompts = [[1, 2, 3], [4] * 9, [7, 6]]
    (whole, first), (_, second) = run_ranks(load_and_answer, 2, model.config, str(tmp_path / "model"), prompts)
    for name, parameter in model.named_parameters():
        assert torch.tensor(whole[name]).equal(parameter), name
    samples = [text_prompt(ids) for ids in prompts]
    answers = generate(model, samples, stop_ids=[], max_new_tokens=6)
    assert first + second == [answer.token_ids for answer in answers]


def test_a_sharded_tower_reads_its_slice_of_a_convolution(tmp_path):
    """The patch convolution and the class token are stored in other shapes; the slice is cut before the reshape."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        save(llava(), tmp_path)
        config = read_config(tmp_path)
        with torch.device("meta"):
            model = AVLM(config)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        model.to_empty(device="cpu")
        load_weights(model, InitFrom(all=str(tmp_path)))
        plain = loaded(config, all=tmp_path)
        for (name, a), b in zip(model.named_parameters(), plain.parameters()):
            assert a.full_tensor().equal(b), name
    finally:
        dist.destroy_process_group()

"""What Qwen3-VL with experts has for itself: tensors of all experts of a layer, whichever way they lie, and keys.

What it shares with the others of its kind is tested with them (test_qwen_vl.py, _keys.py and _prompts.py).
"""

import dataclasses
import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from avlm.config.run import InitFrom
from avlm.families import qwen3_vl, qwen3_vl_moe
from avlm.families.keys import require_same
from avlm.models.avlm import AVLM
from avlm.models.shapes import parameter_shapes
from avlm.weights.export import export
from avlm.weights.folder import read_config
from avlm.weights.load import load_weights
from tests.families.test_qwen_vl_keys import IDS, config_of, keys_of
from tests.models.handmade import loaded, save

PUBLISHED = {  # of the Hub's Qwen3-VL-30B-A3B-Instruct
    "model_type": "qwen3_vl_moe",
    "tie_word_embeddings": False,
    "text_config": {
        **{"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48},
        **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128},
        **{"num_experts_per_tok": 8, "moe_intermediate_size": 768, "max_position_embeddings": 262144},
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    },
    "vision_config": {"out_hidden_size": 2048},
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(transformers' model, folder, our config)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("theirs")
    theirs = transformers.Qwen3VLMoeForConditionalGeneration(config_of("qwen3_vl_moe"))
    save(theirs, folder)
    return theirs, folder, read_config(folder)


@pytest.mark.parametrize("form", ["turned", "as computed", "each"])
def test_experts_load_whichever_way_they_lie(case, form, tmp_path):
    theirs, folder, config = case
    state = {}
    for name, tensor in theirs.state_dict().items():
        if ".experts." not in name:
            state[name] = tensor.clone()
        elif form != "each":
            state[name] = tensor.mT.contiguous() if form == "turned" else tensor.clone()
        else:
            stem, _, leaf = name.rpartition(".")
            parts = (
                dict(zip(("gate_proj", "up_proj"), tensor.chunk(2, 1))) if leaf == "gate_up_proj" else {leaf: tensor}
            )
            for key, part in parts.items():
                state |= {f"{stem}.{number}.{key}.weight": each.clone() for number, each in enumerate(part)}
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(state, tmp_path / "model.safetensors")
    model, expected = AVLM(config), loaded(config, all=folder)
    [report] = load_weights(model, InitFrom(all=str(tmp_path)))
    assert report.loaded == report.total == len(state)
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters()):
        assert parameter.equal(other), name


def test_an_export_lies_as_the_hubs_folders_do(case, tmp_path):
    theirs, folder, config = case
    export(config, loaded(config, all=folder).state_dict(), tmp_path / "out", "qwen3_vl_moe")
    held = load_file(tmp_path / "out" / "model.safetensors")
    seen = 0
    for name, tensor in theirs.state_dict().items():
        if ".experts." in name:
            assert held[name].equal(tensor.mT) and held[name].shape != tensor.shape
            seen += 1
    assert seen == 2 * 2  # two layers have experts


def test_the_weights_of_experts_are_normalised_and_the_head_tied_by_the_top_whatever_else_is_said():
    keys = keys_of("qwen3_vl_moe")
    keys["text_config"] |= {"norm_topk_prob": False, "tie_word_embeddings": True}
    config = qwen3_vl_moe.read(keys, {})
    assert config.decoder.experts.normalize and not config.decoder.tie_embedding
    written = qwen3_vl_moe.config_json(config, IDS)
    assert written["text_config"]["num_experts"] == 6 and written["text_config"]["mlp_only_layers"] == [1]
    older = json.loads(json.dumps(written).replace('num_experts"', 'num_local_experts"'))
    assert qwen3_vl_moe.read(older, {}) == config


def test_a_format_that_holds_no_experts_or_needs_them_names_the_other():
    config = qwen3_vl_moe.read(keys_of("qwen3_vl_moe"), {})
    with pytest.raises(ValueError, match=r"the qwen3_vl format cannot hold decoder\.experts: take qwen3_vl_moe"):
        qwen3_vl.config_json(config, IDS)
    dense = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, experts=None))
    with pytest.raises(ValueError, match=r"the qwen3_vl_moe format needs decoder\.experts: take qwen3_vl"):
        qwen3_vl_moe.config_json(dense, IDS)
    with pytest.raises(ValueError, match="the llava format cannot hold this model: it has 7"):
        require_same("llava", config, _of_7, {}, {})


def _of_7(keys, files):
    raise ValueError("it has 7")


def test_the_hubs_30b_has_as_many_parameters_as_its_page_says():
    """31 B: those of Qwen3-30B-A3B and half a billion in the tower and its projectors."""
    config = qwen3_vl_moe.read(PUBLISHED, {})
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(config).items()}
    decoder = sum(size for name, size in sizes.items() if name.startswith("decoder."))
    assert decoder == 30_532_122_624 and round(sum(sizes.values()) / 1e9, 1) == 31.1

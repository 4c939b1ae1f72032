"""Pixtral, Mistral Small 3 and Ministral 3: config and processor keys, in and out."""

import dataclasses
import json
import math

import pytest
import torch
import transformers

from avlm.config.run import DataConfig
from avlm.config.values import validated
from avlm.families import mistral3, pixtral
from avlm.models.shapes import parameter_shapes
from avlm.weights.folder import media_prompts, read_config
from tests.families.test_mistral3 import CLASSES, CONFIGS, FAMILIES, TOKENS, YARN, keys_of

EDGES = {"pixtral": 1024, "mistral3": 1540, "ministral3": 1540}
MARKED = {"markers": {"image": ["", "[IMG_END]"]}}
HUB_FILES = {
    "preprocessor_config.json": {
        "image_processor_type": "PixtralImageProcessor",
        "size": {"longest_edge": 60},
        "patch_size": {"height": 4, "width": 4},
        "resample": 2,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "rescale_factor": 1 / 255,
    },
    "processor_config.json": {"image_break_token": "[B]", "image_end_token": "[E]", "patch_size": 4},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_our_config_comes_back_from_their_keys_in_both_dialects(name):
    family = FAMILIES[name]
    config = family.read(keys_of(name), {})
    keys, files = family.config_json(config, TOKENS), family.processor_json(config, None)
    assert family.read(keys, files) == config
    theirs = CONFIGS[name](**keys)
    assert theirs.image_token_index == TOKENS["[IMG]"]
    assert theirs.text_config.model_type == keys_of(name)["text_config"]["model_type"]
    assert theirs.text_config.sliding_window is None
    assert family.read(json.loads(theirs.to_json_string(use_diff=False)), files) == config


@pytest.mark.parametrize("name", FAMILIES)
def test_the_older_dialect_is_read_as_the_newer_one(name):
    keys = keys_of(name)
    old = json.loads(json.dumps(keys))
    rope = old["text_config"].pop("rope_parameters")
    old["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if name == "ministral3" else None}
    old["vision_config"] |= {"rope_parameters": None, "rope_theta": 10_000.0, "head_dim": 16}
    assert FAMILIES[name].read(old, {}) == FAMILIES[name].read(keys, {})


@pytest.mark.parametrize("name", ["pixtral", "mistral3"])
def test_absent_keys_have_the_defaults_of_their_classes(name):
    given = {"model_type": "mistral3"}
    if name == "pixtral":
        given = {"vision_feature_select_strategy": "full", "vision_config": {"model_type": "pixtral"}}
        given |= {"model_type": "llava", "text_config": {"model_type": "mistral"}}
    theirs = json.loads(CONFIGS[name](**json.loads(json.dumps(given))).to_json_string(use_diff=False))
    ours, read = FAMILIES[name].read(given, {}), FAMILIES[name].read(theirs, {})
    assert dataclasses.replace(ours, decoder=read.decoder) == read
    assert dataclasses.replace(ours.decoder, rope_theta=read.decoder.rope_theta) == read.decoder


def test_a_ministral_without_rope_parameters_grows_as_its_class_does():
    keys = keys_of("ministral3")
    keys["text_config"] |= {"rope_parameters": None, "max_position_embeddings": 262144}
    decoder = mistral3.read(keys, {}).decoder
    theirs = transformers.Ministral3Config().rope_parameters
    assert decoder.query_growth == theirs["llama_4_scaling_beta"] == 0.1
    assert (decoder.yarn.factor, decoder.rope_theta) == (theirs["factor"], theirs["rope_theta"]) == (16.0, 1e6)
    assert decoder.yarn.original_max_position == 16384 and decoder.yarn.attention_factor == 1.0


@pytest.mark.parametrize("name", ["pixtral", "mistral3"])
def test_a_model_of_the_size_of_the_hubs_has_the_parameters_of_their_class(name):
    """Mistral Small 3.1 is the default of its class."""
    keys = {
        "vision_config": {"model_type": "pixtral"},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    text = {"model_type": "mistral", "hidden_size": 5120, "head_dim": 128, "num_hidden_layers": 40}
    text |= {"vocab_size": 131072, "sliding_window": None}
    given = CONFIGS[name](**{**keys, "text_config": text}) if name == "pixtral" else CONFIGS[name]()
    given.tie_word_embeddings = False
    with torch.device("meta"):
        theirs = CLASSES[name](given)
    config = FAMILIES[name].read(json.loads(given.to_json_string(use_diff=False)), {})
    ours = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    assert ours == sum(parameter.numel() for parameter in theirs.parameters()) > 12e9


@pytest.mark.parametrize(
    ("top", "inside", "tied"),
    [(None, None, False), (True, None, True), (True, False, False), (None, True, True), (False, True, True)],
)
def test_the_inner_key_says_whether_the_head_of_mistral_3_is_tied(top, inside, tied):
    """transformers 5 writes true at the top of Mistral Small, whose head is its own."""
    keys = keys_of("mistral3")
    for part, value in ((keys, top), (keys["text_config"], inside)):
        del part["tie_word_embeddings"]
        part |= {} if value is None else {"tie_word_embeddings": value}
    assert mistral3.read(keys, {}).decoder.tie_embedding == tied


@pytest.mark.parametrize("dialect", ["files of the Hub", "one file"])
@pytest.mark.parametrize("name", FAMILIES)
def test_processors_give_pixels_and_prompts(name, dialect, tmp_path):
    files = json.loads(json.dumps(HUB_FILES))
    if name != "pixtral":
        files["processor_config.json"]["spatial_merge_size"] = 2
    if dialect == "one file":
        files["processor_config.json"]["image_processor"] = files.pop("preprocessor_config.json")
    for file, keys in {**files, "config.json": keys_of(name)}.items():
        (tmp_path / file).write_text(json.dumps(keys))
    vision = read_config(tmp_path).vision
    assert (vision.mean, vision.std, vision.resample) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], "bilinear")
    found = media_prompts(tmp_path)
    assert found["image_layout"] == {"longest_edge": 60, "line_break": "[B]"} and found["markers"]["image"] == [
        "",
        "[E]",
    ]
    data = validated(DataConfig, {"train": "x", **found}, "data")
    again = FAMILIES[name].processor_json(read_config(tmp_path), data)
    assert FAMILIES[name].prompts(read_config(tmp_path), again) == found
    assert FAMILIES[name].prompts(read_config(tmp_path), {}) == {
        "markers": {"image": ["", "[IMG_END]"]},
        "image_layout": {"longest_edge": EDGES[name], "line_break": "[IMG_BREAK]"},
    }


def test_a_layer_counts_from_either_end():
    for theirs, ours in ((-2, -2), (3, -1), (1, -3)):
        assert pixtral.read({**keys_of("pixtral"), "vision_feature_layer": theirs}, {}).vision.feature_layer == ours


@pytest.mark.parametrize(
    ("name", "part", "change", "said"),
    [
        ("pixtral", None, {"vision_feature_select_strategy": "default"}, "strategy='default' is not implemented"),
        ("pixtral", None, {"vision_feature_layer": [-1, -2]}, "features of several layers"),
        ("mistral3", None, {"vision_feature_layer": [-1, -2]}, "features of several layers"),
        ("mistral3", None, {"projector_hidden_act": "relu"}, "projector_hidden_act='relu'"),
        ("mistral3", None, {"quantization_config": {"bits": 8}}, "quantization_config"),
        ("mistral3", "text_config", {"model_type": "gemma"}, "text_config.model_type 'gemma' is not supported"),
        ("pixtral", "text_config", {"model_type": "gemma"}, "text_config.model_type 'gemma' is not supported"),
        ("mistral3", "vision_config", {"model_type": "siglip_vision_model"}, "model_type='siglip_vision_model'"),
        ("mistral3", "vision_config", {"head_dim": 8}, "head_dim=8 is not implemented"),
        ("mistral3", "vision_config", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("pixtral", "vision_config", {"rope_theta": 100.0}, "rope_theta=100.0"),
        ("pixtral", "vision_config", {"rope_parameters": {"rope_type": "axial", "rope_theta": 1.0}}, "rope_parameters"),
        ("ministral3", "text_config", {"rope_parameters": {**YARN, "truncate": False}}, "truncate=False"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(name, part, change, said, tmp_path):
    keys = keys_of(name)
    (keys[part] if part else keys).update(change)
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(ValueError, match=said) as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("preprocessor_config.json", {"size": {"shortest_edge": 60}}, "size=.* in preprocessor_config.json"),
        ("preprocessor_config.json", {"size": {"height": 60, "width": 50}}, "accepted: longest_edge"),
        ("preprocessor_config.json", {"do_center_crop": True}, "do_center_crop=True"),
        ("preprocessor_config.json", {"resample": 1}, "resample=1"),
        ("processor_config.json", {"patch_size": 8}, "patch_size=8 in processor_config.json, and 4 in config.json"),
        ("processor_config.json", {"spatial_merge_size": 3}, "spatial_merge_size=3 in .*, and 1 in config.json"),
    ],
)
def test_processors_that_make_other_images_are_refused(file, change, said, tmp_path):
    files = json.loads(json.dumps({**HUB_FILES, "config.json": keys_of("pixtral")}))
    files[file] |= change
    for name, keys in files.items():
        (tmp_path / name).write_text(json.dumps(keys))
    with pytest.raises(ValueError, match=said):
        read_config(tmp_path)
        media_prompts(tmp_path)


def test_what_the_formats_cannot_hold_is_refused():
    small = mistral3.read(keys_of("mistral3"), {})
    change = lambda part, **fields: dataclasses.replace(
        small, **{part: dataclasses.replace(getattr(small, part), **fields)}
    )
    for config, said in (
        (change("vision_projector", merge=False), "cannot hold vision_projector.merge=False"),
        (change("vision_projector", norm="none"), "vision_projector.norm=none"),
        (change("vision", axial_offset=False), "vision.axial_offset=False"),
        (change("vision", bias=True), "vision.bias=True"),
        (change("decoder", qk_norm=True, query_growth=0.0), None),
    ):
        if said is None:  # their class takes any decoder that it knows
            assert mistral3.config_json(config, TOKENS)["text_config"]["model_type"] == "qwen3"
            continue
        with pytest.raises(ValueError, match=said):
            mistral3.config_json(config, TOKENS)
    with pytest.raises(ValueError, match=r"the pixtral format cannot hold vision_projector\.downsample=2"):
        pixtral.config_json(small, TOKENS)
    for data in ({}, {"markers": {"image": ["", "x"]}}, {**MARKED, "image_layout": {"line_break": ""}}):
        with pytest.raises(ValueError, match=r"puts \[IMG_BREAK\] between lines .* exported as avlm"):
            mistral3.processor_json(small, validated(DataConfig, {"train": "x", **data}, "data"))

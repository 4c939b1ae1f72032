"""Gemma 3 with its tower, PaliGemma and PaliGemma 2: config and processor keys, in and out."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import transformers

from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.config.values import validated
from avlm.families import door, gemma3, paligemma, paligemma2
from avlm.models.shapes import parameter_shapes
from avlm.storage.hub import resolve
from avlm.weights.folder import media_prompts, read_config

HUB = Path(__file__).parents[1] / "config/hub/models--google--gemma-3-4b-it/snapshots/published"
FAMILIES = {family.FORMAT: family for family in (gemma3, paligemma, paligemma2)}
PALIGEMMA = transformers.PaliGemmaConfig
CONFIGS = {"gemma3": transformers.Gemma3Config, "paligemma": PALIGEMMA, "paligemma2": PALIGEMMA}
IDS = {"<image>": 97, "<image_soft_token>": 97, "<start_of_image>": 95, "<end_of_image>": 96}
SIDE = 32  # 8 x 8 patches; of Gemma 3 4 x 4 features, more than its window has
TOWER = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"image_size": SIDE, "patch_size": 4, "layer_norm_eps": 1e-4, "vision_use_head": False}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096, "pad_token_id": 0}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
OLD_KINDS = {"sliding_window_pattern": 2}
GEMMA2 = {"sliding_window": 12, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0}
GEMMA2 |= {"final_logit_softcapping": 1.5, "layer_types": KINDS}
ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
}
OLD_ROPES = {"rope_theta": 1e5, "rope_local_base_freq": 1e4, "rope_scaling": {"type": "linear", "factor": 8.0}}
GEMMA3 = {"sliding_window": 12, "query_pre_attn_scalar": 24, "layer_types": KINDS, "rope_parameters": ROPES}
TEXTS = {
    "gemma3": {"model_type": "gemma3_text", **SIZES, **GEMMA3},
    "paligemma": {"model_type": "gemma", **SIZES},
    "paligemma2": {"model_type": "gemma2", **SIZES, **GEMMA2},
}
PROMPTS = {
    "gemma3": {"markers": gemma3.MARKERS},
    "paligemma": {"template": "paligemma"},
    "paligemma2": {"template": "paligemma"},
}


def config_of(name: str, vocab_size: int = 99, **ids: int) -> transformers.PretrainedConfig:
    """A tiny model of a family."""
    ids = ids or {"image_token_index": 97}
    own = {"mm_tokens_per_image": 16} if name == "gemma3" else {"projection_dim": 32}
    text = {**copy.deepcopy(TEXTS[name]), "vocab_size": vocab_size}
    return CONFIGS[name](text_config=text, vision_config={**TOWER}, **own, **ids)


def keys_of(name: str) -> dict:
    return json.loads(config_of(name).to_json_string(use_diff=False))


def model_of(name: str) -> ModelConfig:
    return FAMILIES[name].read(keys_of(name), {})


def published(name: str, **changes) -> dict[str, dict]:
    """The files of a folder as the Hub has them."""
    of_class = {"gemma3": ("Gemma3ImageProcessor", "Gemma3Processor", 2)}
    images, whole, resample = of_class.get(name, ("SiglipImageProcessor", "PaliGemmaProcessor", 3))
    count = 16 if name == "gemma3" else 64
    pixels = {"do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True}
    pixels |= {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "image_processor_type": images,
        "processor_class": whole,
    }
    pixels |= {"resample": resample, "rescale_factor": 1 / 255, "size": {"height": SIDE, "width": SIDE}}
    pixels |= {"image_seq_length": count}
    if name == "gemma3":
        pixels |= {"do_pan_and_scan": None, "pan_and_scan_max_num_crops": None}
    files = {"config.json": keys_of(name), "preprocessor_config.json": {**pixels, **changes}}
    if name == "gemma3":
        files["processor_config.json"] = {"image_seq_length": count, "processor_class": whole}
    return files


def folder(path, files: dict[str, dict]):
    path.mkdir(exist_ok=True)
    for name, keys in files.items():
        (path / name).write_text(json.dumps(keys))
    return path


def data_of(name: str, **changes) -> DataConfig:
    return validated(DataConfig, {"train": "", **PROMPTS[name], **changes}, "data")


@pytest.mark.parametrize("name", FAMILIES)
def test_our_config_comes_back_from_their_keys_in_both_dialects(name):
    family = FAMILIES[name]
    config = family.read(keys_of(name), published(name))
    keys = {**family.config_json(config, IDS), **door.prompt_keys(family, config, data_of(name))}
    files = family.processor_json(config, data_of(name))
    assert family.read(keys, files) == config and door.family_of(keys) is family
    theirs = CONFIGS[name](**copy.deepcopy(keys))
    assert theirs.image_token_id == 97 and theirs.vision_config.model_type == "siglip_vision_model"
    new = json.loads(theirs.to_json_string(use_diff=False))
    assert family.read(new, files) == config and door.family_of(new) is family
    assert config.decoder.bidirectional == ("images" if name == "gemma3" else "prefix")
    assert config.vision.post_norm and config.vision.resample == ("bilinear" if name == "gemma3" else "bicubic")


def test_the_keys_of_the_published_gemma_3_mean_the_same_as_those_of_today():
    old = {key: value for key, value in TEXTS["gemma3"].items() if key not in ("layer_types", "rope_parameters")}
    keys = {**keys_of("gemma3"), "text_config": {**old, **OLD_ROPES, **OLD_KINDS, "vocab_size": 99}}
    assert gemma3.read(keys, {}) == gemma3.read(keys_of("gemma3"), {})


@pytest.mark.parametrize("name", FAMILIES)
def test_absent_keys_have_the_defaults_of_their_classes(name):
    family = FAMILIES[name]
    model_type = "gemma3" if name == "gemma3" else "paligemma"
    named = {"text_config": {"model_type": "gemma2", "hidden_size": 2048}} if name == "paligemma2" else {}
    if name == "gemma3":  # the class's tower, of 14 x 14 patches, has no 16 x 16 features
        named = {"vision_config": TOWER, "mm_tokens_per_image": 16}
    keys = json.loads(CONFIGS[name](**copy.deepcopy(named)).to_json_string(use_diff=False))
    assert family.read({"model_type": model_type, **named}, {}) == family.read(keys, {})
    text = {**TEXTS[name], "vocab_size": 99}
    for tied in (False, True):  # what the decoder's own keys say does not count
        given = {"tie_word_embeddings": tied, "text_config": {**text, "tie_word_embeddings": not tied}}
        assert family.read({**keys_of(name), **given}, {}).decoder.tie_embedding == tied


# As published: https://huggingface.co/google/gemma-3-4b-it, paligemma-3b-pt-224 and paligemma2-3b-pt-224.
LARGE_TOWER = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27}
LARGE_TOWER |= {"image_size": 896, "patch_size": 14, "vision_use_head": False}
LARGE = {"num_attention_heads": 8, "vocab_size": 257216, "hidden_size": 2048}
LARGEST = {
    "gemma3": (
        {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024},
        LARGE_TOWER,
        4_300_079_472,
    ),
    "paligemma": (
        {**LARGE, "intermediate_size": 16384, "num_hidden_layers": 18, "num_key_value_heads": 1},
        {**LARGE_TOWER, "image_size": 224},
        2_923_466_480,
    ),
    "paligemma2": (
        {**LARGE, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_key_value_heads": 4},
        {**LARGE_TOWER, "image_size": 224},
        3_032_242_416,
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_published_models_have_the_parameters_of_their_classes(name):
    text, tower, expected = LARGEST[name]
    keys = {"text_config": {"model_type": TEXTS[name]["model_type"], **text}, "vision_config": tower}
    keys |= {} if name == "gemma3" else {"projection_dim": text["hidden_size"]}
    config = FAMILIES[name].read(copy.deepcopy(keys), {})
    with torch.device("meta"):
        model = getattr(transformers, FAMILIES[name].CLASS)(CONFIGS[name](**keys))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert sum(math.prod(shape) for shape in parameter_shapes(config).values()) == count == expected


def test_the_published_gemma_3_of_4b_is_read_as_its_class_reads_it():
    """Its files in tests/config/hub; most of its keys are defaults of the class."""
    config = read_config(resolve("google/gemma-3-4b-it", weights=False))
    decoder, vision, projector = config.decoder, config.vision, config.vision_projector
    theirs = transformers.Gemma3Config(**json.loads((HUB / "config.json").read_text())).text_config
    full = [i for i, kind in enumerate(theirs.layer_types) if kind == "full_attention"]
    assert full == [5, 11, 17, 23, 29] == [i for i in range(34) if not decoder.has_window(i)]
    ropes = theirs.rope_parameters
    assert decoder.rope_theta == ropes["full_attention"]["rope_theta"] == 1e6
    assert decoder.rope_stretch == ropes["full_attention"]["factor"] == 8
    assert decoder.window_rope_theta == ropes["sliding_attention"]["rope_theta"] == 1e4
    assert decoder.sliding_window == theirs.sliding_window == 1024 and decoder.score_size is None
    assert decoder.head_dim == theirs.query_pre_attn_scalar == 256 and decoder.tie_embedding
    assert (decoder.vocab_size, decoder.max_position) == (theirs.vocab_size, theirs.max_position_embeddings)
    assert (projector.downsample, gemma3.num_features(config)) == (4, 256)
    assert (vision.resize, vision.resample, vision.mean) == ("stretch", "bilinear", [0.5] * 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": {"height": 64, "width": 64}}, "size=.* in preprocessor_config.json is not implemented"),
        ({"size": {"shortest_edge": 32}}, "size=.* in preprocessor_config.json is not implemented"),
        ({"do_resize": False}, "do_resize=False in preprocessor_config.json is not implemented"),
        ({"image_seq_length": 9}, "image_seq_length=9 in preprocessor_config.json, and .* is (16|64)"),
        ({"rescale_factor": 1}, "rescale_factor=1"),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_processor_that_makes_other_pixels_is_refused(name, change, said, tmp_path):
    with pytest.raises(ValueError, match=said) as error:
        media_prompts(folder(tmp_path / "here", published(name, **change)))
    assert "\n" not in str(error.value)


def test_pan_and_scan_is_refused_by_name(tmp_path):
    files = published("gemma3", do_pan_and_scan=True)
    with pytest.raises(ValueError, match=r"do_pan_and_scan=True in preprocessor_config\.json is not implemented"):
        read_config(folder(tmp_path / "here", files))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            "gemma3",
            {"mm_tokens_per_image": 9},
            "mm_tokens_per_image=9 is not implemented: 8 patches a side make no such",
        ),
        ("gemma3", {"mm_tokens_per_image": 8}, "mm_tokens_per_image=8 is not implemented"),
        ("gemma3", {"mm_tokens_per_image": "all"}, "mm_tokens_per_image must be an integer"),
        ("gemma3", {"text_config": {"model_type": "gemma2"}}, "model_type 'gemma2' is not supported .*gemma3_text"),
        ("paligemma", {"text_config": {"model_type": "llama"}}, "model_type 'llama' is not supported .*gemma, gemma2"),
        ("paligemma", {"projection_dim": 48}, "projection_dim=48 is not text_config.hidden_size=32"),
        (
            "paligemma",
            {"text_config": {**TEXTS["paligemma"], paligemma.BOTH_WAYS: False}},
            f"{paligemma.BOTH_WAYS}=False",
        ),
        ("paligemma2", {"vision_config": {"model_type": "clip_vision_model"}}, "model_type='clip_vision_model' is not"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(name, change, said, tmp_path):
    keys = {**keys_of(name), **change}
    with pytest.raises(ValueError, match=said):
        read_config(folder(tmp_path / "here", {"config.json": keys}))


@pytest.mark.parametrize("name", FAMILIES)
def test_null_is_the_default_of_a_key(name):
    tops = ("text_config", "vision_config", "projection_dim", "mm_tokens_per_image", "quantization_config")
    keys = {"model_type": FAMILIES[name].read.__module__.rpartition(".")[2]}
    keys |= {"text_config": {"model_type": "gemma2", "hidden_size": 2048}} if name == "paligemma2" else {}
    if name == "gemma3":  # that has the features of the default
        keys |= {"vision_config": {**TOWER, "image_size": 224, "patch_size": 14}}
    nulls = {key: None for key in tops if key not in keys}
    assert door.family_of({**keys, **nulls}) is FAMILIES[name]
    assert FAMILIES[name].read({**keys, **nulls}, {}) == FAMILIES[name].read(keys, {})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_processor_is_read_in_both_dialects(name, tmp_path):
    files = published(name, image_mean=[0.4, 0.5, 0.6])
    old = folder(tmp_path / "old", files)
    nested = {**files.get("processor_config.json", {}), "image_processor": files["preprocessor_config.json"]}
    new = folder(tmp_path / "new", {"config.json": files["config.json"], "processor_config.json": nested})
    config = read_config(old)
    assert config == read_config(new) and config.vision.mean == [0.4, 0.5, 0.6]
    assert media_prompts(old) == media_prompts(new) == door.prompts(FAMILIES[name], config, {})


def changed(config: ModelConfig, module: str, **changes) -> ModelConfig:
    return dataclasses.replace(config, **{module: dataclasses.replace(getattr(config, module), **changes)})


@pytest.mark.parametrize(
    ("module", "changes", "said"),
    [
        ("vision", {"post_norm": False}, "cannot hold vision.post_norm=False, only True"),
        ("vision", {"resize": "crop"}, "cannot hold vision.resize=crop, only stretch"),
        ("vision_projector", {"type": "mlp2x_gelu"}, "cannot hold vision_projector.type=mlp2x_gelu, only linear"),
        ("vision_projector", {"norm": "layer"}, "cannot hold vision_projector.norm=layer, only none"),
        ("decoder", {"bidirectional": "none"}, "cannot hold decoder.bidirectional=none, only"),
        ("decoder", {"activation": "silu"}, "cannot hold decoder.activation=silu, only gelu_tanh"),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_format_cannot_hold_is_refused(name, module, changes, said):
    config = changed(FAMILIES[name].read(keys_of(name), {}), module, **changes)
    with pytest.raises(ValueError, match=f"the {name} format {said}"):
        FAMILIES[name].config_json(config, IDS)


def test_each_format_holds_its_own_decoder():
    for name, other in (("paligemma", paligemma2), ("paligemma2", paligemma), ("paligemma2", gemma3)):
        config = FAMILIES[name].read(keys_of(name), {})
        with pytest.raises(ValueError, match=f"the {other.FORMAT} format cannot hold decoder|model_type .* is not sup"):
            other.config_json(config, IDS)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gemma3", {"markers": {}}, r"data.markers=\{\}, only"),
        (
            "gemma3",
            {"image_layout": {"line_break": "<start_of_image>"}},
            "data.image_layout.line_break=<start_of_image>",
        ),
        ("paligemma", {"template": "plain"}, "data.template='plain', only 'paligemma'"),
        ("paligemma2", {"system": "be kind"}, "data.system='be kind', only None"),
        ("paligemma2", {"markers": {"image": ["<image>", ""]}}, "data.markers="),
    ],
)
def test_prompts_that_a_format_cannot_hold_are_refused(name, changes, said):
    family = FAMILIES[name]
    config = family.read(keys_of(name), {})
    with pytest.raises(ValueError, match=f"the {name} format cannot hold {said}"):
        door.prompt_keys(family, config, data_of(name, **changes))
        family.processor_json(config, data_of(name, **changes))

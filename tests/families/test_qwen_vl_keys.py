"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: config and processor keys, in and out."""

import dataclasses
import json
import math

import pytest
import transformers

from avlm.config.media import TIMESTAMP
from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.config.values import validated
from avlm.families import llama, qwen2_5_vl, qwen2_vl, qwen3_vl, qwen3_vl_moe
from avlm.models.shapes import parameter_shapes
from avlm.weights.folder import media_prompts, read_config

FAMILIES = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl, "qwen3_vl_moe": qwen3_vl_moe}
IDS = dict(zip(qwen2_vl.MEDIA_TOKENS, (95, 96, 97, 98)))
TOKENS = {"vision_start_token_id": 95, "image_token_id": 96, "video_token_id": 97, "vision_end_token_id": 98}
TEXT = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
TEXT |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}
SIDES = {"num_heads": 2, "patch_size": 4, "depth": 3}
VISION = {
    "qwen2_vl": {**SIDES, "embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2},
    "qwen2_5_vl": {**SIDES, "hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 20}
    | {"window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2},
    "qwen3_vl": {**SIDES, "hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 20}
    | {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]},
}
VISION["qwen3_vl_moe"] = VISION["qwen3_vl"]
CONFIGS = {
    "qwen2_vl": transformers.Qwen2VLConfig,
    "qwen2_5_vl": transformers.Qwen2_5_VLConfig,
    "qwen3_vl": transformers.Qwen3VLConfig,
    "qwen3_vl_moe": transformers.Qwen3VLMoeConfig,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]}


def config_of(name: str, tied: bool = False) -> transformers.PretrainedConfig:
    """A tiny model of a family."""
    text = {**TEXT, "rope_parameters": dict(ROPE)}
    if name.startswith("qwen3_vl"):
        text |= {"head_dim": 8, "rope_parameters": {**ROPE, "mrope_interleaved": True}}
    if name == "qwen3_vl_moe":
        text |= EXPERTS
    return CONFIGS[name](text_config=text, vision_config=dict(VISION[name]), tie_word_embeddings=tied, **TOKENS)


def keys_of(name: str) -> dict:
    return json.loads(config_of(name).to_json_string(use_diff=False))


@pytest.mark.parametrize("name", FAMILIES)
def test_our_config_comes_back_from_their_keys_in_both_dialects(name):
    family = FAMILIES[name]
    config = family.read(keys_of(name), {})
    keys, files = family.config_json(config, IDS), family.processor_json(config, None)
    assert family.read(keys, files) == config
    assert keys["text_config" if name.startswith("qwen3_vl") else "rope_scaling"] and "rope_parameters" not in str(keys)
    theirs = CONFIGS[name](**keys)
    assert {key: getattr(theirs, key) for key in TOKENS} == TOKENS
    assert family.read(json.loads(theirs.to_json_string(use_diff=False)), files) == config


@pytest.mark.parametrize("name", FAMILIES)
def test_absent_keys_have_the_defaults_of_their_classes(name):
    family, theirs = FAMILIES[name], CONFIGS[name]()
    width = {"hidden_size" if name == "qwen2_vl" else "out_hidden_size": theirs.text_config.hidden_size}
    theirs.vision_config.update(width)  # the defaults of tower and decoder do not fit together
    given = {"model_type": name, "vision_config": width}
    assert family.read(given, {}) == family.read(json.loads(theirs.to_json_string(use_diff=False)), {})


def test_the_hubs_qwen2_vl_2b_has_the_parameters_that_were_published():
    """With the decoder's keys at the top, as most folders have them."""
    keys = {"model_type": "qwen2_vl", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960}
    keys |= {"num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True}
    keys |= {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    keys |= {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 28}
    vision = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": 1536}
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2}
    config = qwen2_vl.read({**keys, "vision_config": vision}, {})
    assert sum(math.prod(shape) for shape in parameter_shapes(config).values()) == 2_208_985_600
    assert config.decoder.sliding_window is None and config.decoder.rope_theta == 1e6


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen3_vl_moe"])
def test_a_tied_head_may_be_said_at_the_top_or_inside(name):
    keys = keys_of(name)
    inside = {**keys["text_config"], "tie_word_embeddings": True}
    for tied in ({**keys, "tie_word_embeddings": True}, {**keys, "text_config": inside}):
        assert FAMILIES[name].read(tied, {}).decoder.tie_embedding
    assert not FAMILIES[name].read(keys, {}).decoder.tie_embedding


@pytest.mark.parametrize(
    ("name", "part", "change", "said"),
    [
        ("qwen2_vl", "text_config", {"rope_parameters": {**ROPE, "rope_type": "yarn"}}, "rope_type 'yarn'"),
        ("qwen2_vl", "text_config", {"rope_parameters": {**ROPE, "mrope_section": [2, 2, 2]}}, "must add up to half"),
        ("qwen2_vl", "text_config", {"rope_parameters": {**ROPE, "mrope_interleaved": True}}, "mrope_interleaved=True"),
        ("qwen3_vl", "text_config", {"rope_parameters": {**ROPE, "mrope_interleaved": False}}, "interleaved=False"),
        ("qwen3_vl", "text_config", {"attention_bias": True}, "attention_bias=True"),
        ("qwen2_vl", "vision_config", {"hidden_size": 40}, "features of 40 numbers, and the decoder 32"),
        ("qwen2_5_vl", "vision_config", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("qwen2_5_vl", "vision_config", {"in_channels": 4}, "in_channels=4"),
        ("qwen2_5_vl", "vision_config", {"window_size": 4}, "window_size=4 is smaller than a feature"),
        ("qwen2_5_vl", "vision_config", {"rope_parameters": {"rope_type": "axial", "rope_theta": 1.0}}, "rope_param"),
        ("qwen3_vl", "vision_config", {"num_position_embeddings": 35}, "num_position_embeddings=35 is no square"),
        ("qwen3_vl", "vision_config", {"deepstack_visual_indexes": [5]}, "deepstack_layers=.* below the 3 layers"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(name, part, change, said, tmp_path):
    keys = keys_of(name)
    keys[part] |= change
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(ValueError, match=said) as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_three_positions_are_refused_in_a_decoder_of_its_own(tmp_path):
    text = {**TEXT, "model_type": "qwen2", "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    (tmp_path / "config.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match="mrope_section is not implemented for qwen2"):
        read_config(tmp_path)
    config = qwen2_vl.read(keys_of("qwen2_vl"), {})
    with pytest.raises(ValueError, match="only the formats of Qwen-VL hold a decoder with mrope_sections"):
        llama.write(config.decoder)
    alone = llama.read(llama.config_json(config, {}))  # whose text is the same
    assert dataclasses.replace(alone, mrope_sections=config.decoder.mrope_sections) == config.decoder


def test_what_a_format_cannot_hold_is_refused():
    config = qwen2_vl.read(keys_of("qwen2_vl"), {})
    other = qwen2_5_vl.read(keys_of("qwen2_5_vl"), {})
    with pytest.raises(ValueError, match=r"needs vision\.intermediate_size=20 to be a multiple of"):
        qwen2_vl.config_json(other, IDS)
    other = dataclasses.replace(other, vision=dataclasses.replace(other.vision, intermediate_size=48))
    with pytest.raises(ValueError, match=r"the qwen2_vl format cannot hold vision\.gated=True"):
        qwen2_vl.config_json(other, IDS)
    plain = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, mrope_sections=None))
    with pytest.raises(ValueError, match="a decoder with mrope_sections and a tower with resize=area"):
        qwen2_vl.config_json(plain, IDS)
    with pytest.raises(ValueError, match=r"needs vision\.window and vision\.tokens_per_second"):
        qwen2_5_vl.config_json(config, IDS)
    wide = dataclasses.replace(config.vision_projector, hidden_size=40)
    with pytest.raises(ValueError, match=r"vision_projector\.hidden_size=40"):
        qwen2_vl.config_json(dataclasses.replace(config, vision_projector=wide), IDS)
    with pytest.raises(ValueError, match="without an audio tower"):
        qwen3_vl.config_json(ModelConfig(decoder=config.decoder), IDS)
    trained = dataclasses.replace(config.vision_projector, output_std=0.5)
    assert qwen2_vl.config_json(dataclasses.replace(config, vision_projector=trained), IDS)


PIXELS = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}


def folder(path, name, **files):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(keys_of(name)))
    for file, keys in files.items():
        (path / f"{file}.json").write_text(json.dumps(keys))
    return path


def test_a_processor_is_read_in_both_dialects_and_brings_its_bounds(tmp_path):
    old = folder(tmp_path / "old", "qwen2_5_vl", preprocessor_config={**PIXELS, "min_pixels": 256, "max_pixels": 6400})
    size = {"shortest_edge": 256, "longest_edge": 6400}
    both = {"image_processor": {**PIXELS, "size": size}, "video_processor": {**PIXELS, "size": size}}
    new = folder(tmp_path / "new", "qwen2_5_vl", processor_config=both)
    config = read_config(old)
    assert config == read_config(new) and config.vision.std == [0.25] * 3
    prompts = media_prompts(old)
    assert prompts == media_prompts(new)
    assert prompts["image_tokens"] == prompts["video"]["frame_tokens"] == [4, 100]
    assert prompts["markers"]["image"] == ["<|vision_start|>", "<|vision_end|>"]
    oldest = {**PIXELS, "min_pixels": 256, "max_pixels": 6400, "size": {"min_pixels": 1, "max_pixels": 2}}
    assert media_prompts(folder(tmp_path / "oldest", "qwen2_5_vl", preprocessor_config=oldest)) == prompts
    video = {**PIXELS, "size": {"shortest_edge": 512, "longest_edge": 1280}, "fps": 1, "max_frames": 16}
    video |= {"min_pixels": 64, "max_pixels": 128}  # which this family's class does not read
    apart = folder(
        tmp_path / "apart",
        "qwen3_vl",
        preprocessor_config={**PIXELS, "size": size},
        video_preprocessor_config=video,
    )
    prompts = media_prompts(apart)
    assert prompts["image_tokens"] == [4, 100]
    assert prompts["video"] == {
        **{"num_frames": None, "fps": 1.0, "min_frames": 4, "max_frames": 16},
        **{"spread": "first_to_last", "text": {"frame": TIMESTAMP}, "tokens": [4, 10]},
    }
    data = validated(DataConfig, {"train": "", **prompts}, "data")
    written = qwen3_vl.processor_json(read_config(apart), data)
    again = {name.removesuffix(".json"): keys for name, keys in written.items()}
    assert media_prompts(folder(tmp_path / "again", "qwen3_vl", **again)) == prompts


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"do_resize": False}, "do_resize=False in preprocessor_config.json is not implemented"),
        ({"patch_size": 14}, "patch_size=14 in preprocessor_config.json"),
        ({"merge_size": 1}, "merge_size=1 in"),
        ({"rescale_factor": 1.0}, "rescale_factor=1.0 in"),
        ({"resample": 0}, "resample=0 in"),
        ({"size": [1, 2]}, "the image processor in preprocessor_config.json is not understood"),
        ({"size": {"shortest_edge": "small", "longest_edge": 6400}}, "not understood"),
        ({"size": {"min_pixels": 256, "max_pixels": 6400}}, "has no shortest_edge, and there is no min_pixels"),
        ({"size": {"shortest_edge": 256}}, r"size=.* in preprocessor_config.json has no longest_edge"),
    ],
)
def test_a_processor_that_makes_other_pixels_is_refused(change, said, tmp_path):
    path = folder(tmp_path / "here", "qwen2_vl", preprocessor_config={**PIXELS, **change})
    with pytest.raises(ValueError, match=said):
        read_config(path)


def test_images_and_videos_that_are_normalised_in_different_ways_are_refused(tmp_path):
    video = {**PIXELS, "image_mean": [0.1] * 3}
    path = folder(tmp_path / "here", "qwen2_vl", preprocessor_config=PIXELS, video_preprocessor_config=video)
    with pytest.raises(ValueError, match="images and videos that are resized or normalised in different ways"):
        read_config(path)

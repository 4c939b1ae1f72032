"""InternVL3 and 3.5: config and processor keys, in and out."""

import copy
import dataclasses
import json
import math

import pytest
import torch
import transformers

from avlm.config.media import VideoText
from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.config.values import validated
from avlm.families import internvl
from avlm.models.shapes import parameter_shapes
from avlm.weights.folder import media_prompts, read_config

IDS = dict(zip(internvl.MEDIA_TOKENS, range(95, 99)))
TEXT = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
TEXT |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "rms_norm_eps": 1e-6}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
DECODERS = {
    "qwen2": {**TEXT, "model_type": "qwen2", "rope_parameters": DYNAMIC},  # as published
    "qwen3": {**TEXT, "model_type": "qwen3", "head_dim": 12},
    "llama": {**TEXT, "model_type": "llama"},
}
SIDE, FEATURES = 24, 9  # 6 x 6 patches, of which 2 x 2 make a feature
TOWER = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
TOWER |= {"image_size": [SIDE, SIDE], "patch_size": [4, 4], "attention_bias": True}
TOWERS = {
    "qwen2": TOWER,
    "qwen3": {**TOWER, "use_mean_pooling": False, "norm_type": "layer_norm", "use_mask_token": True},
    "llama": {**TOWER, "use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False},  # InternViT 6B
}
TIED = "qwen3"
PIXELS = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3}
PIXELS |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.25] * 3, "rescale_factor": 1 / 255, "do_center_crop": None}
PIXELS |= {"size": {"height": SIDE, "width": SIDE}, "processor_class": "InternVLProcessor"}
TILES = {"crop_to_patches": False, "min_patches": 1, "max_patches": 6}
FILES = {  # as most folders of the Hub have them
    "preprocessor_config.json": {**PIXELS, **TILES, "image_processor_type": "GotOcr2ImageProcessorFast"},
    "video_preprocessor_config.json": {**PIXELS, "video_processor_type": "InternVLVideoProcessor"},
    "processor_config.json": {"image_seq_length": FEATURES, "processor_class": "InternVLProcessor"},
}


def config_of(name: str, vocab_size: int = 99, image: int = IDS["<IMG_CONTEXT>"]) -> transformers.InternVLConfig:
    """A tiny model with a decoder of this kind."""
    tied = name == TIED
    return transformers.InternVLConfig(
        text_config={**copy.deepcopy(DECODERS[name]), "vocab_size": vocab_size, "tie_word_embeddings": tied},
        vision_config=dict(TOWERS[name]),
        image_token_id=image,
        image_seq_length=FEATURES,
        tie_word_embeddings=tied,
    )


def keys_of(name: str) -> dict:
    return json.loads(config_of(name).to_json_string(use_diff=False))


def data_of(config: ModelConfig, **more) -> DataConfig:
    return validated(DataConfig, {"train": "", **internvl.prompts(config, FILES), **more}, "data")


def folder(path, keys: dict, files: dict[str, dict] = FILES):
    path.mkdir(exist_ok=True)
    for name, content in {"config.json": keys, **files}.items():
        (path / name).write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("name", DECODERS)
def test_our_config_comes_back_from_their_keys_in_both_dialects(name):
    config = internvl.read(keys_of(name), FILES)
    assert config.vision.qk_norm == (name == "llama") and config.vision.post_norm == (name == "qwen3")
    keys, files = internvl.config_json(config, IDS), internvl.processor_json(config, data_of(config))
    assert internvl.read(keys, files) == config
    theirs = transformers.InternVLConfig(**copy.deepcopy(keys))
    assert (theirs.image_token_id, theirs.image_seq_length) == (IDS["<IMG_CONTEXT>"], FEATURES)
    assert internvl.read(json.loads(theirs.to_json_string(use_diff=False)), files) == config
    prompts = internvl.prompts(config, FILES)
    prompts["video"] |= {"num_frames": 8, "fps": None}  # those of a run that says nothing
    assert internvl.prompts(config, files) == prompts


def test_absent_keys_have_the_defaults_of_their_classes():
    keys = json.loads(transformers.InternVLConfig().to_json_string(use_diff=False))
    config = internvl.read({"model_type": "internvl", "tie_word_embeddings": False}, {})
    assert config == internvl.read({**keys, "tie_word_embeddings": False}, {})
    assert internvl.prompts(config, {})["image_layout"] == {"tiles": "aspect", "min_tiles": 1, "max_tiles": 12}


def test_a_folder_that_says_nowhere_whether_its_head_is_tied_has_one_of_its_own():
    """As version 4 of transformers wrote the published ones."""
    keys = keys_of(TIED)
    del keys["tie_word_embeddings"]
    assert internvl.read(keys, {}).decoder.tie_embedding
    del keys["text_config"]["tie_word_embeddings"]
    assert not internvl.read(keys, {}).decoder.tie_embedding


def test_positions_that_grow_past_the_longest_prompt_alone_are_plain():
    decoder = internvl.read(keys_of("qwen2"), {}).decoder
    assert (decoder.rope_theta, decoder.rope_scaling, decoder.yarn, decoder.max_position) == (1e6, None, None, 4096)


def test_the_smallest_published_model_has_the_parameters_of_its_class():
    text = {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    text |= {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151674, "tie_word_embeddings": False}
    vision = {"attention_bias": True}
    config = internvl.read({"model_type": "internvl", "text_config": text, "vision_config": vision}, {})
    theirs = transformers.InternVLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    with torch.device("meta"):
        model = transformers.InternVLForConditionalGeneration(theirs)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert sum(math.prod(shape) for shape in parameter_shapes(config).values()) == count == 938_193_024


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy='full' is not implemented"),
        ({"vision_feature_layer": [-2, -1]}, "features of several layers"),
        ({"downsample_ratio": 0.3}, r"downsample_ratio=0.3 is not implemented \(accepted: 0.5, 1.0"),
        ({"downsample_ratio": 0.25}, "downsample=4 does not divide 6 patches a side"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act='relu'"),
        ({"text_config": {"model_type": "gpt_oss"}}, "text_config.model_type 'gpt_oss' is not supported"),
        ({"vision_config": {"use_absolute_position_embeddings": False}}, "use_absolute_position_embeddings=False"),
        ({"vision_config": {"image_size": [24, 36]}}, r"image_size=\[24, 36\] is not implemented \(accepted: squares"),
        ({"vision_config": {"image_size": "24"}}, "vision_config.image_size must be an integer or a list, not '24'"),
        ({"vision_config": {"norm_type": "batch_norm"}}, "norm_type='batch_norm' is not implemented"),
        ({"vision_config": {"norm_type": "rms_norm", "use_mean_pooling": False}}, "use_mean_pooling=False with norm_"),
        ({"vision_config": {"use_qk_norm": True, "layer_norm_eps": 1e-5}}, "layer_norm_eps=1e-05 with use_qk_norm"),
        ({"vision_config": {"hidden_act": "relu"}}, "hidden_act='relu' is not implemented"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change, said, tmp_path):
    keys = keys_of("qwen2")
    for key, value in change.items():
        keys[key] = {**keys[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=said) as error:
        read_config(folder(tmp_path / "here", keys))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("module", "change", "said"),
    [
        ("vision", {"layer_scale": False}, "the internvl format cannot hold vision.layer_scale=False, only True"),
        ("vision", {"class_token": False}, "cannot hold vision.class_token=False"),
        ("vision", {"bias": False}, "cannot hold vision.bias=False"),
        ("vision", {"resize": "crop"}, "cannot hold vision.resize=crop, only stretch"),
        ("vision_projector", {"feature_norm": "none"}, "cannot hold vision_projector.feature_norm=none"),
        ("vision_projector", {"norm_eps": 1e-6}, "cannot hold vision_projector.norm_eps=1e-06, only 1e-05"),
        ("vision_projector", {"downsample": 3}, "downsample_ratio=0.33333.* is not implemented"),
        ("vision_projector", {"newline": True}, "cannot hold vision_projector.newline=True"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(module, change, said):
    config = internvl.read(keys_of("qwen2"), {})
    changed = dataclasses.replace(getattr(config, module), **change)
    with pytest.raises(ValueError, match=said):
        internvl.config_json(dataclasses.replace(config, **{module: changed}), IDS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_layout": {}}, "cannot hold data.image_layout.tiles=none, only aspect"),
        ({"image_layout": {"tiles": "aspect", "only_alone": True}}, "cannot hold data.image_layout.only_alone=True"),
        ({"markers": {"image": ["<img>", ""]}}, "cannot hold data.markers={'image': "),
        ({"video": {"text": {"frame": "{n}"}}}, "cannot hold data.video.text="),
    ],
)
def test_prompts_that_the_processor_does_not_make_are_refused(change, said):
    config = internvl.read(keys_of("qwen2"), {})
    with pytest.raises(ValueError, match=f"the internvl format {said}"):
        internvl.processor_json(config, data_of(config, **change))


def test_a_processor_is_read_in_both_dialects(tmp_path):
    old = folder(tmp_path / "old", keys_of("qwen2"))
    inner = {key: FILES[f"{file}_config.json"] for key, file in (("image_processor", "preprocessor"),)}
    inner["video_processor"] = FILES["video_preprocessor_config.json"]
    files = {"processor_config.json": {**FILES["processor_config.json"], **inner}}
    new = folder(tmp_path / "new", keys_of("qwen2"), files)
    config = read_config(old)
    assert config == read_config(new) and config.vision.mean == [0.4, 0.5, 0.6]
    assert media_prompts(old) == media_prompts(new)
    data = validated(DataConfig, {"train": "", **media_prompts(old)}, "data")
    assert (data.image_layout.tiles, data.image_layout.max_tiles) == ("aspect", 6)
    assert data.video.text == VideoText(frame="Frame{n}: ", between="\n")
    assert data.markers == {"image": ["<img>", "</img>"], "video": ["<img>", "</img>"]}


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("preprocessor_config.json", {"size": {"height": 24, "width": 28}}, "size=.*in preprocessor_config.json"),
        ("preprocessor_config.json", {"size": None}, "size={'height': 384, 'width': 384} in preprocessor_config.json"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 24}}, r"is not implemented \(accepted: height and wid"),
        ("video_preprocessor_config.json", {"image_mean": [0.1] * 3}, "images and videos that are"),
        ("video_preprocessor_config.json", {"initial_shift": 1}, "initial_shift=1 in video_preprocessor_config.json"),
        ("processor_config.json", {"image_seq_length": 256}, "image_seq_length=256 in .*: a tile has 9 features"),
    ],
)
def test_a_processor_that_makes_other_pixels_or_counts_is_refused(file, change, said, tmp_path):
    files = {**FILES, file: {**FILES[file], **change}}
    with pytest.raises(ValueError, match=said):
        read_config(folder(tmp_path / "here", keys_of("qwen2"), files))


@pytest.mark.parametrize(
    ("keys", "seen"),
    [
        ({"num_frames": 5}, {"spread": "middle_frames", "num_frames": 5, "fps": None}),
        ({"fps": 2, "initial_shift": True}, {"spread": "middle_frames", "num_frames": None, "fps": 2.0}),
        ({"num_frames": 5, "initial_shift": False}, {"spread": "starts", "num_frames": 5, "fps": None}),
    ],
)
def test_the_frames_that_a_folder_asks_for_are_seen_and_written(keys, seen, tmp_path):
    name = "video_preprocessor_config.json"
    here = folder(tmp_path / "here", keys_of("qwen2"), {**FILES, name: {**FILES[name], **keys}})
    prompts = media_prompts(here)
    assert {key: value for key, value in prompts["video"].items() if key != "text"} == seen
    written = internvl.processor_json(read_config(here), validated(DataConfig, {"train": "", **prompts}, "data"))
    assert internvl.prompts(read_config(here), written)["video"] == prompts["video"]

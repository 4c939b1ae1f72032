"""Idefics3 and SmolVLM2: config and processor keys, in and out."""

import copy
import dataclasses
import json
import math

import pytest
import torch
import transformers
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.config.values import validated
from avlm.families import idefics3, llava, smolvlm
from avlm.models.patches import tower_layout
from avlm.models.shapes import parameter_shapes
from avlm.weights.folder import media_prompts, read_config

FAMILIES = {family.FORMAT: family for family in (idefics3, smolvlm)}
CONFIGS = {"idefics3": transformers.Idefics3Config, "smolvlm": transformers.SmolVLMConfig}
IDS = {"<image>": 97, "<fake_token_around_image>": 96}
SIDE = 16  # 4 x 4 patches, 2 x 2 features
TEXT = {"model_type": "llama", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
TEXT |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
TOWER = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
TOWER |= {"image_size": SIDE, "patch_size": 4}
CLASSES = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}
TILE = "<fake_token_around_image><row_{line}_col_{column}>"
WHOLE = ["<fake_token_around_image><global-img>", "<fake_token_around_image>"]
LAYOUT = {"tiles": "long_edge", "longest_edge": 4 * SIDE, "tile_markers": [TILE, ""], "line_end": "\n"}
LAYOUT |= {"tiles_end": "\n", "whole_markers": WHOLE}
FRAMES = {"num_frames": None, "fps": 2.0, "max_frames": 5, "spread": "inner", "text": smolvlm.TEXT}
PROMPTS = {
    "idefics3": {"image_layout": LAYOUT},
    "smolvlm": {"image_layout": LAYOUT, "markers": {"video": WHOLE}, "video": FRAMES},
}


def config_of(name: str, tied: bool = False, vocab_size: int = 99, image: int = 97) -> transformers.PretrainedConfig:
    """A tiny model of a family."""
    return CONFIGS[name](
        text_config={**TEXT, "vocab_size": vocab_size},
        vision_config={**TOWER},
        image_token_id=image,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )


def keys_of(name: str) -> dict:
    return json.loads(config_of(name).to_json_string(use_diff=False))


def published(name: str, **changes) -> dict[str, dict]:
    """The files of a folder as the Hub has them. There ``resample`` is 1, Lanczos, for which transformers takes other
    filters in frames of videos, by the version of torchvision."""
    pixels = {"do_convert_rgb": True, "do_image_splitting": True, "do_normalize": True, "do_pad": True}
    pixels |= {"do_rescale": True, "do_resize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.25] * 3}
    pixels |= {"rescale_factor": 1 / 255, "resample": 3, "max_image_size": {"longest_edge": SIDE}}
    pixels |= {"image_processor_type": f"{CLASSES[name]}ImageProcessor", "size": {"longest_edge": 4 * SIDE}}
    if name == "smolvlm":
        pixels["video_sampling"] = {"fps": 2, "max_frames": 5, "video_size": {"longest_edge": SIDE}}
    return {
        "config.json": keys_of(name),
        "preprocessor_config.json": {**pixels, **changes},
        "processor_config.json": {"processor_class": f"{CLASSES[name]}Processor", "image_seq_len": 4},
    }


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
    keys = family.config_json(config, IDS)
    files = family.processor_json(config, data_of(name))
    assert family.read(keys, files) == config
    theirs = CONFIGS[name](**copy.deepcopy(keys))
    assert theirs.image_token_id == 97 and theirs.vision_config.model_type == f"{name}_vision"
    assert family.read(json.loads(theirs.to_json_string(use_diff=False)), files) == config
    assert family.prompts(config, files) == PROMPTS[name] == family.prompts(config, published(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_absent_keys_have_the_defaults_of_their_classes(name):
    family = FAMILIES[name]
    keys = json.loads(CONFIGS[name]().to_json_string(use_diff=False))
    odd = {"scale_factor": 1}  # 7 x 7 patches, the default, are not cut into 2 x 2
    config = family.read({"model_type": name, **odd}, {})
    assert config == family.read({**keys, **odd}, {}) and config.decoder.norm_eps == 1e-5
    named = {"vision_config": TOWER, "text_config": {"vocab_size": 9}}
    config = family.read({"model_type": name, **named}, {})
    assert config.decoder.norm_eps == 1e-6 and config.vision_projector.downsample == keys["scale_factor"] == 2
    for tied in (False, True):  # what the decoder's own keys say does not count
        given = {"tie_word_embeddings": tied, "text_config": {**TEXT, "tie_word_embeddings": not tied}}
        assert family.read({**keys_of(name), **given}, {}).decoder.tie_embedding == tied
    large = {**keys_of(name), "vision_config": {**TOWER, "image_size": 364, "patch_size": 14}}
    config = family.read(large, {"preprocessor_config.json": {}})
    assert family.prompts(config, {"preprocessor_config.json": {}})["image_layout"]["longest_edge"] == 1456


@pytest.mark.parametrize("scale", [2, 3, 4])  # of Idefics3, SmolVLM2 2.2B and SmolVLM2 256M
def test_the_rows_of_a_feature_stand_side_by_side_as_in_the_connector(scale):
    side = 12
    config = transformers.SmolVLMConfig(**{"vision_config": TOWER, "text_config": {**TEXT}, "pad_token_id": 0})
    connector = SmolVLMConnector(config)
    theirs = connector.pixel_shuffle(torch.arange(side * side).view(1, -1, 1), scale)[0]
    vision = smolvlm.read(keys_of("smolvlm"), {}).vision
    assert tower_layout((side, side), vision, scale).sources.equal(theirs)


def test_the_smallest_published_smolvlm2_has_the_parameters_of_its_class():
    text = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    text |= {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49280}
    tower = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 512}
    keys = {"text_config": text, "vision_config": {**tower, "patch_size": 16}, "scale_factor": 4}
    config = smolvlm.read(copy.deepcopy(keys), {})
    with torch.device("meta"):
        model = transformers.SmolVLMForConditionalGeneration(transformers.SmolVLMConfig(**keys))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert sum(math.prod(shape) for shape in parameter_shapes(config).values()) == count == 256_484_928


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_image_size": {"longest_edge": 32}}, "max_image_size=32 in preprocessor_config.json, and image_size=16"),
        ({"size": {"height": 32, "width": 32}}, r"size=.* in preprocessor_config.json is not implemented"),
        ({"size": 64}, "size=64 in preprocessor_config.json is not implemented"),
        ({"do_resize": False}, "do_resize=False in preprocessor_config.json is not implemented"),
        ({"resample": 4}, "resample=4"),
        ({"rescale_factor": 1}, "rescale_factor=1"),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_processor_that_makes_other_pixels_is_refused(name, change, said, tmp_path):
    with pytest.raises(ValueError, match=said) as error:
        media_prompts(folder(tmp_path / "here", published(name, **change)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"scale_factor": 3}, "vision_projector.downsample=3 does not divide 4 patches"),
        ("config.json", {"scale_factor": "two"}, "scale_factor must be an integer"),
        ("config.json", {"text_config": {"model_type": "gpt2"}}, "text_config.model_type 'gpt2' is not supported"),
        ("config.json", {"vision_config": {**TOWER, "hidden_act": "relu"}}, "hidden_act='relu' is not implemented"),
        ("processor_config.json", {"image_seq_len": 9}, "image_seq_len=9 in processor_config.json, .* has 4 features"),
        ("processor_config.json", {"image_processor": 3}, "the image processor in processor_config.json is not under"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(file, change, said, tmp_path):
    files = published("idefics3")
    files[file] = {**files[file], **change}
    with pytest.raises(ValueError, match=said):
        read_config(folder(tmp_path / "here", files))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_processor_is_read_in_both_dialects(name, tmp_path):
    files = published(name, resample=1)
    old = folder(tmp_path / "old", files)
    inner = {"image_processor": files["preprocessor_config.json"]}
    if name == "smolvlm":
        keys = {key: value for key, value in files["preprocessor_config.json"].items() if key != "video_sampling"}
        inner["video_processor"] = {**keys, "num_frames": 5, "fps": 2}
    nested = {**files["processor_config.json"], **inner}
    new = folder(tmp_path / "new", {"config.json": files["config.json"], "processor_config.json": nested})
    config = read_config(old)
    assert config == read_config(new) and config.vision.mean == [0.4, 0.5, 0.6]
    assert (config.vision.resize, config.vision.resample) == ("stretch", "lanczos")
    assert media_prompts(old) == media_prompts(new) == PROMPTS[name]


def test_images_that_a_folder_does_not_cut_are_not_cut(tmp_path):
    files = published("idefics3", do_image_splitting=False)
    layout = {"longest_edge": 4 * SIDE, "whole_markers": WHOLE}
    assert media_prompts(folder(tmp_path / "here", files)) == {"image_layout": layout}
    config = read_config(tmp_path / "here")
    written = idefics3.processor_json(config, validated(DataConfig, {"train": "", "image_layout": layout}, "data"))
    assert written["preprocessor_config.json"]["do_image_splitting"] is False
    assert idefics3.prompts(config, written) == {"image_layout": layout}


def test_frames_of_other_pixels_than_images_are_refused(tmp_path):
    files = published("smolvlm")
    images = files["preprocessor_config.json"]
    for change, said in (
        ({"image_mean": [0.1] * 3}, "images and videos that are resampled or normalised in different ways"),
        ({"size": {"longest_edge": SIDE}}, "frames of a longest edge of 16 pixels, in video_preprocessor_config.json"),
    ):
        files["video_preprocessor_config.json"] = {**images, **change}
        with pytest.raises(ValueError, match=said):
            media_prompts(folder(tmp_path / "here", files))
    alone = {key: value for key, value in images.items() if key != "size"}  # then the sampling's own size counts
    files["video_preprocessor_config.json"] = alone
    with pytest.raises(ValueError, match="a longest edge of 16 pixels"):
        media_prompts(folder(tmp_path / "here", files))


def changed(config: ModelConfig, module: str, **changes) -> ModelConfig:
    return dataclasses.replace(config, **{module: dataclasses.replace(getattr(config, module), **changes)})


@pytest.mark.parametrize(
    ("module", "changes", "said"),
    [
        ("vision", {"post_norm": False}, "cannot hold vision.post_norm=False, only True"),
        ("vision", {"resize": "crop", "resample": "bicubic"}, "cannot hold vision.resize=crop, only stretch"),
        ("vision_projector", {"bias": True}, "cannot hold vision_projector.bias=True, only False"),
        ("vision_projector", {"type": "mlp2x_gelu"}, "cannot hold vision_projector.type=mlp2x_gelu, only linear"),
        ("vision_projector", {"norm": "layer"}, "cannot hold vision_projector.norm=layer, only none"),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_format_cannot_hold_is_refused(name, module, changes, said):
    config = changed(FAMILIES[name].read(keys_of(name), {}), module, **changes)
    with pytest.raises(ValueError, match=f"the {name} format {said}"):
        FAMILIES[name].config_json(config, IDS)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("idefics3", {"image_layout": {}}, r"data.image_layout.longest_edge=None, only 64"),
        ("idefics3", {"image_layout": {**LAYOUT, "line_end": ""}}, r"data.image_layout.line_end=, only"),
        ("idefics3", {"markers": {"image": ["<image>", ""]}}, r"data.markers.image=\['<image>', ''\], only \['', ''\]"),
        ("smolvlm", {"markers": {}}, r"data.markers.video=\['', ''\], only \['<fake"),
        ("smolvlm", {"video": {}}, "data.video.num_frames=8, only data.video.fps; .* may be exported as idefics3"),
        ("smolvlm", {"video": {**FRAMES, "spread": "middles"}}, "data.video.spread='middles', only 'inner'"),
        ("smolvlm", {"video": {**FRAMES, "text": {}}}, r"data.video.text=VideoText\(before='', frame='', .* only Vid"),
        ("smolvlm", {"video": {**FRAMES, "min_frames": 2}}, "data.video.min_frames=2, only 1"),
    ],
)
def test_prompts_that_a_format_cannot_hold_are_refused(name, changes, said):
    config = FAMILIES[name].read(keys_of(name), {})
    with pytest.raises(ValueError, match=f"the {name} format cannot hold {said}"):
        FAMILIES[name].processor_json(config, data_of(name, **changes))


def test_llava_holds_no_tiles_of_idefics():
    with pytest.raises(ValueError, match=r"llava format cannot hold data\.image_layout\.tiles=long_edge, only none"):
        llava.prompt_keys(idefics3.read(keys_of("idefics3"), {}), data_of("idefics3"))


def test_lanczos_goes_with_towers_that_see_whole_images():
    with pytest.raises(ValueError, match="resample=lanczos does not go with resize=crop"):
        dataclasses.replace(idefics3.read(keys_of("idefics3"), {}).vision, resize="crop")

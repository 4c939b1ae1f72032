"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision: config and processor keys, in and out."""

import copy
import dataclasses
import json
import math

import pytest
import torch
import transformers

from avlm.config.model import ModelConfig, VisionConfig
from avlm.config.run import DataConfig
from avlm.config.values import validated
from avlm.families import llava, llava_next, llava_next_video, llava_onevision
from avlm.models.shapes import parameter_shapes
from avlm.weights.folder import media_prompts, read_config

FAMILIES = {family.FORMAT: family for family in (llava_next, llava_next_video, llava_onevision)}
CONFIGS = {
    "llava_next": transformers.LlavaNextConfig,
    "llava_next_video": transformers.LlavaNextVideoConfig,
    "llava_onevision": transformers.LlavaOnevisionConfig,
}
IDS = {"<image>": 97, "<video>": 98}
TEXT = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
TEXT |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
TOWER = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4}
SIDES = {"llava_next": 16, "llava_next_video": 24, "llava_onevision": 14}  # 4 x 4, 6 x 6 and 3 x 3 patches
DECODERS = {"llava_next": "mistral", "llava_next_video": "llama", "llava_onevision": "qwen2"}
FIVE = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
GRIDS = {"llava_next": FIVE, "llava_next_video": FIVE}
GRIDS["llava_onevision"] = [[lines, columns] for lines in range(1, 7) for columns in range(1, 7)]


def pinpoints(name: str) -> list[list[int]]:
    return [[SIDES[name] * lines, SIDES[name] * columns] for lines, columns in GRIDS[name]]


def config_of(
    name: str, tied: bool = False, vocab_size: int = 99, image: int = 97, video: int = 98
) -> transformers.PretrainedConfig:
    """A tiny model of a family."""
    kind = "siglip_vision_model" if name == "llava_onevision" else "clip_vision_model"
    more = {"vision_aspect_ratio": "anyres_max_3"} if name == "llava_onevision" else {}
    return CONFIGS[name](
        text_config={"model_type": DECODERS[name], **TEXT, "vocab_size": vocab_size, "tie_word_embeddings": tied},
        vision_config={"model_type": kind, **TOWER, "image_size": SIDES[name]},
        image_grid_pinpoints=pinpoints(name),
        image_token_index=image,
        tie_word_embeddings=tied,
        **({} if name == "llava_next" else {"video_token_index": video}),
        **more,
    )


def keys_of(name: str) -> dict:
    return json.loads(config_of(name).to_json_string(use_diff=False))


def files_of(name: str) -> dict[str, dict]:
    return {"config.json": keys_of(name)}


def data_of(name: str, config: ModelConfig, **more) -> DataConfig:
    given = {"train": "", **FAMILIES[name].prompts(config, files_of(name)), **more}
    return validated(DataConfig, given, "data")


@pytest.mark.parametrize("name", FAMILIES)
def test_our_config_comes_back_from_their_keys_in_both_dialects(name):
    family = FAMILIES[name]
    config = family.read(keys_of(name), {})
    keys = {**family.config_json(config, IDS), **family.prompt_keys(config, data_of(name, config))}
    files = family.processor_json(config, data_of(name, config))
    config = dataclasses.replace(config, vision=exported(config.vision))
    assert family.read(keys, files) == config
    theirs = CONFIGS[name](**copy.deepcopy(keys))
    assert (theirs.image_token_id, theirs.image_grid_pinpoints) == (97, pinpoints(name))
    assert family.read(json.loads(theirs.to_json_string(use_diff=False)), files) == config
    prompts = family.prompts(config, files_of(name))
    if name != "llava_next":
        prompts["video"] |= {"num_frames": 8, "fps": None}  # those of a run that says nothing
    assert family.prompts(config, {"config.json": keys, **files}) == prompts


def exported(vision: VisionConfig) -> VisionConfig:
    """With the layers that we build alone."""
    return dataclasses.replace(vision, num_layers=vision.num_blocks, feature_layer=-1)


@pytest.mark.parametrize("name", FAMILIES)
def test_absent_keys_have_the_defaults_of_their_classes(name):
    family = FAMILIES[name]
    keys = json.loads(CONFIGS[name]().to_json_string(use_diff=False))
    config = family.read({"model_type": name}, {})
    assert config == family.read(keys, {})
    assert family.prompts(config, {}) == family.prompts(config, {"config.json": keys})
    assert data_of(name, family.read(keys_of(name), {})).image_layout.grids == GRIDS[name]


def test_the_smallest_published_onevision_has_the_parameters_of_its_class():
    """Without the norm of the pooled output, which is not loaded."""
    text = {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    text |= {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 152000}
    config = llava_onevision.read({"model_type": "llava_onevision", "text_config": text}, {})
    theirs = transformers.LlavaOnevisionConfig(text_config=dict(text))
    with torch.device("meta"):
        model = transformers.LlavaOnevisionForConditionalGeneration(theirs)
    count = sum(parameter.numel() for name, parameter in model.named_parameters() if name != "lm_head.weight")
    assert sum(math.prod(shape) for shape in parameter_shapes(config).values()) == count - 2 * 1152 == 893_673_248
    assert config.decoder.tie_embedding and config.vision_projector.stretch_above_tiles == 9


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("llava_next", {"image_grid_pinpoints": [[16, 24]]}, r"image_grid_pinpoints has \[16, 24\], which is not cut"),
        ("llava_next", {"use_image_newline_parameter": False}, "use_image_newline_parameter=False"),
        ("llava_next", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy='full' of a clip"),
        ("llava_next", {"vision_feature_layer": [-2, -1]}, "features of several layers"),
        ("llava_next_video", {"spatial_pool_mode": "max"}, "spatial_pool_mode='max'"),
        ("llava_next_video", {"spatial_pool_stride": 4}, "spatial_pool_stride=4"),
        ("llava_next_video", {"vision_config": {**TOWER, "image_size": 20}}, "an even number of patches a side, not 5"),
        ("llava_onevision", {"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio='anyres' is not implemented"),
        ("llava_onevision", {"vision_feature_select_strategy": "default"}, "strategy='default' of a siglip"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(name, change, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**keys_of(name), **change}))
    with pytest.raises(ValueError, match=said) as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "projector", "said"),
    [
        ("llava_next", {"newline": False}, "the llava_next format needs vision_projector.newline=true"),
        ("llava_next", {"halve_frames": "mean"}, "cannot hold vision_projector.halve_frames=mean, only none"),
        ("llava_next", {"stretch_above_tiles": 9.0}, "cannot hold vision_projector.stretch_above_tiles=9.0, only None"),
        ("llava_next_video", {"halve_frames": "bilinear"}, "cannot hold vision_projector.halve_frames=bilinear"),
        (
            "llava_onevision",
            {"stretch_above_tiles": None},
            "cannot hold vision_projector.stretch_above_tiles=None: give a whole number",
        ),
        ("llava_onevision", {"stretch_above_tiles": 1.5}, "cannot hold vision_projector.stretch_above_tiles=1.5"),
        ("llava_onevision", {"hidden_size": 40}, "cannot hold vision_projector.hidden_size=40"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(name, projector, said):
    config = FAMILIES[name].read(keys_of(name), {})
    changed = dataclasses.replace(config.vision_projector, **projector)
    with pytest.raises(ValueError, match=said):
        FAMILIES[name].config_json(dataclasses.replace(config, vision_projector=changed), IDS)


def test_llava_holds_neither_newlines_nor_tiles():
    config = llava_next.read(keys_of("llava_next"), {})
    with pytest.raises(ValueError, match=r"the llava format cannot hold vision_projector\.newline=True"):
        llava.config_json(config, IDS)
    with pytest.raises(ValueError, match=r"llava format cannot hold data\.image_layout\.tiles=pinpoints, only none"):
        llava.prompt_keys(config, data_of("llava_next", config))
    with pytest.raises(ValueError, match=r"the llava_next format cannot hold data\.image_layout\.tiles=none"):
        llava_next.prompt_keys(config, DataConfig(train=""))
    onevision = data_of("llava_onevision", llava_onevision.read(keys_of("llava_onevision"), {}))
    with pytest.raises(ValueError, match=r"cannot hold data\.image_layout\.only_alone=True, only False"):
        llava_next.prompt_keys(config, onevision)
    with pytest.raises(ValueError, match=r"cannot hold data\.video\.newline=True, only False"):
        llava_next_video.prompt_keys(config, onevision)


def published(name: str) -> dict[str, dict]:
    """The processor's files as most folders of the Hub have them."""
    side, classes = SIDES[name], CONFIGS[name].__name__.removesuffix("Config")
    of_images = "LlavaOnevision" if name == "llava_onevision" else "LlavaNext"
    pixels = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3}
    pixels |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.25] * 3, "rescale_factor": 1 / 255}
    if name == "llava_onevision":
        pixels |= {"size": {"height": side, "width": side}}
        counts, strategy = {"num_image_tokens": 9, "vision_aspect_ratio": "anyres_max_3"}, "full"
    else:
        square = {"height": side, "width": side}
        pixels |= {"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": square}
        counts, strategy = {"patch_size": 4, "num_additional_image_tokens": 1}, "default"
    counts |= {"processor_class": f"{classes}Processor", "vision_feature_select_strategy": strategy}
    tiles = {"image_processor_type": f"{of_images}ImageProcessor", "do_pad": True}
    files = {
        "config.json": keys_of(name),
        "preprocessor_config.json": {**pixels, **tiles, "image_grid_pinpoints": pinpoints(name)},
        "processor_config.json": counts,
    }
    if name != "llava_next":
        files["video_preprocessor_config.json"] = {**pixels, "video_processor_type": f"{classes}VideoProcessor"}
    return files


def folder(path, files: dict[str, dict]):
    path.mkdir(exist_ok=True)
    for name, keys in files.items():
        (path / name).write_text(json.dumps(keys))
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_a_processor_is_read_in_both_dialects(name, tmp_path):
    files = published(name)
    old = folder(tmp_path / "old", files)
    inner = {"image_processor": files["preprocessor_config.json"]}
    if name != "llava_next":
        inner["video_processor"] = files["video_preprocessor_config.json"]
    new = folder(
        tmp_path / "new",
        {"config.json": files["config.json"], "processor_config.json": {**files["processor_config.json"], **inner}},
    )
    config = read_config(old)
    assert config == read_config(new) and config.vision.mean == [0.4, 0.5, 0.6]
    assert config.vision.resize == ("stretch" if name == "llava_onevision" else "crop")
    prompts = media_prompts(old)
    assert prompts == media_prompts(new)
    layout = {"tiles": "pinpoints", "grids": GRIDS[name]}
    assert prompts["image_layout"] == layout | ({"only_alone": True} if name == "llava_onevision" else {})
    assert prompts.get("video", {}).get("newline", False) == (name == "llava_onevision")


@pytest.mark.parametrize(
    ("name", "file", "change", "said"),
    [
        (
            "llava_next",
            "preprocessor_config.json",
            {"image_grid_pinpoints": [[32, 32]]},
            "are not those of config.json",
        ),
        ("llava_next", "preprocessor_config.json", {"do_resize": False}, "do_resize=False in preprocessor_config.json"),
        ("llava_next_video", "video_preprocessor_config.json", {"image_mean": [0.1] * 3}, "images and videos that are"),
        (
            "llava_onevision",
            "video_preprocessor_config.json",
            {"size": {"shortest_edge": 14}},
            "images and videos that",
        ),
        ("llava_onevision", "processor_config.json", {"vision_aspect_ratio": "anyres_max_4"}, "is not that of config"),
        ("llava_onevision", "processor_config.json", {"video_processor": 3}, "the video processor in processor_config"),
    ],
)
def test_a_processor_that_makes_other_pixels_or_counts_is_refused(name, file, change, said, tmp_path):
    files = published(name)
    files[file] = {**files[file], **change}
    with pytest.raises(ValueError, match=said):
        read_config(folder(tmp_path / "here", files))


def test_the_frames_that_a_folder_asks_for_are_seen(tmp_path):
    files = published("llava_next_video")
    for keys, seen in (
        ({"num_frames": 5}, {"num_frames": 5, "fps": None}),
        ({"fps": 2}, {"num_frames": None, "fps": 2.0}),
    ):
        files["video_preprocessor_config.json"] = {
            **published("llava_next_video")["video_preprocessor_config.json"],
            **keys,
        }
        prompts = media_prompts(folder(tmp_path / "here", files))
        assert prompts["video"] == {"spread": "starts", **seen}
        config = read_config(tmp_path / "here")
        written = llava_next_video.processor_json(config, validated(DataConfig, {"train": "", **prompts}, "data"))
        assert llava_next_video.read_frames(written) == prompts["video"]


def test_a_folder_without_a_template_for_text_gets_that_of_its_decoder():
    """Published models stand on Mistral, Llama 3, Vicuna and Qwen or Yi, which have ChatML."""
    of = {"text_config": {"model_type": "llama"}}
    assert llava_next.text_template({"text_config": {"model_type": "mistral"}}, ["<s>", "</s>"]) == "mistral"
    assert llava_next.text_template(of, ["<|start_header_id|>", "<|eot_id|>"]) == "llama3"
    assert llava_next.text_template(of, ["<s>", "</s>"]) == "llava"
    assert llava_next.text_template(of, ["<|im_start|>", "<|im_end|>"]) == "chatml"

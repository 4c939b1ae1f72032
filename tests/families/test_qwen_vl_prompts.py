"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL exported with their prompts: the Auto classes of transformers read the folder, and
both sides make the same ids, pixels and answers of images and a video."""

import dataclasses

import pytest
import torch
import transformers
import yaml
from transformers.video_utils import VideoMetadata

from avlm.config.run import DataConfig
from avlm.config.values import validated
from avlm.data.packing import pack
from avlm.data.sample import SampleEncoder
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation.generation import generate
from avlm.models.batch import IMAGE
from avlm.weights.export import export
from avlm.weights.folder import model_and_data, stop_ids
from avlm.weights.model_from import open_config
from tests.data.media.test_area import every_frame
from tests.data.small_files import CORPUS, image_file, photo, video_file, write_tokenizer
from tests.data.test_markers import PADS, TEMPLATE, VISION
from tests.families.measured import note
from tests.families.test_qwen_vl import CLASSES
from tests.families.test_qwen_vl_keys import FAMILIES, keys_of
from tests.models.handmade import build

PICTURES, VIDEO, RATE = [photo(70, 33), photo(20, 90)], video_file(2.0), 8
QUESTIONS = {  # our template begins a line after media, in a list of parts
    "tokenizer": "<image>one<image><video>what is two?",
    "chatml": "<image>\none<image><video>\nwhat is two?",
}
PARTS = [{"type": "image"}, {"type": "text", "text": "one"}, {"type": "image"}, {"type": "video"}]
PARTS += [{"type": "text", "text": "what is two?"}]


CASES = [*((name, "tokenizer") for name in FAMILIES), ("qwen2_5_vl", "chatml"), ("qwen3_vl", "chatml")]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: " with ".join(case))
def exported(request, tmp_path_factory):
    """(family, template, our model, the folder of its export)."""
    name, template = request.param
    here = tmp_path_factory.mktemp(name)
    control = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", *VISION, *PADS]
    corpus = [*CORPUS, "one<0.2 seconds> and <1.2 seconds>"]
    write_tokenizer(here / "tokenizer", control, corpus, bos_token=None, eos_token="<|im_end|>", chat_template=TEMPLATE)
    tokenizer = Tokenizer(here / "tokenizer")
    config = FAMILIES[name].read(keys_of(name), {})
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=tokenizer.size))
    prompts = FAMILIES[name].prompts(config, {})
    prompts["image_tokens"] = [4, 12]
    prompts["video"]["tokens" if name.startswith("qwen3_vl") else "frame_tokens"] = [8, 24]
    given = {"train": "x", "tokenizer": str(here / "tokenizer"), "template": template, **prompts}
    model = build(config)
    export(config, model.state_dict(), here / "out", name, data=validated(DataConfig, given, "data"))
    return name, template, model, here / "out"


def inputs_of(name: str, template: str, folder) -> dict:
    processor = transformers.AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template([{"role": "user", "content": PARTS}], add_generation_prompt=True)
    if (
        name.startswith("qwen3_vl") and template == "tokenizer"
    ):  # 5.17 would leave the template's markers around those of each patch of frames
        text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
    frames = every_frame(VIDEO)
    settings = {"do_sample_frames": True, "cap_pixels_per_frame": False, "return_tensors": "pt"}
    metadata = [VideoMetadata(total_num_frames=len(frames), fps=float(RATE))]
    return processor(text=[text], images=PICTURES, videos=[frames], video_metadata=metadata, **settings)


def test_a_folder_of_ours_makes_the_prompts_and_answers_that_we_make(exported):
    name, template, model, folder = exported
    theirs, report = CLASSES[name].from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    inputs = inputs_of(name, template, folder)
    config, data = model_and_data(folder)
    assert (config, data.template) == (model.config, "tokenizer")
    tokenizer = Tokenizer(folder)
    question = [{"role": "user", "content": QUESTIONS[template]}]
    prompt = SampleEncoder(config, data, tokenizer).prompt(question, [*map(image_file, PICTURES)], videos=[VIDEO])
    [ids] = inputs["input_ids"]
    is_pad = torch.isin(ids, torch.tensor([theirs.config.image_token_id, theirs.config.video_token_id]))
    assert torch.equal(is_pad, prompt.token_T == IMAGE)
    assert torch.equal(ids[~is_pad], prompt.token_T[~is_pad])
    with torch.no_grad():
        hidden = model.hidden(pack([prompt], len(prompt), config))
        logits = model.decoder.head(model.decoder.norm(hidden), None)
        torch.testing.assert_close(logits, theirs(**inputs).logits[0], atol=1e-4, rtol=1e-4)
    [answer] = generate(model, [prompt], stop_ids=stop_ids(folder), max_new_tokens=12)
    out = theirs.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert answer.token_ids == out[0, len(ids) :].tolist()
    note(f"{name} prompts")


def test_an_export_keeps_the_bounds_markers_and_times_of_its_run(exported):
    name, _, _, folder = exported
    _, data = model_and_data(folder)
    assert data.image_tokens == [4, 12] and data.markers == {"image": VISION, "video": VISION}
    assert (data.video.tokens or data.video.frame_tokens) == [8, 24]
    assert bool(data.video.text.frame) == name.startswith("qwen3_vl")
    assert (data.video.fps, data.video.max_frames) == (2.0, 768)
    assert stop_ids(folder) == [Tokenizer(folder).find("<|im_end|>")]


def test_a_run_that_starts_from_a_folder_takes_its_prompts_along(exported, tmp_path):
    _, _, model, folder = exported
    stage = {"name": "lora", "steps": 1, "train": ["lora"], "optimizer": {"lr": 1e-4}}
    tree = {"model": {"from": str(folder), "lora": {}}, "data": {"train": "a.jsonl"}, "stages": [stage]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    cfg = open_config(tmp_path / "mine.yaml")
    _, data = model_and_data(folder)
    assert dataclasses.replace(cfg.model, lora=None) == model.config
    for key in ("template", "markers", "image_tokens", "video"):
        assert getattr(cfg.stages[0].data, key) == getattr(data, key)
    own = open_config(tmp_path / "mine.yaml", ["data.image_tokens=[1, 9]", "data.video.max_frames=8"]).stages[0].data
    assert own.image_tokens == [1, 9] and own.video == dataclasses.replace(data.video, max_frames=8)

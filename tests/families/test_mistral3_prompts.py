"""Pixtral, Mistral Small 3 and Ministral 3 exported with their prompts: the Auto classes of transformers read the
folder, and both sides make the same ids, pixels and answers of images of any size."""

import dataclasses
import json

import pytest
import torch
import transformers
import yaml

from avlm.config.run import DataConfig
from avlm.config.values import validated
from avlm.data.media.patches import frames_of
from avlm.data.packing import pack
from avlm.data.sample import SampleEncoder
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation.generation import generate
from avlm.models.batch import IMAGE
from avlm.models.vit import normalise
from avlm.weights.export import export
from avlm.weights.folder import model_and_data, stop_ids
from avlm.weights.model_from import open_config
from tests.data.small_files import image_file, photo, write_tokenizer
from tests.families.measured import note
from tests.families.test_mistral3 import CLASSES, FAMILIES, FORMATS, close, keys_of
from tests.models.handmade import build

EDGE = 60
# Heights and widths: within the bound, at it, above it, thin, of odd numbers.
SIZES = [(40, 24), (60, 60), (61, 60), (33, 57), (120, 90), (7, 150), (300, 11), (59, 1), (601, 599), (5, 5)]
CONTROL = ["<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {{- '[INST]' -}}
    {%- if message.content is string -%}
      {{- message.content -}}
    {%- else -%}
      {%- for part in message.content -%}{{- part.text if part.type == 'text' else '[IMG]' -}}{%- endfor -%}
    {%- endif -%}
    {{- '[/INST]' -}}
  {%- else -%}
    {{- message.content + eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""
QUESTIONS = {  # our template begins a line after media, in a list of parts
    "tokenizer": "<image>one<image>what is two?",
    "mistral": "<image>\none<image>\nwhat is two?",
}
PARTS = [{"type": "image"}, {"type": "text", "text": "one"}, {"type": "image"}]
PARTS += [{"type": "text", "text": "what is two?"}]
CASES = [*((name, "tokenizer") for name in FAMILIES), ("mistral3", "mistral")]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: " with ".join(case))
def exported(request, tmp_path_factory):
    """(name of the case, template, our model, the folder of its export)."""
    name, template = request.param
    here = tmp_path_factory.mktemp(name)
    write_tokenizer(here / "tokenizer", CONTROL, chat_template=TEMPLATE)
    tokenizer = Tokenizer(here / "tokenizer")
    config = FAMILIES[name].read(keys_of(name), {})
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=tokenizer.size))
    prompts = FAMILIES[name].prompts(config, {})
    prompts["image_layout"]["longest_edge"] = EDGE
    given = {"train": "x", "tokenizer": str(here / "tokenizer"), "template": template, **prompts}
    model = build(config)
    export(config, model.state_dict(), here / "out", FORMATS[name], data=validated(DataConfig, given, "data"))
    return name, template, model, here / "out"


def test_ids_counts_and_pixels_of_images_equal_those_of_the_processor(exported):
    name, template, _, folder = exported
    config, data = model_and_data(folder)
    encoder = SampleEncoder(config, data, Tokenizer(folder))
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "PixtralProcessor"
    for height, width in SIZES:
        picture = photo(width, height)
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}],
            add_generation_prompt=True,
        )
        theirs = processor(text=[text], images=[picture], return_tensors="pt")
        question = "<image>what?" if template == "tokenizer" else "<image>\nwhat?"
        prompt = encoder.prompt([{"role": "user", "content": question}], [image_file(picture)])
        [ids] = theirs["input_ids"]
        is_pad = ids == processor.image_token_id
        assert torch.equal(is_pad, prompt.token_T == IMAGE), (height, width)
        assert torch.equal(ids[~is_pad], prompt.token_T[~is_pad])
        batch = pack([prompt], len(prompt), config)
        media = dataclasses.replace(batch.image, values=normalise(batch.image.values, config.vision))
        [pixels] = frames_of(media, config.vision, config.vision_projector.downsample)
        assert pixels.shape[1:] == theirs["pixel_values"].shape[1:]
        assert (pixels - theirs["pixel_values"]).abs().max() <= 1e-6
        assert list(pixels.shape[-2:]) == theirs["image_sizes"][0].tolist()
    note(f"{FORMATS[name]} prompts")


def test_a_folder_of_ours_makes_the_prompts_and_answers_that_we_make(exported):
    name, template, model, folder = exported
    theirs, report = CLASSES[name].from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    pictures = [photo(70, 33), photo(20, 90)]
    processor = transformers.AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template([{"role": "user", "content": PARTS}], add_generation_prompt=True)
    inputs = processor(text=[text], images=pictures, return_tensors="pt")
    config, data = model_and_data(folder)
    assert (config, data.template) == (model.config, "tokenizer")
    question = [{"role": "user", "content": QUESTIONS[template]}]
    prompt = SampleEncoder(config, data, Tokenizer(folder)).prompt(question, [*map(image_file, pictures)])
    [ids] = inputs["input_ids"]
    is_pad = ids == theirs.config.image_token_index
    assert torch.equal(is_pad, prompt.token_T == IMAGE) and torch.equal(ids[~is_pad], prompt.token_T[~is_pad])
    with torch.no_grad():
        logits = model.decoder.head(model.decoder.norm(model.hidden(pack([prompt], len(prompt), config))), None)
        close(logits, theirs(**inputs).logits[0], f"{FORMATS[name]} logits of a prompt")
    [answer] = generate(model, [prompt], stop_ids=stop_ids(folder), max_new_tokens=12)
    out = theirs.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert answer.token_ids == out[0, len(ids) :].tolist()


def test_a_run_that_starts_from_a_folder_takes_its_prompts_along(exported, tmp_path):
    _, _, model, folder = exported
    stage = {"name": "lora", "steps": 1, "train": ["lora"], "optimizer": {"lr": 1e-4}}
    tree = {"model": {"from": str(folder), "lora": {}}, "data": {"train": "a.jsonl"}, "stages": [stage]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    cfg = open_config(tmp_path / "mine.yaml")
    _, data = model_and_data(folder)
    assert dataclasses.replace(cfg.model, lora=None) == model.config
    assert data.image_layout.longest_edge == EDGE and data.markers == {"image": ["", "[IMG_END]"]}
    for key in ("template", "markers", "image_layout"):
        assert getattr(cfg.stages[0].data, key) == getattr(data, key)


def test_the_template_of_a_folder_may_be_that_of_its_processor(exported, tmp_path):
    """As in the Hub's folders of Pixtral; LLaVA's with this file get a template of ours."""
    _, _, model, folder = exported
    for name in ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    config, data = model_and_data(tmp_path)
    assert data.template == "tokenizer"
    question = [{"role": "user", "content": "what?"}]
    prompt = SampleEncoder(config, data, Tokenizer(tmp_path)).prompt(question)
    assert Tokenizer(tmp_path).decode(prompt.token_T.tolist()) == "<s>[INST]what?[/INST]"
    export(config, model.state_dict(), tmp_path / "out", "decoder", data=data)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.apply_chat_template(question, add_generation_prompt=True)["input_ids"] == prompt.token_T.tolist()

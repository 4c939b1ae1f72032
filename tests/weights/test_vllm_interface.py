"""What vLLM's Transformers backend asks of an exported folder, asked as it asks: the backend itself is not needed.

It loads the base model alone, encodes media item by item, puts the features in place of their tokens itself, and serves
the decoder with its own attention and its own head. Read in vLLM 0.32 and 0.33,
model_executor/models/transformers/base.py and multimodal.py.
"""

import re

import numpy
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from avlm.families import door, llava
from tests.weights import served_models

NAMES = {"image": "image_processor", "audio": "feature_extractor"}
MODELS = {
    "llava": (served_models.MODELS["llava"], {}),
    "masked": (served_models.MODELS["masked"], {}),  # the longest windows that a clip leaves
    "fixed": (served_models.MODELS["fixed"], {}),
    "qwen2_5_vl": served_models.joint("qwen2_5_vl"),
    "idefics3": served_models.joint("idefics3"),
    "internvl": served_models.joint("internvl"),
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    config, prompts = MODELS[request.param]
    words = [*door.FORMATS.get(request.param, llava).MEDIA_TOKENS, "<|im_start|>", "<|im_end|>", "<global-img>"]
    served_models.served(config, path, words=dict.fromkeys(words), **prompts)
    return path / "out"


@pytest.fixture(scope="module")
def processor(folder):
    return transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def whole(folder):
    """The model with its head, as transformers opens it."""
    model = transformers.AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return model.eval()


def media():
    source = numpy.random.default_rng(0)
    images = [Image.fromarray(source.integers(0, 255, (*size, 3), dtype=numpy.uint8)) for size in ((60, 80), (120, 40))]
    return images, [source.normal(0, 0.1, length).astype(numpy.float32) for length in (16000, 6000)]


def processed(processor, images=(), audio=()):
    """A text of placeholders alone, as vLLM's profiling and its cache of media make it."""
    text = " ".join([processor.audio_token] * len(audio) + [processor.image_token] * len(images))
    return processor(
        text=text,
        images=list(images) or None,
        audio=list(audio) or None,
        return_text_replacement_offsets=True,
        truncation=False,
        return_tensors="pt",
    )


def features(model, kind, fields):
    """(number of features, width), as vLLM asks for those of one item."""
    main = {"image": "pixel_values", "audio": "input_features"}[kind]
    rest = {name: value for name, value in fields.items() if name != main}
    with torch.no_grad():
        found = getattr(model, f"get_{kind}_features")(fields[main], return_dict=True, **rest).pooler_output
    return torch.cat(list(found)) if not isinstance(found, torch.Tensor) else found.flatten(0, -2)


def positions(model, processor, inputs):
    """Positions as vLLM counts them: (1, T), or (3, 1, T) where the decoder's rotary angles have three axes."""
    ids = inputs["input_ids"]
    if "image_grid_thw" not in inputs:
        return torch.arange(ids.shape[1])[None]
    kinds = torch.zeros_like(ids)
    for number, kind in ((1, "image"), (3, "audio")):
        kinds[ids == getattr(processor, f"{kind}_token_id")] = number
    grids = {"image_grid_thw": inputs["image_grid_thw"], "video_grid_thw": None}
    return model.get_rope_index(input_ids=ids, mm_token_type_ids=kinds, **grids)[0]


def fields_of(processor, kind, inputs):
    """What the processor made of one kind of media: vLLM gives a field to the kind whose processor names it."""
    named = getattr(processor, NAMES[kind]).model_input_names
    return {name: value for name, value in inputs.items() if name in named or name.removesuffix("_mask") in named}


def test_every_field_belongs_to_a_kind_of_media_and_every_item_to_its_rows(processor):
    images, audio = media()
    inputs = processed(processor, images, audio)
    of_text = {"input_ids", "attention_mask", "mm_token_type_ids", "text_replacement_offsets"}
    owned = {kind: fields_of(processor, kind, inputs) for kind in NAMES}
    assert inputs.keys() - of_text == set().union(*owned.values())
    assert {len(value) for value in owned["audio"].values()} == {len(audio)}
    counts = processor._get_num_multimodal_tokens(image_sizes=[(image.height, image.width) for image in images])
    # Idefics3 puts the images of a prompt into a dimension of their own.
    assert sum(counts["num_image_patches"]) in owned["image"]["pixel_values"].shape[:2]


def test_the_tokens_of_an_image_are_counted_before_it_is_read(processor):
    """vLLM keeps room for this number; some processors count what they write around the features as well."""
    for image in media()[0]:
        [replaced] = processed(processor, [image])["text_replacement_offsets"][0]
        [counted] = processor._get_num_multimodal_tokens(image_sizes=[(image.height, image.width)])["num_image_tokens"]
        written = processor.tokenizer(replaced["replacement"], add_special_tokens=False)["input_ids"]
        assert replaced["replacement"].count(processor.image_token) <= counted <= len(written)


def test_an_item_alone_has_the_features_of_one_in_company_and_a_token_for_each(processor, whole):
    images, audio = media()
    together = processed(processor, images, audio)
    for kind, items in (("image", images), ("audio", audio)):
        token = getattr(processor, f"{kind}_token")
        entries = [entry for entry in together["text_replacement_offsets"][0] if entry["type"] == kind]
        alone = []
        for item, entry in zip(items, entries):
            inputs = processed(processor, **{"images" if kind == "image" else "audio": [item]})
            assert [replaced["type"] for replaced in inputs["text_replacement_offsets"][0]] == [kind]
            fields = fields_of(processor, kind, inputs)
            if kind == "audio":  # so it comes where clips of other lengths are encoded in the same step
                fields["input_features_mask"] = list(fields["input_features_mask"])
            alone.append(features(whole.model, kind, fields))
            assert len(alone[-1]) == entry["replacement"].count(token)
        in_company = features(whole.model, kind, fields_of(processor, kind, together))
        torch.testing.assert_close(torch.cat(alone), in_company, atol=1e-5, rtol=1e-5)


def test_vllm_served_in_its_own_steps_gives_the_logits_of_the_whole_model(folder, processor, whole, monkeypatch):
    images, audio = media()
    inputs = processed(processor, images, audio)
    of_model = {name: value for name, value in inputs.items() if name != "text_replacement_offsets"}
    with torch.no_grad():
        expected = whole(**of_model).logits

    layers = []

    def vllm(module, *arguments, **options):
        layers.append(module.layer_idx)
        return sdpa_attention_forward(module, *arguments, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", vllm)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    text = config.get_text_config()
    assert text is not config
    text._attn_implementation = "vllm"
    base = transformers.AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=True).eval()
    assert isinstance(base, type(whole.model)) and base.base_model_prefix == "model"
    base.load_state_dict(whole.model.state_dict())
    for kind in NAMES:
        assert base.get_encoder(modality=kind) is not base

    ids = inputs["input_ids"]
    x = base.get_input_embeddings()(ids)
    for kind in NAMES:
        found = features(base, kind, fields_of(processor, kind, inputs))
        x = x.masked_scatter((ids == getattr(processor, f"{kind}_token_id"))[..., None], found)
    position = positions(base, processor, inputs)
    with torch.no_grad():
        hidden = base(inputs_embeds=x, position_ids=position, use_cache=False, return_dict=False)[0]
        logits = hidden @ whole.lm_head.weight.T
    assert layers == list(range(text.num_hidden_layers))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_the_decoder_says_how_ranks_share_it_and_the_config_whether_its_head_is_tied(whole):
    config = whole.config
    text, layers = config.get_text_config(), dict(whole.model.named_modules())
    plan = {re.compile(re.escape(name).replace(r"\*", r"\d+")): style for name, style in whole.model.tp_plan.items()}
    shared = [name for name in layers if any(pattern.fullmatch(name) for pattern in plan)]
    linears = [name for name, layer in layers.items() if "language_model" in name and isinstance(layer, nn.Linear)]
    assert set(linears) <= set(shared)
    tied = config.tie_word_embeddings or getattr(text, "tie_word_embeddings", False)
    assert tied == (whole.lm_head.weight is whole.get_input_embeddings().weight)
    assert len(whole.lm_head.weight) == text.vocab_size
    assert config.audio_config.max_source_positions > 0


def test_the_template_writes_a_marker_for_each_medium_of_a_message(processor):
    """vLLM takes a template that loops over the parts of a message to write the markers itself."""
    parts = [{"type": "audio"}, {"type": "image"}, {"type": "text", "text": "one"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert text.index(processor.audio_token) < text.index(processor.image_token) < text.index("one")

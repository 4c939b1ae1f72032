"""BLIP-2's tower and Q-Former in front of a decoder of ours, against Blip2ForConditionalGeneration."""

import dataclasses
import json
from collections import defaultdict

import pytest
import torch
import transformers
import yaml

from avlm.config.decoder import DecoderConfig
from avlm.config.model import ModelConfig, VisionParts
from avlm.config.run import InitFrom
from avlm.data.media import image
from avlm.data.media.patches import cut_into_patches
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample, placeholders
from avlm.families import blip_2
from avlm.families.door import full_name
from avlm.models.avlm import AVLM
from avlm.models.batch import IMAGE
from avlm.models.vit import normalise
from avlm.weights.folder import read_config
from avlm.weights.load import init_weights, load_weights
from avlm.weights.model_from import open_config
from tests.data.small_files import image_file, photo, write_tokenizer
from tests.models.handmade import assert_gradients_close, normalised, pixels_of, save

SIDE = 16
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": SIDE, "patch_size": 4}
QFORMER = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2}
QFORMER |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OPT = {"vocab_size": 40, "hidden_size": 12, "word_embed_proj_dim": 12, "ffn_dim": 24, "num_hidden_layers": 1}
T5 = {"vocab_size": 40, "d_model": 12, "d_kv": 6, "d_ff": 24, "num_layers": 1, "num_heads": 2}
TEXTS = {
    "opt": transformers.OPTConfig(**OPT, num_attention_heads=2),
    "t5": transformers.T5Config(**T5, tie_word_embeddings=False),
}
PROCESSOR = {
    "image_processor_type": "BlipImageProcessor",
    **{"do_convert_rgb": True, "do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3},
    **{"rescale_factor": 1 / 255, "size": {"height": SIDE, "width": SIDE}},
    **{"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
}
WIDTHS = {"num_heads": 2, "num_kv_heads": 1}


@pytest.fixture(scope="module", params=TEXTS)
def case(request, tmp_path_factory):
    """(folder, transformers' model)"""
    torch.manual_seed(0)
    keys = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(**VISION),
        qformer_config=transformers.Blip2QFormerConfig(**QFORMER),
        text_config=TEXTS[request.param],
        num_query_tokens=4,
    )
    theirs = transformers.Blip2ForConditionalGeneration(keys)
    folder = tmp_path_factory.mktemp(request.param)
    save(theirs, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder, theirs


def in_front_of(parts: VisionParts, width: int) -> ModelConfig:
    decoder = DecoderConfig(vocab_size=40, hidden_size=width, intermediate_size=8, num_layers=1, **WIDTHS)
    return ModelConfig(decoder=decoder, vision=parts.vision, vision_projector=parts.vision_projector)


def test_features_and_gradients_of_two_images_equal_those_of_transformers(case):
    folder, theirs = case
    config = in_front_of(read_config(folder), 12)
    model = AVLM(config)
    [report] = init_weights(model, InitFrom(all=str(folder)), seed=0)
    assert set(report.initialised) == {"decoder"} and set(report.skipped) == {"language model"}

    pixels = pixels_of(2, SIDE)
    items = [cut_into_patches(each[None], config.vision) for each in pixels]
    token_T = torch.tensor(placeholders("image", items, config))
    row = pack([EncodedSample("", "mixed", token_T, token_T, {"image": items})], len(token_T), config)
    assert token_T.tolist() == [IMAGE] * 8
    out = theirs.get_image_features(normalised(pixels, config.vision))
    queries_QD = model.vision_projector.resampler(row.image, model.vision(row.image))
    features_TD = model.embed(row)[0]
    torch.testing.assert_close(queries_QD, out.qformer_outputs[0].flatten(0, 1), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(features_TD, out.pooler_output.flatten(0, 1), atol=2e-6, rtol=1e-5)

    weights = torch.randn_like(features_TD)
    (features_TD * weights).sum().backward()
    (out.pooler_output.flatten(0, 1) * weights).sum().backward()
    gradients = defaultdict(list)
    for name, parameter in model.named_parameters():
        module, _, rest = name.partition(".")
        if module in blip_2.PREFIXES:
            gradients[full_name(blip_2, module, rest, blip_2.PREFIXES[module][0])].append(parameter.grad)
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert_gradients_close({name: torch.cat(rows) for name, rows in gradients.items()}, expected, tolerance=5e-6)
    theirs.zero_grad()


def test_pixels_equal_those_of_the_processor(case):
    vision = read_config(case[0]).vision
    assert vision.resize == "stretch" and vision.resample == "bicubic"
    original = photo(41, 23)
    ours = normalise(
        cut_into_patches(image.fit(image.decode(image_file(original), 10**6), vision)[None], vision), vision
    )
    processor = transformers.BlipImageProcessor(**PROCESSOR)
    theirs = cut_into_patches(processor(original, return_tensors="pt")["pixel_values"], vision)
    assert (ours - theirs).abs().max() <= 2 / 255


def test_a_decoder_of_another_width_gets_a_projector_of_its_own(case):
    folder, _ = case
    config = in_front_of(read_config(folder), 8)
    wide = dataclasses.replace(config.vision_projector, type="mlp2x_gelu")
    for changed, number in ((config, 2), (dataclasses.replace(config, vision_projector=wide), 4)):
        [report] = init_weights(AVLM(changed), InitFrom(all=str(folder)), seed=0)
        assert report.initialised["vision_projector"] == number
        assert report.skipped["projection to a language model that our decoder is none of"] == 2
    [report] = load_weights(AVLM(config), InitFrom(vision=str(folder)))
    assert "other modules" in report.skipped and not any(name.startswith("vision_projector") for name in report.names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_queries": 5}, r"vision_projector\.resampler\.num_queries is 5, and there 4"),
        ({"num_layers": 4}, r"vision_projector\.resampler\.num_layers is 4, and there 3"),
        (None, r"vision_projector\.resampler is None, and there ResamplerConfig"),
    ],
)
def test_a_q_former_of_other_sizes_is_refused(case, changes, message):
    config = in_front_of(read_config(case[0]), 12)
    resampler = None if changes is None else dataclasses.replace(config.vision_projector.resampler, **changes)
    projector = dataclasses.replace(config.vision_projector, resampler=resampler)
    with pytest.raises(ValueError, match=message):
        load_weights(AVLM(dataclasses.replace(config, vision_projector=projector)), InitFrom(all=str(case[0])))


def test_from_takes_the_tower_and_the_q_former_and_leaves_the_decoder(case, tmp_path):
    """Of a config: what is left out are the prompts of BLIP-2, and its language model."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.LlamaConfig(vocab_size=400, **sizes)
    save(transformers.LlamaForCausalLM(text), tmp_path / "llama")
    write_tokenizer(tmp_path / "llama", ["<s>", "</s>"], chat_template="{{ messages[0].content }}", eos_token="</s>")
    model = {"from": str(case[0]), "decoder": {"from": str(tmp_path / "llama")}}
    stage = {"name": "a", "steps": 1, "train": ["vision_projector"], "optimizer": {"lr": 1e-4}}
    tree = {"model": model, "data": {"train": "synthetic"}, "stages": [stage]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    config = open_config(tmp_path / "run.yaml")
    assert config.model.vision_projector.resampler.num_queries == 4 and config.model.decoder.hidden_size == 8
    assert config.init_from == InitFrom(all=str(case[0]), decoder=str(tmp_path / "llama"))
    whole, decoder = load_weights(AVLM(config.model), config.init_from)
    assert whole.initialised == {"vision_projector": 2} and not decoder.initialised


def test_absent_keys_are_those_of_the_class():
    ours = blip_2.read({"model_type": "blip-2"}, {})
    assert ours == blip_2.read(json.loads(transformers.Blip2Config().to_json_string(use_diff=False)), {})
    with pytest.raises(ValueError, match=r"hidden_act='gelu_new' is not implemented"):
        blip_2.read({"model_type": "blip-2", "qformer_config": {"hidden_act": "gelu_new"}}, {})
    with pytest.raises(ValueError, match=r"size=.*384.* is not implemented"):
        blip_2.read({"model_type": "blip-2"}, {"preprocessor_config.json": {"do_resize": True}})

"""The folder for transformers with code of its own: the same ids, logits and answers as ours, of every tower, projector
and decoder that it holds, for text, images, audio and videos, alone and together, in a batch and with a cache."""

import dataclasses

import numpy
import pytest
import torch
import transformers

from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.config.values import validated
from avlm.data.media import audio
from avlm.evaluation.answering import open_encoder
from avlm.families import door, qwen2_vl
from avlm.weights.load import open_model
from avlm.weights.served import check_code, choose, places
from tests.data.small_files import photo, write_tokenizer
from tests.families import test_gemma_vision_keys, test_qwen_vl_prompts
from tests.models.handmade import build
from tests.weights.served_models import (
    ASKED,
    CHATML,
    CLIPS,
    FAMILIES,
    IMAGES,
    MODELS,
    assert_same,
    changed,
    joint,
    of_family,
    of_model,
    sample,
    served,
)
from tests.weights.test_peft import command
from tests.weights.test_sources import write_run

TONE = numpy.sin(numpy.arange(800, dtype=numpy.float32) / 9)
MEDIA = {"audio": CLIPS, "image": IMAGES}
TILES = {"tiles": "pinpoints", "grids": [[1, 2]], "join": False}


@pytest.mark.parametrize("name", MODELS)
def test_text_images_audio_and_videos_give_our_ids_logits_and_answers(name, tmp_path):
    config, options, asked = of_model(name)
    parts = served(config, tmp_path, **options)
    assert_same(*parts, asked)
    assert_comes_back(parts[0], tmp_path / "out")


def test_frames_by_their_rate_and_within_bounds_are_those_of_training(tmp_path):
    for most in (8, 3):  # of the 4 that the rate asks for
        video = {"num_frames": None, "fps": 2.0, "min_frames": 1, "max_frames": most}
        assert_same(*served(MODELS["vision alone"], tmp_path / str(most), video=video), ASKED[4:5])


def test_beams_take_one_clip_a_prompt_and_refuse_what_would_be_mixed_up(tmp_path):
    *_, engine = served(MODELS["llava"], tmp_path)
    one = engine.prompts([ASKED[2], sample("<audio> two", audios=CLIPS[2:])])
    settings = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False}
    both = engine.network.generate(**one, **settings)
    alone = engine.network.generate(**engine.prompts([ASKED[2]]), **settings)
    assert both[:2, -5:].tolist() == alone[:, -5:].tolist()
    uneven = [[sample(f"<{kind}><{kind}>", **{f"{kind}s": files[:2]}), ASKED[0]] for kind, files in MEDIA.items()]
    for several in [[ASKED[3]], *uneven]:  # as many files as prompts do not make one of each
        with pytest.raises(ValueError, match="take one medium of a kind"):
            engine.network.generate(**engine.prompts(several), **settings)


def test_a_folder_that_transformers_saved_again_encodes_the_same(tmp_path):
    *_, engine = served(MODELS["fixed"], tmp_path, video={"num_frames": 3})
    engine.processor.save_pretrained(tmp_path / "again")
    engine.network.save_pretrained(tmp_path / "again")
    assert check_code(tmp_path / "again")
    again = transformers.AutoProcessor.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again.tokenizer.padding_side == "left"
    shown = numpy.zeros((8, 30, 40, 3), numpy.uint8)
    given = {"audio": [TONE], "images": [photo(30, 20)], "videos": [shown], "text": "<audio><image><video>"}
    first, second = engine.processor(**given, return_tensors="pt"), again(**given, return_tensors="pt")
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    assert len(first["pixel_values_videos"][0]) == 3  # of 8: the frames that training chooses
    assert again(images=[photo(30, 20)], return_tensors="pt")["pixel_values"].equal(first["pixel_values"])


@pytest.mark.parametrize(
    ("audio", "text", "message"),
    [
        ([TONE[None]], "<audio>", r"float32 \(1, 800\): give floats"),
        ([TONE[:0]], "<audio>", r"float32 \(0,\): give floats"),
        ([(TONE * 32767).astype(numpy.int16)], "<audio>", "audio of int16"),
        (None, "<audio>", "1 audio tokens for 0"),
        ([TONE, TONE], ["<audio>", "two"], "1 audio tokens for 2"),
    ],
)
def test_audio_that_would_be_heard_wrongly_is_refused(audio, text, message, tmp_path):
    *_, engine = served(MODELS["audio alone"], tmp_path)
    with pytest.raises(ValueError, match=message):
        engine.processor(text=text, audio=audio)
    with pytest.raises(ValueError, match="44100 Hz: resample"):
        engine.processor(text="<audio>", audio=[TONE], audio_kwargs={"sampling_rate": 44_100})


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_a_place_for_an_image_or_a_video_that_is_not_given_is_refused(name, tmp_path):
    config, options, _ = of_model(name) if name in MODELS else of_family(name)
    *_, engine = served(config, tmp_path, **options)
    for kind in ("image", "video"):
        token = getattr(engine.processor, f"{kind}_token")
        with pytest.raises(ValueError, match=f"1 {kind} tokens for 0: write one for each"):
            engine.processor(text=["one", f"two {token}"])


def test_a_clip_of_no_feature_is_no_error_and_embeddings_that_no_audio_goes_into_are(tmp_path):
    *_, engine = served(MODELS["masked"], tmp_path)
    short = engine.processor(text="one<audio>", audio=[TONE[:100]], return_tensors="pt")  # half of a pooled row
    assert engine.network(**short).logits.shape[1] == short["input_ids"].shape[1]
    heard = engine.prompts([ASKED[2]])
    embedded = engine.network.get_input_embeddings()(heard["input_ids"])
    media = {name: heard[name] for name in ("input_features", "input_features_mask")}
    with pytest.raises(ValueError, match="0 tokens"):
        engine.network(inputs_embeds=embedded, **media)


def assert_comes_back(model, folder) -> None:
    """Through ``init_from``, with every weight, adapters merged."""
    opened = open_model(str(folder))
    back = opened.load(torch.device("cpu"), torch.float32)
    config = dataclasses.replace(model.config, lora=None)
    assert opened.is_published and dataclasses.replace(opened.config, decoder=config.decoder) == config
    if model.config.lora is None:
        for name, parameter in model.named_parameters():
            rows = back.get_parameter(name)[: len(parameter)]  # the others are those of media tokens
            assert torch.equal(rows, parameter), name


def with_swiglu(name: str) -> ModelConfig:
    config, _ = joint(name)
    return dataclasses.replace(config, vision_projector=dataclasses.replace(config.vision_projector, type="swiglu"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_that_sees_hears_too(name, tmp_path):
    config, options, asked = of_family(name)
    parts = served(config, tmp_path, **options)
    assert_same(*parts, asked)
    assert_comes_back(parts[0], tmp_path / "out")


@pytest.mark.parametrize("format", door.FORMATS)
def test_a_format_refuses_a_model_that_it_cannot_hold_in_one_line(format):
    family = door.FORMATS[format]
    models = [joint(name)[0] for name in FAMILIES]
    for config in [*models, *MODELS.values()]:
        for sees, hears in [(True, True), (True, False), (False, True)]:
            left_out = {} if sees else {"vision": None, "vision_projector": None}
            left_out |= {} if hears else {"audio": None, "audio_projector": None}
            try:
                family.config_json(dataclasses.replace(config, **left_out), dict.fromkeys(family.MEDIA_TOKENS, 0))
            except ValueError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        (dataclasses.replace(MODELS["audio alone"], audio=None, audio_projector=None), {}, "--format decoder holds it"),
        (changed("vision", gated=True), {}, "nearest being LlavaForConditionalGeneration: .* no gated=True"),
        (
            MODELS["llava"],
            {"markers": {"image": ["Image {n}: ", ""]}},
            r"data.markers.image=\['Image \{n\}: ', ''\] counts",
        ),
        (changed("decoder", qkv_bias=True, qk_norm=True), {}, "no Hugging Face architecture has both qkv_bias and"),
        (changed("vision"), {"image_layout": {"line_break": "\n"}}, "cannot hold data.image_layout.line_break="),
        (
            changed("vision_projector", feature_norm="rms_offset"),
            {},
            "transformers format cannot hold vision_projector.feature_norm=rms_offset: train it with rms",
        ),
        (changed("audio_projector", norm="rms_offset"), {}, "cannot hold audio_projector.norm=rms_offset"),
        (
            test_gemma_vision_keys.model_of("paligemma2"),
            {"template": "paligemma"},
            "being PaliGemmaForConditionalGeneration: its processor takes no prompt without an image, but --format",
        ),
        (MODELS["llava"], {"image_layout": TILES}, "being LlavaNextForConditionalGeneration: .*newline=true"),
        (changed("vision"), {"image_layout": TILES}, "a LlavaNext with tiles has no vision_projector.downsample=2"),
        (
            with_swiglu("qwen2_5_vl"),
            {},
            "nearest being Qwen2_5_VLForConditionalGeneration: .* vision_projector.type=swiglu",
        ),
    ],
)
def test_a_model_that_no_class_sees_like_is_refused_by_what_the_nearest_lacks(config, data, message):
    with pytest.raises(ValueError, match=message):
        choose(config, validated(DataConfig, {"train": "x", **data}, "data"))


@pytest.mark.parametrize("base", ["gpt", ["llava"]])
def test_a_base_that_is_none_is_refused(base):
    with pytest.raises(ValueError, match=r"base .* in config\.json is not one of"):
        places({"base": base}, MODELS["llava"])


def test_the_command_says_what_the_folder_does_without(tmp_path, monkeypatch, capsys):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", eos_token="</s>")
    config = dataclasses.replace(MODELS["llava"], audio=None, audio_projector=None)
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=400))
    given = {
        "train": "x",
        "tokenizer": str(tokenizer),
        "template": "plain",
        "seq_length": 64,
        "video": {"text": {"before": "a "}},
    }
    write_run(tmp_path / "run", build(config), data=validated(DataConfig, given, "data"))
    command(monkeypatch, tmp_path / "run", tmp_path / "out", "--format", "transformers")
    said = capsys.readouterr().out
    assert "out', trust_remote_code=True)" in said and "--format llava holds this model without code" in said
    assert "it takes no videos, because of data.video.text=" in said


def test_a_template_of_the_tokenizer_gets_parts_and_tags_of_audio(tmp_path):
    config, prompts = joint("qwen2_5_vl")
    words = [*door.FORMATS["qwen2_5_vl"].MEDIA_TOKENS, "<|im_start|>", "<|im_end|>"]
    prompts = {**prompts, "template": "tokenizer", "markers": {**prompts["markers"], "audio": ["<|im_start|>", ""]}}
    model, encoder, engine = served(
        config, tmp_path, words=words, chat_template=test_qwen_vl_prompts.TEMPLATE, **prompts
    )
    assert_same(model, encoder, engine, ASKED[:4])
    parts = [{"type": "image"}, {"type": "text", "text": "one"}, {"type": "audio"}, {"type": "text", "text": "two"}]
    text = engine.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    tags = sample("<image>one<audio>two", images=IMAGES[:1], audios=CLIPS[:1])
    [ids] = engine.prompts([tags])["input_ids"]
    again = engine.processor(
        text=[text], images=[[photo(30, 47)]], audio=[audio.decode(CLIPS[0], 60).numpy()], add_special_tokens=False
    )
    assert again["input_ids"] == [ids.tolist()]
    opened = open_model(str(tmp_path / "out"))
    own, _ = open_encoder(opened)
    for each in ASKED[:4]:
        asked = (each.messages[:-1], each.images, each.audios)
        assert own.prompt(*asked).token_T.equal(encoder.prompt(*asked).token_T)


@pytest.mark.parametrize("template", ["tokenizer", "chatml"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "decoder"])
def test_a_folder_of_a_family_is_run_by_the_same_engine(name, template, tmp_path):
    config, prompts = joint(name) if name == "qwen2_5_vl" else (MODELS["llava"], {})
    config = dataclasses.replace(config, audio=None, audio_projector=None)
    if name == "decoder":
        config = dataclasses.replace(config, vision=None, vision_projector=None)
    words = [*qwen2_vl.MEDIA_TOKENS, "<image>", "<|im_start|>", "<|im_end|>"]
    jinja = test_qwen_vl_prompts.TEMPLATE if name == "qwen2_5_vl" else CHATML
    parts = served(config, tmp_path, words, jinja, name, template=template, **prompts)
    assert_same(*parts, ASKED[: 1 if name == "decoder" else 2])

"""The folder for transformers with code of its own: the same ids, logits and answers as ours, of every tower, projector
and decoder that it holds, for text, images, audio and videos, alone and together, in a batch and with a cache."""

import dataclasses

import pytest
import torch
import transformers

from avlm.config.decoder import RopeScaling
from avlm.config.model import AudioConfig, LoraConfig, ModelConfig, ProjectorConfig
from avlm.config.run import DataConfig
from avlm.config.values import validated
from avlm.data.media import audio
from avlm.data.packing import pack
from avlm.data.sample import Sample, SampleEncoder
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation.answering import open_encoder
from avlm.evaluation.generation import generate
from avlm.evaluation.transformers_engine import Engine
from avlm.families import door, qwen2_vl
from avlm.weights.export import export
from avlm.weights.load import open_model
from avlm.weights.served import choose
from tests.data.small_files import CONTROL, image_file, photo, tone, video_file, write_tokenizer
from tests.families import (
    test_idefics3_keys,
    test_internvl_keys,
    test_llava_next_keys,
    test_mistral3,
    test_mistral3_keys,
    test_qwen_vl_keys,
    test_qwen_vl_prompts,
)
from tests.models.handmade import build
from tests.models.test_avlm import WHOLE
from tests.weights.test_peft import command
from tests.weights.test_sources import write_run

AUDIO = AudioConfig(hidden_size=24, intermediate_size=48, num_layers=2, num_heads=2, num_mels=16, max_positions=50)
IMAGES = [image_file(photo(*size, seed)) for seed, size in enumerate([(30, 47), (61, 20), (16, 16)])]
CLIPS = [tone(0.3), tone(2.57, frequency=300.0), tone(1.0)]  # of one and of three windows
VIDEO = video_file(2.0, 8)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sample(question: str, **media) -> Sample:
    talk = [{"role": "user", "content": question}, {"role": "assistant", "content": "x"}]
    return Sample("sample", talk, **media)


ASKED = [
    sample("one two?"),
    sample("<image>\nturn?", images=IMAGES[:1]),
    sample("<audio> one?", audios=CLIPS[:1]),
    sample("one <image> and <audio> two\n<audio><image>?", images=IMAGES[1:], audios=CLIPS[1:]),
    sample("<video>\nturn?", videos=[VIDEO]),
    sample("<audio>\n<image> <video> one", images=IMAGES[:1], audios=CLIPS[1:2], videos=[VIDEO]),
]


def served(config: ModelConfig, folder, words=(), chat_template=CHATML, format="transformers", **data):
    """(our model of random weights, its prompt encoder, its folder in transformers' hands)."""
    names = {"eos_token": "</s>", "chat_template": chat_template}
    source = write_tokenizer(folder / "tokenizer", [*CONTROL, *words], **names)
    tokenizer = Tokenizer(source)
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=tokenizer.size))
    given = {"train": "x", "tokenizer": str(source), "template": "llava", **data}
    data = validated(DataConfig, given, "data")
    model = build(config)
    for name, parameter in model.named_parameters():
        if ".lora_up" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    export(config, model.state_dict(), folder / "out", format, data=data)
    return model, SampleEncoder(config, data, tokenizer), Engine(folder / "out", data, config)


def assert_same(model, encoder: SampleEncoder, engine: Engine, asked: list[Sample]) -> None:
    prompts = [encoder.prompt(each.messages[:-1], each.images, each.audios, each.videos) for each in asked]
    for each, prompt in zip(asked, prompts):
        inputs = engine.prompts([each])
        [ids] = inputs["input_ids"]
        assert len(ids) == len(prompt) and ((ids == prompt.token_T) | (prompt.token_T < 0)).all()
        batch = pack([prompt], len(prompt), model.config)
        with torch.no_grad():
            ours = model.decoder.head(model.decoder.norm(model.hidden(batch)), None)
            theirs = engine.network(**inputs).logits[0, :, : ours.shape[1]]
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    stops = engine.stop_ids
    completions = generate(model, prompts, stop_ids=stops, max_new_tokens=12)
    ours = [[token for token in each.token_ids if token not in stops] for each in completions]
    assert engine.answer(asked, 12) == ours


def changed(module: str, **changes) -> ModelConfig:
    config = dataclasses.replace(WHOLE, audio=AUDIO)
    return dataclasses.replace(config, **{module: dataclasses.replace(getattr(config, module), **changes)})


SIGLIP = {"class_token": False, "pre_norm": False, "patch_bias": True, "activation": "gelu_tanh", "resize": "stretch"}
NORMS = {"norm": "rms", "feature_norm": "layer", "hidden_norm": "rms", "output_norm": "layer"}
MODELS = {
    "llava": changed("vision_projector", downsample=1),
    "siglip": changed("vision", **SIGLIP, feature_layer=-1, post_norm=True),
    "clip with a post norm": changed("vision", post_norm=True),
    "swiglu": changed("vision_projector", type="swiglu", **NORMS, hidden_size=40),
    "linear": changed("vision_projector", type="linear", bias=False, merge=True, norm="layer"),
    "mean": changed("vision_projector", mean=True, bias=False),
    "audio swiglu": changed("audio_projector", type="swiglu", downsample=3, **NORMS),
    "audio merged": changed("audio_projector", type="mlp2x_gelu", merge=True, norm="rms"),
    "audio mean": changed("audio_projector", mean=True, downsample=7),
    "fixed": changed("audio", window="fixed"),
    "fixed, of clips": changed("audio", window="fixed", log_mel="clip"),
    "silence": changed("audio", edge="silence", log_mel="clip"),
    "masked": changed("audio", edge="masked", pool=2, key_bias=True),
    "tied": changed("decoder", tie_embedding=True),
    "qwen2": changed("decoder", qkv_bias=True, sliding_window=9, window_layers=[1]),
    "qwen3": changed("decoder", qk_norm=True, head_dim=12),
    "mistral": changed("decoder", sliding_window=11),
    "llama3": changed(
        "decoder",
        rope_scaling=RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64),
    ),
    "audio alone": dataclasses.replace(changed("decoder", tie_embedding=True), vision=None, vision_projector=None),
    "vision alone": dataclasses.replace(changed("decoder"), audio=None, audio_projector=None),
    "lora": dataclasses.replace(changed("decoder"), lora=LoraConfig(rank=4, targets=["*.q", "*.up"])),
}


TILES = {"tiles": "pinpoints", "grids": [[1, 2]], "join": False}


@pytest.mark.parametrize("name", MODELS)
def test_text_images_audio_and_videos_give_our_ids_logits_and_answers(name, tmp_path):
    config = MODELS[name]
    hears, sees = config.audio is not None, config.vision is not None
    asked = [each for each in ASKED if (hears or not each.audios) and (sees or not each.images + each.videos)]
    parts = served(config, tmp_path, video={"num_frames": 3, "audio": "after" if hears else False})
    assert_same(*parts, asked)
    assert_comes_back(parts[0], tmp_path / "out")


def test_beams_take_one_clip_a_prompt_and_refuse_what_would_be_mixed_up(tmp_path):
    *_, engine = served(MODELS["llava"], tmp_path)
    one, several = engine.prompts([ASKED[2], sample("<audio> two", audios=CLIPS[2:])]), engine.prompts([ASKED[3]])
    settings = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False}
    both = engine.network.generate(**one, **settings)
    alone = engine.network.generate(**engine.prompts([ASKED[2]]), **settings)
    assert both[:2, -5:].tolist() == alone[:, -5:].tolist()
    with pytest.raises(ValueError, match="take one medium of a kind"):
        engine.network.generate(**several, **settings)


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


def joint(name: str) -> tuple[ModelConfig, dict]:
    """A tiny vision-language model of a family that hears as well, and its prompts."""
    family, files = door.FORMATS[name], {}
    if name.startswith("qwen"):
        keys = test_qwen_vl_keys.keys_of(name)
    elif name == "internvl":
        keys, files = test_internvl_keys.keys_of("qwen2"), test_internvl_keys.FILES
    elif name in ("idefics3", "smolvlm"):
        keys, files = test_idefics3_keys.keys_of(name), test_idefics3_keys.published(name)
    elif name.startswith("llava"):
        keys = test_llava_next_keys.keys_of(name)
    else:
        keys, files = test_mistral3.keys_of(name), test_mistral3_keys.HUB_FILES
    config = family.read(keys, files)
    heard = {"audio": AUDIO, "audio_projector": ProjectorConfig(downsample=4)}
    decoder = dataclasses.replace(config.decoder, max_position=4096)
    prompts = door.prompts(family, config, {"config.json": keys, **files})
    return dataclasses.replace(config, decoder=decoder, **heard), prompts


def with_swiglu(name: str) -> ModelConfig:
    config, _ = joint(name)
    return dataclasses.replace(config, vision_projector=dataclasses.replace(config.vision_projector, type="swiglu"))


FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "smolvlm", "llava_next", "llava_next_video"]
FAMILIES += ["llava_onevision", "pixtral", "mistral3"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_that_sees_hears_too(name, tmp_path):
    config, prompts = joint(name)
    words = dict.fromkeys(
        [*door.FORMATS[name].MEDIA_TOKENS, "<|im_start|>", "<|im_end|>", "<global-img>", "[E]", "[B]"]
    )
    parts = served(config, tmp_path, words=words, template="chatml", **prompts)
    if name in ("idefics3", "smolvlm"):  # by default Pillow resizes where torchvision has no Lanczos, for any filter
        pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", backend="torchvision")
        parts[2].processor.image_processor = pixels
    asked = ASKED if "video" in door.FORMATS[name].MEDIA else [each for each in ASKED if not each.videos]
    assert_comes_back(parts[0], tmp_path / "out")
    assert_same(*parts, asked[:-1] if name == "smolvlm" else asked)  # its processor takes images or videos, not both


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
        (changed("decoder", qkv_bias=True, qk_norm=True), {}, "no Hugging Face architecture has both qkv_bias and"),
        (changed("vision"), {"image_layout": {"line_break": "\n"}}, "cannot hold data.image_layout.line_break="),
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

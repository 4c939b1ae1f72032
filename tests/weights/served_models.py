"""Small models with random weights in transformers' hands, and how near they come to ours there."""

import dataclasses

import torch
import transformers
from PIL import Image

from avlm.config.decoder import RopeScaling
from avlm.config.model import AudioConfig, LoraConfig, ModelConfig, ProjectorConfig
from avlm.config.run import DataConfig
from avlm.config.values import validated
from avlm.data.packing import pack
from avlm.data.sample import Sample, SampleEncoder
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation.generation import generate
from avlm.evaluation.transformers_engine import Engine
from avlm.families import door
from avlm.models.avlm import AVLM
from avlm.weights.export import export
from tests.data.small_files import CONTROL, image_file, photo, tone, video_file, write_tokenizer
from tests.families import (
    test_gemma_vision_keys,
    test_idefics3_keys,
    test_internvl_keys,
    test_llava_next_keys,
    test_mistral3,
    test_mistral3_keys,
    test_qwen_vl_keys,
)
from tests.models.handmade import build
from tests.models.test_avlm import WHOLE

AUDIO = AudioConfig(hidden_size=24, intermediate_size=48, num_layers=2, num_heads=2, num_mels=16, max_positions=50)
TURNED = Image.Exif()
TURNED[0x0112] = 6  # orientation: shown after a quarter turn
IMAGES = [image_file(photo(30, 47), exif=TURNED), image_file(photo(61, 20, 1)), image_file(photo(16, 16, 2))]
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
    engine = Engine(folder / "out", data, config)
    if config.vision is not None and config.vision.resize == "stretch" and data.image_layout.tiles == "long_edge":
        # By default Pillow resizes for Idefics3 where torchvision has no Lanczos, whatever filter is asked for.
        pixels = transformers.AutoImageProcessor.from_pretrained(folder / "out", backend="torchvision")
        engine.processor.image_processor = pixels
    return model, SampleEncoder(config, data, tokenizer), engine


def assert_same(model: AVLM, encoder: SampleEncoder, engine: Engine, asked: list[Sample]) -> None:
    found = compared(model, encoder, engine, asked)
    assert found.ids == found.answers == len(asked) and found.error <= 1e-4 * max(1.0, found.largest), found


@dataclasses.dataclass
class Compared:
    """Of some prompts: how many have the same ids, and the same greedy answers; the largest difference between logits,
    and the largest logit."""

    ids: int = 0
    answers: int = 0
    error: float = 0.0
    largest: float = 0.0


@torch.no_grad()
def compared(model: AVLM, encoder: SampleEncoder, engine: Engine, asked: list[Sample]) -> Compared:
    """Prompts and logits of one after the other, answers of all of them as a batch."""
    prompts = [encoder.prompt(each.messages[:-1], each.images, each.audios, each.videos) for each in asked]
    found = Compared()
    for each, prompt in zip(asked, prompts):
        inputs = engine.prompts([each])
        [ids] = inputs["input_ids"]
        if len(ids) != len(prompt) or ((ids != prompt.token_T) & (prompt.token_T >= 0)).any():
            continue
        found.ids += 1
        ours = model.decoder.head(model.decoder.norm(model.hidden(pack([prompt], len(prompt), model.config))), None)
        theirs = engine.network(**inputs).logits[0, :, : ours.shape[1]]  # media tokens may have rows of their own
        found.error = max(found.error, (theirs - ours).abs().max().item())
        found.largest = max(found.largest, ours.abs().max().item())
    stops = engine.stop_ids
    completions = generate(model, prompts, stop_ids=stops, max_new_tokens=12)
    ours = [[token for token in each.token_ids if token not in stops] for each in completions]
    found.answers = sum(answer == theirs for answer, theirs in zip(ours, engine.answer(asked, 12)))
    return found


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


def joint(name: str) -> tuple[ModelConfig, dict]:
    """A tiny vision-language model of a family that hears as well, and its prompts."""
    family, files = door.FORMATS[name], {}
    if name.startswith("qwen"):
        keys = test_qwen_vl_keys.keys_of(name)
    elif name == "internvl":
        keys, files = test_internvl_keys.keys_of("qwen2"), test_internvl_keys.FILES
    elif name in ("idefics3", "smolvlm"):
        keys, files = test_idefics3_keys.keys_of(name), test_idefics3_keys.published(name)
    elif name == "gemma3":
        keys, files = test_gemma_vision_keys.keys_of(name), test_gemma_vision_keys.published(name)
    elif name.startswith("llava"):
        keys = test_llava_next_keys.keys_of(name)
    else:
        keys, files = test_mistral3.keys_of(name), test_mistral3_keys.HUB_FILES
    config = family.read(keys, files)
    heard = {"audio": AUDIO, "audio_projector": ProjectorConfig(downsample=4)}
    decoder = dataclasses.replace(config.decoder, max_position=4096)
    prompts = door.prompts(family, config, {"config.json": keys, **files})
    if name.startswith("qwen"):  # the published bounds are those of large photos
        prompts["image_tokens"] = [4, 12]
        prompts["video"]["tokens" if name == "qwen3_vl" else "frame_tokens"] = [8, 24]
    return dataclasses.replace(config, decoder=decoder, **heard), prompts


FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "smolvlm", "llava_next", "llava_next_video"]
FAMILIES += ["llava_onevision", "pixtral", "mistral3", "gemma3"]


def of_model(name: str) -> tuple[ModelConfig, dict, list[Sample]]:
    """One of MODELS, options of ``served``, and what it is asked."""
    config = MODELS[name]
    hears, sees = config.audio is not None, config.vision is not None
    asked = [each for each in ASKED if (hears or not each.audios) and (sees or not each.images + each.videos)]
    return config, {"video": {"num_frames": 3, "audio": "after" if hears else False}}, asked


def of_family(name: str) -> tuple[ModelConfig, dict, list[Sample]]:
    """The same of a family that sees and now hears."""
    config, prompts = joint(name)
    words = [*door.FORMATS[name].MEDIA_TOKENS, "<|im_start|>", "<|im_end|>", "<global-img>", "[E]", "[B]"]
    asked = ASKED if "video" in door.FORMATS[name].MEDIA else [each for each in ASKED if not each.videos]
    if name == "smolvlm":  # its processor takes images or videos, not both
        asked = asked[:-1]
    return config, {"words": list(dict.fromkeys(words)), "template": "chatml", **prompts}, asked

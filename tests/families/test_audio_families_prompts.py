"""Qwen2-Audio, Audio Flamingo 3 and Qwen2.5-Omni exported with their prompts: the processors of transformers read the
folder, and both sides make the same ids, log-mel and answers of clips, images and videos."""

import dataclasses
import io
import wave

import av
import numpy
import pytest
import torch
import transformers
from transformers.video_utils import VideoMetadata

from avlm.config.run import DataConfig
from avlm.config.values import validated
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample, SampleEncoder
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation.generation import generate
from avlm.families import door
from avlm.models.batch import AUDIO, IMAGE
from avlm.weights.export import export
from avlm.weights.folder import model_and_data, stop_ids
from tests.data.media.test_area import every_frame
from tests.data.small_files import CORPUS, image_file, photo, video_file, write_tokenizer
from tests.families.measured import note
from tests.families.test_audio_families import CLASSES
from tests.families.test_audio_families_keys import FAMILIES, keys_of
from tests.models.handmade import build

# As published: each part of a list where it stands; Audio Flamingo 3 puts the audio of a turn before its text.
QWEN_AUDIO = transformers.Qwen2AudioProcessor.default_chat_template.fget(None)
OMNI = """\
{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>\
{% elif part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>\
{% elif part['type'] == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>\
{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
FLAMINGO = OMNI.replace("<|audio_bos|><|AUDIO|><|audio_eos|>", "<sound>")
TEMPLATES = {"qwen2_audio": QWEN_AUDIO, "audioflamingo3": FLAMINGO, "qwen2_5_omni": OMNI}
RATE = 8  # frames a second of the video


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, tmp_path_factory):
    """(family, our model with windows as published, the folder of its export)."""
    name = request.param
    family, here = FAMILIES[name], tmp_path_factory.mktemp(name)
    control = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", *family.MEDIA_TOKENS]
    corpus = [*CORPUS, "Audio 1: one", "You are a helpful assistant."]
    names = {
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATES[name],
    }
    write_tokenizer(here / "tokenizer", control, corpus, **names)
    tokenizer = Tokenizer(here / "tokenizer")
    keys = keys_of(name)
    keys["audio_config"]["max_source_positions"] = 1500
    if name == "qwen2_5_omni":
        keys["audio_config"]["n_window"] = 100
    config = family.read(keys, {})
    decoder = dataclasses.replace(config.decoder, vocab_size=tokenizer.size, max_position=8192)
    config = dataclasses.replace(config, decoder=decoder)
    prompts = door.prompts(family, config, {"config.json": keys})
    if name == "qwen2_5_omni":
        prompts["image_tokens"] = [4, 12]
    given = {"train": "x", "tokenizer": str(here / "tokenizer"), "template": "tokenizer", **prompts}
    model = build(config)
    export(config, model.state_dict(), here / "out", name, data=validated(DataConfig, given, "data"))
    return name, model, here / "out"


def recording(seconds: float, seed: int = 0) -> tuple[numpy.ndarray, bytes]:
    """Noise that grows louder: float32 (samples,) at 16 kHz, and its WAV file."""
    count = round(16_000 * seconds)
    noise = numpy.random.default_rng(seed).normal(0, 1, count) * numpy.linspace(100, 8000, count)
    samples = noise.clip(-32768, 32767).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.tobytes())
    return samples.astype(numpy.float32) / 32768, buffer.getvalue()


def processed(folder, parts: list[dict], **media) -> dict:
    """What transformers' processor makes of a turn."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    return processor(text=[text], return_tensors="pt", **media)


def assert_equal_ids(inputs: dict, prompt: EncodedSample, theirs) -> None:
    [ids] = inputs["input_ids"]
    kinds = {"audio_token_id": AUDIO, "image_token_id": IMAGE, "video_token_id": IMAGE}
    expected = ids.clone()
    for key, ours in kinds.items():
        expected[ids == getattr(theirs.config, key, -1)] = ours
    assert expected.tolist() == prompt.token_T.tolist()


@pytest.mark.parametrize("seconds", [[0.1, 3.21], [29.99], [95.0]], ids=str)
def test_a_folder_of_ours_makes_the_prompts_and_answers_that_we_make(exported, seconds):
    """Clips from 0.1 s on; Qwen2-Audio's processor cuts them off at 30 s, and ours does not."""
    name, model, folder = exported
    if name == "audioflamingo3":
        seconds = seconds[-1:]  # its processor takes one clip a turn
    theirs, report = CLASSES[name].from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    config, data = model_and_data(folder)
    assert (config, data.template) == (model.config, "tokenizer")
    clips = [recording(length, seed) for seed, length in enumerate(seconds)]
    parts = [part for _ in clips for part in ({"type": "audio"}, {"type": "text", "text": "one"})]
    inputs = processed(folder, parts, audio=[samples for samples, _ in clips])
    encoder = SampleEncoder(config, data, Tokenizer(folder))
    question = [{"role": "user", "content": "<audio>one" * len(clips)}]
    prompt = encoder.prompt(question, audios=[file for _, file in clips])
    if name == "qwen2_audio" and seconds == [95.0]:
        assert (prompt.token_T == AUDIO).sum() == 95 * 25 and inputs["feature_attention_mask"].sum() == 3000
        return
    assert_equal_ids(inputs, prompt, theirs)
    with torch.no_grad():
        hidden = model.hidden(pack([prompt], len(prompt), config))
        logits = model.decoder.head(model.decoder.norm(hidden), None)
        torch.testing.assert_close(logits, theirs(**inputs).logits[0], atol=1e-4, rtol=1e-4)
    [answer] = generate(model, [prompt], stop_ids=stop_ids(folder), max_new_tokens=4)
    out = theirs.generate(**inputs, do_sample=False, max_new_tokens=4)
    assert answer.token_ids == out[0, inputs["input_ids"].shape[1] :].tolist()
    note(f"{name} prompts")


@pytest.mark.parametrize("exported", ["qwen2_5_omni"], indirect=True)
@pytest.mark.parametrize("heard", ["interleaved", False])
def test_images_audio_and_a_video_with_its_sound_stand_in_one_prompt_of_qwen_omni(exported, heard):
    name, model, folder = exported
    theirs = CLASSES[name].from_pretrained(folder)
    config, data = model_and_data(folder)
    samples, clip = recording(1.3)
    picture, video = photo(70, 33), video_file(5.0, RATE, sound=True)
    sound = soundtrack(video)
    frames = every_frame(video)
    metadata = [VideoMetadata(total_num_frames=len(frames), fps=float(RATE))]
    parts = [{"type": "image"}, {"type": "text", "text": "one"}, {"type": "audio"}, {"type": "video"}]
    size = {"shortest_edge": 8 * 8 * 8, "longest_edge": 24 * 8 * 8}
    settings = {"fps": 2.0, "do_sample_frames": True, "size": size, "use_audio_in_video": bool(heard)}
    inputs = processed(
        folder,
        parts,
        images=[picture],
        audio=[samples, sound] if heard else [samples],
        videos=[frames],
        videos_kwargs={**settings, "video_metadata": metadata, "cap_pixels_per_frame": False},
    )
    assert data.video.frame_tokens == [128 * 784 / 64, 768 * 784 / 64]  # of the class, as files do not count there
    data = dataclasses.replace(data, video=dataclasses.replace(data.video, audio=heard, frame_tokens=[8.0, 24.0]))
    encoder = SampleEncoder(config, data, Tokenizer(folder))
    question = [{"role": "user", "content": "<image>one<audio><video>"}]
    prompt = encoder.prompt(question, [image_file(picture)], [clip], [video])
    assert_equal_ids(inputs, prompt, theirs)
    with torch.no_grad():
        hidden = model.hidden(pack([prompt], len(prompt), config))
        logits = model.decoder.head(model.decoder.norm(hidden), None)
        expected = theirs(**inputs, use_audio_in_video=bool(heard)).logits[0]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("exported", ["qwen2_5_omni"], indirect=True)
@pytest.mark.parametrize(("heard", "seconds"), [(False, 2.0), ("interleaved", 4.0), ("interleaved", 1.5)])
def test_an_export_of_qwen_omni_says_whether_its_run_heard_videos(exported, heard, seconds, tmp_path):
    name, model, folder = exported
    config, data = model_and_data(folder)
    video = dataclasses.replace(data.video, audio=heard, chunk_seconds=seconds)
    data = dataclasses.replace(data, video=video)
    if seconds == 1.5:
        with pytest.raises(ValueError, match=r"holds whole seconds, and data.video.chunk_seconds is 1.5"):
            export(config, model.state_dict(), tmp_path / "out", name, data=data)
        return
    export(config, model.state_dict(), tmp_path / "out", name, data=data)
    assert model_and_data(tmp_path / "out")[1].video == video
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (theirs.seconds_per_chunk, theirs.use_audio_in_video) == (seconds, bool(heard))


def soundtrack(video: bytes) -> numpy.ndarray:
    with av.open(io.BytesIO(video)) as file:
        return numpy.concatenate([frame.to_ndarray()[0] for frame in file.decode(audio=0)]).astype("f4") / 32768

"""Qwen3-Omni's thinker exported with its prompts: the processor of transformers reads the folder, and both sides make
the same ids, log-mel and answers of clips, images and videos."""

import dataclasses

import pytest
import torch
from transformers.video_utils import VideoMetadata

from avlm.config.run import DataConfig
from avlm.config.values import validated
from avlm.data.packing import pack
from avlm.data.sample import SampleEncoder
from avlm.data.text.tokenizer import Tokenizer
from avlm.families import door
from avlm.families import qwen3_omni_moe as family
from avlm.models.batch import AUDIO, IMAGE
from avlm.weights.export import export
from avlm.weights.folder import model_and_data
from tests.data.media.test_area import every_frame
from tests.data.small_files import CORPUS, image_file, photo, video_file, write_tokenizer
from tests.families.measured import note
from tests.families.test_audio_families_prompts import OMNI, processed, recording, soundtrack
from tests.families.test_qwen3_omni_moe import CLASS, NAME, keys_of
from tests.models.handmade import build

RENAMED = {"vision_bos": "vision_start", "vision_eos": "vision_end", "IMAGE": "image_pad", "VIDEO": "video_pad"}
RENAMED |= {"audio_bos": "audio_start", "audio_eos": "audio_end", "AUDIO": "audio_pad"}
RATE = 8  # frames a second of the video


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(our model, the folder of its export)."""
    here = tmp_path_factory.mktemp(NAME)
    template = OMNI
    for old, new in RENAMED.items():
        template = template.replace(f"<|{old}|>", f"<|{new}|>")
    control = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", *family.MEDIA_TOKENS]
    names = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": template}
    write_tokenizer(here / "tokenizer", control, [*CORPUS, "You are a helpful assistant."], **names)
    keys = keys_of()
    config = family.read(keys, {})
    size = Tokenizer(here / "tokenizer").size
    config = dataclasses.replace(
        config, decoder=dataclasses.replace(config.decoder, vocab_size=size, max_position=8192)
    )
    prompts = {**door.prompts(family, config, {"config.json": keys}), "image_tokens": [4, 12]}
    given = {"train": "x", "tokenizer": str(here / "tokenizer"), "template": "tokenizer", **prompts}
    model = build(config)
    export(config, model.state_dict(), here / "out", NAME, data=validated(DataConfig, given, "data"))
    return model, here / "out"


@pytest.mark.parametrize("heard", ["merged", False])
def test_images_audio_and_a_video_with_its_sound_stand_in_one_prompt(exported, heard):
    """Of frames that are whole; transformers lets the longest clip of a call end in its mirror image, ours in
    silence."""
    model, folder = exported
    theirs, report = CLASS.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    config, data = model_and_data(folder)
    assert config == model.config and data.video.audio == "merged"
    assert data.video.frame_tokens == [128 * 1024 / 64, 768 * 1024 / 64]  # of the class, as files do not count there
    samples, clip = recording(1.3)
    picture, video = photo(70, 33), video_file(5.0, RATE, sound=True)
    frames, sound = every_frame(video), soundtrack(video)
    parts = [{"type": "image"}, {"type": "text", "text": "one"}, {"type": "audio"}, {"type": "video"}]
    size = {"shortest_edge": 8 * 8 * 8, "longest_edge": 24 * 8 * 8}
    settings = {"fps": 2.0, "do_sample_frames": True, "size": size, "use_audio_in_video": bool(heard)}
    metadata = [VideoMetadata(total_num_frames=len(frames), fps=float(RATE))]
    inputs = processed(
        folder,
        parts,
        images=[picture],
        audio=[samples, sound] if heard else [samples],
        videos=[frames],
        videos_kwargs={**settings, "video_metadata": metadata, "cap_pixels_per_frame": False},
    )
    data = dataclasses.replace(data, video=dataclasses.replace(data.video, audio=heard, frame_tokens=[8.0, 24.0]))
    encoder = SampleEncoder(config, data, Tokenizer(folder))
    question = [{"role": "user", "content": "<image>one<audio><video>"}]
    prompt = encoder.prompt(question, [image_file(picture)], [clip], [video])
    [ids] = inputs["input_ids"]
    expected = ids.clone()
    for kind, ours in {"audio": AUDIO, "image": IMAGE, "video": IMAGE}.items():
        expected[ids == getattr(theirs.config, f"{kind}_token_id")] = ours
    assert expected.tolist() == prompt.token_T.tolist()

    windows = iter(prompt.media["audio"])
    for features, mask in zip(inputs["input_features"], inputs["feature_attention_mask"], strict=True):
        length, parts = int(mask.sum()), []
        while sum(part.shape[1] for part in parts) < length:
            parts.append(next(windows))
        ours = torch.cat(parts, 1)
        torch.testing.assert_close(ours[:, : length - 1], features[:, : length - 1], atol=1e-4, rtol=1e-4)
        features[:, :length] = ours
    with torch.no_grad():
        hidden = model.hidden(pack([prompt], len(prompt), config))
        logits = model.decoder.head(model.decoder.norm(hidden), None)
        logits_of_theirs = theirs(**inputs, use_audio_in_video=bool(heard)).logits[0]
    torch.testing.assert_close(logits, logits_of_theirs, atol=1e-4, rtol=1e-4)
    note(f"{NAME} prompts")


def test_the_format_with_code_of_its_own_refuses_experts_and_their_stem(exported, tmp_path):
    model, folder = exported
    config, data = model_and_data(folder)
    dense = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, experts=None))
    for refused, said in ((config, "decoder.experts: .* give --format avlm"), (dense, r"audio\.stem=conv2d is not in")):
        with pytest.raises(ValueError, match=said) as error:
            export(refused, model.state_dict(), tmp_path / "out", "transformers", data=data)
        assert "\n" not in str(error.value)


def test_an_export_says_whether_its_run_heard_videos(exported, tmp_path):
    model, folder = exported
    config, data = model_and_data(folder)
    data = dataclasses.replace(data, video=dataclasses.replace(data.video, audio=False))
    export(config, model.state_dict(), tmp_path / "out", NAME, data=data)
    assert model_and_data(tmp_path / "out")[1].video == data.video

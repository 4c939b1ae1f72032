import dataclasses
import json

import pytest
import torch

from avlm.config.media import VideoConfig
from avlm.data.media import audio, image
from avlm.data.media.patches import cut_into_patches
from avlm.data.sample import Sample, SampleEncoder, parse, placeholders
from avlm.data.stream import fingerprint
from avlm.data.text.tokenizer import Tokenizer
from avlm.models.batch import AUDIO as AUDIO_ID
from avlm.models.batch import IGNORE, IMAGE
from tests.data.small_files import AUDIO, VISION, data, image_file, model, photo, tone, video_file, write_tokenizer

SECONDS = [0.1, 0.5, 1.0, 1.007, 2.51, 9.99, 29.99, 30.0, 30.01, 65.0]


def encoder(folder, config=None, **changes) -> SampleEncoder:
    return SampleEncoder(config or model(), data(folder, **{"seq_length": 8192, **changes}), Tokenizer(folder))


def sample(question: str, answer: str = "one", **media) -> Sample:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Sample("key", messages, **media)


def png(seed: int) -> bytes:
    return image_file(photo(40, 30, seed))


def runs(token_T: torch.Tensor, placeholder: int) -> list[int]:
    """Lengths of the runs of a placeholder."""
    marks = torch.cat([torch.tensor([False]), token_T == placeholder, torch.tensor([False])]).int().diff()
    return ((marks == -1).nonzero() - (marks == 1).nonzero()).flatten().tolist()


@pytest.mark.parametrize("stack", [1, 4])
@pytest.mark.parametrize("window", ["true", "fixed"])
def test_placeholders_equal_the_features_of_clips_of_every_length(tokenizer_folder, stack, window):
    config = model(audio=dataclasses.replace(AUDIO, window=window, num_mels=8), stack=stack)
    encode = encoder(tokenizer_folder, config).encode
    for seconds in SECONDS:
        encoded = encode(sample("<audio>", audios=[tone(seconds)]))
        samples = round(seconds * 16_000)
        parts = [480_000] * (samples // 480_000) + ([samples % 480_000] if samples % 480_000 else [])
        rows = [1500 if window == "fixed" else -(-part // 320) for part in parts]
        assert [mel.shape[1] // 2 for mel in encoded.media["audio"]] == rows
        assert (encoded.token_T == AUDIO_ID).sum() == sum(-(-count // stack) for count in rows)


@pytest.mark.parametrize("downsample, rows", [(1, 16), (2, 4)])
def test_every_image_has_its_own_run_of_placeholders(tokenizer_folder, downsample, rows):
    encode = encoder(tokenizer_folder, model(downsample=downsample)).encode
    encoded = encode(sample("<image> and <image> and <image>", images=[png(1), png(2), png(3)]))
    assert runs(encoded.token_T, IMAGE) == [rows] * 3
    for patches, seed in zip(encoded.media["image"], (1, 2, 3)):
        pixels = image.fit(image.decode(png(seed), 10**6), VISION)
        assert torch.equal(patches, cut_into_patches(pixels[None], VISION))


def test_clips_of_different_lengths_keep_their_identity_and_order(tokenizer_folder):
    seconds, frequencies = [0.8, 0.2, 1.4], [300.0, 900.0, 2000.0]
    files = [tone(s, frequency=f) for s, f in zip(seconds, frequencies)]
    encoded = encoder(tokenizer_folder).encode(sample("a <audio> b <audio> c <audio>", audios=files))
    assert runs(encoded.token_T, AUDIO_ID) == [40, 10, 70]
    for mel, file in zip(encoded.media["audio"], files):
        torch.testing.assert_close(mel, audio.mels(audio.decode(file, 10), AUDIO)[0])


def test_media_stand_where_their_tags_stand(tokenizer_folder):
    encode = encoder(tokenizer_folder)
    encoded = encode.encode(sample("one<image>two<audio>three<image>", images=[png(1), png(2)], audios=[tone(0.2)]))
    order, kept = [], encoded.token_T.tolist()
    for token in kept:
        name = {IMAGE: "i", AUDIO_ID: "a"}.get(token, "t")
        order += [name] if not order or order[-1] != name else []
    assert "".join(order) == "titatit"
    text = encode.tokenizer.decode([token for token in kept if token >= 0])
    assert text == "<|im_start|>user\nonetwothree<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"


def test_a_video_becomes_its_frames_scaled_like_images_and_then_its_sound(tokenizer_folder):
    config = {"video": VideoConfig(num_frames=3, audio="after")}
    encoded = encoder(tokenizer_folder, **config).encode(sample("<video>", videos=[video_file(1.5, sound=True)]))
    pixels = torch.stack(encoded.media["image"])
    assert pixels.shape == (3, 4, 4, 3 * 7 * 7) and pixels.dtype == torch.uint8
    assert pixels.float().mean().item() == pytest.approx(12, abs=3)  # bytes: not normalised twice, not 0..1
    assert runs(encoded.token_T, IMAGE) == [3 * 16] and runs(encoded.token_T, AUDIO_ID) == [75]
    placeholders = encoded.token_T[encoded.token_T < 0].tolist()
    assert placeholders == sorted(placeholders, reverse=True)  # images (-200) before sound (-300)
    assert encoded.kind == "video"


def test_a_silent_video_has_no_sound_rows(tokenizer_folder):
    encoded = encoder(tokenizer_folder, video=VideoConfig(audio="after")).encode(
        sample("<video>", videos=[video_file(1)])
    )
    assert encoded.media["audio"] == [] and len(encoded.media["image"]) == 8


def test_targets_are_the_next_tokens_of_the_answers_alone(tokenizer_folder):
    encode = encoder(tokenizer_folder)
    encoded = encode.encode(sample("<image> what", "see this one  ", images=[png(1)]))
    rows = (encoded.target_T != IGNORE).nonzero().flatten()
    assert torch.equal(encoded.target_T[rows], encoded.token_T[rows + 1])
    assert encode.tokenizer.decode(encoded.target_T[rows].tolist()) == "see this one  <|im_end|>"
    assert encoded.target_T[-1] == IGNORE


@pytest.mark.parametrize(
    "template, learned", [("llama3", "one<|eot_id|>"), ("llava", " one</s>"), ("plain", " one \n</s>")]
)
def test_blanks_around_an_answer_lose_no_target(tokenizer_folder, template, learned):
    encode = encoder(tokenizer_folder, template=template)
    encoded = encode.encode(sample("what", " one \n"))
    assert encode.tokenizer.decode(encoded.target_T[encoded.target_T != IGNORE].tolist()) == learned


def test_a_placeholder_is_never_a_target(tokenizer_folder):
    encoded = encoder(tokenizer_folder).encode(sample("what", "this <image> here", images=[png(1)]))
    assert (encoded.token_T == IMAGE).sum() == 16 and encoded.target_T.min() == IGNORE


@pytest.mark.parametrize(
    "question, media, kind",
    [
        ("x", {}, "text"),
        ("<image>", {"images": [png(1)]}, "image"),
        ("<audio>", {"audios": [tone(0.1)]}, "audio"),
        ("<image><audio>", {"images": [png(1)], "audios": [tone(0.1)]}, "mixed"),
    ],
)
def test_a_sample_is_of_the_kind_of_its_media(tokenizer_folder, question, media, kind):
    assert encoder(tokenizer_folder).encode(sample(question, **media)).kind == kind


def test_a_prompt_has_no_targets_and_is_the_start_of_the_sample(tokenizer_folder):
    encode = encoder(tokenizer_folder)
    whole = encode.encode(sample("<image> what", images=[png(1)]))
    prompt = encode.prompt([{"role": "user", "content": "<image> what"}], images=[png(1)])
    assert torch.equal(prompt.token_T, whole.token_T[: len(prompt)])
    for theirs, ours in zip(whole.media["image"], prompt.media["image"], strict=True):
        assert torch.equal(ours, theirs)
    assert (prompt.target_T == IGNORE).all()


def test_wrong_samples_are_refused_with_their_numbers(tokenizer_folder):
    encode = encoder(tokenizer_folder).encode
    with pytest.raises(ValueError, match="1 <image> tag but 2 images"):
        encode(sample("<image>", images=[png(1), png(2)]))
    with pytest.raises(ValueError, match="2 <audio> tags but 0 audios"):
        encode(sample("<audio><audio>"))
    with pytest.raises(ValueError, match=r"more than data\.seq_length=20"):
        encoder(tokenizer_folder, seq_length=20).encode(sample("<image>", images=[png(1)]))
    with pytest.raises(ValueError, match=r"exceeds data\.max_media_bytes=10"):
        encoder(tokenizer_folder, max_media_bytes=10).encode(sample("<image>", images=[png(1)]))
    with pytest.raises(ValueError, match="1 video, but the model has no vision tower"):
        encoder(tokenizer_folder, model(vision=None)).encode(sample("<video>", videos=[video_file(1)]))
    with pytest.raises(ValueError, match="1 audio, but the model has no audio tower"):
        encoder(tokenizer_folder, model(audio=None)).encode(sample("<audio>", audios=[tone(1)]))
    with pytest.raises(ValueError, match=r"video\.audio=after needs model\.audio"):
        encoder(tokenizer_folder, model(audio=None), video=VideoConfig(audio="after"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x" * 30_000_000, "a text of 30,000,003 characters, which 256 tokens cannot hold"),
        ("ab cd " * 170_000, "a text of 1,020,000 characters, which are more than 256 tokens"),
    ],
    ids=["by its length", "by its beginning"],
)
def test_a_text_that_no_row_holds_is_not_tokenised(tokenizer_folder, monkeypatch, text, message):
    encode, longest = encoder(tokenizer_folder, seq_length=256), []
    tokenise = encode.tokenizer.encode
    monkeypatch.setattr(encode.tokenizer, "encode", lambda text, **_: longest.append(len(text)) or tokenise(text))
    with pytest.raises(ValueError, match=message):
        encode.encode(sample(text))
    assert max(longest, default=0) <= 2**18
    longest.clear()
    encode.encode(sample("who?"))
    assert 0 not in longest, "a short turn is tokenised once"


def test_a_long_text_of_few_tokens_is_encoded(tmp_path):
    tree = json.loads((write_tokenizer(tmp_path) / "tokenizer.json").read_text())
    longest = max(token["id"] for token in tree["added_tokens"]) + 1
    word = {"id": longest, "content": "x" * 300_000, **dict.fromkeys(("single_word", "lstrip", "rstrip"), False)}
    tree["added_tokens"].append({**word, "normalized": False, "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    encoded = encoder(tmp_path, seq_length=256).encode(sample("x" * 1_500_000))
    assert (encoded.token_T == longest).sum() == 5


def test_turns_that_are_not_to_be_learned_have_no_targets(tokenizer_folder):
    for template in ("llama3", "chatml", "llava", "plain"):
        encode = encoder(tokenizer_folder, template=template)
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "wrong", "learn": False}]
        right = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "right"}]
        encoded = encode.encode(Sample("k", turns + right))
        learned = encode.tokenizer.decode(encoded.target_T[encoded.target_T != IGNORE].tolist(), control=False)
        assert learned.strip() == "right"
        with pytest.raises(ValueError, match="no token of the sample is learned"):
            encode.encode(Sample("k", turns))


@pytest.mark.parametrize("towers", [{"vision": None}, {"audio": None}, {"vision": None, "audio": None}])
def test_models_without_a_tower_encode_what_they_have(tokenizer_folder, towers):
    encode = encoder(tokenizer_folder, model(**towers)).encode
    assert encode(sample("hello")).kind == "text"
    if "audio" not in towers:
        assert encode(sample("<audio>", audios=[tone(0.1)])).kind == "audio"


def test_audio_features_round_up_within_each_window():
    features = [len(placeholders("audio", [torch.empty(1, frames)], model(stack=4))) for frames in (2, 8, 10)]
    assert features == [1, 1, 2]


def test_three_forms_of_records_are_the_same_sample():
    files = {"a.png": b"image", "b.wav": b"sound"}
    turns = [("what <image>", "this"), ("and <audio>", "that")]
    messages = [m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    conversations = [m for q, a in turns for m in ({"from": "human", "value": q}, {"from": "gpt", "value": a})]
    context, answers = [q for q, _ in turns], [a for _, a in turns]
    records = [
        {"messages": messages, "images": ["a.png"], "audios": ["b.wav"], "videos": [], "task": "x"},
        {"id": 7, "conversations": conversations, "image": "a.png", "audio": ["b.wav"]},
        {
            "context": context,
            "answers": answers,
            "images": ["a.png"],
            "audios": ["b.wav"],
            "videos": None,
        },
    ]
    expected = Sample("k", messages, [b"image"], [b"sound"], [])
    assert all(parse(json.loads(json.dumps(record)), files.__getitem__, "k") == expected for record in records)


@pytest.mark.parametrize(
    "record, message",
    [
        ([], "must be a JSON object, not list"),
        ({"text": "x"}, "the record has text, and neither messages"),
        ({"messages": ["x"]}, "not of the form"),
        ({"conversations": [{"role": "user"}]}, "not of the form"),
        ({"context": ["a", "b"], "answers": ["c"]}, "must be lists of one length"),
        ({"context": "hi", "answers": "yo"}, "must be lists of one length: hi, yo"),
        ({"messages": [], "images": [{"url": 1}]}, "images must be file names"),
    ],
)
def test_records_of_another_form_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        parse(record, lambda name: b"", "k")


def test_the_fingerprint_sees_what_changes_samples_and_not_where_files_lie(tokenizer_folder):
    base = data(tokenizer_folder)
    same = dataclasses.replace(base, train="y", num_workers=5, tokenizer="elsewhere")
    assert fingerprint(base, model()) == fingerprint(same, model())
    assert fingerprint(base, model()) != fingerprint(dataclasses.replace(base, seq_length=128), model())
    assert fingerprint(base, model()) != fingerprint(base, model(stack=2))
    moved = dataclasses.replace(base, validation={"a": "b"}, media_root="/", max_bad_fraction=1.0)
    assert fingerprint(base, model()) == fingerprint(moved, model()) == "ea9345ca65239db0"
    heard = dataclasses.replace(base, video=VideoConfig(audio="after"))  # called sound: true before
    assert fingerprint(heard, model()) == "a011028f4c3204cd"

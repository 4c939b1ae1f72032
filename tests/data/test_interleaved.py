"""Videos whose frames and sound take turns: order and positions against Qwen2.5-Omni's processor and model."""

import dataclasses

import pytest
import torch
import transformers
from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerConfig, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerForConditionalGeneration

from avlm.config.decoder import DecoderConfig
from avlm.config.media import VideoConfig, VideoText
from avlm.config.model import AudioConfig, ModelConfig, ProjectorConfig, VisionConfig
from avlm.config.run import DataConfig
from avlm.data.media.audio import delayed
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample, SampleEncoder
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation.generation import steps
from avlm.evaluation.kept_cache import KeptCache, labels_of
from avlm.models.avlm import AVLM
from avlm.models.batch import AUDIO, IGNORE, IMAGE
from avlm.models.initial import init
from tests.data.small_files import ANY_GRID, CORPUS, model, tone, video_file, write_tokenizer
from tests.data.small_files import AUDIO as TOWER
from tests.models.handmade import build

MARKERS = {"video": ["<|vision_bos|>", "<|vision_eos|>"], "audio": ["<|audio_bos|>", "<|audio_eos|>"]}
NAMES = {
    **{"image_token": "<|IMAGE|>", "video_token": "<|VIDEO|>", "audio_token": "<|AUDIO|>"},
    **{"vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>"},
    **{"audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"},
}
SPREAD = {"num_frames": None, "fps": 2.0, "min_frames": 4, "max_frames": 768, "spread": "starts"}
QUESTION = [{"role": "user", "content": "what <video> is <audio> heard?"}]
DECODER = DecoderConfig(
    **{"vocab_size": 400, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 1},
    **{"num_kv_heads": 1, "mrope_sections": [1, 1, 2]},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    control = ["<|im_start|>", "<|im_end|>", *NAMES.values()]
    return write_tokenizer(
        tmp_path_factory.mktemp("tokenizer"), control, CORPUS, bos_token=None, eos_token="<|im_end|>"
    )


def omni() -> ModelConfig:
    """Sizes of nothing, the rows and positions of Qwen2.5-Omni."""
    audio = dataclasses.replace(TOWER, max_positions=100, log_mel="clip", edge="masked", pool=2)
    vision = dataclasses.replace(ANY_GRID, tokens_per_second=25.0)
    return dataclasses.replace(model(downsample=2), vision=vision, audio=audio, decoder=DECODER)


def encoder(folder, config: ModelConfig, **changes) -> SampleEncoder:
    options = {"template": "chatml", "image_tokens": [4.0, 12.0], "markers": MARKERS, **changes}
    return SampleEncoder(config, DataConfig(train="x", tokenizer=str(folder), **options), Tokenizer(folder))


@pytest.mark.parametrize("seconds", [1.0, 5.0, 7.5])
def test_ids_and_positions_equal_those_of_qwen2_5_omni(folder, seconds):
    video = VideoConfig(**SPREAD, frame_tokens=[4, 9], audio="interleaved")
    ours = encoder(folder, omni(), video=video).prompt(
        QUESTION, videos=[video_file(seconds, sound=True)], audios=[tone(1.3)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, extra_special_tokens=NAMES)
    processor = Qwen2_5OmniProcessor(
        Qwen2VLImageProcessor(), Qwen2VLVideoProcessor(), transformers.WhisperFeatureExtractor(), tokenizer
    )
    num_patches = len(ours.media["image"])
    grid = torch.tensor([num_patches, *ours.media["image"][0].shape[:2]])
    frames = torch.tensor([round(seconds * 100), 130])
    each = seconds / num_patches  # that of the frames that are seen, as the authors' qwen-omni-utils measures it
    text = "<|im_start|>user\nwhat <|vision_bos|><|VIDEO|><|vision_eos|> is <|audio_bos|><|AUDIO|><|audio_eos|> heard?"
    [text] = processor.replace_multimodal_special_tokens(
        [text + "<|im_end|>\n<|im_start|>assistant\n"],
        iter((((frames - 1) // 2 + 1 - 2) // 2 + 1).tolist()),
        iter([]),
        iter([grid]),
        video_second_per_grid=iter([each]),
        use_audio_in_video=True,
        position_id_per_seconds=25,
        seconds_per_chunk=2.0,
    )
    ids = torch.tensor(tokenizer(text).input_ids)
    places = {tokenizer.convert_tokens_to_ids("<|VIDEO|>"): IMAGE, tokenizer.convert_tokens_to_ids("<|AUDIO|>"): AUDIO}
    expected = ids.clone()
    for theirs, placeholder in places.items():
        expected[ids == theirs] = placeholder
    assert ours.token_T.tolist() == expected.tolist()

    of_token = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(NAMES[f"{name}_token"])
        for name in ("image", "video", "audio")
    }
    starts = {"vision_start_token_id": "<|vision_bos|>", "audio_start_token_id": "<|audio_bos|>"}
    of_token |= {key: tokenizer.convert_tokens_to_ids(token) for key, token in starts.items()}
    settings = {"position_id_per_seconds": 25, "seconds_per_chunk": 2}
    with torch.device("meta"):
        network = Qwen2_5OmniThinkerForConditionalGeneration(Qwen2_5OmniThinkerConfig(**of_token, **settings))
    position, _ = network.get_rope_index(
        ids[None], None, grid[None], torch.ones(1, len(ids), dtype=torch.int64), True, frames, torch.tensor([each])
    )
    assert torch.equal(ours.position_T, position[:, 0].long())


def test_frames_and_sound_take_turns_of_the_seconds_asked_for_in_a_model_of_our_own(folder):
    """Four frames a second apart; features of 20 ms."""
    video = VideoConfig(num_frames=4, audio="interleaved", chunk_seconds=1.0)
    ours = encoder(folder, model(), video=video, markers={}).prompt(
        [{"role": "user", "content": "<video>"}], videos=[video_file(4.0, sound=3.0)]
    )
    assert ours.position_T is None
    placed = [token for token in ours.token_T.tolist() if token < 0]
    turn = [IMAGE] * 16 + [AUDIO] * 50
    assert placed == [*turn * 3, *[IMAGE] * 16]
    after = dataclasses.replace(video, audio="after")
    apart = encoder(folder, model(), video=after, markers={}).prompt(
        [{"role": "user", "content": "<video>"}], videos=[video_file(4.0, sound=3.0)]
    )
    assert [token for token in apart.token_T.tolist() if token < 0] == [IMAGE] * 64 + [AUDIO] * 150
    for modality, items in ours.media.items():
        assert all(map(torch.equal, items, apart.media[modality])), "the same features, in another order"
    batch = pack([ours], len(ours), model())
    assert batch.image.rows.tolist() == (ours.token_T == IMAGE).nonzero().flatten().tolist()


def test_sound_that_begins_later_than_the_frames_is_heard_when_it_begins(folder):
    """Silence stands before it. Some hundredths of a second are those of encoders, and change nothing."""
    options = {"video": VideoConfig(num_frames=4, audio="interleaved", chunk_seconds=1.0), "markers": {}}
    encode = encoder(folder, model(), max_audio_seconds=4.0, **options).prompt
    question = [{"role": "user", "content": "<video>"}]
    punctual, soon, late = (
        encode(question, videos=[video_file(4.0, sound=2.0, sound_from=seconds)]) for seconds in (0.0, 0.05, 1.5)
    )
    assert soon.token_T.equal(punctual.token_T) and soon.media["audio"][0].equal(punctual.media["audio"][0])
    placed = [token for token in late.token_T.tolist() if token < 0]
    assert placed == [*([IMAGE] * 16 + [AUDIO] * 50) * 3, *[IMAGE] * 16, *[AUDIO] * 25]
    mel = torch.cat(late.media["audio"], 1)
    assert mel[:, :140].unique().numel() <= 3 < mel[:, 150:].unique().numel(), "the floors of windows"
    with pytest.raises(ValueError, match=r"begins after 2.5 s is longer than data.max_audio_seconds=4"):
        encode(question, videos=[video_file(4.0, sound=2.0, sound_from=2.5)])
    assert delayed(torch.arange(32_000), -0.5, 4.0)[0] == 8_000
    with pytest.raises(ValueError, match="ends before its first frame"):
        delayed(torch.zeros(32_000), -2.0, 4.0)


def test_turns_end_where_seconds_of_no_exact_float_do(folder):
    """1.2 s are more than 60 features of 20 ms, and less than 3 turns of 0.4 s, if all are floats."""
    video = VideoConfig(num_frames=4, audio="interleaved", chunk_seconds=0.4)
    ours = encoder(folder, model(), video=video, markers={}).prompt(
        [{"role": "user", "content": "<video>"}], videos=[video_file(1.6, rate=10, sound=True)]
    )
    assert [token for token in ours.token_T.tolist() if token < 0] == ([IMAGE] * 16 + [AUDIO] * 20) * 4


def test_markers_abreast_share_a_position_and_text_around_them_counts_on(folder):
    video = VideoConfig(**SPREAD, frame_tokens=[4, 9], audio="interleaved")
    around = ["one two <|vision_bos|>", "<|vision_eos|> three"]
    ours = encoder(folder, omni(), video=video, markers={**MARKERS, "video": around})
    asked = ours.prompt([{"role": "user", "content": "see <video> two"}], videos=[video_file(3.0, sound=True)])
    tokens = asked.token_T.tolist()
    [time] = asked.position_T[:1].tolist()
    first, last = tokens.index(IMAGE), len(tokens) - 1 - tokens[::-1].index(AUDIO)
    assert time[:first] == [*range(first - 1), first - 2]
    assert time[last + 1 :] == [time[last] + 1, *range(time[last] + 1, time[last] + len(tokens) - last - 1)]


def test_a_window_too_short_for_a_row_is_no_item_and_audio_of_nothing_else_is_refused(folder):
    """Of 4.01 s the last window would be one row, which has no other to be averaged with."""
    config = omni()
    encode = encoder(folder, config).prompt
    turns = [{"role": "user", "content": "<audio>one<audio>"}]
    asked = encode(turns, audios=[tone(4.01), tone(1.0)])
    assert [mel.shape[1] for mel in asked.media["audio"]] == [200, 200, 100]
    kept = KeptCache(build(config))
    kept.add(labels_of(asked, config))
    turns += [{"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
    rest, _ = kept.cut(encode(turns, audios=[tone(4.01), tone(1.0)]))
    assert not rest.media["audio"], "all of it was run before"
    with pytest.raises(ValueError, match=r"audio of 0\.0100 s is too short for the audio tower"):
        encode([{"role": "user", "content": "<audio>"}], audios=[tone(0.01)])
    with pytest.raises(ValueError, match="max_positions=1 is fewer than pool=2 rows"):
        dataclasses.replace(TOWER, max_positions=1, pool=2)


def test_a_conversation_goes_on_after_frames_and_sound_that_take_turns(folder):
    """A cache that is cut back within a video runs all of it again."""
    config = omni()
    network = build(config)
    video = VideoConfig(**SPREAD, frame_tokens=[4, 9], audio="interleaved")
    encode = encoder(folder, config, video=video, seq_length=2048).prompt
    kept = KeptCache(network)
    for seconds, question in ((5.0, "one"), (5.0, "two"), (6.0, "two")):
        turns = [{"role": "user", "content": f"<video>{question}"}]
        asked = encode(turns, videos=[video_file(seconds, sound=True)])
        [whole] = list(steps(network, [asked], max_new_tokens=1))
        [again] = list(steps(network, [asked], max_new_tokens=1, kept=kept))
        assert again[0][0][0] == whole[0][0][0]
        assert again[0][0][1] == pytest.approx(whole[0][0][1], abs=1e-5)


def test_a_tiny_model_learns_what_is_seen_and_heard_together_where_they_take_turns():
    """A bright frame and a loud second, each first or last: is the bright one loud? Neither alone tells."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "num_heads": 1}
    wider = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2}
    square = {"image_size": 2, "patch_size": 2, "feature_layer": -1, "class_token": False}
    config = ModelConfig(
        decoder=DecoderConfig(**wider, vocab_size=8, num_kv_heads=2),
        vision=VisionConfig(**sizes, **square),
        audio=AudioConfig(**sizes, num_mels=2, max_positions=4),
        vision_projector=ProjectorConfig(output_std=0.3),
        audio_projector=ProjectorConfig(output_std=0.3, downsample=2),
    )
    generator = torch.Generator().manual_seed(0)

    def draw() -> EncodedSample:
        bright, loud = torch.randint(0, 2, (2,), generator=generator).tolist()
        frames = [torch.full((1, 1, 12), 250 if i == bright else 5, dtype=torch.uint8) for i in (0, 1)]
        mel = torch.cat([torch.full((2, 4), 1.0 if i == loud else -1.0) for i in (0, 1)], 1)
        token_T = torch.tensor([IMAGE, AUDIO, IMAGE, AUDIO, 1, 2 + (bright == loud)])
        target_T = torch.tensor([*[IGNORE] * 4, token_T[5], IGNORE])
        return EncodedSample("", "video", token_T, target_T, {"image": frames, "audio": [mel]})

    network = AVLM(config)
    init(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(120):
        loss = network(pack([draw() for _ in range(32)], 192, config))[0] / 32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1, "chance is 0.69"


def test_a_cache_is_not_cut_within_sound_that_goes_on_past_the_cut(folder):
    config = model()
    encode = encoder(folder, config, video=VideoConfig(num_frames=4, audio="interleaved", chunk_seconds=1.0)).prompt
    asked = encode([{"role": "user", "content": "see <video>"}], videos=[video_file(4.0, sound=True)])
    other = [*asked.media["image"][:2], asked.media["image"][2] + 1, asked.media["image"][3]]
    changed = dataclasses.replace(asked, media={**asked.media, "image": other})
    kept = KeptCache(build(config))
    kept.add(labels_of(asked, config))
    rest, labels = kept.cut(changed)
    first_sound = int((asked.token_T == AUDIO).nonzero()[0])
    assert len(kept.labels) == first_sound and len(rest) == len(labels) == len(asked) - first_sound
    assert len(rest.media["image"]) == 3 and len(rest.media["audio"]) == 1


def test_times_in_the_text_do_not_go_with_turns_of_frames_and_sound():
    with pytest.raises(ValueError, match="text goes with audio=after or false"):
        VideoConfig(audio="interleaved", text=VideoText(frame="{n}"))
    with pytest.raises(ValueError, match=r"chunk_seconds\s+Input should be greater than or equal to 0.001"):
        VideoConfig(audio="interleaved", chunk_seconds=1e-310)

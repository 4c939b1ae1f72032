"""Videos whose frames and sound are merged by time: order and positions against Qwen3-Omni's processor and model."""

import dataclasses

import pytest
import torch
import transformers
from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor, Qwen3OmniMoeProcessor
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeThinkerForConditionalGeneration

from avlm.config.audio import AudioConfig
from avlm.config.media import VideoConfig
from avlm.config.model import ModelConfig
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation.generation import generate
from avlm.models.batch import AUDIO, IGNORE, IMAGE
from avlm.parallel.rows import _message, _read
from tests.data.small_files import ANY_GRID, CORPUS, model, tone, video_file, write_tokenizer
from tests.data.test_interleaved import DECODER, QUESTION, SPREAD, encoder
from tests.models.handmade import build

MARKERS = {"video": ["<|vision_start|>", "<|vision_end|>"], "audio": ["<|audio_start|>", "<|audio_end|>"]}
NAMES = {
    **{"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "audio_token": "<|audio_pad|>"},
    **{"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"},
    **{"audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"},
}
VIDEO = VideoConfig(**SPREAD, frame_tokens=[4, 9], audio="merged")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    control = ["<|im_start|>", "<|im_end|>", *NAMES.values()]
    return write_tokenizer(
        tmp_path_factory.mktemp("tokenizer"), control, CORPUS, bos_token=None, eos_token="<|im_end|>"
    )


def omni() -> ModelConfig:
    """Sizes of nothing, the rows and positions of Qwen3-Omni."""
    audio = AudioConfig(
        **{"hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 1, "num_mels": 8},
        **{"log_mel": "clip", "stem": "conv2d", "stem_width": 2, "max_positions": 104, "key_bias": True},
    )
    vision = dataclasses.replace(ANY_GRID, tokens_per_second=13.0, fractional_time=True)
    like = model(downsample=2)
    projector = dataclasses.replace(like.audio_projector, downsample=1)
    return dataclasses.replace(like, vision=vision, audio=audio, audio_projector=projector, decoder=DECODER)


def ask(folder, seconds: float, sound: float | bool = True) -> EncodedSample:
    return encoder(folder, omni(), video=VIDEO, markers=MARKERS).prompt(
        QUESTION, videos=[video_file(seconds, sound=sound)], audios=[tone(1.3)]
    )


@pytest.mark.parametrize("seconds", [1.0, 5.0, 9.75])
def test_ids_and_positions_equal_those_of_qwen3_omni(folder, seconds):
    ours = ask(folder, seconds)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, extra_special_tokens=NAMES)
    processor = Qwen3OmniMoeProcessor(
        Qwen2VLImageProcessor(), Qwen2VLVideoProcessor(), transformers.WhisperFeatureExtractor(), tokenizer
    )
    num_patches = len(ours.media["image"])
    grid = torch.tensor([num_patches, *ours.media["image"][0].shape[:2]])
    frames = torch.tensor([round(seconds * 100), 130])
    each = seconds / num_patches  # that of the frames that are seen
    tower = omni().audio
    text = "<|im_start|>user\nwhat <|vision_start|><|video_pad|><|vision_end|> is "
    text += "<|audio_start|><|audio_pad|><|audio_end|> heard?<|im_end|>\n<|im_start|>assistant\n"
    [text] = processor.replace_multimodal_special_tokens(
        [text],
        iter([tower.rows_of(count) for count in frames.tolist()]),
        iter([]),
        iter([grid]),
        video_second_per_grid=iter([each]),
        use_audio_in_video=True,
        position_id_per_seconds=13,
        seconds_per_chunk=2.0,
    )
    ids = torch.tensor(tokenizer(text).input_ids)
    expected = ids.clone()
    expected[ids == tokenizer.convert_tokens_to_ids("<|video_pad|>")] = IMAGE
    expected[ids == tokenizer.convert_tokens_to_ids("<|audio_pad|>")] = AUDIO
    assert ours.token_T.tolist() == expected.tolist()

    of_token = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video", "audio")
    }
    starts = {
        f"{name}_start_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_start|>") for name in ("vision", "audio")
    }
    with torch.device("meta"):
        config = Qwen3OmniMoeThinkerConfig(
            **of_token, **starts, position_id_per_seconds=13, text_config={"num_hidden_layers": 1, "num_experts": 2}
        )
        network = Qwen3OmniMoeThinkerForConditionalGeneration(config)
    position, _ = network.get_rope_index(
        ids[None], None, grid[None], torch.ones(1, len(ids), dtype=torch.int64), True, frames, torch.tensor([each])
    )
    torch.testing.assert_close(ours.position_T.float(), position[:, 0], atol=1e-5, rtol=1e-6)


def test_a_model_with_one_position_for_each_token_merges_by_seconds(folder):
    """Four frames a second apart; features of 20 ms."""
    video = VideoConfig(num_frames=4, audio="merged")
    ours = encoder(folder, model(), video=video, markers={}).prompt(
        [{"role": "user", "content": "<video>"}], videos=[video_file(4.0, sound=3.0)]
    )
    turn = [IMAGE] * 16 + [AUDIO] * 50
    assert ours.position_T is None
    assert [token for token in ours.token_T.tolist() if token < 0] == [*turn * 3, *[IMAGE] * 16]


def test_positions_that_are_no_whole_numbers_reach_every_rank_as_they_are(folder):
    """Rows of whole numbers travel as int32."""
    prompt = ask(folder, 9.75)
    whole = EncodedSample("b", "text", torch.arange(5), torch.arange(5))
    assert prompt.position_T.dtype == torch.float64 and (prompt.position_T % 1).any()
    batch = pack([whole, prompt], len(prompt) + 8, omni())
    back = _read(*_message(batch))
    assert back.position_T.dtype == torch.float64 and back.position_T.equal(batch.position_T)
    assert batch.position_T[:, 5:-3].equal(prompt.position_T) and batch.position_T[0, -3:].tolist() == [0, 1, 2]
    alone = pack([whole], 8, omni())
    assert _read(*_message(alone)).position_T.dtype == torch.int64


def test_an_answer_continues_after_the_largest_position(folder):
    """Token by token as in a forward of all of it."""
    config = dataclasses.replace(omni(), decoder=dataclasses.replace(DECODER, vocab_size=Tokenizer(folder).size))
    network = build(config)
    with torch.no_grad():
        for block in network.decoder.blocks:  # what a token sees depends on the exact position
            block.attention.q.weight.mul_(100.0)
    prompt = ask(folder, 2.5, sound=1.0)
    assert prompt.position_T.max() % 1  # that of a frame behind the last of the sound, and of all that follows it
    [answer] = generate(network, [prompt], stop_ids=[], max_new_tokens=16)
    following = prompt.position_T.max() + 1 + torch.arange(16)
    token_T = torch.cat([prompt.token_T, torch.tensor(answer.token_ids)])
    position_T = torch.cat([prompt.position_T, following.expand(3, -1)], 1)
    longer = dataclasses.replace(
        prompt, token_T=token_T, target_T=torch.full_like(token_T, IGNORE), position_T=position_T
    )
    with torch.no_grad():
        hidden = network.hidden(pack([longer], len(token_T), config))
        likeliest = network.decoder.head(network.decoder.norm(hidden), None).argmax(-1)
    assert likeliest[len(prompt) - 1 : -1].tolist() == token_T[len(prompt) :].tolist()

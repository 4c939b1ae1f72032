"""Ids and positions of Qwen's families, against their processors and models in transformers."""

import dataclasses

import pytest
import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.video_utils import VideoMetadata

from avlm.config.decoder import DecoderConfig
from avlm.config.media import TIMESTAMP, VideoConfig, VideoText
from avlm.config.run import DataConfig
from avlm.data.positions import Placed, of_grid, positions
from avlm.data.sample import EncodedSample, Sample, SampleEncoder, parse
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation.answering import RawChat
from avlm.models.batch import AUDIO, IMAGE
from tests.data.media.test_area import QWEN3, every_frame
from tests.data.small_files import ANY_GRID, CORPUS, image_file, model, photo, tone, video_file, write_tokenizer

VISION = ["<|vision_start|>", "<|vision_end|>"]
PADS = ["<|image_pad|>", "<|video_pad|>"]
TEMPLATE = """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- else -%}
    {%- for part in message.content -%}
      {{- part.text if part.type == 'text' else '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' -}}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
PARTS = ["image", "what is ", "video", " and ", "image", "image", "?", "video", "one two"]
PICTURES = [photo(200, 90), photo(64, 300), photo(33, 33)]
VIDEOS = [video_file(2.5), video_file(1.0)]
RATE = 8  # of the videos


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    corpus = [*CORPUS, "see <0.3 seconds> and <1.5 seconds>", "is <2.0 seconds>"]
    control = ["<|im_start|>", "<|im_end|>", *VISION, *PADS]
    path = tmp_path_factory.mktemp("tokenizer")
    return write_tokenizer(path, control, corpus, bos_token=None, eos_token="<|im_end|>", chat_template=TEMPLATE)


@dataclasses.dataclass(frozen=True)
class Family:
    """Settings of ours, and the same processor and model of transformers."""

    vision: object
    video: VideoConfig
    sections: list[int]
    processor: type
    video_processor: object
    network: type
    config: type


SPREAD = {"num_frames": None, "fps": 2.0, "min_frames": 4, "max_frames": 768}
STARTS = Qwen2VLVideoProcessor(
    size={"shortest_edge": 4 * 28**2, "longest_edge": 9 * 28**2},
    fps=2,
    do_sample_frames=True,
    cap_pixels_per_frame=False,
)
TOGETHER = Qwen3VLVideoProcessor(
    size={"shortest_edge": 16 * 32**2, "longest_edge": 40 * 32**2}, cap_pixels_per_frame=False
)
FAMILIES = {
    "Qwen2-VL": Family(
        ANY_GRID,
        VideoConfig(**SPREAD, spread="starts", frame_tokens=[4, 9]),
        [1, 1, 2],
        Qwen2VLProcessor,
        STARTS,
        Qwen2VLModel,
        Qwen2VLConfig,
    ),
    "Qwen2.5-VL": Family(
        dataclasses.replace(ANY_GRID, tokens_per_second=1.0),
        VideoConfig(**SPREAD, spread="starts", frame_tokens=[4, 9]),
        [1, 1, 2],
        Qwen2_5_VLProcessor,
        STARTS,
        Qwen2_5_VLModel,
        Qwen2_5_VLConfig,
    ),
    "Qwen3-VL": Family(
        QWEN3,
        VideoConfig(**SPREAD, spread="first_to_last", tokens=[8, 20], text=VideoText(frame=TIMESTAMP)),
        [1, 1, 2],
        Qwen3VLProcessor,
        TOGETHER,
        Qwen3VLModel,
        Qwen3VLConfig,
    ),
}


def encoder(folder, family: Family, template: str = "tokenizer", chat=None, **changes) -> SampleEncoder:
    decoder = DecoderConfig(
        vocab_size=400,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        mrope_sections=family.sections,
    )
    config = dataclasses.replace(model(downsample=2), vision=family.vision, decoder=decoder)
    markers = {"image": VISION, "video": VISION}
    options = {"image_tokens": [4.0, 12.0], "markers": markers, "video": family.video, **changes}
    data = DataConfig(train="x", tokenizer=str(folder), template=template, **options)
    return SampleEncoder(config, data, Tokenizer(folder), chat)


def tagged(parts: list[str]) -> str:
    return "".join(f"<{part}>" if part in ("image", "video") else part for part in parts)


def theirs(folder, family: Family) -> dict:
    """What the processor makes of PARTS, by the template's own markers."""
    factor = 2 * family.vision.patch_size
    images = Qwen2VLImageProcessor(
        patch_size=family.vision.patch_size, size={"shortest_edge": 4 * factor**2, "longest_edge": 12 * factor**2}
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|im_end|>")
    processor = family.processor(images, tokenizer, family.video_processor, chat_template=TEMPLATE)
    parts = [{"type": part} if part in ("image", "video") else {"type": "text", "text": part} for part in PARTS]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    if family.video.text.frame:  # 5.17 would leave the template's markers around those of each patch
        text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
    frames = [every_frame(data) for data in VIDEOS]
    metadata = [VideoMetadata(total_num_frames=len(of_one), fps=float(RATE)) for of_one in frames]
    return processor(text=[text], images=PICTURES, videos=frames, video_metadata=metadata, return_tensors="pt")


def with_pads(encoded: EncodedSample, given: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """Our ids, with the pad of transformers for each placeholder."""
    pads = [tokenizer.find(pad) for pad in PADS]
    is_pad = torch.isin(given, torch.tensor(pads))
    assert torch.equal(is_pad, encoded.token_T == IMAGE)
    return torch.where(is_pad, given, encoded.token_T)


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_positions_equal_those_of_transformers(folder, name):
    family = FAMILIES[name]
    media = {"images": [image_file(picture) for picture in PICTURES], "videos": VIDEOS}
    question = [{"role": "user", "content": tagged(PARTS)}]
    expected = theirs(folder, family)
    [ids] = expected["input_ids"]
    for template in ("tokenizer", "chatml"):
        ours = encoder(folder, family, template)
        encoded = ours.prompt(question, **media)
        assert torch.equal(with_pads(encoded, ids, ours.tokenizer), ids)
    trained = ours.encode(
        Sample("k", [*question, {"role": "assistant", "content": "one"}], media["images"], [], VIDEOS)
    )
    assert torch.equal(trained.token_T[: len(encoded)], encoded.token_T)
    network = family.network.__new__(family.network)  # positions need its config alone
    torch.nn.Module.__init__(network)
    network.config = family.config()
    network.config.vision_config.spatial_merge_size = 2
    network.config.vision_config.tokens_per_second = 1
    grids = {key: expected[key] for key in ("image_grid_thw", "video_grid_thw")}
    seconds = {"second_per_grid_ts": expected["second_per_grid_ts"]} if "second_per_grid_ts" in expected else {}
    found, delta = network.get_rope_index(
        expected["input_ids"], mm_token_type_ids=expected["mm_token_type_ids"], **grids, **seconds
    )
    assert torch.equal(encoded.position_T, found[:, 0])
    assert encoded.position_T.max() + 1 - len(encoded) == delta.item()


def test_a_template_that_gets_parts_elsewhere_gives_markers_once(folder):
    """Parts of a record are text with tags to every template."""
    ours = encoder(folder, FAMILIES["Qwen2-VL"])
    record = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "one"}]}]}
    record["messages"].append({"role": "assistant", "content": "two"})
    sample = parse({**record, "images": ["a.png"]}, lambda name: image_file(PICTURES[0]), "k")
    text = ours.tokenizer.decode([token for token in ours.encode(sample).token_T.tolist() if token >= 0])
    assert text == (
        "<|im_start|>user\n<|vision_start|><|vision_end|>\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
    )


def test_a_prompt_without_a_template_has_markers_and_times_too(folder):
    family = FAMILIES["Qwen3-VL"]
    tokenizer = Tokenizer(folder)
    raw = encoder(folder, family, chat=RawChat(tokenizer))
    prompt = raw.prompt([{"role": "user", "content": "see <video> two"}], videos=[VIDEOS[1]])
    ids = [token for token in prompt.token_T.tolist() if token >= 0]
    assert tokenizer.decode(ids) == (
        "see <0.1 seconds><|vision_start|><|vision_end|><0.8 seconds><|vision_start|><|vision_end|> two"
    )
    assert ids[:2] == tokenizer.encode("see <0.1 seconds>")[:2], "the time is tokenised with the text before it"


def test_positions_continue_after_the_largest_number_on_any_axis():
    """The rule of the published weights: 5.17 would continue after max(lines, columns)."""
    found = positions(12, [Placed(2, of_grid(range(4), 1, 2, step=2.5))])
    assert found[0].tolist() == [0, 1, 2, 2, 4, 4, 7, 7, 9, 9, 10, 11]
    assert found[1].tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 10, 11]
    assert found[2].tolist() == [0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 10, 11]


def test_audio_and_text_count_on_and_text_alone_needs_no_positions(folder):
    ours = encoder(folder, FAMILIES["Qwen2.5-VL"], markers={"image": VISION, "audio": ["<|im_start|>", "<|im_end|>"]})
    heard = ours.prompt(
        [{"role": "user", "content": "<image><audio> one"}], images=[image_file(PICTURES[2])], audios=[tone(0.2)]
    )
    sound = (heard.token_T == AUDIO).nonzero().flatten()
    following = heard.position_T[:, sound[0] - 1 :]
    assert torch.equal(following, torch.arange(following.shape[1]).expand(3, -1) + following[0, 0])
    around = [heard.token_T[sound[0] - 1].item(), heard.token_T[sound[-1] + 1].item()]
    assert around == [ours.tokenizer.find(token) for token in ("<|im_start|>", "<|im_end|>")]
    assert ours.prompt([{"role": "user", "content": "one"}]).position_T is None


def test_a_prompt_may_be_as_long_as_the_decoder_reads(folder):
    ours = encoder(folder, FAMILIES["Qwen2-VL"], image_tokens=[4.0, 16384.0], seq_length=100)
    question = [{"role": "user", "content": "<image>"}]
    assert len(ours.prompt(question, images=[image_file(photo(560, 560))])) > 400
    with pytest.raises(
        ValueError, match=r"takes 10,000 tokens, more than model\.decoder\.max_position=8192: lower data\.im"
    ):
        ours.prompt(question, images=[image_file(photo(2800, 2800))])


def test_a_medium_may_have_one_marker_and_markers_that_the_tokenizer_lacks_are_named(folder):
    ours = encoder(folder, FAMILIES["Qwen2-VL"], markers={"image": [VISION[0], ""]}, chat=RawChat(Tokenizer(folder)))
    prompt = ours.prompt([{"role": "user", "content": "<image>"}], images=[image_file(PICTURES[0])])
    assert [token for token in prompt.token_T.tolist() if token >= 0] == [ours.tokenizer.find(VISION[0])]
    with pytest.raises(ValueError, match=r"data\.markers\.image: 'one' has no control token of .*tokenizer\.json"):
        encoder(folder, FAMILIES["Qwen2-VL"], markers={"image": ["one", "two"]})

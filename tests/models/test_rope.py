"""Positions on three axes, YaRN and DeepStack in the decoder, against transformers."""

import dataclasses

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from avlm.config.decoder import DecoderConfig, YarnScaling
from avlm.config.model import ModelConfig
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample
from avlm.families import llama
from avlm.families.door import hugging_face_name
from avlm.models.decoder import Decoder, DeepFeatures
from avlm.models.rope import decoder_rope, positions_of_pairs, rope_frequencies, rope_table
from kernels.segments import Segments
from tests.models.handmade import build, shake

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48}
SIZES |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
SECTIONS = [4, 2, 2]
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": SECTIONS}
QWEN2_5 = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=1e6,
    norm_eps=1e-6,
    qkv_bias=True,
    mrope_sections=SECTIONS,
)
QWEN3 = dataclasses.replace(QWEN2_5, qkv_bias=False, qk_norm=True, mrope_interleaved=True)


def qwen2_5_text() -> Qwen2_5_VLTextModel:
    sizes = SIZES | {"hidden_size": 64, "rms_norm_eps": 1e-6, "rope_parameters": ROPE}
    return Qwen2_5_VLTextModel(transformers.models.qwen2_5_vl.Qwen2_5_VLTextConfig(**sizes))


def qwen3_text() -> Qwen3VLTextModel:
    sizes = SIZES | {"head_dim": 16, "rms_norm_eps": 1e-6, "rope_parameters": ROPE}
    return Qwen3VLTextModel(transformers.models.qwen3_vl.Qwen3VLTextConfig(**sizes))


CASES = {
    "sections": (dataclasses.replace(QWEN2_5, hidden_size=64), qwen2_5_text),
    "interleaved": (QWEN3, qwen3_text),
}


def media_positions() -> torch.Tensor:
    """Text, an image of 3 x 2 features, text, and two times of a video of 2 x 3 features, (3, T)."""
    parts, start = [], 0
    for times, lines, columns in ((4, 0, 0), (1, 3, 2), (3, 0, 0), (2, 2, 3), (2, 0, 0)):
        if lines:
            axes = torch.meshgrid(*map(torch.arange, (times, lines, columns)), indexing="ij")
            part = torch.stack([5 * axes[0], axes[1], axes[2]]).flatten(1)
        else:
            part = torch.arange(times).repeat(3, 1)
        parts.append(part + start)
        start = int(parts[-1].max()) + 1
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", CASES)
def test_each_pair_of_dimensions_turns_with_the_axis_that_transformers_gives_it(name):
    config, theirs = CASES[name]
    position = media_positions()
    frequency = rope_frequencies(config)
    cos, sin = rope_table(frequency, positions_of_pairs(config, position))
    expected = theirs().rotary_emb(torch.zeros(1, 1, 1), position[:, None])
    assert (cos - expected[0][0]).abs().max() < 1e-5
    assert (sin[:, 8:] - expected[1][0, :, 8:]).abs().max() < 1e-5 and sin[:, :8].equal(-sin[:, 8:])
    axes = positions_of_pairs(config, torch.arange(3)[:, None])[0]
    assert axes.bincount().tolist() == SECTIONS


@pytest.mark.parametrize("config", [QWEN2_5, QWEN3], ids=CASES)
def test_text_turns_as_without_three_axes_to_the_last_bit(config):
    position_T = torch.cat([torch.arange(50), torch.arange(7)])
    frequency = rope_frequencies(config)
    plain = rope_table(frequency, position_T)
    on_axes = rope_table(frequency, positions_of_pairs(config, position_T.repeat(3, 1)))
    assert plain[0].equal(on_axes[0]) and plain[1].equal(on_axes[1])


@pytest.mark.parametrize("name", CASES)
def test_hidden_states_equal_those_of_transformers_with_media_positions_and_deep_features(name):
    config, make = CASES[name]
    theirs = make().eval()
    shake(theirs)
    ours = Decoder(config)
    held = theirs.state_dict()
    for key, parameter in ours.named_parameters():
        if key != "head.weight":
            parameter.data = held[hugging_face_name(llama, "decoder", key)]
    position = media_positions()
    x_TD = torch.randn(position.shape[1], config.hidden_size)
    is_medium_T = torch.zeros(len(x_TD), dtype=torch.bool)
    is_medium_T[4:10] = is_medium_T[13:25] = True
    deep, options = None, {}
    if name == "interleaved":
        features = [torch.randn(18, config.hidden_size) for _ in range(2)]
        deep = DeepFeatures(is_medium_T.nonzero().flatten(), features)
        options = {"visual_pos_masks": is_medium_T[None], "deepstack_visual_embeds": features}
    with torch.no_grad():
        out = theirs(inputs_embeds=x_TD[None], position_ids=position[:, None], **options).last_hidden_state[0]
        found = ours.norm(ours(x_TD, position, Segments.of([len(x_TD)]), deep=deep))
    assert (found - out).abs().max() <= 1e-5 * out.abs().max()


PLAIN = dataclasses.replace(QWEN2_5, head_dim=32, mrope_sections=None)
YARN = YarnScaling(factor=8.0, original_max_position=64, attention_factor=1.25)


@pytest.mark.parametrize("betas", [(32.0, 1.0), (2.0, 0.5)])
def test_yarn_scales_the_speed_of_each_pair_as_transformers_does(betas):
    yarn = dataclasses.replace(YARN, beta_fast=betas[0], beta_slow=betas[1])
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 8.0, "original_max_position_embeddings": 64}
    rope |= {"beta_fast": betas[0], "beta_slow": betas[1], "attention_factor": 1.25}
    theirs = transformers.LlamaConfig(**SIZES, head_dim=32, rope_parameters=rope)
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, None)
    assert torch.allclose(rope_frequencies(dataclasses.replace(PLAIN, yarn=yarn)).float(), expected, rtol=1e-6, atol=0)
    assert factor == 1.25


def test_yarn_keeps_fast_pairs_and_slows_the_others_by_its_factor():
    plain, scaled = (rope_frequencies(dataclasses.replace(PLAIN, yarn=yarn)) for yarn in (None, YARN))
    assert plain[0] == scaled[0] and torch.allclose(plain[-1] / 8, scaled[-1])
    assert (scaled.diff() < 0).all()


def test_queries_grow_after_each_original_context_and_keys_do_not():
    grows = dataclasses.replace(PLAIN, yarn=YARN, query_growth=0.1)
    position = torch.tensor([0, 63, 64, 127, 128])
    cos, sin, query_cos, query_sin = decoder_rope(grows, position)
    growth = 1 + 0.1 * torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0]).log()[:, None]
    assert torch.allclose(query_cos, cos * growth) and torch.allclose(query_sin, sin * growth)
    assert cos[0].eq(1.25).all()
    without = decoder_rope(dataclasses.replace(grows, query_growth=0.0), position)
    assert len(without) == 2 and without[0].equal(cos) and without[1].equal(sin)


def test_scalings_that_make_no_sense_are_refused():
    for options, message in (
        ({"query_growth": 0.1}, "query_growth needs yarn"),
        ({"yarn": YARN, "query_growth": 0.1, "mrope_sections": [8, 4, 4]}, "needs one position for each token"),
        ({"yarn": YARN, "rope_theta": 1.0}, "needs a rope_theta above 1, not 1"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(PLAIN, **options)


def test_packed_documents_with_media_positions_equal_separate_ones():
    config = ModelConfig(decoder=QWEN3)
    model = build(config)
    samples = []
    for position in (media_positions(), None, media_positions()[:, :14]):
        length = 9 if position is None else position.shape[1]
        token_T = torch.randint(61, (length,))
        samples.append(EncodedSample("", "text", token_T, token_T, position_T=position))
    packed = pack(samples, sum(map(len, samples)) + 5, config)
    assert packed.position_T.shape == (3, len(packed.token_T))
    assert packed.position_T[:, -5:].equal(torch.arange(5).repeat(3, 1))
    separate = [model(pack([sample], len(sample), config))[1] for sample in samples]
    assert (model(packed)[1] - torch.cat(separate)).abs().max() <= 1e-5

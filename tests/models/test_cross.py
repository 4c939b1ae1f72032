"""Layers of gated cross-attention: against Idefics, and what each token sees of the media of its document."""

import dataclasses

import pytest
import torch
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

from avlm.config.connector import CrossConfig, ResamplerConfig
from avlm.config.decoder import DecoderConfig
from avlm.config.model import ModelConfig, ProjectorConfig, VisionConfig
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample, placeholders
from avlm.evaluation.generation import generate, steps
from avlm.evaluation.kept_cache import KeptCache
from avlm.models.avlm import AVLM
from avlm.models.batch import AUDIO, IGNORE, IMAGE
from avlm.models.cross import CrossBlock
from avlm.models.initial import init
from avlm.models.reading import read_by
from kernels.segments import Segments
from tests.models.handmade import assert_gradients_close, build, shake

DECODER = DecoderConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_layers=3, num_heads=2, num_kv_heads=2)
NAMES = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attention.{name}": f"cross_attn.{name}_proj" for name in ("q", "k", "v", "o")},
    "attention.q_norm": "cross_attn.q_layer_norm",
    "attention.k_norm": "cross_attn.k_layer_norm",
    **{f"ffn.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


@pytest.mark.parametrize("qk_norm", [False, True])
def test_equals_idefics(qk_norm: bool) -> None:
    """Two documents side by side, of which transformers sees one after the other; some tokens see nothing."""
    torch.manual_seed(3)
    keys = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "rms_norm_eps": DECODER.norm_eps}
    config = IdeficsConfig(**keys, qk_layer_norms=qk_norm, vision_config={"embed_dim": 16}, alpha_type="float")
    config._attn_implementation = "sdpa"
    theirs = IdeficsGatedCrossAttentionLayer(config, layer_idx=0)
    shake(theirs)
    ours = CrossBlock(CrossConfig(every=1, qk_norm=qk_norm), DECODER)
    found = {"attention_gate.weight": theirs.alpha_cross_attn, "ffn_gate.weight": theirs.alpha_dense}
    for name, parameter in ours.named_parameters():
        path, _, key = name.rpartition(".")
        if name not in found:
            found[name] = theirs.get_parameter(f"{NAMES[path]}.{key}")
        parameter.data.copy_(found[name])
    # 5 tokens with items of 2 and 3 features at tokens 1 and 3; 3 tokens with an item of 2 features at the first.
    row = read_by(Segments.of([5, 3]), [1, 3, 5], [2, 3, 2], "all")
    seen = [torch.tensor([0, 2, 2, 5, 5]), torch.tensor([2, 2, 2])]
    x_TD, features_MD = torch.randn(8, 16), torch.randn(7, 16, requires_grad=True)
    their_features_MD = features_MD.detach().clone().requires_grad_()
    out_TD = ours(x_TD, features_MD, row)
    expected = []
    for x_D, features, count in zip(x_TD.split([5, 3]), their_features_MD.split([5, 2]), seen):
        is_seen = torch.arange(len(features)) < count[:, None]
        mask = torch.zeros(is_seen.shape).masked_fill(~is_seen, torch.finfo(torch.float32).min)
        expected.append(
            theirs(
                x_D[None],
                image_hidden_states=features[None],
                image_attention_mask=mask[None, None],
                cross_attention_gate=(count > 0).float()[None],
            )[0]
        )
    expected_TD = torch.cat(expected)
    torch.testing.assert_close(out_TD, expected_TD, atol=2e-6, rtol=1e-5)
    weights = torch.randn_like(out_TD)
    (out_TD * weights).sum().backward()
    (expected_TD * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    their_gradients = {name: found[name].grad for name in gradients}
    assert_gradients_close(
        {**gradients, "features": features_MD.grad},
        {**their_gradients, "features": their_features_MD.grad},
        tolerance=5e-6,
    )


def test_tokens_see_media_of_their_document_up_to_themselves() -> None:
    # Documents of 6 and 4 tokens; in the first two items side by side, then one; in the second one.
    documents, places, counts = Segments.of([6, 4, 2]), [1, 2, 4, 7], [3, 2, 4, 5]
    row = read_by(documents, places, counts, "all")
    assert row.tokens.intervals.last_T.tolist() == [-1, 2, 4, 4, 8, 8, -1, 4, 4, 4, -1, -1]
    assert not row.tokens.intervals.first_T.any() and row.features.cu_seqlens.tolist() == [0, 9, 14, 14]
    row = read_by(documents, places, counts, "last")
    # The two items that stand side by side are one medium.
    assert row.tokens.intervals.first_T.tolist() == [0, 0, 0, 0, 5, 5, 0, 0, 0, 0, 0, 0]
    assert row.tokens.intervals.last_T.tolist() == [-1, 2, 4, 4, 8, 8, -1, 4, 4, 4, -1, -1]
    none = read_by(Segments.of([]), [], [], "last")
    assert none.num_rows == 0 and len(none.tokens) == 0


VISION = VisionConfig(hidden_size=8, intermediate_size=16, num_layers=1, num_heads=2, image_size=8, patch_size=4,
                      feature_layer=-1)  # fmt: skip
PERCEIVER = ResamplerConfig(type="perceiver", num_queries=3, num_layers=1, num_heads=2, intermediate_size=16)


def model_of(cross: CrossConfig | None, resampler: ResamplerConfig | None) -> ModelConfig:
    return ModelConfig(
        decoder=DECODER, vision=VISION, vision_projector=ProjectorConfig(resampler=resampler), cross=cross
    )


def sample_of(text: list[int], num_images: int, config: ModelConfig) -> EncodedSample:
    """Images after the first token of a text."""
    items = [torch.randint(256, (2, 2, 48), dtype=torch.uint8) for _ in range(num_images)]
    token_T = torch.tensor([text[0], *placeholders("image", items, config), *text[1:]])
    target_T = torch.cat([token_T[1:], torch.tensor([IGNORE])])
    target_T[target_T < 0] = IGNORE
    return EncodedSample("", "image", token_T, target_T, {"image": items}, num_features=3 * num_images)


@pytest.mark.parametrize("sees", ["all", "last"])
def test_begins_as_its_decoder_and_packs(sees: str) -> None:
    torch.manual_seed(4)
    config = model_of(CrossConfig(every=2, sees=sees), PERCEIVER)
    fresh = AVLM(config)
    init(fresh)
    samples = [sample_of([1, 2, 3, 4], 2, config), sample_of([5, 6], 0, config), sample_of([7, 8, 9], 1, config)]
    row = pack(samples, 16, config)
    assert (row.token_T == IMAGE).sum() == 3 and not (row.token_T == AUDIO).any()
    x_TD, *_ = fresh.embed(row)
    alone_TD = fresh.decoder(x_TD, row.position_T, row.segments)
    assert torch.equal(fresh.hidden(row), alone_TD), "gates of 0 leave the decoder as it was, bit for bit"

    model = build(config)
    loss, _ = model(row)
    loss.backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(gradient.abs().sum() > 0 for gradient in packed.values())
    model.zero_grad()
    total = 0.0
    for sample in samples:
        of_sample, _ = model(pack([sample], len(sample), config))
        of_sample.backward()
        total += of_sample.item()
    assert total == pytest.approx(loss.item(), rel=1e-6)
    assert_gradients_close(packed, {name: parameter.grad for name, parameter in model.named_parameters()}, 1e-5)


@pytest.mark.parametrize("sees", ["all", "last"])
def test_answers_with_caches_are_those_without(sees: str) -> None:
    """In a batch of prompts of which one has no media; and in a conversation, of which nothing is kept."""
    torch.manual_seed(5)
    config = model_of(CrossConfig(every=2, sees=sees, first_gate=0.8), PERCEIVER)
    model = build(config)
    asked = [sample_of([1, 2, 3], 2, config), sample_of([5, 6], 0, config), sample_of([7, 8, 9, 10], 1, config)]
    answers = generate(model, asked, stop_ids=[], max_new_tokens=6)
    for prompt, answer in zip(asked, answers):
        for i, token in enumerate(answer.token_ids):
            token_T = torch.cat([prompt.token_T, torch.tensor(answer.token_ids[:i], dtype=torch.int64)])
            longer = dataclasses.replace(prompt, token_T=token_T, target_T=token_T)
            [alone] = generate(model, [longer], stop_ids=[], max_new_tokens=1)
            assert alone.token_ids == [token]
            assert alone.logprobs == pytest.approx(answer.logprobs[i : i + 1], abs=1e-5)
    kept = KeptCache(model)
    for prompt, answer in zip(asked, answers):
        found = [token for [[(token, _)]] in steps(model, [prompt], max_new_tokens=6, kept=kept)]
        assert found == answer.token_ids


def test_what_does_not_go_together_is_named() -> None:
    sections = dataclasses.replace(DECODER, mrope_sections=[2, 1, 1])
    projector = ProjectorConfig(resampler=PERCEIVER)
    parts = {"vision": VISION, "vision_projector": projector}
    ModelConfig(decoder=sections, **parts)  # a resampler goes with M-RoPE
    with pytest.raises(ValueError, match=r"Value error, cross does not go with decoder\.mrope_sections"):
        ModelConfig(decoder=sections, cross=CrossConfig(every=1), **parts)
    with pytest.raises(ValueError, match=r"resampler does not go with vision_projector\.downsample"):
        ModelConfig(decoder=DECODER, **{**parts, "vision_projector": dataclasses.replace(projector, downsample=2)})

"""Resamplers against transformers: forward, gradients, items of any number of rows side by side in a row."""

import dataclasses

import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel, IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverConfig, Idefics2PerceiverResampler

from avlm.config.connector import ResamplerConfig
from avlm.models.reading import QuerySets
from avlm.models.resampler import Resampler
from tests.models.handmade import assert_gradients_close, features_at, shake

LENGTHS = [5, 1, 9]  # rows of three items
WIDTH, TOWER = 16, 12
QFORMER = ResamplerConfig(
    type="qformer", num_queries=3, num_layers=3, num_heads=2, intermediate_size=20, hidden_size=WIDTH, read_every=2,
    norm_eps=1e-12,
)  # fmt: skip
PERCEIVER = ResamplerConfig(
    type="perceiver", num_queries=4, num_layers=2, num_heads=2, head_dim=6, intermediate_size=48, activation="relu",
)  # fmt: skip
IDEFICS2 = dataclasses.replace(PERCEIVER, num_heads=4, num_kv_heads=2, norm="rms", gated=True, activation="silu")

OF_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}


def qformer():
    keys = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = Blip2QFormerModel(Blip2QFormerConfig(**keys, **dropout, encoder_hidden_size=TOWER))
    names = {"first_norm": "layernorm"}
    for i in range(3):
        ours, theirs = f"blocks.{i}", f"encoder.layer.{i}"
        of_attention = {"attention": "attention"} | ({"reading": "crossattention"} if i % 2 == 0 else {})
        for part, their_part in of_attention.items():
            for name, their_name in {"q": "query", "k": "key", "v": "value"}.items():
                names[f"{ours}.{part}.{name}"] = f"{theirs}.{their_part}.attention.{their_name}"
            names[f"{ours}.{part}.o"] = f"{theirs}.{their_part}.output.dense"
            names[f"{ours}.{part}_norm"] = f"{theirs}.{their_part}.output.LayerNorm"
        names[f"{ours}.up"] = f"{theirs}.intermediate_query.dense"
        names[f"{ours}.down"] = f"{theirs}.output_query.dense"
        names[f"{ours}.ffn_norm"] = f"{theirs}.output_query.LayerNorm"
    queries = torch.nn.Parameter(torch.randn(3, WIDTH))

    def forward(rows_PC):
        return model(query_embeds=queries[None], encoder_hidden_states=rows_PC[None]).last_hidden_state[0]

    return QFORMER, model, queries, names, forward


def idefics():
    config = IdeficsConfig(perceiver_config={"qk_layer_norms_perceiver": False}, vision_config={"embed_dim": TOWER})
    model = IdeficsPerceiverResampler(config, TOWER, depth=2, n_heads=2, head_dim=6, n_latents=4)
    names = {"last_norm": "layer_norm"}
    for i in range(2):
        attention, ffn = f"blocks.{i}.0", f"blocks.{i}.1"
        names |= {f"blocks.{i}.rows_norm": f"{attention}.context_layer_norm"}
        names |= {f"blocks.{i}.queries_norm": f"{attention}.latents_layer_norm", f"blocks.{i}.ffn_norm": f"{ffn}.ln"}
        names |= {f"blocks.{i}.reading.{ours}": f"{attention}.{theirs}" for ours, theirs in OF_ATTENTION.items()}
        names |= {f"blocks.{i}.reading.o": f"{attention}.output_proj"}
        names |= {f"blocks.{i}.up": f"{ffn}.fc", f"blocks.{i}.down": f"{ffn}.c_proj"}
    return PERCEIVER, model, model.latents, names, lambda rows_PC: model(rows_PC[None])[0]


def idefics2():
    keys = {"resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 6}
    config = Idefics2PerceiverConfig(hidden_size=TOWER, num_key_value_heads=2, rms_norm_eps=1e-5, **keys)
    config._attn_implementation = "sdpa"
    model = Idefics2PerceiverResampler(config)
    names = {"last_norm": "norm"}
    for i in range(2):
        ours, theirs = f"blocks.{i}", f"layers.{i}"
        names |= {f"{ours}.rows_norm": f"{theirs}.input_context_norm"}
        names |= {f"{ours}.queries_norm": f"{theirs}.input_latents_norm"}
        names |= {f"{ours}.ffn_norm": f"{theirs}.post_attention_layernorm"}
        names |= {f"{ours}.reading.{a}": f"{theirs}.self_attn.{b}" for a, b in OF_ATTENTION.items()}
        names |= {f"{ours}.{a}": f"{theirs}.mlp.{a}_proj" for a in ("gate", "up", "down")}

    def forward(rows_PC):
        return model(context=rows_PC[None], attention_mask=torch.ones(1, len(rows_PC)))[0]

    return IDEFICS2, model, model.latents, names, forward


@pytest.mark.parametrize("make", [qformer, idefics, idefics2])
def test_equals_transformers(make) -> None:
    torch.manual_seed(1)
    config, theirs, queries, names, forward = make()
    theirs.train()
    shake(theirs)
    ours = Resampler(config, TOWER)
    found = {"queries": queries}
    for name, their_name in names.items():
        found |= {f"{name}.{key}": value for key, value in theirs.get_submodule(their_name).named_parameters()}
    assert found.keys() == dict(ours.named_parameters()).keys()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(found[name])
    rows_PC = torch.randn(sum(LENGTHS), TOWER, requires_grad=True)
    their_rows_PC = rows_PC.detach().clone().requires_grad_()

    media = features_at(torch.arange(0), torch.empty(0, 1), queries=QuerySets.of(LENGTHS, config))
    out_QD = ours(media, rows_PC)
    expected_QD = torch.cat([forward(part) for part in their_rows_PC.split(LENGTHS)])
    torch.testing.assert_close(out_QD, expected_QD, atol=2e-6, rtol=1e-5)

    weights = torch.randn_like(out_QD)
    (out_QD * weights).sum().backward()
    (expected_QD * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    their_gradients = {name: found[name].grad for name in gradients}
    assert_gradients_close(
        {**gradients, "rows": rows_PC.grad}, {**their_gradients, "rows": their_rows_PC.grad}, tolerance=5e-6
    )


def test_windows_read_their_own_rows_alone() -> None:
    """Rows of a clip in windows of 4: each set of queries is that of a clip of so many rows."""
    torch.manual_seed(2)
    config = dataclasses.replace(QFORMER, window=4)
    resampler = Resampler(config, TOWER)
    torch.nn.init.normal_(resampler.queries)
    shake(resampler)
    rows_PC = torch.randn(6, TOWER)

    def out(lengths: list[int], given: ResamplerConfig) -> torch.Tensor:
        return resampler(features_at(torch.arange(0), torch.empty(0, 1), queries=QuerySets.of(lengths, given)), rows_PC)

    assert config.outputs_of(6) == 6 and config.outputs_of(0) == 0
    torch.testing.assert_close(out([6], config), out([4, 2], QFORMER))

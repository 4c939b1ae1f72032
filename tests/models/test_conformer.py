"""Conformer blocks behind a tower, against those of transformers; what they keep for the backward."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import ParakeetEncoder, ParakeetEncoderConfig

from avlm.config.connector import ResamplerConfig
from avlm.families import parakeet
from avlm.models import conformer
from avlm.models.conformer import ConformerBlock, relative_positions
from avlm.models.reading import QuerySets
from avlm.models.resampler import ConformerAdapter
from avlm.preflight import activations
from kernels.segments import Segments
from tests.models.handmade import assert_gradients_close, features_at, load_tower, save
from tests.parallel.live_bytes import LiveBytes
from tests.preflight.test_activations import as_on_a_gpu
from tests.preflight.test_memory import make_case, make_config

LENGTHS = [9, 1, 30, 4]  # rows of items
TOWER = 12
CONFIG = ResamplerConfig(type="conformer", num_layers=2, num_heads=4, hidden_size=32, intermediate_size=40)


def test_the_adapter_is_a_linear_and_blocks_of_parakeet_with_neighbours_or_without(tmp_path):
    torch.manual_seed(0)
    keys = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    theirs = ParakeetEncoder(ParakeetEncoderConfig(**keys, num_mel_bins=16, subsampling_conv_channels=4))
    save(theirs, tmp_path)
    tower, _ = load_tower(parakeet.read(theirs.config.to_dict(), {}), tmp_path)
    adapter = ConformerAdapter(CONFIG, TOWER)
    adapter.blocks.load_state_dict(tower.blocks.state_dict())
    rows_PC = torch.randn(sum(LENGTHS), TOWER, requires_grad=True)
    media = features_at(torch.arange(0), torch.empty(0, 1), queries=QuerySets.of(LENGTHS, CONFIG))
    out_PD = adapter(media, rows_PC)
    expected = []
    for part_LC in rows_PC.split(LENGTHS):
        x_1LD = math.sqrt(32) * adapter.linear(part_LC)[None]
        positions = theirs.encode_positions(x_1LD)
        for block in theirs.layers:
            x_1LD = block(x_1LD, position_embeddings=positions)
        expected.append(x_1LD[0])
    torch.testing.assert_close(out_PD, torch.cat(expected), atol=3e-6, rtol=1e-5)
    weights = torch.randn_like(out_PD)
    inputs = (rows_PC, adapter.linear.weight, adapter.linear.bias)
    ours = torch.autograd.grad((out_PD * weights).sum(), inputs)
    wanted = torch.autograd.grad((torch.cat(expected) * weights).sum(), inputs)
    assert_gradients_close(dict(enumerate(ours)), dict(enumerate(wanted)), tolerance=1e-5)
    assert CONFIG.outputs_of(7) == 7 and adapter.init_stats().keys() >= dict(adapter.named_parameters()).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_block_keeps_is_as_estimated(dtype, monkeypatch):
    """Where attention keeps its inputs, with the biases, its result and lse."""

    def attention(q, k, v, bias):
        rows = [x[0].transpose(0, 1) for x in (q, k, v)]
        return as_on_a_gpu(*rows).transpose(0, 1)[None] + 0 * bias.exp().sum()  # exp keeps its result: as many numbers

    monkeypatch.setattr(conformer.F, "scaled_dot_product_attention", attention)
    block = ConformerBlock(64, 160, 4, kernel=9, bias=True, conv_bias=True).to(dtype)
    segments = Segments.of([100, 100])
    x_TD = torch.randn(200, 64, dtype=dtype, requires_grad=True)
    positions_ND = relative_positions(segments, x_TD)
    with LiveBytes() as counter:
        out_TD = block(x_TD, segments, positions_ND)
        kept = counter.live - sum(parameter.nbytes for parameter in block.parameters())
    cfg = make_config()
    layout = make_case(cfg, dtype, cfg.stages[0]).layout
    said = activations.conformer_block_bytes(64, 160, 4, 100, layout)
    assert len(out_TD) * said == pytest.approx(kept, rel=0.15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_queries": 4}, "num_queries=4 is for another type than conformer"),
        ({"conv_kernel": 4}, "conv_kernel=4 is even"),
        ({"type": "qformer"}, "type=qformer needs num_queries"),
        ({"type": "perceiver", "num_queries": 2, "conv_kernel": 7}, "conv_kernel=7 is for another type"),
    ],
)
def test_a_setting_of_another_type_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_a_convolution_over_one_row_takes_no_rows():
    adapter = ConformerAdapter(replace(CONFIG, conv_kernel=1), TOWER)
    media = features_at(torch.arange(0), torch.empty(0, 1), queries=QuerySets.of([], adapter.config))
    assert adapter(media, torch.empty(0, TOWER)).shape == (0, 32)

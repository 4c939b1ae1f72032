"""Projectors: which features come together, and where they are written."""

import typing

import pytest
import torch

from avlm.config.model import ProjectorConfig
from avlm.models.projector import Projector
from tests.models.handmade import features_at

KINDS = typing.get_args(typing.get_type_hints(ProjectorConfig)["type"])


@pytest.mark.parametrize("kind", KINDS)
def test_projected_rows_replace_theirs_and_leave_the_others(kind):
    projector = Projector(ProjectorConfig(type=kind, hidden_size=7), tower_size=4, gathered=2, decoder_size=6)
    into, rows, features = torch.randn(9, 6), torch.tensor([7, 2, 3]), torch.randn(6, 4)
    source = torch.tensor([[0, 5], [4, 2], [3, -1]])
    before = into.clone()
    out, _ = projector(into, features_at(rows, source), features)
    x = torch.stack([torch.cat([features[0], features[5]]), torch.cat([features[4], features[2]])])
    x = torch.cat([x, torch.cat([features[3], torch.zeros(4)])[None]])
    expected = {
        "linear": lambda: projector.linear(x),
        "mlp2x_gelu": lambda: projector.down(torch.nn.functional.gelu(projector.up(x))),
        "swiglu": lambda: projector.down(torch.nn.functional.silu(projector.gate(x)) * projector.up(x)),
    }[kind]()
    assert (out[rows] - expected).abs().max() < 1e-6
    others = torch.tensor([0, 1, 4, 5, 6, 8])
    assert out[others].equal(before[others])


@pytest.mark.parametrize("kind", KINDS)
def test_no_features_give_exactly_zero_gradients(kind):
    projector = Projector(ProjectorConfig(type=kind), tower_size=4, gathered=1, decoder_size=6)
    nothing = torch.zeros(0, dtype=torch.int64)
    out, _ = projector(torch.randn(5, 6), features_at(nothing, nothing.view(0, 1)), torch.zeros(0, 4))
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in projector.parameters())


# The root mean squares of the GELU and of the SiLU of a standard normal.
@pytest.mark.parametrize("kind, share", [("linear", 1.0), ("mlp2x_gelu", 0.65), ("swiglu", 0.60)])
@pytest.mark.parametrize("std", [0.02, 0.14])
def test_features_start_about_as_large_as_told(kind, share, std):
    config = ProjectorConfig(type=kind, hidden_size=256, output_std=std)
    projector = Projector(config, tower_size=64, gathered=2, decoder_size=512)
    stats = projector.init_stats()
    for name, parameter in projector.named_parameters():
        torch.nn.init.normal_(parameter, *stats[name])
    x_PC, source_RS = torch.randn(200, 64), torch.arange(200).view(100, 2)
    with torch.no_grad():
        out, _ = projector(torch.zeros(100, 512), features_at(torch.arange(100), source_RS), x_PC)
    assert out.square().mean().sqrt().item() == pytest.approx(share * std, rel=0.1)


def test_features_are_made_of_the_mean_of_their_rows_or_of_what_a_merger_makes_of_them():
    x, source = torch.randn(6, 4), torch.tensor([[0, 5, 1, 2], [4, -1, -1, -1]])
    rows = torch.tensor([1, 3])
    mean = Projector(ProjectorConfig(mean=True), tower_size=4, gathered=4, decoder_size=6)
    out, _ = mean(torch.zeros(5, 6), features_at(rows, source), x)
    expected = torch.stack([x[[0, 5, 1, 2]].mean(0), x[4]])
    assert (out[rows] - mean.down(torch.nn.functional.gelu(mean.up(expected)))).abs().max() < 1e-6
    merging = Projector(ProjectorConfig(merge=True), tower_size=4, gathered=2, decoder_size=6)
    out, _ = merging(torch.zeros(5, 6), features_at(rows, source[:, :2]), x)
    merged = merging.merger(torch.stack([torch.cat([x[0], x[5]]), torch.cat([x[4], torch.zeros(4)])]))
    assert (out[rows] - merging.down(torch.nn.functional.gelu(merging.up(merged)))).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_weighted_sums_of_projected_rows_beside_learned_ones(kind):
    projector = Projector(ProjectorConfig(type=kind, newline=True), tower_size=4, gathered=1, decoder_size=6)
    torch.nn.init.normal_(projector.newline)
    x, rows, newlines = torch.randn(5, 4), torch.tensor([0, 4, 2]), torch.tensor([1, 3])
    source = torch.tensor([[2], [0], [4]])
    mix = torch.tensor([[0, 1, 2, 2], [1, 1, 1, 1], [2, 0, 0, 0]])
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    media = features_at(rows, source, mix=mix, weights=weights, newlines=newlines)
    out, _ = projector(torch.randn(5, 6), media, x)
    each, _ = projector(torch.zeros(3, 6), features_at(torch.arange(3), source), x)
    assert (out[rows] - (weights[..., None] * each[mix]).sum(1)).abs().max() < 1e-6
    assert out[newlines].equal(projector.newline.expand(2, -1))
    out[newlines].sum().backward()
    assert projector.newline.grad.equal(torch.full((6,), 2.0))


def test_an_offset_norm_of_means_multiplies_by_one_more_than_its_weight():
    """Gemma 3: the means of 2 x 2 rows are normalised and go through one linear without a bias."""
    config = ProjectorConfig(type="linear", bias=False, mean=True, feature_norm="rms_offset", norm_eps=1e-3)
    projector = Projector(config, tower_size=4, gathered=4, decoder_size=6).double()
    stats = projector.init_stats()
    assert stats["feature_norm.weight"] == (0.0, 0.0)
    torch.nn.init.normal_(projector.feature_norm.weight)
    x, rows = torch.randn(8, 4).double(), torch.tensor([2, 0])
    source = torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7]])
    out, _ = projector(torch.zeros(3, 6, dtype=torch.float64), features_at(rows, source), x)
    mean = x[source].mean(1)
    normed = mean / (mean.square().mean(1, keepdim=True) + 1e-3).sqrt() * (1 + projector.feature_norm.weight)
    assert (out[rows] - normed @ projector.linear.weight.T).abs().max() < 1e-6

"""Pixel shuffle and frame stacking: which features come together, and where."""

import pytest
import torch

from avlm.config import ProjectorConfig
from avlm.models.projector import Projector, shuffle_pixels, stack_frames


def test_pixel_shuffle_puts_neighbouring_patches_side_by_side():
    patches = torch.arange(2 * 16).view(2, 16, 1)  # two images of 4 x 4 patches
    rows = shuffle_pixels(patches, 2)
    assert rows.tolist()[:4] == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert (rows[4:] - 16).equal(rows[:4])


def test_pixel_shuffle_of_one_keeps_every_patch():
    patches = torch.randn(2, 9, 5)
    assert shuffle_pixels(patches, 1).equal(patches.flatten(0, 1))


def test_stacked_frames_stand_in_order_and_are_padded_with_zeros():
    frames = torch.arange(1, 6).view(5, 1)
    rows = torch.tensor([[0, 1, 2], [3, 4, -1]])
    assert stack_frames(frames, rows).tolist() == [[1, 2, 3], [4, 5, 0]]


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_projected_rows_replace_theirs_and_leave_the_others(kind):
    projector = Projector(ProjectorConfig(type=kind, hidden_size=7), tower_size=4, gathered=2, decoder_size=6)
    into, rows, features = torch.randn(9, 6), torch.tensor([7, 2, 3]), torch.randn(3, 8)
    out = projector(into, rows, features)
    if kind == "linear":
        expected = projector.linear(features)
    else:
        expected = projector.down(torch.nn.functional.gelu(projector.up(features)))
    assert (out[rows] - expected).abs().max() < 1e-6
    others = torch.tensor([0, 1, 4, 5, 6, 8])
    assert out[others].equal(into[others])


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_no_features_give_exactly_zero_gradients(kind):
    projector = Projector(ProjectorConfig(type=kind), tower_size=4, gathered=1, decoder_size=6)
    projector(torch.randn(5, 6), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in projector.parameters())

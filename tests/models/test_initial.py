"""Random initial values."""

import pytest
import torch

from avlm.models import initial
from avlm.models.initial import Drawn


@pytest.mark.parametrize("shape", [(64, 48), (7,), (5, 3, 2), (1, 200), ()])
def test_a_slice_has_the_numbers_of_the_whole(monkeypatch, shape):
    monkeypatch.setattr(initial, "BLOCK", 96)
    value = Drawn(torch.Size(shape), 0.5, 2.0, "1 decoder.weight")
    whole = value.whole()
    assert whole.shape == torch.Size(shape) and whole.unique().numel() == whole.numel()
    for start, end in ((0, 2), (1, 5), (4, 5), (0, 64)):
        for columns in (slice(None), slice(1, 3)):
            region = (slice(start, end), columns, slice(None))[: len(shape)]
            assert torch.equal(value[region], whole[region])


def test_a_rank_draws_the_blocks_that_it_holds_a_part_of(monkeypatch):
    drawn = []
    monkeypatch.setattr(Drawn, "_block", lambda self, number: drawn.append(number) or torch.zeros(64, 2**14))
    value = Drawn(torch.Size((256, 2**14)), 0.0, 1.0, "1 weight")
    assert value[slice(70, 120), slice(None)].shape == (50, 2**14)
    assert drawn == [1]
    value[slice(60, 65), slice(0, 3)]
    assert drawn == [1, 0, 1]


def test_values_that_fit_in_one_block_are_drawn_at_once():
    """As they were before there were blocks."""
    expected = torch.empty(30, 20).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(242666581))
    assert torch.equal(Drawn(torch.Size((30, 20)), 0.0, 0.02, "1 decoder.head.weight").whole(), expected)

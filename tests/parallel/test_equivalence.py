"""The quick form of ``make equivalence``."""

import pytest

from tests.measurements import no_hang
from tests.measurements.equivalence import choose, compare_all
from tests.measurements.layouts import LAYOUTS
from tests.parallel.spawn import run_ranks


@pytest.mark.parametrize("world_size", [1, 2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_every_layout_has_the_loss_and_the_gradients_of_one_process(world_size):
    failed = run_ranks(compare_all, world_size, choose(world_size, quick=True), LAYOUTS[world_size], False)[0]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_no_mix_of_media_over_ranks_hangs_or_changes_the_loss(world_size):
    assert not no_hang.run([world_size], quick=True)

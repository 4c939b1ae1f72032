import dataclasses
from itertools import islice

import pytest
import torch

from avlm.data.loader import open_loader
from avlm.data.stream import Stream
from avlm.models.batch import AUDIO, IMAGE
from tests.data.small_files import ANY_GRID, data, model


def loader(folder, source="synthetic:seconds=1", towers=None, rank=0, state=None, train=True, **changes):
    settings = data(folder, seq_length=512, **changes)
    stream = Stream(source, settings, towers or model(), rank=rank, world=2, seed=1, train=train)
    return open_loader(stream, state)


def test_rows_hold_the_mix_that_was_asked_for(tmp_path):
    batch = next(iter(loader(tmp_path, "synthetic:documents=2,images=3,clips=2,seconds=1")))
    assert batch.segments.spans == [(0, 256), (256, 256)] and len(batch.keys) == batch.read == 2
    assert len(batch.image.sizes) == 3 and (batch.token_T == IMAGE).sum() == len(batch.image.rows) == 48
    assert len(batch.audio.values) == 2 and (batch.token_T == AUDIO).sum() == len(batch.audio.rows) == 100
    assert (batch.target_R >= 0).all() and len(batch.target_R) == 512 - 148


def test_rows_repeat_for_a_seed_and_differ_between_ranks_and_steps(tmp_path):
    tokens = lambda rank: [batch.token_T for batch in islice(loader(tmp_path, rank=rank), 2)]
    first, again, other = tokens(0), tokens(0), tokens(1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])


def test_images_of_any_grid_differ_in_size_and_have_positions(tmp_path):
    sections = dataclasses.replace(model().decoder, head_dim=8, mrope_sections=[1, 1, 2])
    towers = dataclasses.replace(model(downsample=2, audio=None), vision=ANY_GRID, decoder=sections)
    source = "synthetic:documents=2,images=4"
    batch = next(iter(loader(tmp_path, source, towers, image_tokens=[4.0, 40.0])))
    assert batch.image.sizes == [(10, 14), (8, 16), (14, 10), (14, 10)]
    assert (batch.token_T == IMAGE).sum() == len(batch.image.rows) == sum(y * x // 4 for y, x in batch.image.sizes)
    assert batch.position_T.shape == (3, 512) and batch.position_T[1:, 35].tolist() == [7, 7], "after 5 x 7 features"
    with pytest.raises(ValueError, match=r"do not fit into .*: lower the mix or data\.image_tokens"):
        next(iter(loader(tmp_path, source, towers)))


def test_a_resumed_loader_goes_on(tmp_path):
    rows = loader(tmp_path)
    next(iter(rows))
    expected = next(iter(rows)).token_T
    state = loader(tmp_path).state() | {"row": 1}
    assert torch.equal(next(iter(loader(tmp_path, state=state))).token_T, expected)


def test_validation_ends(tmp_path):
    rows = loader(tmp_path, train=False)
    assert len(list(rows)) == len(list(rows)) == 8


def test_models_without_towers_get_text(tmp_path):
    batch = next(iter(loader(tmp_path, towers=model(vision=None, audio=None))))
    assert len(batch.image.values) == len(batch.audio.values) == 0 and len(batch.target_R) == 512 - 4


@pytest.mark.parametrize(
    "source, message",
    [
        ("synthetic:pictures=2", "'pictures=2' is none of documents=N"),
        ("synthetic:documents=0", "must be at least 1"),
        ("synthetic:images=99", "do not fit into a synthetic document of 128 tokens"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        next(iter(loader(tmp_path, source)))
    with pytest.raises(ValueError, match="no tower for"):
        loader(tmp_path, "synthetic:images=1", model(vision=None))

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avlm.config.load import load_config
from avlm.config.model import ProjectorConfig
from avlm.data.features import of_images
from avlm.data.media.patches import cut_into_patches, frames_of
from avlm.data.packing import pack, select
from avlm.data.sample import EncodedSample
from avlm.models.batch import AUDIO as AUDIO_ID
from avlm.models.batch import IGNORE, IMAGE, KINDS, empty_batch
from tests.data.small_files import AUDIO, VISION, model

ROOT = Path(__file__).parents[2]
METHODS = ["knapsack", "first_fit"]
STACK = 4
MODEL = model(stack=STACK)
IMAGE_ROWS = 16  # (28 / 7)^2


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 50), max_size=60), seq_length=st.integers(50, 120))
def test_every_sample_is_in_one_row_and_no_row_is_too_long(method, lengths, seq_length):
    rows = select(lengths, seq_length, method)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= seq_length for row in rows)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=2, max_size=60))
def test_no_two_rows_would_fit_into_one(method, lengths):
    sums = sorted(sum(lengths[i] for i in row) for row in select(lengths, 50, method))
    assert len(sums) < 2 or sums[0] + sums[1] > 50


def test_the_knapsack_opens_with_the_first_and_takes_the_largest_that_still_fits():
    assert select([3, 9, 5, 2, 1], 10, "knapsack") == [[0, 2, 3], [1, 4]]
    assert select([2, 4, 4, 6, 3, 1], 10, "knapsack") == [[0, 3, 5], [1, 2], [4]]
    assert select([3, 9, 5, 2, 1], 10, "first_fit") == [[0, 2, 3], [1, 4]]


def test_rows_of_the_demo_are_full():
    """As many samples as its packer sees at a time, of the lengths that it has."""
    data = load_config(ROOT / "configs" / "demo.yaml").stages[-1].data
    lengths = torch.randint(8, 64, (data.packing_buffer,), generator=torch.Generator().manual_seed(0)).tolist()
    *full, _ = select(lengths, data.seq_length, data.packing)  # what the last row holds goes back into the buffer
    assert len(full) >= 5 and sum(lengths[i] for row in full for i in row) >= 0.98 * len(full) * data.seq_length


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="11 tokens does not fit into seq_length=10"):
        select([3, 11], 10, "knapsack")


@st.composite
def samples(draw):
    """Samples whose media carry their own number, so that mixing them up shows."""
    made = []
    for number in range(draw(st.integers(0, 5))):
        images = draw(st.integers(0, 2))
        frames = draw(st.lists(st.sampled_from([2, 4, 10, 22]), max_size=3))
        rows = [-(-(count // 2) // STACK) for count in frames]
        tokens = [IMAGE] * (IMAGE_ROWS * images) + [AUDIO_ID] * sum(rows)
        tokens += [draw(st.integers(0, 99)) for _ in range(draw(st.integers(1, 6)))]
        token_T = torch.tensor(tokens)
        target_T = torch.cat([token_T[1:], torch.tensor([IGNORE])])
        pixels = torch.full((images, 4, 4, 3 * 7 * 7), number, dtype=torch.uint8)
        mels = [torch.full((AUDIO.num_mels, count), float(number + 1)) for count in frames]
        media = {"image": list(pixels), "audio": mels}
        kind = KINDS[number % len(KINDS)]
        target_T = torch.where(target_T >= 0, target_T, IGNORE)
        made.append(EncodedSample(f"s{number}", kind, token_T, target_T, media))
    return made


@settings(max_examples=60, deadline=None)
@given(samples=samples(), spare=st.integers(0, 7))
def test_a_row_holds_its_samples_whole_and_in_order(samples, spare):
    length = sum(map(len, samples)) + spare
    batch = pack(samples, length, MODEL)
    assert batch.token_T.shape == (length,) and batch.token_T.dtype == batch.position_T.dtype == torch.int64
    spans = batch.segments.spans
    assert len(spans) == len(samples) + (spare > 0)
    targets = torch.full((length,), IGNORE)
    targets[batch.target_rows_R] = batch.target_R
    for sample, (start, count) in zip(samples, spans):
        assert torch.equal(batch.token_T[start : start + count], sample.token_T)
        assert torch.equal(targets[start : start + count], sample.target_T)
        rows = (batch.target_rows_R >= start) & (batch.target_rows_R < start + count)
        assert (batch.kind_R[rows] == KINDS.index(sample.kind)).all()
    for start, count in spans:
        assert torch.equal(batch.position_T[start : start + count], torch.arange(count))
    assert (targets[length - spare :] == IGNORE).all()
    assert batch.keys == [sample.key for sample in samples]


@settings(max_examples=60, deadline=None)
@given(samples=samples())
def test_each_feature_goes_to_a_row_of_its_own_sample(samples):
    batch = pack(samples, sum(map(len, samples)) + 3, MODEL)
    owner_T = torch.cat([torch.full((len(s),), n) for n, s in enumerate(samples)] + [torch.full((3,), -1)])
    # Images: the features of image i are rows i * 16 to (i + 1) * 16, and its pixels hold the sample's number.
    assert len(batch.image.rows) == len(batch.image.values) == IMAGE_ROWS * len(batch.image.sizes)
    image_owner = torch.tensor([n for n, sample in enumerate(samples) for _ in sample.media["image"]])
    pixel_owner = image_owner.repeat_interleave(IMAGE_ROWS)
    assert torch.equal(owner_T[batch.image.rows], pixel_owner.long())
    assert batch.image.segments.spans == [(i * 17, 17) for i in range(len(batch.image.sizes))]
    # Sound: flatten the windows as the tower's convolutions do, keep rows, stack them, and see whose they are.
    flat = batch.audio.values[:, 0, ::2].flatten()
    kept = torch.cat([flat[batch.audio.windows.kept], torch.zeros(1)])  # index -1: the padding of a stack
    stacked = kept[batch.audio.sources]
    for feature, row in zip(stacked, batch.audio.rows):
        assert feature[0] == owner_T[row] + 1
        assert ((feature == feature[0]) | (feature == 0)).all()
    assert len(batch.audio.rows) == len(batch.audio.sources) == (batch.token_T == AUDIO_ID).sum()
    assert batch.audio.segments.cu_seqlens[-1] == len(batch.audio.windows.kept)


def test_frames_past_a_clip_are_exact_zeros():
    samples = []
    for frames in (2, 12):
        ids = torch.tensor([AUDIO_ID] * (frames // 2))
        mel = torch.ones(AUDIO.num_mels, frames)
        samples.append(EncodedSample("a", "audio", ids, torch.full_like(ids, IGNORE), {"audio": [mel]}))
    batch = pack(samples, 10, model())
    assert batch.audio.values.shape == (2, AUDIO.num_mels, 12)
    assert (batch.audio.values[0, :, 2:] == 0).all() and (batch.audio.values[1] == 1).all()
    assert batch.audio.windows.kept.tolist() == [0, 6, 7, 8, 9, 10, 11]


def test_a_feature_is_made_of_neighbouring_patches_of_its_image():
    vision = dataclasses.replace(VISION, image_size=32, patch_size=8, class_token=True)
    shuffled = dataclasses.replace(MODEL, vision=vision, vision_projector=ProjectorConfig(downsample=2))
    rows = of_images([(4, 4)] * 2, shuffled).sources
    assert rows.tolist()[:4] == [[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]
    assert (rows[4:] - 17).equal(rows[:4])
    plain = dataclasses.replace(MODEL, vision=dataclasses.replace(vision, class_token=False))
    assert of_images([(4, 4)], plain).sources.tolist() == [[row] for row in range(16)]


def test_pixels_stay_bytes_until_the_tower_reads_them():
    pixels = torch.randint(0, 256, (2, 1, 3, 28, 28), dtype=torch.uint8)
    ids = torch.tensor([IMAGE] * 32)
    patches = [cut_into_patches(frames, MODEL.vision) for frames in pixels]
    sample = EncodedSample("a", "image", ids, torch.full_like(ids, IGNORE), {"image": patches})
    packed = pack([sample], 40, MODEL).image
    assert packed.values.dtype == torch.uint8
    assert torch.equal(torch.stack(frames_of(packed, MODEL.vision, 1)), pixels)


@pytest.mark.parametrize("towers", [{}, {"vision": None}, {"audio": None}, {"vision": None, "audio": None}])
def test_a_row_without_media_has_zero_rows_of_each(towers):
    batch = empty_batch(12, model(**towers))
    packed = pack([], 12, model(**towers))
    for name, media in batch.media.items():
        assert packed.media[name].values.shape == media.values.shape
        assert packed.media[name].sources.shape == media.sources.shape
    assert batch.token_T.equal(packed.token_T) and batch.segments.spans == [(0, 12)]
    assert len(batch.target_R) == len(batch.image.rows) == len(batch.audio.rows) == 0
    assert len(batch.image.sources) == len(batch.audio.sources) == 0
    assert len(batch.image.values) == len(batch.audio.values) == 0
    assert len(batch.image.segments) == len(batch.audio.segments) == 0


def test_a_full_row_has_no_padding_and_a_row_of_nothing_is_legal():
    sample = EncodedSample("a", "text", torch.arange(4), torch.arange(4))
    assert pack([sample, sample], 8, MODEL).segments.spans == [(0, 4), (4, 4)]
    assert len(pack([], 0, MODEL).segments) == 0


def test_a_batch_moves_as_a_whole():
    batch = empty_batch(4, MODEL)
    moved = batch.to("meta")
    tensors = [moved.token_T, moved.segments.cu_seqlens, moved.audio.windows.kept]
    for media in moved.media.values():
        tensors += [media.values, media.segments.cu_seqlens, media.sources, media.rows]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.segments.max_length == 4

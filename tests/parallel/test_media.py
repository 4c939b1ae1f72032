"""Images and audio windows encoded on any rank give the features and the gradients of one process."""

import functools
import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from avlm.config.decoder import DecoderConfig
from avlm.config.model import AudioConfig, ModelConfig, ProjectorConfig, VisionConfig
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample
from avlm.models.avlm import AVLM
from avlm.models.costs import item_costs
from avlm.models.initial import init
from avlm.parallel import media
from avlm.parallel.apply import own_part
from avlm.parallel.exchange import RoutedSegments, apply_media
from avlm.parallel.mesh import lay_out
from kernels.segments import Segments
from tests.parallel.spawn import run_ranks

TOKENS = 128
SIZES = {"hidden_size": 24, "intermediate_size": 48, "num_heads": 2}
MODEL = ModelConfig(
    decoder=DecoderConfig(vocab_size=32, num_layers=1, num_kv_heads=2, **SIZES),
    # A class token and 16 patches, four of which make a feature.
    vision=VisionConfig(num_layers=2, image_size=16, patch_size=4, feature_layer=-1, **SIZES),
    audio=AudioConfig(num_layers=1, num_mels=16, max_positions=50, **SIZES),
    vision_projector=ProjectorConfig(downsample=2),
    audio_projector=ProjectorConfig(downsample=2),
)
AREA = {"resize": "area", "class_token": False, "pre_norm": False, "frames_per_patch": 2, "axial_rope": True}
# Images of any grid: windows of 4 x 4 patches in one of two layers, a position table, and the rows of both layers.
ANY_GRID = replace(
    MODEL,
    vision=VisionConfig(
        **{"num_layers": 2, "image_size": 8, "patch_size": 2, "window": 4, "full_layers": [1]},
        **{"deepstack_layers": [0], "feature_layer": -1, **AREA, **SIZES},
    ),
)
GRIDS = [(2, 2), (6, 4), (4, 10), (2, 8), (8, 8)]

# Ranks -> mesh (replicate, shard, context, tensor) -> cases: (images, clips) of every data rank.
APART = {
    2: {
        (1, 1, 2, 1): [[(5, 0)], [(0, 3)], [(3, 4)], [(1, 0)], [(0, 0)]],
    },
    4: {
        (1, 1, 2, 2): [[(5, 0)], [(0, 3)], [(4, 5)], [(1, 1)], [(0, 0)]],
        (1, 2, 2, 1): [[(3, 2), (0, 1)], [(0, 0), (2, 0)]],
    },
}
POOLED = {
    2: {
        (1, 2, 1, 1): [
            [(12, 5), (0, 0)],
            [(0, 3), (2, 0)],
            [(0, 0), (0, 0)],
        ],
    },
    4: {
        (2, 2, 1, 1): [
            [(12, 5), (0, 0), (0, 0), (0, 0)],
            [(3, 1), (0, 2), (1, 0), (6, 4)],
        ],
        (1, 2, 1, 2): [
            [(12, 5), (0, 0)],
            [(2, 0), (3, 7)],
            [(0, 11), (1, 0)],
            [(0, 0), (0, 0)],
        ],
    },
}
WORLDS = pytest.mark.parametrize("world_size", [2, 4])


def cases_of(world_size):
    """(kind, mesh, counts) of every case."""
    for kind, layouts in (("apart", APART), ("pooled", POOLED)):
        for shape, cases in layouts[world_size].items():
            for counts in cases:
                yield kind, shape, counts


def make_batch(model, num_images, num_clips, seed):
    """One row in a random order: samples of an image or of a clip, and one of text."""
    generator = torch.Generator().manual_seed(seed)
    samples = [make_image(model, generator) for _ in range(num_images)]
    samples += [make_clip(model, generator) for _ in range(num_clips)]
    samples.append(make_sample([], {}))
    order = torch.randperm(len(samples), generator=generator).tolist()
    return pack([samples[i] for i in order], TOKENS, model)


def make_image(model, generator):
    lines, columns = 4, 4
    if model.vision.any_grid:
        lines, columns = GRIDS[int(torch.randint(len(GRIDS), (), generator=generator))]
    shape = (lines, columns, model.vision.patch_numbers)
    patches = torch.randint(0, 255, shape, generator=generator, dtype=torch.uint8)
    return make_sample([-200] * (lines * columns // 4), {"image": [patches]})


def make_clip(model, generator):
    """9 to 20 tower rows, so that some clips have an odd one at the end."""
    num_rows = int(torch.randint(9, 21, (), generator=generator))
    mel = torch.randn(model.audio.num_mels, 2 * num_rows, generator=generator)
    return make_sample([-300] * math.ceil(num_rows / 2), {"audio": [mel]})


def make_sample(placeholders, items):
    token_T = torch.tensor([*placeholders, 7])
    return EncodedSample("", "text", token_T, torch.full_like(token_T, -100), items)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference(model, batches, weights):
    """Token features of every row and the summed gradients, in this process alone."""
    model.zero_grad()
    features = []
    for batch, weight_TD in zip(batches, weights):
        x_TD = embed(model, batch)
        (x_TD * weight_TD).sum().backward()
        features.append(x_TD.detach())
    return features, gradients(model)


def embed(model, batch):
    """Token features, with those of an inner layer added."""
    x_TD, deep, _ = model.embed(batch)
    return x_TD if deep is None else x_TD.index_add(0, deep.rows, *deep.features)


def distance(found, expected, floor=1e-30):
    largest = expected.abs().max().clamp(min=floor)
    return ((found - expected).abs().max() / largest).item()


def compare(model, world, counts, group=None, shuffled=True):
    """(error of the features, of the gradients, images encoded here, rows of each window encoded here)."""
    batches = [make_batch(model.config, *count, seed) for seed, count in enumerate(counts)]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(TOKENS, 24, generator=generator) for _ in batches]
    features, expected = reference(model, batches, weights)

    share = media.Share.of_prompts(group, TOKENS) if group else media.Share.of_rows(world, TOKENS)
    batch = batches[world.data_rank]
    place_T = torch.arange(TOKENS)
    if shuffled:
        place_T = torch.randperm(TOKENS, generator=generator)
    first = share.rank % share.ranks_per_home * share.tokens_per_rank
    held = place_T.argsort()[first : first + share.tokens_per_rank]  # tokens of the whole row on this rank
    local = media.split(batch, place_T, model.config, share)
    num_images = len(local.image.sizes)
    window_lengths = local.audio.lengths
    local = replace(local, token_T=batch.token_T[held], position_T=batch.position_T[held]).to("cpu")

    model.zero_grad()
    x_TD = embed(model, local)
    (x_TD * weights[world.data_rank][held]).sum().backward()
    summed = gradients(model)
    assert summed.keys() == expected.keys()
    floor = 1e-3 * torch.cat([gradient.flatten() for gradient in expected.values()]).norm().item()
    error = 0.0
    for name, gradient in expected.items():
        dist.all_reduce(summed[name], group=group)
        error = max(error, distance(summed[name], gradient, floor))
    return distance(x_TD, features[world.data_rank][held]), error, num_images, window_lengths


def make_model(config):
    model = AVLM(config)
    init(model)
    apply_media(model)
    return model


def all_cases(world_size):
    """What ``compare`` finds, by case; and whether a batch stays as it is where nobody shares its row."""
    dist.init_process_group("gloo")
    device = torch.device("cpu")
    model = make_model(MODEL)
    found = {}
    for kind, shape, counts in cases_of(world_size):
        found[kind, shape, str(counts)] = compare(model, lay_out(shape, device, kind == "pooled"), counts)

    world = lay_out((1, 1, world_size // 2, 2), device)
    group = world.decoder_mesh.get_group("tensor")
    found["group of the tensor axis"] = compare(model, world, [(3, 2)], group=group, shuffled=False)
    world = lay_out((1, world_size, 1, 1), device, balance_media=True)
    others = [(0, 0)] * (world_size - 1)
    model.vision.requires_grad_(False)
    found["frozen tower"] = compare(model, world, [(3, 2), *others])
    any_grid = make_model(ANY_GRID)
    found["images of any grid, of one row"] = compare(any_grid, lay_out((1, 1, world_size, 1), device), [(5, 1)])
    found["images of any grid, of all rows"] = compare(any_grid, world, [(4, 1), *others[1:], (1, 0)])
    found["no images of any grid"] = compare(any_grid, world, [(0, 1), *others])
    no_audio = make_model(replace(MODEL, audio=None, audio_projector=None))
    found["no audio tower"] = compare(no_audio, world, [(3, 0), *others])
    batch = make_batch(MODEL, 1, 1, 0)
    alone = lay_out((1, world_size, 1, 1), device)
    is_same = own_part(batch, MODEL, alone) is batch
    dist.destroy_process_group()
    return found, is_same


@functools.cache
def measured(world_size):
    return run_ranks(all_cases, world_size, world_size)


@WORLDS
def test_every_rank_gets_the_features_and_gradients_of_one_process(world_size):
    for found, _ in measured(world_size):
        for case, (feature_error, gradient_error, *_) in found.items():
            assert feature_error <= 1e-5, case
            assert gradient_error <= 1e-4, case


@WORLDS
def test_each_image_and_window_is_encoded_once_and_no_rank_has_more_than_its_share(world_size):
    ranks = [found for found, _ in measured(world_size)]
    for kind, shape, counts in cases_of(world_size):
        encoded = [found[kind, shape, str(counts)][2:] for found in ranks]
        if kind == "pooled":
            check_shares(encoded, counts)
            continue
        size = world_size // len(counts)
        for home, count in enumerate(counts):
            check_shares(encoded[home * size : (home + 1) * size], [count])


def check_shares(encoded, counts):
    """``encoded``: of each rank that shares these (images, clips), its images and the rows of each window."""
    images, windows = zip(*encoded)
    num_images, num_clips = map(sum, zip(*counts))
    assert sum(images) == num_images
    assert sum(map(len, windows)) == num_clips
    assert max(images) - min(images) <= 1
    costs = [sum(item_costs("audio", of_rank, MODEL)) for of_rank in windows]
    [longest] = item_costs("audio", [20], MODEL)
    assert max(costs) <= sum(costs) / len(costs) + longest


@WORLDS
def test_a_batch_whose_row_nobody_shares_stays_as_it_is(world_size):
    assert all(is_same for _, is_same in measured(world_size))


def test_a_route_moves_to_a_device_with_its_boundaries(monkeypatch):
    ordinary = Segments.of([3, 0, 2])
    rows_S = torch.tensor([4, 1])
    routed = RoutedSegments(
        *(ordinary.cu_seqlens, 3),
        **{"send_rows_S": rows_S, "send_counts": [1, 1], "receive_counts": [0, 2], "group": None, "repeats": False},
    )
    moved = routed.to("meta")
    assert isinstance(moved, RoutedSegments)
    assert moved.cu_seqlens.is_meta
    assert moved.send_rows_S.is_meta
    assert moved.spans == ordinary.spans, "known without asking the device"
    assert (moved.max_length, moved.send_counts, moved.receive_counts) == (3, [1, 1], [0, 2])
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.to("meta"))  # pinned memory needs a GPU
    pinned = routed.pin_memory()
    assert isinstance(pinned, RoutedSegments) and pinned.cu_seqlens.is_meta and pinned.send_rows_S.is_meta


def test_an_image_with_windows_costs_what_its_windows_do():
    """Twice the patches in a line of windows cost twice as much, those in full layers more."""
    windowed = replace(ANY_GRID, vision=replace(ANY_GRID.vision, full_layers=[]))
    one, two = item_costs("image", [(4, 8), (4, 16)], windowed)
    assert two == 2 * one
    one, two = item_costs("image", [(4, 8), (4, 16)], ANY_GRID)
    assert two > 2 * one


def slowest(costs, ranks):
    loads = [0] * (max(ranks, default=0) + 1)
    for cost, rank in zip(costs, ranks):
        loads[rank] += cost
    return max(loads)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 3))
def test_the_slowest_rank_takes_at_most_a_third_longer_than_in_the_best_assignment(costs, num_ranks):
    ranks = media.assign(costs, num_ranks)
    assignments = itertools.product(range(num_ranks), repeat=len(costs))
    best = min(slowest(costs, other) for other in assignments)
    assert set(ranks) <= set(range(num_ranks))
    assert slowest(costs, ranks) <= (4 / 3 - 1 / (3 * num_ranks)) * best + 1e-9


def test_with_four_clips_to_a_rank_the_slowest_is_within_a_tenth_of_what_is_possible():
    """Of the mean, or of the largest clip where that is above the mean. Log-normal lengths, median 6 s, 1 to 30 s."""
    whisper = AudioConfig(hidden_size=1280, intermediate_size=5120, num_layers=32, num_heads=20)
    model = replace(MODEL, audio=whisper)
    draw = random.Random(0)
    for _ in range(1000):
        num_ranks = draw.choice([2, 4, 8, 16, 32])
        rows = []
        for _ in range(draw.randint(4 * num_ranks, 5 * num_ranks)):
            seconds = min(max(draw.lognormvariate(math.log(6), 0.7), 1), 30)
            rows.append(round(50 * seconds))
        costs = item_costs("audio", rows, model)
        bound = max(sum(costs) / num_ranks, max(costs))
        assert slowest(costs, media.assign(costs, num_ranks)) <= 1.1 * bound


@pytest.mark.parametrize("num_items", [0, 1, 4, 17, 20])
def test_equal_images_are_dealt_one_by_one(num_items):
    """So 17 images on four ranks are 5 for one of them, 18 % above the mean, and nothing better exists."""
    assert media.assign([100] * num_items, 4) == [item % 4 for item in range(num_items)]

"""How evenly the programs of attention keep the multiprocessors of an H100 busy, by counting their rounds."""

import heapq

import pytest
import torch

from kernels.attention_backward import num_parts
from kernels.attention_configs import forward_config, keys_config, one_pass
from kernels.attention_tiles import heads_in_turn

PROCESSORS = 132
FIXED = 2  # rounds that a program takes besides those of its loop: to find its tile, to load and to store it
MODELS = {"Qwen2.5-0.5B": (14, 2, 64), "Qwen2.5-7B": (28, 4, 128), "Llama-3-8B": (32, 8, 128)}
LAYOUTS = {
    "4k": [4096],
    "8k": [8192],
    "packed 4k": [700, 900, 1100, 1396],
    "packed 8k": [1900, 577, 40, 3000, 130, 145, 2400],
}


def busy(rounds_of_tiles: list[int], heads: int, section: int, residents: int = 1) -> float:
    """The share of their time that the processors work, until the last program ends: each takes the next program of
    the launch order (``find_program``) when it is free. ``residents``: programs that share a processor."""
    free = [0] * (PROCESSORS * residents)
    total = 0
    for program in range(len(rounds_of_tiles) * heads):
        tile = program % (len(rounds_of_tiles) * section) // section
        rounds = rounds_of_tiles[tile]
        if rounds:
            rounds += FIXED
            total += rounds
            heapq.heapreplace(free, free[0] + rounds)
    return total / len(free) / max(free)


def tiles_of(lengths: list[int], block: int) -> list[tuple[int, int] | None]:
    """(length of its segment, first row within it) of each tile, None for one without rows (``find_tile``)."""
    tiles: list[tuple[int, int] | None] = [None] * (sum(lengths) // block + len(lengths))
    begin = 0
    for n, length in enumerate(lengths):
        for number, first in enumerate(range(0, length, block)):
            tiles[begin // block + n + number] = length, first
        begin += length
    return tiles


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_key_gradients_keep_nine_tenths_of_the_processors_busy(model, layout):
    (H, K, E), lengths = MODELS[model], LAYOUTS[layout]
    config = keys_config(E, torch.bfloat16, one_pass(E, torch.bfloat16, None), None)
    M, N = config["BLOCK_M"], config["BLOCK_N"]
    tiles = tiles_of(lengths, N)
    parts = num_parts(len(tiles) * K, H // K, PROCESSORS)
    group = H // K // parts
    rounds = [group * -(-(tile[0] - tile[1] // M * M) // M) if tile else 0 for tile in tiles]
    section = heads_in_turn(K * parts, 2 * sum(lengths) * E * group * 2, len(tiles), PROCESSORS)
    assert busy(rounds, K * parts, section) >= 0.9
    if K == 2:  # without parts half of the GPU and more would wait
        assert busy([parts * n for n in rounds], K, K) <= 0.5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_the_forward_keeps_the_processors_busy(model, layout):
    """Less so with few heads at 4k: 14 heads are 462 programs for 264 places."""
    (H, K, E), lengths = MODELS[model], LAYOUTS[layout]
    config = forward_config(E, torch.bfloat16, False)
    M, N = config["BLOCK_M"], config["BLOCK_N"]
    tiles = tiles_of(lengths, M)
    rounds = [-(-min(tile[0], tile[1] + M) // N) if tile else 0 for tile in tiles]
    section = heads_in_turn(K, 2 * sum(lengths) * E * 2, len(tiles) * (H // K), PROCESSORS) * (H // K)
    least = 0.75 if H == 14 else 0.9
    assert busy(rounds[::-1], H, section, residents=2 if E == 64 else 1) >= least


def test_parts_only_where_programs_are_few():
    assert num_parts(128 * 8, 4, PROCESSORS) == 1  # Llama-3-8B at 16k rows: 1024 programs
    assert num_parts(64 * 8, 4, PROCESSORS) == 2
    assert num_parts(32 * 8, 4, PROCESSORS) == 4
    assert num_parts(32 * 2, 7, PROCESSORS) == 7  # a group of seven is whole or apart
    assert num_parts(32, 1, PROCESSORS) == 1

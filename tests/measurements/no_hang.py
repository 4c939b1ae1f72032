"""No rank waits for a tower that another does not run: every pair of media on neighbouring ranks, towers frozen and
trained, sharded in each way. There is no timeout here: a case that hangs stops the whole run.

    python -m tests.measurements.no_hang
"""

import itertools

from avlm.parallel import mesh
from tests.parallel.small import EVERYTHING, MEDIA, MODELS, build, make_config, make_rows
from tests.parallel.spawn import run_ranks

PROJECTORS = ["vision_projector", "audio_projector"]
TRAINED = {  # how towers are sharded -> modules that train
    "unit": [EVERYTHING, PROJECTORS, ["decoder"]],
    "block": [EVERYTHING, PROJECTORS, ["vision", "audio"]],
    "replicate": [PROJECTORS, ["decoder"]],
}
CASES = [("square", sharding, trained) for sharding, choices in TRAINED.items() for trained in choices]
CASES += [("means", "block", EVERYTHING)]
CASES += [
    (model, "block", trained)
    for model in ("windows", "deep", "tiles", "queries", "cross")
    for trained in (EVERYTHING, PROJECTORS)
]
CASES += [("cross", "unit", [*EVERYTHING, "cross"]), ("cross", "replicate", ["cross"])]


def pairs_of(model: str, quick: bool) -> list[tuple[str, str]]:
    """Media of even ranks and of odd ones; a third of all pairs if quick, or for models with other images than squares;
    if both, four that differ."""
    pairs = list(itertools.product(MEDIA, MEDIA))
    if model == "square":
        return pairs[::3] if quick else pairs
    return pairs[1::7] if quick else pairs[::3]


def steps(quick: bool) -> list[str]:
    """Runs on every rank: one forward and backward for each pair. Losses must be those of the first sharding of the
    same model."""
    worlds: dict = {}
    losses: dict[tuple[str, tuple[str, str]], float] = {}
    failed = []
    for model_name, sharding, trained in CASES:
        stage = {"name": "all", "steps": 1, "train": trained}
        cfg = make_config(model=MODELS[model_name], parallel={"tower_sharding": sharding}, stages=[stage])
        world, model = build(cfg, worlds)
        for pair in pairs_of(model_name, quick):
            mixes = [pair[rank % 2] for rank in range(world.size)]
            row = make_rows(cfg, mixes)[world.rank]
            loss, _ = model(row)
            loss.backward()
            [total] = world.sum([loss.item()])
            expected = losses.setdefault((model_name, pair), total)
            if not abs(total - expected) <= 1e-5 * expected:
                failed.append(
                    f"{world.size} ranks, {model_name}, {pair}, towers {sharding}, {trained} train: {total}, "
                    f"not {expected}"
                )
    mesh.stop()
    return failed


def run(world_sizes: list[int], quick: bool) -> list[str]:
    failed = []
    count = sum(len(pairs_of(model, quick)) for model, *_ in CASES)
    for world_size in world_sizes:
        if world_size > 1:
            failed += run_ranks(steps, world_size, quick, method="spawn")[0]
            print(f"{world_size}  no hang: {count} combinations of media, frozen parts, towers and models went through")
    return failed


if __name__ == "__main__":
    assert not run([2, 4], quick=False)

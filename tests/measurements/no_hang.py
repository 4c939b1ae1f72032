"""No rank waits for a tower that another does not run: every pair of media on neighbouring ranks, towers frozen and
trainable, sharded in each way. Nothing here is timed out: a case that hangs is seen as the whole run standing still."""

import itertools

from avlm.config.load import resolve_config
from avlm.config.model import MODULES
from avlm.parallel import mesh
from tests.parallel.small import MEDIA, TREE, build, make_rows
from tests.parallel.spawn import run_ranks

PROJECTORS = ["vision_projector", "audio_projector"]
KINDS = {  # how towers are sharded -> what trains
    "unit": [list(MODULES), PROJECTORS, ["decoder"]],
    "block": [list(MODULES), PROJECTORS, ["vision", "audio"]],
    "replicate": [PROJECTORS, ["decoder"]],
}


def steps(quick: bool) -> list[str]:
    """Runs on every rank: one forward and backward for each pair. Losses are those of the first sharding."""
    worlds: dict = {}
    failed, losses = [], {}
    for sharding, trained in itertools.chain(*([(k, t) for t in v] for k, v in KINDS.items())):
        tree = {**TREE, "parallel": {"tower_sharding": sharding}}
        cfg = resolve_config({**tree, "stages": [{"name": "all", "steps": 1, "train": trained}]}, "no hang")
        world, model = build(cfg, worlds)
        pairs = list(itertools.product(MEDIA, MEDIA))
        for pair in pairs[:: 3 if quick else 1]:
            mixes = [pair[rank % 2] for rank in range(world.size)]
            row = make_rows(cfg, mixes)[world.rank]
            loss, _ = model(row)
            loss.backward()
            total = world.sum([loss.item()])[0]
            expected = losses.setdefault(pair, total)  # of the first layout; the rows are the same
            if not abs(total - expected) <= 1e-5 * expected:
                failed.append(
                    f"{world.size} ranks, {pair}, towers {sharding}, {trained} train: {total}, not {expected}"
                )
    mesh.stop()
    return failed


def run(world_sizes: list[int], quick: bool) -> list[str]:
    failed = []
    for world_size in (size for size in world_sizes if size > 1):
        failed += run_ranks(steps, world_size, quick, method="spawn")[0]
        count = sum(map(len, KINDS.values())) * len(range(0, len(MEDIA) ** 2, 3 if quick else 1))
        print(f"{world_size}  no hang: {count} combinations of media, frozen parts and tower sharding went through")
    return failed


if __name__ == "__main__":
    assert not run([2, 4], quick=False)

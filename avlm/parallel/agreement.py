"""What all ranks have to agree on, checked before a collective waits for a rank that does something else."""

import hashlib
from collections import Counter, defaultdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from avlm.models.avlm import AVLM, trains
from avlm.models.batch import Batch
from avlm.parallel.mesh import World

ROOT = Path(__file__).parents[2]


def check_start(world: World, config: str) -> None:
    """Raise ValueError, on all ranks, unless they run one config, one code and one torch."""
    code = hashlib.sha256()
    sources = [*ROOT.glob("avlm/**/*.py"), *ROOT.glob("kernels/**/*.py"), ROOT / "train.py"]
    for path in sorted(sources):
        code.update(path.read_bytes())
    own = {"config": config, "code (avlm/, kernels/, train.py)": code.hexdigest()[:16], "torch": torch.__version__}
    _compare(world, own, "start the same command from the same files on every machine")


def check_step(world: World, model: AVLM, step: int, parts: list[Batch]) -> None:
    """Raise ValueError, on all ranks, unless they are about to run the same forwards of the same modules."""
    own = {
        "step": step,
        "micro-batches": len(parts),
        "tokens": [len(part.token_T) for part in parts if part.pairs is None],
        "pairs of each rank": [part.pairs.counts for part in parts if part.pairs is not None],
        "modules, and whether they train": {name: trains(module) for name, module in model.named_children()},
    }
    _compare(world, own, "every rank has to run every tower the same number of times, if need be on zero items")


def _compare(world: World, own: dict[str, Any], advice: str) -> None:
    digest = hashlib.sha256(repr(own).encode()).hexdigest()
    if len(set(world.gather(digest))) == 1:
        return
    everyone = world.gather({key: str(value) for key, value in own.items()})
    for key in own:
        texts = [of_rank[key] for of_rank in everyone]
        usual, count = Counter(texts).most_common(1)[0]
        if count < len(texts):
            raise ValueError(f"ranks disagree on {key}: {_differences(texts, usual)}; {advice}")


def _differences(texts: list[str], usual: str) -> str:
    """Which ranks differ from the usual text, and in which line."""
    ranks_of = defaultdict(list)
    for rank, text in enumerate(texts):
        ranks_of[text].append(str(rank))
    del ranks_of[usual]
    found = []
    for odd, ranks in ranks_of.items():
        most_have, they_have = _first_difference(usual, odd)
        found.append(f"rank {', '.join(ranks)} has `{they_have}`, most have `{most_have}`")
    return ", ".join(found)


def _first_difference(a: str, b: str) -> tuple[str, str]:
    """The first lines in which two texts differ."""
    for line_a, line_b in zip_longest(a.splitlines(), b.splitlines(), fillvalue=""):
        if line_a != line_b:
            return line_a.strip(), line_b.strip()
    return a, b

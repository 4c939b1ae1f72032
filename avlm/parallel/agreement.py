"""What all ranks have to agree on, found out before the model's collectives wait for one that does something else."""

import hashlib
from collections import Counter
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
    for path in sorted([*ROOT.glob("avlm/**/*.py"), *ROOT.glob("kernels/**/*.py"), ROOT / "train.py"]):
        code.update(path.read_bytes())
    own = {"config": config, "code (avlm/, kernels/, train.py)": code.hexdigest()[:16], "torch": torch.__version__}
    _compare(world, own, "start the same command from the same files on every machine")


def check_step(world: World, model: AVLM, step: int, parts: list[Batch]) -> None:
    """Raise ValueError, on all ranks, unless they are about to run the same forwards of the same modules."""
    units = {name: trains(module) for name, module in model.named_children()}
    own = {
        "step": step,
        "micro-batches": len(parts),
        "token rows": [len(part.token_T) for part in parts],
        "modules, and whether they train": units,
    }
    _compare(world, own, "every rank has to run every tower as often, with zero rows where it has nothing")


def _compare(world: World, own: dict[str, Any], mend: str) -> None:
    for key, values in _different(world, own).items():
        usual, _ = Counter(values).most_common(1)[0]
        odd = [value for value in dict.fromkeys(values) if value != usual]
        differences = [_where_they_differ(usual, value) for value in odd]
        who = [", ".join(str(rank) for rank, x in enumerate(values) if x == value) for value in odd]
        said = (f"rank {ranks} has `{theirs}`, most have `{ours}`" for ranks, (ours, theirs) in zip(who, differences))
        raise ValueError(f"ranks disagree on {key}: {', '.join(said)}; {mend}")


def _different(world: World, own: dict[str, Any]) -> dict[str, list[str]]:
    """The entries that are not the same everywhere, as text of each rank. A hash tells whether there are any."""
    digest = hashlib.sha256(repr(own).encode()).hexdigest()
    if len(set(world.gather(digest))) == 1:
        return {}
    everyone = world.gather({key: str(value) for key, value in own.items()})
    columns = {key: [texts[key] for texts in everyone] for key in own}
    return {key: values for key, values in columns.items() if len(set(values)) > 1}


def _where_they_differ(a: str, b: str) -> tuple[str, str]:
    """The first lines that differ of two texts."""
    pairs = zip(a.splitlines() + [""], b.splitlines() + [""])
    return next(((x.strip(), y.strip()) for x, y in pairs if x != y), (a, b))

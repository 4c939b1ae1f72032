"""Everything that can be known to be wrong before ranks start. Each room checks its own part of the config."""

import sys

from avlm.config.run import Config
from avlm.data.check import check_data
from avlm.evaluation.check import check_measures
from avlm.models.shapes import parameter_shapes
from avlm.parallel.check import check_layout
from avlm.process.launch import local_ranks, started_by_torchrun
from avlm.storage.run_folder import find
from avlm.training.epochs import Epoch, epoch_of
from avlm.training.log import check_log
from avlm.weights import plan


def check(config: Config, world_size: int) -> list[Epoch | None]:
    """Raise ValueError or FileNotFoundError for what would fail later: mesh, initial weights, data, tokenizer, metrics.

    Returns the length of an epoch of each stage. Under torchrun one rank of each machine reads the files, and the
    others return nothing. If it finds an error, torchrun ends them while they wait for it to join the process group.
    """
    check_layout(config, world_size)
    if started_by_torchrun() and local_ranks()[0] > 0:
        return []
    resumes = find(config)[0] is not None
    if not resumes:
        plan.check(config.model, parameter_shapes(config.model), config.init_from)
    looks = check_data(config)
    told: list[str] = []
    for stage, found in zip(config.stages, looks, strict=True):
        lines = [line for each in found for line in each.lines() if line not in told]
        told += lines
        for line in lines:
            print(f"warning: stage {stage.name}: {line}", file=sys.stderr)
    check_measures(config)
    check_log(config)
    return [epoch_of(stage.data, found) for stage, found in zip(config.stages, looks, strict=True)]

"""Weights of pretrained models in, trained weights out: one name table per tower, strict in both directions.

    init_weights(model, init_from, seed)      every parameter: from a source, or at random
    load_weights(model, init_from)            what ``avlm.weights.plan`` found -> the model's parameters

A rank reads only the slice that it holds, one tensor at a time, whatever sharded the model and whatever layout wrote
it.
"""

from avlm.config.run import InitFrom
from avlm.models.avlm import AVLM, initial_values
from avlm.models.lora import start_magnitudes
from avlm.weights.plan import Report, plan
from avlm.weights.sources import Whole, copy_slice


def load_weights(model: AVLM, init_from: InitFrom) -> list[Report]:
    """Fill the modules that ``init_from`` names; the others are left as they are.

    Parameters are plain tensors or DTensors of any dtype and device. Raises ValueError or FileNotFoundError before any
    of them is written to, unless a file turns out to be damaged.
    """
    parameters = dict(model.named_parameters())
    plans = plan(model.config, {name: tuple(parameter.shape) for name, parameter in parameters.items()}, init_from)
    for each in plans:
        for name, theirs in each.chosen.items():
            copy_slice(parameters[name], each.source.tensors[theirs])
    return [each.report for each in plans]


def init_weights(model: AVLM, init_from: InitFrom, seed: int) -> list[Report]:
    """Give every parameter its first value: a source's where ``init_from`` has one, a random one elsewhere."""
    reports = load_weights(model, init_from)
    loaded = {name for report in reports for name in report.names}
    parameters = dict(model.named_parameters())
    for name, value in initial_values(model, seed, skip=loaded):
        copy_slice(parameters[name], Whole(value))
    start_magnitudes(model, skip=loaded)
    return reports

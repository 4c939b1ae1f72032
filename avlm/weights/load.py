"""Weights into a model: from the sources of ``init_from``, or from a folder or run that is opened as a whole.

    init_weights(model, init_from, seed)    every parameter: from a source, or at random
    load_weights(model, init_from)          only what the sources have
    open_model(name)                        a trained model, for use

A rank reads only the slice that it holds, one tensor at a time, however the model is sharded and whatever layout wrote
the file.
"""

from dataclasses import dataclass

import torch

from avlm.config.decoder import DecoderConfig
from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig, InitFrom
from avlm.models.avlm import AVLM
from avlm.models.initial import initial_values
from avlm.models.lora import init_magnitudes
from avlm.storage.hub import resolve
from avlm.storage.run_folder import is_run, read_run
from avlm.storage.weight_files import local
from avlm.weights.folder import model_and_data, read_config, stop_ids
from avlm.weights.plan import Report, load_plans
from avlm.weights.sources import copy_slice


def load_weights(model: AVLM, init_from: InitFrom) -> list[Report]:
    """Fill the modules that ``init_from`` names; the others are left as they are.

    Parameters are plain tensors or DTensors of any dtype and device. Raises ValueError or FileNotFoundError before any
    of them is written to, unless a file turns out to be damaged.
    """
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    plans = load_plans(model.config, shapes, init_from)
    for plan in plans:
        for name, chosen in plan.chosen.items():
            copy_slice(parameters[name], chosen.tensor)
    return [plan.report for plan in plans]


def init_weights(model: AVLM, init_from: InitFrom, seed: int) -> list[Report]:
    """Give every parameter its first value: a source's where ``init_from`` has one, a random one elsewhere."""
    reports = load_weights(model, init_from)
    loaded = {name for report in reports for name in report.names}
    parameters = dict(model.named_parameters())
    for name, value in initial_values(model, seed, skip=loaded):
        copy_slice(parameters[name], value)
    init_magnitudes(model, skip=loaded)
    return reports


@dataclass(frozen=True)
class OpenModel:
    """A trained model before its weights are read."""

    config: ModelConfig
    data: DataConfig  # how prompts are made
    stop_ids: list[int]  # that the folder names; its chat template may have more
    is_published: bool  # from a model folder, and so prompted by its own template
    source: InitFrom

    def load(self, device: torch.device, dtype: torch.dtype) -> AVLM:
        with torch.device("meta"):
            model = AVLM(self.config)
        model.to(dtype).to_empty(device=device).requires_grad_(False)
        model.decoder.tie()  # to_empty gave the head a weight of its own
        load_weights(model, self.source)
        return model


def open_model(name: str) -> OpenModel:
    """A run (its newest complete checkpoint), a checkpoint of one, an exported AVLM, or a decoder or whole model of
    Hugging Face by its folder or Hub name. Raises ValueError or FileNotFoundError."""
    path = local(name)
    if is_run(path):
        run, checkpoint = read_run(path)
        return OpenModel(run.model, run.stages[-1].data, [], False, InitFrom(all=str(checkpoint)))
    folder = resolve(name)
    config, data = model_and_data(folder)
    is_decoder = isinstance(read_config(folder), DecoderConfig)
    source = InitFrom(decoder=str(folder)) if is_decoder else InitFrom(all=str(folder))
    return OpenModel(config, data, stop_ids(folder), True, source)

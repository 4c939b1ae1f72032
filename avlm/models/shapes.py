"""The shapes of a model's parameters, without memory for them."""

import dataclasses
import functools
import json

import torch
from pydantic import TypeAdapter

from avlm.config.model import ModelConfig
from avlm.models.avlm import AVLM

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(model: ModelConfig) -> Shapes:
    return _parameter_shapes(json.dumps(dataclasses.asdict(model)))


@functools.lru_cache(maxsize=4)  # it takes a second for a model of billions of parameters, and many callers ask
def _parameter_shapes(model: str) -> Shapes:
    with torch.device("meta"):
        built = AVLM(TypeAdapter(ModelConfig).validate_json(model))
    return {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}

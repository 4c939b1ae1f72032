"""Energon's loader state as plain JSON, and back: a checkpoint holds no pickle."""

import dataclasses
from typing import Any

import numpy
import torch
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState
from megatron.energon.state import FlexState

KINDS = (SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState, SystemRngState, SliceState)
STATES = {kind.__name__: kind for kind in KINDS}


def to_json(value: Any) -> Any:
    """Energon's state as plain JSON: a container that JSON lacks becomes an object whose one key is its kind."""
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, list | tuple):
        items = [to_json(item) for item in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, torch.Tensor):
        assert value.dtype == torch.uint8  # the state of a generator
        return {"tensor": value.numpy().tobytes().hex()}
    if isinstance(value, numpy.ndarray):
        return {"array": [str(value.dtype), value.tolist()]}
    if isinstance(value, dict):
        kind = "flex" if isinstance(value, FlexState) else "dict"
        return {kind: [[to_json(key), to_json(item)] for key, item in value.items()]}
    name = type(value).__name__
    assert name in STATES
    fields = {}
    for field in dataclasses.fields(value):
        fields[field.name] = to_json(getattr(value, field.name))
    return {"state": [name, fields]}


def from_json(value: Any) -> Any:
    """The inverse of ``to_json``."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tuple":
        return tuple(from_json(item) for item in content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "tensor":
        return torch.frombuffer(bytearray.fromhex(content), dtype=torch.uint8)
    if kind == "array":
        return numpy.array(content[1], dtype=content[0])
    if kind in ("dict", "flex"):
        pairs = [(from_json(key), from_json(item)) for key, item in content]
        return FlexState(pairs) if kind == "flex" else dict(pairs)
    name, fields = content
    return STATES[name](**{key: from_json(item) for key, item in fields.items()})

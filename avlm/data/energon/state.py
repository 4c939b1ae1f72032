"""Energon's loader state as plain JSON, and back: a checkpoint holds no pickle."""

import dataclasses
from typing import Any

import numpy
import torch
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState
from megatron.energon.state import FlexState

STATES = {
    state.__name__: state
    for state in (SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState, SystemRngState, SliceState)
}


def to_json(value: Any) -> Any:
    """Energon's state as plain JSON: each container that JSON lacks becomes an object with its kind as the one key."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [to_json(item) for item in value]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, torch.Tensor):
        assert value.dtype == torch.uint8  # the state of a generator
        return {"tensor": value.numpy().tobytes().hex()}
    if isinstance(value, numpy.ndarray):
        return {"array": [str(value.dtype), value.tolist()]}
    if isinstance(value, dict):
        return {
            "flex" if isinstance(value, FlexState) else "dict": [[to_json(k), to_json(v)] for k, v in value.items()]
        }
    fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {"state": [STATES[type(value).__name__].__name__, fields]}


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
        return (FlexState if kind == "flex" else dict)((from_json(k), from_json(v)) for k, v in content)
    name, fields = content
    return STATES[name](**{key: from_json(item) for key, item in fields.items()})

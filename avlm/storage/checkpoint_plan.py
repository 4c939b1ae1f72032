"""Which rank writes which part of a checkpoint, and the index of what they wrote.

DCP's own save lets every rank send its plan to the first, which removes what several ranks hold, checks the rest and
sends each its part back: Python that grows with ranks x tensors, at every save. Here a rank knows its part from the
layout alone, and the first one hears where the parts lie only when that has changed, so at the first save of a stage.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo  # part of every .metadata
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor

from avlm.parallel.mesh import World


class Part(NamedTuple):
    """A tensor, or the shard of one, that this rank writes."""

    item: WriteItem  # DCP's description: name, offsets and sizes within the whole
    tensor: Tensor


class Place(NamedTuple):
    """Where a part lies. Plain data: the first rank gathers those of all ranks."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int


def flat(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, tuple]]:
    """(tensor by name, path in ``state`` by name), named as DCP names them."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(state)
    return planner.state_dict, planner.mappings


def own_parts(tensors: dict[str, Tensor], world: World) -> list[Part]:
    """What this rank writes. Of a shard that several ranks hold, the one with the fewest bytes so far writes it."""
    parts = []
    loads: dict[int, list[int]] = {}  # number of copies -> bytes of each copy; the same on all ranks
    for item in create_default_local_save_plan(tensors, is_coordinator=world.is_first).items:
        tensor = tensors[item.index.fqn]
        own, num_copies = _copy(tensor, world)
        load = loads.setdefault(num_copies, [0] * num_copies)
        writer = load.index(min(load))
        load[writer] += tensor.nbytes
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if own == writer and local.numel():  # of a tensor with fewer rows than ranks some hold nothing
            parts.append(Part(item, local.detach()))
    return parts


def _copy(tensor: Tensor, world: World) -> tuple[int, int]:
    """(which of the copies of its shard this rank holds, how many there are)."""
    if not isinstance(tensor, DTensor):
        return world.rank, world.size
    names = tensor.device_mesh.mesh_dim_names
    sharded = {name for name, placement in zip(names, tensor.placements) if not placement.is_replicate()}
    meshes = (world.decoder_mesh, world.tower_mesh, world.expert_mesh)
    whole = next(mesh for mesh in meshes if mesh is not None and sharded <= set(mesh.mesh_dim_names))
    own, num_copies = 0, 1
    for name in whole.mesh_dim_names:
        if name not in sharded:
            size = whole.size(whole.mesh_dim_names.index(name))
            own = own * size + whole.get_local_rank(name)
            num_copies *= size
    return own, num_copies


def index_of(tensors: dict[str, Tensor], paths: dict[str, tuple], places: Iterable[Iterable[Place]]) -> Metadata:
    """DCP's index of what all ranks wrote."""
    stored = {}
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        stored[name] = TensorStorageMetadata(TensorProperties.create_from_tensor(local), tensor.size(), chunks=[])
    found: dict[MetadataIndex, _StorageInfo] = {}
    numbers: dict[str, int] = defaultdict(int)
    for of_rank in places:
        for place in of_rank:
            chunk = ChunkStorageMetadata(torch.Size(place.offsets), torch.Size(place.sizes))
            stored[place.name].chunks.append(chunk)
            numbers[place.name] += math.prod(place.sizes)
            found[MetadataIndex(place.name, chunk.offsets)] = _StorageInfo(place.file, place.offset, place.length)
    for name, tensor in tensors.items():
        assert numbers[name] == tensor.numel(), f"the ranks wrote {numbers[name]} of {tensor.numel()} numbers of {name}"
    return Metadata(stored, planner_data=paths, storage_data=found)

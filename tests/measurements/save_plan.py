"""What the first rank computes in Python to plan and to index a checkpoint of the last stage of configs/avlm_8b.yaml,
by the number of ranks: DCP's save, DCP's save with its plan cached, and ours. CPU seconds; nothing is written or sent.

    python -m tests.measurements.save_plan [RANKS ...]

The parts of all ranks are emulated by cutting rows as FSDP2 does. All three are given the same parts.
"""

import dataclasses
import pickle
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.testing._internal.distributed.fake_pg import FakeStore

from avlm.models.avlm import AVLM
from avlm.models.freezing import freeze
from avlm.parallel import mesh
from avlm.parallel.apply import apply_parallel
from avlm.storage.checkpoint_files import pickled
from avlm.storage.checkpoint_plan import Place, flat, index_of, own_parts
from avlm.training import optimizer
from avlm.training.checkpoint import model_tensors, optimizer_tensors
from tests.parallel.small import make_config

DECODER = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32}
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_layers": 24, "num_heads": 16}
AUDIO = {"hidden_size": 1280, "intermediate_size": 5120, "num_layers": 32, "num_heads": 20}
MODEL = {
    "decoder": {**DECODER, "num_heads": 32, "num_kv_heads": 8},
    "vision": {**VISION, "image_size": 336, "patch_size": 14, "feature_layer": -2},
    "audio": {**AUDIO, "num_mels": 128, "max_positions": 1500},
    **{"vision_projector": {}, "audio_projector": {}},
}
STAGE = {"name": "finetune", "steps": 1, "train": ["decoder", "vision_projector", "audio_projector"]}


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def plan_of(local: SavePlan, rank: int, size: int) -> SavePlan:
    """The plan of a rank, from that of the first, whose shards are whole rows."""
    items = []
    for item in local.items:
        data = item.tensor_data
        if not len(data.size):  # a step count, which all ranks hold
            items.append(item)
            continue
        per_rank = -(-data.size[0] // size)
        first = min(rank * per_rank, data.size[0])
        count = min(per_rank, data.size[0] - first)
        if count:
            chunk = ChunkStorageMetadata(
                torch.Size([first, *[0] * (len(data.size) - 1)]), torch.Size([count, *data.size[1:]])
            )
            index = MetadataIndex(item.index.fqn, chunk.offsets)
            items.append(dataclasses.replace(item, index=index, tensor_data=dataclasses.replace(data, chunk=chunk)))
    return dataclasses.replace(local, items=items)


def of_dcp(state: dict, plans: list[SavePlan]) -> tuple[float, float]:
    """(first save, later save with the plan cached). Without the cache every save is as the first."""
    planner = DefaultSavePlanner(enable_plan_caching=True)
    planner._cached_plans_key = f"{len(plans)} ranks"  # the cache belongs to the class
    found = []
    for sent in (plans, [SavePlan([], usable=False)] * len(plans)):
        messages = [pickle.dumps(plan) for plan in sent]
        planner.set_up_planner(state, is_coordinator=True)

        def plan(messages: list[bytes] = messages) -> Any:
            planner.create_local_plan()
            decided, metadata = planner.create_global_plan([pickle.loads(message) for message in messages])
            [pickle.dumps(each) for each in decided]
            return metadata

        planning, metadata = seconds(plan)
        results = [pickle.dumps([WriteResult(i.index, 1, _StorageInfo("f", 0, 1)) for i in p.items]) for p in plans]

        def finish(metadata: Any = metadata, results: list[bytes] = results) -> None:
            places = {each.index: each.storage_data for of_rank in results for each in pickle.loads(of_rank)}
            pickle.dumps(dataclasses.replace(metadata, storage_data=places))

        found.append(planning + seconds(finish)[0])
    return found[0], found[1]


def place(item: WriteItem) -> Place:
    chunk = item.tensor_data.chunk
    return Place(item.index.fqn, tuple(chunk.offsets), tuple(chunk.sizes), "f", 0, 1)


def of_ours(state: dict, world: mesh.World, plans: list[SavePlan]) -> tuple[float, float]:
    """(first save, later save)."""
    messages = []
    for rank, plan in enumerate(plans):  # whoever holds the fewest bytes writes a step count; here the first rank
        messages.append(pickle.dumps([place(item) for item in plan.items if not rank or len(item.tensor_data.size)]))

    def later() -> Any:
        tensors, paths = flat(state)
        own_parts(tensors, world)
        return tensors, paths

    again, (tensors, paths) = seconds(later)
    first, _ = seconds(lambda: pickled(index_of(tensors, paths, map(pickle.loads, messages))))
    return again + first, again


def main() -> None:
    sizes = [int(word) for word in sys.argv[1:]] or [8, 64, 256]
    torch.set_num_threads(1)
    cfg = make_config(model=MODEL, stages=[STAGE])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=max(sizes))
    world = mesh.lay_out((1, max(sizes), 1, 1), torch.device("cpu"))
    with torch.device("meta"):
        model = AVLM(cfg.model)
    apply_parallel(model, world, cfg.parallel, cfg.train)
    freeze(model, cfg.stages[-1])
    adam = optimizer.build(model, cfg.stages[-1].optimizer)
    state = {"model": model_tensors(model), "optimizer": optimizer_tensors(model, adam)}
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=True)
    local = planner.create_local_plan()
    print(f"{len(local.items)} tensors in a checkpoint; CPU seconds of the first rank")
    print("ranks  DCP, each save  DCP, cached  ours, first  ours, later")
    for size in sizes:
        plans = [plan_of(local, rank, size) for rank in range(size)]
        first, cached = of_dcp(state, plans)
        ours = of_ours(state, world, plans)
        print(f"{size:5}{first:16.2f}{cached:13.2f}{ours[0]:13.2f}{ours[1]:13.2f}", flush=True)


if __name__ == "__main__":
    main()

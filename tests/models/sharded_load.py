"""What each of two ranks runs in tests/test_weights.py; a module of its own, so that they import no transformers."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from avlm.config import InitFrom, ModelConfig
from avlm.models.avlm import AVLM
from avlm.weights import load


def load_sharded(rank: int, port: int, config: ModelConfig, folder: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    with torch.device("meta"):
        model = AVLM(config)
    for unit in (*model.decoder.blocks, model.vision, model.audio, model):
        fully_shard(unit, mesh=mesh)
    model.to_empty(device="cpu")
    load(model, InitFrom(all=folder))
    whole = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save(whole, out)
    dist.destroy_process_group()

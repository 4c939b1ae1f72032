"""What each of two ranks runs in test_load.py and test_generation.py; here, so that they import no transformers."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from avlm.config.model import ModelConfig
from avlm.config.run import InitFrom
from avlm.data.sample import EncodedSample
from avlm.evaluation.generation import Ranks, generate
from avlm.models.avlm import AVLM
from avlm.models.batch import IGNORE
from avlm.weights.load import load_weights


def sharded(config: ModelConfig, folder: str) -> AVLM:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with torch.device("meta"):
        model = AVLM(config)
    towers = [tower for tower in (model.vision, model.audio) if tower is not None]
    for unit in (*model.decoder.blocks, *towers, model):
        fully_shard(unit, mesh=mesh)
    model.to_empty(device="cpu")
    load_weights(model, InitFrom(all=folder))
    return model


def text_prompt(token_ids: list[int]) -> EncodedSample:
    token_T = torch.tensor(token_ids)
    return EncodedSample("prompt", "text", token_T, torch.full_like(token_T, IGNORE))


def load_and_answer(config: ModelConfig, folder: str, prompts: list[list[int]]) -> tuple[dict, list[list[int]]]:
    """The whole of every parameter after each rank has loaded its part; answers of rank 0 to all prompts but the last.

    Rank 1 answers the last one, and stops when rank 0 does.
    """
    model = sharded(config, folder)
    whole = {name: parameter.full_tensor().tolist() for name, parameter in model.named_parameters()}

    def everyone_done(mine: bool) -> bool:
        waiting = torch.tensor(float(not mine))
        dist.all_reduce(waiting)
        return waiting.item() == 0

    own = prompts[:-1] if dist.get_rank() == 0 else prompts[-1:]
    samples = [text_prompt(ids) for ids in own]
    answers = generate(model, samples, stop_ids=[], max_new_tokens=6, ranks=Ranks(torch.device("cpu"), everyone_done))
    dist.destroy_process_group()
    return whole, [answer.token_ids for answer in answers]

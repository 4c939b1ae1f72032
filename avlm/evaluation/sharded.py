"""A model that answers on several ranks: laid out over them, and what they do together."""

import torch

from avlm.config.model import ModelConfig
from avlm.config.parallel import ParallelConfig
from avlm.config.run import TrainConfig
from avlm.evaluation.answering import Model, open_encoder
from avlm.evaluation.generation import Ranks
from avlm.models.avlm import AVLM
from avlm.parallel import mesh
from avlm.parallel.apply import apply_parallel, prompt_part
from avlm.parallel.mesh import World
from avlm.parallel.tensor import check_sizes
from avlm.process.launch import ranks
from avlm.weights.load import OpenModel, load_weights, open_model


def load_sharded(name: str, device: str, dtype: str, raw: bool) -> Model:
    """``avlm.evaluation.answering.load`` over the ranks of a launcher: with as many on the tensor axis as the decoder
    can be shared among, the others share weights (FSDP). All of them give the same answers to the same prompts."""
    if dtype == "float16":
        raise ValueError("--dtype float16 is for one process: several compute in float32 or bfloat16")
    on = mesh.choose_device(device)
    dtype = dtype.replace("auto", "float32" if on.type == "cpu" else "bfloat16")
    opened = open_model(name)
    encoder, stop_ids = open_encoder(opened, raw)
    parallel = ParallelConfig(tensor=most_tensor_ranks(opened.config, ranks()[1]))
    world = mesh.start(parallel, on)
    train = TrainConfig(precision="fp32" if dtype == "float32" else "bf16")
    network = lay_out(opened, world, parallel, train, getattr(torch, dtype))
    return Model(network, encoder, stop_ids, together(network, world))


def most_tensor_ranks(model: ModelConfig, size: int) -> int:
    """Of ``size`` ranks, how many can share each product of the decoder."""
    for tensor in range(size, 1, -1):
        try:
            check_sizes(model, tensor)
        except ValueError:
            continue
        if size % tensor == 0:
            return tensor
    return 1


def lay_out(
    opened: OpenModel, world: World, parallel: ParallelConfig, train: TrainConfig, dtype: torch.dtype = torch.float32
) -> AVLM:
    """The model with its weights, held in ``dtype``, computing in ``train.precision``."""
    with torch.device("meta"):
        model = AVLM(opened.config).to(dtype)
    apply_parallel(model, world, parallel, train)
    model.requires_grad_(False)  # FSDP needs one dtype of trained parameters; adapters may have a bf16 base
    load_weights(model, opened.source)
    return model


def together(model: AVLM, world: World) -> Ranks:
    """How the ranks of ``model`` generate."""
    return Ranks(
        world.device,
        everyone_done=lambda done: world.sum([float(not done)])[0] == 0,
        own_part=lambda batch: prompt_part(batch, model.config, world),
        multiple=world.shape["tensor"],
    )

"""Products of the decoder's blocks in float8, by torchao (``train.float8``).

torchao replaces each linear by one that scales a row of its input and a row of its weight to the range of float8 e4m3
where it is called, forward and backward (its recipe "rowwise"). Nothing of it is kept: parameters, gradients and
checkpoints stay as they are, and so do products of experts. A scale belongs to one token or one output, so neither
context parallelism nor a share of the outputs changes it. Without a GPU that has these products torchao computes them
in float32 from the rounded numbers.
"""

import importlib.util
from dataclasses import replace

import torch

from avlm.config.run import Config
from avlm.models.decoder import Decoder
from avlm.parallel.tensor import feed_forward_sizes

MULTIPLE = 16  # of every side of a product
CAPABILITY = 9, 0  # of the GPUs that have products with a scale for each row: Hopper, and newer


def apply_float8(decoder: Decoder, device: torch.device) -> None:
    """Before the decoder is sharded. ValueError for a GPU without such products."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # optional, and seconds to import

    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"train.float8=true needs a GPU of Hopper's kind or newer, and {name} is none: set it to false"
        )
    recipe = replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=device.type != "cuda")
    convert_to_float8_training(decoder.blocks, config=recipe)


def check_float8(config: Config) -> None:
    """ValueError for a run with ``train.float8`` whose sizes, adapters or packages do not allow it."""
    if importlib.util.find_spec("torchao") is None:
        raise ValueError("train.float8=true needs the package torchao: pip install torchao==0.17.0")
    if config.model.lora:
        raise ValueError("train.float8=true does not go with model.lora: torchao knows no adapters")
    decoder, ranks = config.model.decoder, config.parallel.tensor
    sides = {"hidden_size": decoder.hidden_size, **feed_forward_sizes(decoder)}
    sides |= {name: getattr(decoder, name) * decoder.head_dim for name in ("num_heads", "num_kv_heads")}
    for name, side in sides.items():
        side = side if name == "hidden_size" else side // ranks
        if side % MULTIPLE:
            raise ValueError(
                f"train.float8=true needs products whose sides are multiples of {MULTIPLE}, and model.decoder.{name} "
                f"gives one of {side} on a rank: set it to false"
            )
    for stage in config.stages:
        tokens = stage.data.seq_length // config.parallel.context
        if tokens % MULTIPLE:
            raise ValueError(
                f"train.float8=true needs a multiple of {MULTIPLE} tokens on a rank, and stage {stage.name} has "
                f"{tokens}: change data.seq_length"
            )

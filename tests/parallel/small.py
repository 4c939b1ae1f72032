"""A small model and rows of any mix of media, for tests that run on several ranks."""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from avlm.config.load import resolve_config
from avlm.config.model import MODULES, VisionConfig
from avlm.config.run import Config
from avlm.data.media.patches import cut_into_patches
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample
from avlm.models import freezing
from avlm.models.avlm import AVLM
from avlm.models.batch import Batch
from avlm.parallel import mesh
from avlm.parallel.apply import apply_parallel, warm_up
from avlm.weights.load import init_weights

TREE = {
    "output_dir": "unused",
    "model": {
        "decoder": {
            **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2},
            **{"num_heads": 4, "num_kv_heads": 2, "tie_embedding": True},
        },
        "vision": {
            **{"hidden_size": 24, "intermediate_size": 48, "num_layers": 2, "num_heads": 2},
            **{"image_size": 16, "patch_size": 8, "feature_layer": -1},
        },
        "audio": {
            **{"hidden_size": 24, "intermediate_size": 48, "num_layers": 1, "num_heads": 2},
            **{"num_mels": 16, "max_positions": 50},
        },
        "vision_projector": {},
        "audio_projector": {"downsample": 2},
    },
    "data": {"train": "synthetic", "seq_length": 64},
    "optimizer": {"lr": 3e-3, "warmup_steps": 2},
    "stages": [{"name": "all", "steps": 20, "train": list(MODULES)}],
}
VISION = VisionConfig(**TREE["model"]["vision"])
# mix of media -> images and clips of a sample
MEDIA = {"text": (0, 0), "image": (2, 0), "audio": (0, 1), "both": (1, 1), "video": (4, 1)}


def make_config(**overrides) -> Config:
    return resolve_config({**TREE, **overrides}, "test")


def make_rows(cfg: Config, mixes: list[str], seed: int = 0) -> list[Batch]:
    """One packed row for each mix: two samples with its media and one of text between them."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for mix in mixes:
        samples = [
            make_sample(mix, 6, generator),
            make_sample("text", 7, generator),
            make_sample(mix, 4, generator),
        ]
        rows.append(pack(samples, cfg.stages[0].data.seq_length, cfg.model))
    return rows


def make_sample(mix: str, num_words: int, generator: torch.Generator) -> EncodedSample:
    """A sample of the small model: 4 features an image, one for 40 ms of audio; every word but the first is learned."""
    num_images, num_clips = MEDIA[mix]
    num_frames = 2 * (4 + num_words)
    mels = [torch.randn(16, num_frames, generator=generator) for _ in range(num_clips)]
    text = torch.randint(0, 96, (num_words,), generator=generator)
    media = [-200] * (4 * num_images) + [-300] * (math.ceil(num_frames / 4) * num_clips)
    token_T = torch.cat([torch.tensor(media, dtype=torch.long), text])
    target_T = torch.full_like(token_T, -100)
    target_T[len(media) : -1] = token_T[len(media) + 1 :]
    pixels = torch.randint(0, 255, (num_images, 1, 3, 16, 16), generator=generator, dtype=torch.uint8)
    images = [cut_into_patches(frames, VISION) for frames in pixels]
    kind = "mixed" if mix == "both" else mix
    return EncodedSample(mix, kind, token_T, target_T, {"image": images, "audio": mels})


def build(cfg: Config, worlds: dict[tuple, mesh.World] | None = None) -> tuple[mesh.World, AVLM]:
    """The model of a config, laid out over all ranks as train.py does it, for its first stage. ``worlds`` keeps the
    meshes of a shape for the next model of a process."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    worlds = {} if worlds is None else worlds
    shape = mesh.sizes(cfg.parallel, dist.get_world_size())
    if shape not in worlds:
        worlds[shape] = mesh.lay_out(shape, torch.device("cpu"))
    world = worlds[shape]
    with torch.device("meta"):
        model = AVLM(cfg.model)
    apply_parallel(model, world, cfg.parallel, cfg.train)
    init_weights(model, cfg.init_from, cfg.seed)
    warm_up(model, world)
    freezing.freeze(model, cfg.stages[0])
    return world, model


class Observer:
    """Stands for the optimizer: in place of a step it copies the whole gradients."""

    def __init__(self, model: AVLM):
        self.model = model
        self.gradients: dict[str, Tensor] = {}

    def step(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.gradients[name] = whole(parameter.grad)

    def zero_grad(self) -> None:
        pass


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of a sharded tensor."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().clone()

"""A small model and rows of any mix of media, for tests that run on several ranks."""

import dataclasses
import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from avlm.config.load import resolve_config
from avlm.config.model import ModelConfig
from avlm.config.run import Config
from avlm.data.features import Group, of_frame, of_images, of_tiles
from avlm.data.media.tiles import Tiling
from avlm.data.packing import pack
from avlm.data.positions import Placed, of_grid, positions
from avlm.data.sample import EncodedSample
from avlm.models import freezing
from avlm.models.avlm import AVLM
from avlm.models.batch import IMAGE, NEWLINE, Batch
from avlm.models.patches import Grid
from avlm.parallel import mesh
from avlm.parallel.apply import apply_parallel, warm_up
from avlm.weights.load import init_weights

EVERYTHING = ["decoder", "vision", "audio", "vision_projector", "audio_projector"]  # the modules of TREE
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
    "stages": [{"name": "all", "steps": 20, "train": EVERYTHING}],
}
# A model of square images, whose queries grow every few tokens. And models whose vision tower takes images of any grid
# and whose audio tower pools: the first as Qwen2.5-Omni's do, with clips of several windows; the second as Qwen3-VL's
# and Audio Flamingo 3's, with Ultravox's projector.
AREA = {
    **{"hidden_size": 24, "intermediate_size": 40, "num_layers": 3, "num_heads": 2, "feature_layer": -1},
    **{"resize": "area", "patch_size": 2, "frames_per_patch": 2, "class_token": False, "pre_norm": False},
    "axial_rope": True,
}
WINDOWS = {"gated": True, "norm": "rms", "activation": "silu", "window": 4, "full_layers": [1]}
DEEP = {"image_size": 8, "patch_bias": True, "activation": "gelu_tanh", "deepstack_layers": [0, 1]}
GROWING = {"yarn": {"factor": 4.0, "original_max_position": 8, "attention_factor": 1.1}, "query_growth": 0.3}
MODELS = {
    "square": {**TREE["model"], "decoder": {**TREE["model"]["decoder"], **GROWING}},
    "windows": {
        **TREE["model"],
        "decoder": {**TREE["model"]["decoder"], "head_dim": 12, "mrope_sections": [2, 2, 2], "qkv_bias": True},
        "vision": {**AREA, **WINDOWS},
        "vision_projector": {"downsample": 2, "norm": "rms", "hidden_size": 96},
        "audio": {**TREE["model"]["audio"], "max_positions": 4, "log_mel": "clip", "edge": "masked", "pool": 2},
        "audio_projector": {"type": "linear"},
    },
    "deep": {
        **TREE["model"],
        "decoder": {
            **TREE["model"]["decoder"],
            **{"head_dim": 12, "mrope_sections": [2, 2, 2], "mrope_interleaved": True, "qk_norm": True},
        },
        "vision": {**AREA, **DEEP},
        "vision_projector": {"downsample": 2, "norm": "layer", "hidden_size": 96},
        "audio": {**TREE["model"]["audio"], "edge": "silence", "pool": 2, "key_bias": True},
        "audio_projector": {
            **{"type": "swiglu", "bias": False, "downsample": 2, "hidden_size": 40},
            **{"feature_norm": "rms", "hidden_norm": "rms", "output_norm": "rms"},
        },
    },
    "tiles": {
        **TREE["model"],
        "vision": {
            **TREE["model"]["vision"],
            **{"image_size": 8, "patch_size": 2, "qk_norm": True, "layer_scale": True, "bias": False},
        },
        "vision_projector": {
            **{"downsample": 2, "merge": True, "norm": "rms", "feature_norm": "layer"},
            **{"newline": True, "halve_frames": "bilinear", "stretch_above_tiles": 2.08},
        },
    },
    "experts": {
        **TREE["model"],
        "decoder": {
            **{**TREE["model"]["decoder"], "num_layers": 3},
            "experts": {
                **{"num": 8, "per_token": 2, "intermediate_size": 24, "shared_size": 16, "dense_layers": [1]},
            },
        },
    },
    "means": {
        **TREE["model"],
        "vision": {**TREE["model"]["vision"], "image_size": 8, "patch_size": 4},
        "vision_projector": {"newline": True, "halve_frames": "mean"},
    },
}
# Media as the queries of a resampler, written among the tokens or read by layers of cross-attention.
RESAMPLERS = {
    "qformer": {"type": "qformer", "num_queries": 3, "num_layers": 2, "num_heads": 2, "intermediate_size": 40},
    "perceiver": {"type": "perceiver", "num_queries": 2, "num_layers": 1, "num_heads": 2, "intermediate_size": 40},
}
MODELS["queries"] = {
    **TREE["model"],
    "vision_projector": {"resampler": {**RESAMPLERS["qformer"], "hidden_size": 20, "read_every": 2}},
    "audio_projector": {"type": "linear", "downsample": 2, "resampler": {**RESAMPLERS["perceiver"], "window": 4}},
}
MODELS["cross"] = {
    **TREE["model"],
    "decoder": {**TREE["model"]["decoder"], "num_layers": 3},
    "cross": {"every": 2, "qk_norm": True, "first_gate": 0.5},
    "vision_projector": {"resampler": RESAMPLERS["perceiver"]},
}
MODELS["last"] = {**MODELS["cross"], "cross": {"every": 1, "sees": "last", "first_gate": 0.7}}
# FastConformer as the tower, and SALM's adapter behind it.
CONFORMER = {
    **{"hidden_size": 24, "intermediate_size": 48, "num_layers": 1, "num_heads": 2, "num_mels": 16},
    **{"max_positions": 50, "block": "conformer", "stem": "depthwise", "stem_width": 4, "mel": "nemo"},
    **{"edge": "masked", "conv_kernel": 5, "scale_input": True},
}
ADAPTER = {"type": "conformer", "num_layers": 2, "num_heads": 2, "hidden_size": 20, "intermediate_size": 40}
MODELS["conformer"] = {
    **TREE["model"],
    **{"audio": CONFORMER, "audio_projector": {"type": "linear", "resampler": ADAPTER}},
}
# All that sets Gemma's decoders apart; and the masks of PaliGemma's.
GEMMA = {
    **{"activation": "gelu_tanh", "norm_offset": True, "post_norms": True, "embedding_scale": True},
    **{"score_size": 6.0, "attention_softcap": 3.0, "logit_softcap": 5.0, "rope_stretch": 2.0},
    **{"sliding_window": 3, "window_layers": [1], "window_rope_theta": 100.0, "bidirectional": "images"},
}
MODELS["gemma"] = {**TREE["model"], "decoder": {**TREE["model"]["decoder"], **GEMMA}}
MODELS["prefix"] = {**TREE["model"], "decoder": {**TREE["model"]["decoder"], **GEMMA, "bidirectional": "prefix"}}
GRIDS = ((2, 6), (4, 2), (6, 4), (2, 2))  # lines and columns of patches of their images, which take turns
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
            make_sample(mix, 6, generator, cfg.model),
            make_sample("text", 7, generator, cfg.model),
            make_sample(mix, 4, generator, cfg.model),
        ]
        rows.append(pack(samples, cfg.stages[0].data.seq_length, cfg.model))
    return rows


def make_sample(mix: str, num_words: int, generator: torch.Generator, model: ModelConfig) -> EncodedSample:
    """A sample of one of the small models: images, a clip or none, text, of which every word but the first is
    learned."""
    _, num_clips = MEDIA[mix]
    vision, audio = model.vision, model.audio
    assert vision is not None and audio is not None and model.audio_projector is not None
    grids, groups, seen, placed = make_views(mix, model)
    num_frames = 2 * (4 + num_words) + (audio.edge == "masked")  # there a clip may have an odd number
    sizes = [len(part) for part in torch.arange(num_frames).split(2 * audio.max_positions)] * num_clips
    mels = [torch.randn(audio.item_shape(size), generator=generator) for size in sizes]
    text = torch.randint(0, 96, (num_words,), generator=generator)
    num_heard = sum(model.tokens_of("audio", size) for size in sizes)
    media = seen + [-300] * num_heard
    token_T = torch.cat([torch.tensor(media, dtype=torch.long), text])
    target_T = torch.full_like(token_T, -100)
    target_T[len(media) : -1] = token_T[len(media) + 1 :]
    images = []
    for grid in grids:
        shape = (*grid, vision.patch_numbers)
        images.append(torch.randint(0, 255, shape, generator=generator, dtype=torch.uint8))
    kind = "mixed" if mix == "both" else mix
    position_T = positions(len(token_T), placed) if model.decoder.mrope_sections else None
    num_features = sum(model.features_of("vision", grid) for grid in grids)
    num_features += sum(model.features_of("audio", size) for size in sizes)
    media = {"image": images, "audio": mels}
    sample = EncodedSample(mix, kind, token_T, target_T, media, position_T, groups)
    return dataclasses.replace(sample, num_features=num_features)


def make_views(mix: str, model: ModelConfig) -> tuple[list[Grid], list[Group], list[int], list[Placed]]:
    """The grids of the patches of a sample's images, how they share features, the placeholders of these and their
    positions. In a model with a newline the first image is cut into tiles, and a video has frames."""
    num_images, _ = MEDIA[mix]
    vision, projector = model.vision, model.vision_projector
    side = vision.patches_per_side
    if model.cross is not None or projector.resampler is not None:
        grids = [(side, side)] * num_images
        return grids, [], [IMAGE] * sum(model.tokens_of("vision", grid) for grid in grids), []
    if not projector.newline:
        grids = [GRIDS[i % len(GRIDS)] if vision.any_grid else (side, side) for i in range(num_images)]
        placed, num_features = [], 0
        for lines, columns in grids:
            a_side = lines // projector.downsample, columns // projector.downsample
            placed.append(Placed(num_features, of_grid([0], *a_side)))
            num_features += math.prod(a_side)
        return grids, [], [IMAGE] * num_features, placed
    if mix == "video":
        grids = [(side, side)] * num_images
        groups = [Group(1, of_frame(grid, model)) for grid in grids]
        return grids, groups, [*[IMAGE] * sum(len(group.features) for group in groups), NEWLINE], []
    groups, tokens = [], []
    tiling = Tiling(3 if projector.stretches else 2, 1, whole_first=True)
    for number in range(num_images):
        if number:
            features, tail = of_images([(side, side)], model), [NEWLINE]
        else:
            features, (lines, columns) = of_tiles((30 * tiling.lines, 30), tiling, (side, side), model)
            tail = [*[IMAGE] * columns, NEWLINE] * lines
        groups.append(Group(1 if number else tiling.num_views, features))
        tokens += [IMAGE] * (len(features) - tail.count(IMAGE)) + tail
    return [(side, side)] * sum(group.num_items for group in groups), groups, tokens, []


def build(cfg: Config, worlds: dict[tuple, mesh.World] | None = None) -> tuple[mesh.World, AVLM]:
    """The model of a config, laid out over all ranks as train.py does it, for its first stage. ``worlds`` keeps the
    meshes of a shape for the next model of a process."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    worlds = {} if worlds is None else worlds
    shape = mesh.sizes(cfg.parallel, dist.get_world_size())
    options = cfg.parallel.balance_media, cfg.parallel.context_mode, cfg.parallel.expert
    key = *shape, *options
    if key not in worlds:
        worlds[key] = mesh.lay_out(shape, torch.device("cpu"), *options)
    world = worlds[key]
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

"""What preflight says of memory: exact where shards are counted, near where autograd's own storages are."""

import functools
import math
import re
from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor

from avlm.config.load import resolve_config, to_dict
from avlm.data.check import check_data
from avlm.models import freezing
from avlm.models.avlm import AVLM
from avlm.models.batch import empty_batch
from avlm.models.shapes import parameter_shapes
from avlm.parallel import mesh
from avlm.parallel.apply import apply_parallel
from avlm.parallel.check import check_layout
from avlm.preflight import memory
from avlm.preflight.layout import layout_of
from avlm.preflight.memory import GIB
from avlm.preflight.report import check_memory, report
from avlm.process.launch import ranks
from avlm.training import optimizer
from kernels import backend
from kernels.cross_entropy import chunk_bytes
from kernels.cross_entropy_rows import losses_reference
from tests.parallel.live_bytes import LiveBytes
from tests.parallel.small import EVERYTHING
from tests.parallel.spawn import run_ranks

TREE = {
    "output_dir": "unused",
    "model": {
        "decoder": {
            **{"vocab_size": 100, "hidden_size": 60, "intermediate_size": 212, "num_layers": 3},
            **{"num_heads": 6, "num_kv_heads": 2, "qkv_bias": True},
        },
        "vision": {
            **{"hidden_size": 54, "intermediate_size": 216, "num_layers": 3, "num_heads": 3},
            **{"image_size": 16, "patch_size": 4, "feature_layer": -1},
        },
        "audio": {
            **{"hidden_size": 54, "intermediate_size": 216, "num_layers": 3, "num_heads": 3},
            **{"num_mels": 10, "max_positions": 48},
        },
        "vision_projector": {"downsample": 2},
        "audio_projector": {"downsample": 3},
    },
    "data": {"train": "synthetic", "seq_length": 64},
    "optimizer": {"lr": 1e-3},
    "stages": [{"name": "all", "steps": 4, "train": EVERYTHING}],
    "device": "cpu",
}
# Towers of any grid: Qwen2.5-VL's, with windows, and Qwen3-VL's, with a position table and DeepStack.
AREA = {
    **{"resize": "area", "class_token": False, "pre_norm": False, "frames_per_patch": 2, "patch_size": 4},
    **{"axial_rope": True, "feature_layer": -1, "hidden_size": 60, "intermediate_size": 200, "num_layers": 3},
    "num_heads": 3,
}
GATED = {**AREA, "gated": True, "norm": "rms", "activation": "silu", "window": 4, "full_layers": [1]}
SCALED = {**AREA, "qk_norm": True, "layer_scale": True, "bias": False}
DEEP = {**AREA, "image_size": 32, "patch_bias": True, "activation": "gelu_tanh", "deepstack_layers": [0, 1]}
TEXT_ONLY = {
    "model": {"decoder": TREE["model"]["decoder"]},
    "stages": [{"name": "text", "steps": 4, "train": ["decoder"]}],
}


def make_config(*changes, **more):
    """The small config with dotted keys changed: ("train.recompute.decoder", "full")."""
    tree = to_dict(resolve_config({**TREE, **more}, "test"))
    for key, value in changes:
        *path, last = key.split(".")
        functools.reduce(dict.__getitem__, path, tree)[last] = value
    return resolve_config(tree, "test")


def estimate(cfg, world_size=1):
    return memory.estimate(cfg, cfg.stages[0], world_size, parameter_shapes(cfg.model))


def make_case(cfg, dtype, stage):
    """One process that computes in a dtype, on the CPU, where the tests can look."""
    layout = replace(layout_of(cfg, 1), dtype=dtype, architecture=backend.architecture(None))
    return memory.Case(cfg, stage, layout, parameter_shapes(cfg.model))


def with_adapters(*changes, **lora):
    """Adapters on every linear of the towers' blocks, and nothing else trains."""
    lora = {"rank": 8, "targets": ["decoder.*", "vision.blocks.*", "audio.*"], **lora}
    stages = [{"name": "adapters", "steps": 4, "train": ["lora"]}]
    return make_config(*changes, model={**TREE["model"], "lora": lora}, stages=stages)


def of_experts(num, width, *changes, shared=0):
    experts = {"num": num, "per_token": 3, "intermediate_size": width, "shared_size": shared, "dense_layers": []}
    decoder = {**TREE["model"]["decoder"], "hidden_size": 64, "num_heads": 4, "experts": experts}
    return make_config(*changes, model={**TREE["model"], "decoder": decoder})


# 1. What stays, against models that are really sharded.

LAYOUTS = {
    2: [
        make_config(),
        make_config(("parallel.tensor", 2)),
        make_config(
            ("parallel.context", 2), ("parallel.tower_sharding", "block"), ("model.decoder.tie_embedding", True)
        ),
    ],
    4: [
        make_config(("parallel.replicate", 2)),
        make_config(("parallel.tensor", 2), ("model.decoder.tie_embedding", True)),
        make_config(
            ("parallel.tower_sharding", "replicate"),
            ("train.precision", "bf16"),
            stages=[{"name": "words", "steps": 4, "train": ["decoder", "audio_projector"]}],
        ),
        of_experts(6, 8, ("parallel.expert", 2)),
        of_experts(12, 8, ("parallel.expert", 4), ("parallel.tensor", 2)),
        of_experts(6, 8, ("parallel.tensor", 2), shared=6),
        with_adapters(("parallel.tensor", 2)),
        with_adapters(rank=3, base="bf16", dora=True, targets=["decoder.*", "audio.*.up"]),
    ],
}


def held(configs):
    """Bytes of parameters, gradients and moments on this rank, for each config."""
    found = []
    mesh.start(configs[0].parallel, torch.device("cpu"))
    for cfg in configs:
        shape = mesh.sizes(cfg.parallel, ranks()[1])
        world = mesh.lay_out(shape, torch.device("cpu"), expert=cfg.parallel.expert)
        with torch.device("meta"):
            model = AVLM(cfg.model)
        apply_parallel(model, world, cfg.parallel, cfg.train)
        freezing.freeze(model, cfg.stages[0])
        adam = optimizer.build(model, cfg.stages[0].optimizer)
        gradients = []
        if cfg.parallel.context == 1:  # without a target and without media, every gradient is there all the same
            model(empty_batch(64, cfg.model))[0].backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
        moments = [x for state in adam.state.values() for name, x in state.items() if name != "step"]
        found.append([local_bytes(model.parameters()), local_bytes(gradients), local_bytes(moments)])
    mesh.stop()
    return found


def local_bytes(tensors):
    return sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in tensors)


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_shards_are_counted_to_the_byte(world_size):
    configs = LAYOUTS[world_size]
    ranks = run_ranks(held, world_size, configs)
    for i, cfg in enumerate(configs):
        said = estimate(cfg, world_size).device
        parameters, gradients, moments = (max(rank[i][kind] for rank in ranks) for kind in range(3))
        assert (said["parameters"], said["optimizer state"]) == (parameters, moments), cfg.parallel
        assert not gradients or said["gradients"] == gradients, cfg.parallel


# 2. The loss, and what is held elsewhere.


def test_the_loss_is_counted_as_it_runs_on_the_device():
    """Plain PyTorch computes in a float32 copy of a chunk of bfloat16 logits; the kernel, on every GPU, in place."""
    bf16 = ("train.precision", "bf16")
    vocabulary = ("model.decoder.vocab_size", 50_000)
    on_cpu, on_gpu = (make_config(bf16, vocabulary, ("device", device), **TEXT_ONLY) for device in ("cpu", "cuda"))
    heads = [estimate(cfg).device["head"] for cfg in (on_cpu, on_gpu)]
    logits = 64 * 50_000 * 2
    copied = 50_000 * 60 * 2  # the gradient of the weight in its own dtype, when the logits are free again
    assert layout_of(on_gpu, 1).architecture >= 80 and logits > copied
    if not backend.INTERPRETED:
        assert heads[0] - heads[1] == 2 * logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_chunk_of_the_loss_takes_as_much_as_is_said(dtype):
    rows, vocabulary = 40, 5000
    target = torch.randint(vocabulary, (rows,))
    with LiveBytes() as counter:
        logits = torch.zeros(rows, vocabulary, dtype=dtype)
        losses_reference(logits, target, None, True, 0, None)
    said = chunk_bytes(rows, vocabulary, dtype.itemsize, "pytorch")
    assert said == pytest.approx(counter.peak, rel=0.01)


def test_what_is_offloaded_is_shown_apart():
    full = ("train.recompute.decoder", "full")
    kept = estimate(make_config(full, **TEXT_ONLY))
    moved = estimate(make_config(full, ("train.offload_activations", True), **TEXT_ONLY))
    assert moved.device["activations"] + moved.host["block inputs"] == kept.device["activations"]
    there, here = estimate(make_config(("parallel.cpu_offload", True))), estimate(make_config())
    assert there.host == {key: here.device[key] for key in ("parameters", "gradients", "optimizer state")}
    assert there.total == here.total - sum(there.host.values())
    staged = estimate(make_config(("checkpoint.async_save", True)))
    assert staged.host == {"staged checkpoint": here.device["parameters"] + here.device["optimizer state"]}
    assert staged.device == here.device


def test_local_accumulation_counts_whole_gradients():
    cfg = make_config(("train.accumulate_mode", "local"), ("train.accumulate", 2))
    numbers = sum(math.prod(shape) for shape in parameter_shapes(cfg.model).values())
    assert estimate(cfg, 4).device["whole gradients"] == 4 * numbers
    assert not estimate(make_config(("train.accumulate_mode", "local")), 4).device["whole gradients"]


# 3. What a user reads.


def test_the_report_gives_tokens_and_a_sum_for_each_stage():
    stages = [{"name": name, "steps": 4, "train": [name]} for name in ("vision", "decoder")]
    cfg = make_config(("parallel.context", 2), ("train.accumulate", 3), stages=stages)
    text = report(cfg, world_size=4)
    assert text.count("6 rows of 64 tokens a step: 3 in turn on a rank, which holds 32 tokens of each") == 2
    for part, stage in zip(text.split("\n\n"), cfg.stages):
        assert part.startswith(f"{stage.name}: 4 steps of up to 384 tokens; trains ")
        lines = re.findall(r"^    (\S.*?) +([\d.]+) MiB", part, re.M)
        *parts, total = [float(amount) for _, amount in lines]
        assert lines[-1][0] == "sum" and total == pytest.approx(sum(parts), abs=0.05)


def test_too_little_memory_is_one_line_with_the_excess_and_the_mend():
    cfg = make_config()
    need = estimate(cfg).total / GIB
    check_memory(cfg, 1, need * 1.01)
    with pytest.raises(ValueError, match=r"stage all needs .* more than --device-memory-gib .*: train\.\S+=\w+ "):
        check_memory(cfg, 1, need * 0.99)
    with pytest.raises(
        ValueError, match=r"recompute\.decoder=.*cpu_offload=true would need .* take more ranks, a shorter"
    ):
        check_memory(cfg, 1, need / 1000)
    with pytest.raises(ValueError, match="--device-memory-gib must be positive, not 0"):
        check_memory(cfg, 1, 0)


def without_vision():
    model = {key: value for key, value in TREE["model"].items() if not key.startswith("vision")}
    return make_config(
        ("train.recompute.vision", "full"), model=model, stages=[{"name": "a", "steps": 1, "train": ["audio"]}]
    )


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (without_vision, r"train\.recompute\.vision=full, but there is no model\.vision: set it to none"),
        (lambda: make_config(("train.offload_activations", True)), r"set train\.recompute\.decoder=full, or "),
        (
            lambda: make_config(("train.offload_activations", True), ("train.recompute.audio", "selective")),
            r"train\.recompute\.audio=selective keeps more: set it to full",
        ),
    ],
)
def test_bad_layouts_are_named_with_their_mend(make, line):
    with pytest.raises(ValueError, match=line):
        config = make()
        check_layout(config, 1)
        check_data(config)

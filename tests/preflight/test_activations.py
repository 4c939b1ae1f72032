"""What preflight says that autograd keeps, against the storages that are alive after some blocks."""

import typing
from dataclasses import replace

import pytest
import torch

from avlm.config.codec import CodecConfig
from avlm.config.connector import ResamplerConfig
from avlm.config.model import ProjectorConfig
from avlm.models import freezing
from avlm.models.avlm import AVLM
from avlm.models.depth import Codec
from avlm.models.projector import Projector
from avlm.models.reading import QuerySets, read_by
from avlm.models.resampler import Resampler
from avlm.models.rope import rope_frequencies, rope_table
from avlm.models.vit import axial_table
from avlm.parallel.recompute import apply_recompute
from avlm.preflight import activations, memory
from avlm.preflight.codes import code_bytes
from kernels.segments import Segments
from tests.models.handmade import features_at
from tests.parallel.live_bytes import LiveBytes
from tests.parallel.small import EVERYTHING
from tests.preflight.test_memory import (
    DEEP,
    GATED,
    SCALED,
    TEXT_ONLY,
    TREE,
    estimate,
    make_case,
    make_config,
    of_experts,
    with_adapters,
)

CODEC = {"num_codebooks": 32, "codebook_size": 20, "hidden_size": 48, "intermediate_size": 160, "num_layers": 2}
CODEC |= {"num_heads": 4, "num_kv_heads": 2}


def of_any_grid(vision, *changes, **data):
    projector = {"downsample": 2, "hidden_size": 240, "norm": vision.get("norm", "layer")}
    model = {**TREE["model"], "vision": vision, "vision_projector": projector}
    return make_config(*changes, model=model, data={**TREE["data"], **data})


def kept_by_a_block(tower, dtype, trains, cfg, tokens=256):
    """Bytes a token that one more block keeps, its parameters apart."""
    model = AVLM(cfg.model).to(dtype).requires_grad_(trains)
    if cfg.model.lora:
        freezing.freeze(model, cfg.stages[0])
    apply_recompute(model, cfg.train)
    blocks, segments = getattr(model, tower).blocks, Segments.of([tokens])
    rope = rope_table(rope_frequencies(cfg.model.decoder), torch.arange(tokens))
    inputs = (rope, segments) if tower == "decoder" else (segments,)
    if tower == "vision" and cfg.model.vision.axial_rope:
        inputs = (segments, axial_table(torch.zeros(tokens, 2), cfg.model.vision))
    if tower == "cross":  # one feature for each token, of which it sees those up to itself
        features = torch.randn(tokens, cfg.model.decoder.hidden_size, dtype=dtype)
        inputs = features, read_by(segments, list(range(tokens)), [1] * tokens, "all")
    width = cfg.model.decoder.hidden_size if tower == "cross" else getattr(cfg.model, tower).hidden_size

    def live(num_blocks):
        x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
        with LiveBytes() as counter:
            for block in blocks[:num_blocks]:
                x = block(x, *inputs)
            return counter.live

    return ((live(3) - live(1)) / 2 - sum(p.nbytes for p in blocks[0].parameters())) / tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mode", "error"), [("none", 0.10), ("selective", 0.25), ("full", 0.10)])
def test_activations_of_a_block_are_as_estimated(mode, error, dtype):
    cfg = make_config(*((f"train.recompute.{tower}", mode) for tower in ("decoder", "vision", "audio")))
    for trains in (True, False):
        stage = cfg.stages[0] if trains else replace(cfg.stages[0], train=["vision_projector"])
        case = make_case(cfg, dtype, stage)
        for name in ("decoder", "vision", "audio") if trains else ("decoder",):
            said = memory.block_bytes(f"{name}.blocks.0", case, mode)
            assert said == pytest.approx(kept_by_a_block(name, dtype, trains, cfg), rel=error), (name, trains)


class Kernel(torch.autograd.Function):
    """Keeps what our attention kernel keeps; the plain path keeps probabilities where queries read other rows."""

    @staticmethod
    def forward(ctx, q_THE, k_SKE, v_SKE):
        out_THE, lse_HT = torch.zeros_like(q_THE), torch.zeros(q_THE.shape[1], len(q_THE))
        ctx.save_for_backward(q_THE, k_SKE, v_SKE, out_THE, lse_HT)
        return out_THE


def as_on_a_gpu(q_THE, k_SKE, v_SKE, *_, **__):
    return Kernel.apply(q_THE, k_SKE, v_SKE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mode", "error"), [("none", 0.10), ("full", 0.10)])
def test_activations_of_a_layer_of_cross_attention_are_as_estimated(mode, error, dtype, monkeypatch):
    monkeypatch.setattr("avlm.models.attention.attention", as_on_a_gpu)
    model = {**TREE["model"], "cross": {"every": 1, "qk_norm": True}}
    cfg = make_config(("train.recompute.decoder", mode), model=model)
    stage = replace(cfg.stages[0], train=[*EVERYTHING, "cross"])
    said = memory.block_bytes("cross.blocks.0", make_case(cfg, dtype, stage), mode)
    assert said == pytest.approx(kept_by_a_block("cross", dtype, True, cfg), rel=error)


QFORMER = {"type": "qformer", "num_queries": 40, "num_layers": 4, "num_heads": 4, "intermediate_size": 160}
PERCEIVER = {**QFORMER, "type": "perceiver", "num_kv_heads": 2, "head_dim": 12}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "keys",
    [
        {**QFORMER, "hidden_size": 48, "read_every": 2},
        {**PERCEIVER, "activation": "relu"},
        {**PERCEIVER, "norm": "rms", "gated": True, "activation": "silu"},
    ],
    ids=["qformer", "perceiver", "gated"],
)
def test_what_a_resampler_keeps_is_as_estimated(keys, dtype, monkeypatch):
    monkeypatch.setattr("avlm.models.attention.attention", as_on_a_gpu)
    config = ResamplerConfig(**keys)
    model = Resampler(config, 64).to(dtype)
    init = model.init_stats()
    assert init.keys() >= dict(model.named_parameters()).keys()
    counts = [50, 70, 130]
    media = features_at(torch.arange(0), torch.empty(0, 1), queries=QuerySets.of(counts, config))
    rows_PC = torch.randn(sum(counts), 64, dtype=dtype)
    with LiveBytes() as counter:
        out_QD = model(media, rows_PC)
        kept = counter.live - sum(parameter.nbytes for parameter in model.parameters()) - rows_PC.nbytes
    cfg = make_config()
    of_query, of_row = activations.resampler_bytes(config, 64, 100, make_case(cfg, dtype, cfg.stages[0]).layout)
    assert of_query * len(out_QD) + of_row * sum(counts) == pytest.approx(kept, rel=0.12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mode", "error"), [("none", 0.10), ("selective", 0.25)])
def test_activations_of_a_block_of_gemma_are_as_estimated(mode, error, dtype):
    gemma = {"norm_offset": True, "post_norms": True, "activation": "gelu_tanh", "qk_norm": True, "qkv_bias": False}
    changes = ((f"model.decoder.{key}", value) for key, value in gemma.items())
    cfg = make_config(("train.recompute.decoder", mode), *changes)
    said = memory.block_bytes("decoder.blocks.0", make_case(cfg, dtype, cfg.stages[0]), mode)
    assert said == pytest.approx(kept_by_a_block("decoder", dtype, True, cfg), rel=error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mode", "error"), [("none", 0.10), ("selective", 0.25), ("full", 0.10)])
@pytest.mark.parametrize("vision", [GATED, DEEP, SCALED], ids=["gated", "deep", "scaled"])
def test_activations_of_a_block_of_any_grid_are_as_estimated(vision, mode, error, dtype):
    cfg = of_any_grid(vision, ("train.recompute.vision", mode))
    said = memory.block_bytes("vision.blocks.0", make_case(cfg, dtype, cfg.stages[0]), mode)
    assert said == pytest.approx(kept_by_a_block("vision", dtype, True, cfg), rel=error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mode", "error"), [("none", 0.10), ("selective", 0.25), ("full", 0.10)])
@pytest.mark.parametrize("shared", [0, 56])
def test_activations_of_a_block_with_experts_are_as_estimated(shared, mode, error, dtype):
    cfg = of_experts(8, 72, ("train.recompute.decoder", mode), shared=shared)
    for trains in (True, False):
        stage = cfg.stages[0] if trains else replace(cfg.stages[0], train=["vision_projector"])
        said = memory.block_bytes("decoder.blocks.0", make_case(cfg, dtype, stage), mode)
        assert said == pytest.approx(kept_by_a_block("decoder", dtype, trains, cfg), rel=error), trains


def test_blocks_with_experts_and_without_are_counted_apart():
    """Dense blocks that are larger than those with experts, and the reverse."""
    for size in (2048, 64):
        activations, gathered = [], []
        for dense in ([], [1], [0, 1, 2]):
            cfg = of_experts(
                8, 72, ("model.decoder.intermediate_size", size), ("model.decoder.experts.dense_layers", dense)
            )
            case = make_case(cfg, torch.float32, cfg.stages[0])
            activations.append(memory._kept(case)[0])
            gathered.append(memory._at_block(case)["gathered weights"])
        of_experts_alone, mixed, dense_alone = activations
        assert mixed == pytest.approx((2 * of_experts_alone + dense_alone) / 3)
        assert gathered[1] == max(gathered[0], gathered[2])


@pytest.mark.parametrize("lora", [{}, {"dropout": 0.1}, {"dora": True}])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_what_adapters_keep_is_as_estimated(mode, lora):
    cfg = with_adapters(*((f"train.recompute.{tower}", mode) for tower in ("decoder", "vision", "audio")), **lora)
    case = make_case(cfg, torch.bfloat16, cfg.stages[0])
    for tower in ("decoder", "vision", "audio"):
        said = memory.block_bytes(f"{tower}.blocks.0", case, mode)
        assert said == pytest.approx(kept_by_a_block(tower, torch.bfloat16, False, cfg), rel=0.1), tower


@pytest.mark.parametrize(
    ("norm", "num_deep", "how"),
    [("none", 0, ""), ("layer", 0, ""), ("layer", 2, ""), ("all", 0, ""), ("all", 0, "mean"), ("none", 0, "merge")],
)
@pytest.mark.parametrize("kind", typing.get_args(typing.get_type_hints(ProjectorConfig)["type"]))
def test_what_a_projector_of_any_type_keeps_is_as_estimated(kind, norm, num_deep, how):
    decoder = make_config().model.decoder
    names = ["norm"]
    if norm == "all":
        names += ["feature_norm", "output_norm", *(["hidden_norm"] if kind != "linear" else [])]
    kinds = dict.fromkeys(names, "none" if norm == "none" else "layer")
    config = ProjectorConfig(type=kind, hidden_size=40, mean=how == "mean", merge=how == "merge", **kinds)
    features = 50
    projector = Projector(config, tower_size=7, gathered=4, decoder_size=decoder.hidden_size, num_deep=num_deep)
    rows, source = torch.arange(features), torch.arange(4 * features).view(-1, 4)
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and not any(storage.data_ptr() == p.data_ptr() for p in projector.parameters()):
            kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    x_PC = torch.randn(4 * features, 7 * (1 + num_deep))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        projector(torch.zeros(features, decoder.hidden_size), features_at(rows, source), x_PC)
    more = {
        "linear": 0,
        "mlp2x_gelu": 0 if norm == "all" else 40 + decoder.hidden_size,
        "swiglu": 0,
    }  # what the plain path keeps besides: GELU's result, too
    of_norms = 2 * (4 * (norm != "none") + num_deep)  # mean and deviation of each row, and of each four together
    of_norms += 2 * (len(kinds) - 1) + (how == "mean")  # by how many rows it is divided
    said = activations.projector_numbers(config, 4 * 7, 7, decoder, num_deep)
    waiting = num_deep * decoder.hidden_size  # for the decoder, not for the backward
    assert sum(kept.values()) == features * (said - waiting + more[kind] + of_norms)


def test_the_memory_of_an_unknown_projector_or_activation_is_not_guessed(monkeypatch):
    config = make_config()
    monkeypatch.delitem(activations.KEPT_BY_ACTIVATION, config.model.vision.activation)
    with pytest.raises(ValueError, match="activation quick_gelu keeps is not written"):
        estimate(config)
    unknown = ProjectorConfig()
    object.__setattr__(unknown, "type", "resampler")
    with pytest.raises(ValueError, match="projector of type resampler keeps is not written"):
        activations.projector_numbers(unknown, 28, 7, config.model.decoder)


def test_activations_shrink_with_recomputation_and_with_the_ranks_of_a_row():
    of = lambda *changes, world=1: estimate(make_config(*changes, **TEXT_ONLY), world).device["activations"]
    decoder = "train.recompute.decoder"
    assert of() > of((decoder, "selective")) > of((decoder, "full"))
    assert of(("parallel.context", 2), world=2) == pytest.approx(of() / 2, rel=0.05)
    assert of() / 2 < of(("parallel.tensor", 2), world=2) < 0.7 * of()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_of_speech_keep_what_is_estimated(dtype):
    """From hidden rows to the heads of the depth decoder. Fewer codes a row would be padded by plain attention."""
    codec = CodecConfig(**CODEC)
    cfg = make_config(**TEXT_ONLY)
    decoder = cfg.model.decoder
    model = Codec(codec, decoder.hidden_size).to(dtype)
    layout = make_case(cfg, dtype, cfg.stages[0]).layout
    code_FK = torch.randint(20, (16, codec.num_codebooks))
    hidden_FD = torch.randn(16, decoder.hidden_size, dtype=dtype, requires_grad=True)
    with LiveBytes() as counter:
        losses = model.losses(hidden_FD, code_FK)
        kept = counter.live - sum(parameter.nbytes for parameter in model.parameters())
    of_heads = sum(head.weight.nbytes for head in model.heads)  # gradients, which the head's moment counts
    said = code_bytes(codec, decoder, layout, trains=True) * code_FK.numel()
    assert said == pytest.approx(kept - of_heads, rel=0.15) and losses[0].requires_grad

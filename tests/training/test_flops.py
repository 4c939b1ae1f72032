"""FLOPs counted from shapes against those that PyTorch counts while it computes, on the plain path."""

import math
import typing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from avlm.config.model import ProjectorConfig
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample
from avlm.data.stream import Stream
from avlm.data.synthetic import SyntheticLoader
from avlm.models import decoder, freezing
from avlm.models.avlm import AVLM
from avlm.models.batch import IGNORE, IMAGE, KINDS, empty_batch
from avlm.models.costs import check_steps, counts, steps
from avlm.models.initial import init
from avlm.models.shapes import parameter_shapes
from avlm.parallel import recompute
from avlm.storage.run_folder import Progress, read_records
from avlm.training import flops
from avlm.training.log import Log, tally, time
from tests.parallel.small import MODELS, TREE, make_config, make_views

PROJECTORS = ["vision_projector", "audio_projector"]
MODEL = TREE["model"]
HEARING = {**MODEL, **{key: MODELS["deep"][key] for key in ("audio", "audio_projector")}}
LORA = {"rank": 4, "targets": ["decoder.*", "vision.blocks.1.*", "audio.*"]}


def staged(**changes):
    return [{"name": "all", "steps": 20, **changes}]


TILED = {**MODELS["tiles"], "vision": {**MODELS["tiles"]["vision"], "class_token": False}}
CASES = {
    "everything": make_config(),
    "decoder alone": make_config(stages=staged(train=["decoder"])),
    "projectors": make_config(stages=staged(train=PROJECTORS)),
    "projectors of one layer, head of its own": make_config(
        model={
            **MODEL,
            "decoder": {**MODEL["decoder"], "tie_embedding": False, "qk_norm": True},
            "vision_projector": {"type": "linear", "downsample": 2},
        },
        stages=staged(train=PROJECTORS),
    ),
    "one tower": make_config(stages=staged(train=["audio"])),
    "pixels past the last whole patch": make_config(model={**MODEL, "vision": {**MODEL["vision"], "image_size": 19}}),
    "upper layers": make_config(stages=staged(train=["decoder"], freeze_params=[r"decoder\.(embedding|blocks\.0)"])),
    "one norm": make_config(
        stages=staged(freeze_params=[""], prevent_freeze_params=[r"decoder\.blocks\.1\.attention_norm"])
    ),
    "LoRA": make_config(model={**MODEL, "lora": LORA}, stages=staged(train=["lora"])),
    "LoRA and projectors": make_config(model={**MODEL, "lora": LORA}, stages=staged(train=["lora", *PROJECTORS])),
    "DoRA": make_config(model={**MODEL, "lora": {**LORA, "dora": True}}, stages=staged(train=["lora"])),
    "recompute full": make_config(train={"recompute": dict.fromkeys(("decoder", "vision", "audio"), "full")}),
    "recompute selective": make_config(train={"recompute": dict.fromkeys(("decoder", "vision", "audio"), "selective")}),
    "recompute with LoRA": make_config(
        model={**MODEL, "lora": LORA},
        stages=staged(train=["lora"]),
        train={"recompute": {"decoder": "full", "vision": "full", "audio": "selective"}},
    ),
    "recompute with DoRA": make_config(
        model={**MODEL, "lora": {**LORA, "dora": True}},
        stages=staged(train=["lora"]),
        train={"recompute": {"decoder": "full", "audio": "selective"}},
    ),
    "selective recompute with DoRA": make_config(
        model={**MODEL, "lora": {**LORA, "dora": True}},
        stages=staged(train=["lora"]),
        train={"recompute": {"decoder": "selective"}},
    ),
    "recompute with DoRA of queries": make_config(
        model={**MODEL, "lora": {**LORA, "dora": True, "targets": ["decoder.*.q"]}},
        stages=staged(train=["lora", "vision"]),
        train={"recompute": {"decoder": "full", "vision": "full"}},
    ),
    **{
        f"projectors of type {kind}": make_config(
            model={
                **MODEL,
                "vision_projector": {"type": kind, "downsample": 2, "hidden_size": 24},
                "audio_projector": {"type": kind, "downsample": 3, "bias": False},
            },
            stages=staged(train=[*PROJECTORS, "vision"]),
        )
        for kind in typing.get_args(typing.get_type_hints(ProjectorConfig)["type"])
    },
    "windows": make_config(model=MODELS["windows"]),
    "audio that is pooled, norms around its projector": make_config(model=HEARING),
    "windows, only the norms of a projector": make_config(
        model=MODELS["windows"], stages=staged(freeze_params=[""], prevent_freeze_params=[r"vision_projector\.norm"])
    ),
    "DeepStack": make_config(model=MODELS["deep"]),
    "DeepStack, projectors": make_config(model=MODELS["deep"], stages=staged(train=PROJECTORS)),
    "DeepStack, recompute": make_config(model=MODELS["deep"], train={"recompute": {"vision": "selective"}}),
    "tiles that are joined and stretched": make_config(model=TILED, train={"recompute": {"vision": "selective"}}),
    "tiles, projectors": make_config(model=TILED, stages=staged(train=PROJECTORS)),
    "Conformers": make_config(model=MODELS["conformer"]),
    "Conformers, recompute": make_config(model=MODELS["conformer"], train={"recompute": {"audio": "full"}}),
    "an adapter of Conformers": make_config(
        model=MODELS["conformer"], stages=staged(freeze_params=[""], prevent_freeze_params=[r"audio_projector\."])
    ),
    "text": make_config(model={"decoder": MODEL["decoder"]}, stages=staged(train=["decoder"])),
}


def make_batch(cfg, documents=4):
    """128 tokens in documents whose lengths are multiples of 16, up to which the plain path rounds; so are the windows
    of images of any grid, and those that are smaller there."""
    if cfg.model.vision and cfg.model.vision.any_grid:
        return of_any_grid(cfg)
    if cfg.model.vision and cfg.model.vision_projector.newline:
        return of_views(cfg)
    media = ",images=3,clips=1,seconds=1" if cfg.model.vision else ""
    source, data = f"synthetic:documents={documents}{media}", replace(cfg.stages[0].data, seq_length=128)
    return next(iter(SyntheticLoader(Stream(source, data, cfg.model, rank=0, world=1, seed=0, train=True))))


def of_any_grid(cfg):
    vision = cfg.model.vision
    samples = []
    for grid in ((8, 4), (4, 4), (4, 12)):
        patches = torch.randint(0, 255, (*grid, vision.patch_numbers), dtype=torch.uint8)
        token_T = torch.cat([torch.full((math.prod(grid) // 4,), IMAGE), torch.arange(32 - math.prod(grid) // 4)])
        target_T = token_T.where(token_T >= 0, IGNORE)
        samples.append(EncodedSample("", "image", token_T, target_T, {"image": [patches]}))
    return pack(samples, 128, cfg.model)


def of_views(cfg):
    """Images that are cut into tiles, and whole ones."""
    grids, groups, tokens, _ = make_views("image", cfg.model)
    token_T = torch.cat([torch.tensor(tokens), torch.arange(32 - len(tokens))])
    target_T = token_T.where(token_T >= 0, IGNORE)
    patches = [torch.randint(0, 255, (*grid, cfg.model.vision.patch_numbers), dtype=torch.uint8) for grid in grids]
    sample = EncodedSample("", "image", token_T, target_T, {"image": patches}, None, groups)
    return pack([sample, sample], 128, cfg.model)


def plain_loss(hidden_RD, weight_VD, target_R, softcap=None, factor_R=None):
    """The products of ``linear_cross_entropy``, which makes its gradients in the forward, as autograd would do them."""
    assert softcap is None and factor_R is None
    loss_R = F.cross_entropy(F.linear(hidden_RD, weight_VD), target_R, reduction="none")
    return loss_R.sum(), loss_R.detach()


def counted(cfg, batch, monkeypatch):
    """(forward, backward) FLOPs that PyTorch saw, and the forward's of each module."""
    monkeypatch.setattr(decoder, "linear_cross_entropy", plain_loss)
    monkeypatch.setattr(recompute, "ATTENTION", ("bmm",))  # what the plain path's attention is made of
    model = AVLM(cfg.model)
    init(model)
    freezing.freeze(model, cfg.stages[0])
    recompute.apply_recompute(model, cfg.train)
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH):  # of the others, the counter knows those of GPUs only
        with forward:
            loss, _ = model(batch)
        with backward:
            loss.backward()
    modules = {name.removeprefix("AVLM."): sum(ops.values()) for name, ops in forward.get_flop_counts().items()}
    return forward.get_total_flops(), backward.get_total_flops(), modules


def of_channels(cfg, count):
    """What PyTorch counts too much: gradients of the weights of depthwise convolutions as if these were whole."""
    shapes = parameter_shapes(cfg.model)
    trained = freezing.trained_names(cfg.stages[0], cfg.model, list(shapes))
    found = 0
    for module in cfg.model.modules:
        for name, paths in steps(module, cfg.model):
            for path in paths:
                channels, inputs, *_ = (*shapes.get(f"{path}.weight", ()), 0, 0)
                if path.endswith((".depthwise", ".conv2", ".conv3")) and inputs == 1 and f"{path}.weight" in trained:
                    found += (channels - 1) * 2 * math.prod(shapes[f"{path}.weight"]) * count[name]
    return found


@pytest.mark.parametrize("case", CASES)
def test_flops_are_those_that_pytorch_counts(case, monkeypatch):
    cfg = CASES[case]
    batch = make_batch(cfg)
    count = counts(batch)
    # The plain path computes every pair of a document, those that a query may not see as well.
    count["token_pairs"] = sum(length**2 for _, length in batch.segments.spans)
    found = flops.by_module(flops.costs(cfg.model, cfg.stages[0], cfg.train.recompute), count)
    forward, backward, modules = counted(cfg, batch, monkeypatch)
    assert sum(parts[0] for parts in found.values()) == forward
    assert sum(parts[1] + parts[2] for parts in found.values()) == backward - of_channels(cfg, count)
    for name in (*cfg.model.modules, "head"):
        apart = modules.get(f"{name}.resampler", 0)  # it does not run in the forward of its projector
        assert found[name][0] == modules["decoder.head" if name == "head" else name] + apart, name


def test_a_weight_that_no_step_covers_is_refused():
    cfg = CASES["projectors of type swiglu"]
    shapes = parameter_shapes(cfg.model)
    check_steps(cfg.model, shapes)
    with pytest.raises(ValueError, match=r"gate2\.weight belongs to no step"):
        check_steps(cfg.model, {**shapes, "vision_projector.gate2.weight": (24, 8)})


def test_attention_is_counted_by_document():
    cfg = CASES["text"]
    costs = flops.costs(cfg.model, cfg.stages[0], cfg.train.recompute)
    whole, cut = (counts(make_batch(cfg, documents)) for documents in (1, 4))
    assert (whole["token_pairs"], cut["token_pairs"]) == (128 * 129 // 2, 4 * 32 * 33 // 2)
    of_pairs = whole["token_pairs"] * 12 * 32 * 2  # 4 forward and 8 backward, for 32 numbers in each of 2 layers
    assert sum(costs["decoder", "token_pairs"]) * whole["token_pairs"] == of_pairs


def test_layers_with_a_window_count_what_they_see():
    cfg = CASES["text"]
    windowed = replace(cfg.model.decoder, sliding_window=10, window_layers=[1])
    cfg = replace(cfg, model=replace(cfg.model, decoder=windowed))
    costs = flops.costs(cfg.model, cfg.stages[0], cfg.train.recompute)
    count = counts(make_batch(cfg, 4))
    assert count["token_pairs"] == 4 * 32 * 33 // 2
    assert count["window_pairs"] == 4 * (10 * 32 - 10 * 9 // 2)
    assert costs["decoder", "window_pairs"] == costs["decoder", "token_pairs"]  # one layer each


def test_a_frozen_tower_has_no_backward():
    cfg = CASES["projectors"]
    found = flops.by_module(flops.costs(cfg.model, cfg.stages[0], cfg.train.recompute), counts(make_batch(cfg)))
    assert found["vision"][0] > 0 and found["audio"][0] > 0
    assert found["vision"][1] == found["audio"][1] == 0
    assert found["head"][0] == found["head"][1], "the frozen head passes a gradient on, and makes none of its own"


def test_what_fills_a_row_counts():
    cfg = CASES["everything"]
    costs = flops.costs(cfg.model, cfg.stages[0], cfg.train.recompute)
    empty = flops.by_module(costs, counts(empty_batch(64, cfg.model)))
    assert empty["decoder"][0] > 0 and empty["head"] == empty["vision"] == empty["audio"] == (0, 0, 0)


@pytest.mark.parametrize(
    "name, tera",
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_device_has_the_peak_of_its_whole_name(name, tera, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert flops.peak(torch.device("cuda")) == (tera and tera * 1e12)
    assert flops.peak(torch.device("cpu")) is None


@pytest.mark.parametrize("name, mfu", [("NVIDIA H200", 0.25), ("a card of tomorrow", None)])
def test_mfu_is_reported_where_the_peak_is_known(name, mfu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    monkeypatch.setattr(time, "perf_counter", iter([0.0, 2.0, 2.0, 2.0, 2.0]).__next__)
    cfg = make_config(output_dir=str(tmp_path))
    log = Log(cfg, SimpleNamespace(device=torch.device("cuda"), size=4, is_first=True), 0)
    row = {"step": 1, "stage": "all", "lr": 0.1} | tally([], flops.costs(cfg.model, cfg.stages[0], cfg.train.recompute))
    row |= {
        "tokens": 6,
        "data_seconds": 0.0,
        "row_tokens": 8,
        "targets/text": 1,
        "flops/decoder": 2 * 989.4e12,
        "recomputed_flops": 989.4e12,
    }
    log.step(row, torch.ones(len(KINDS) + 2), [])
    log.close(Progress(step=1))
    (written,) = read_records(tmp_path / "metrics.jsonl")
    assert (written.get("mfu"), written.get("hfu")) == (mfu and pytest.approx(mfu), mfu and pytest.approx(1.5 * mfu))
    assert written["padding"] == 0.25

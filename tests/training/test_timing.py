"""The seconds of a step's parts, by a clock that only the part under test moves on."""

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from avlm.models import freezing
from avlm.parallel import mesh
from avlm.training import optimizer, timing
from tests.parallel.small import build, make_config, make_rows
from tests.parallel.spawn import run_ranks
from train import train_step

PARTS = ("vision", "vision_projector", "audio", "audio_projector", "decoder", "head", timing.REST)


def measure(cfg):
    """Part -> the seconds of a step in which its forward takes 3, each time, and its backward 1."""
    now = [0.0]
    timing.time = SimpleNamespace(perf_counter=lambda: now[0])
    world, model = build(cfg)
    freezing.freeze(model, cfg.stages[0])
    adam = optimizer.build(model, cfg.stages[0].optimizer)
    clock = timing.PartClock(model, world.device)
    rows = make_rows(cfg, ["both", "text"])[world.rank :: world.size]

    def take(seconds):
        now[0] += seconds

    def behind(module, inputs, output):
        take(3)
        first = output[0] if isinstance(output, tuple) else output
        if first.requires_grad:
            first.register_hook(lambda _: take(1))

    results = {}
    for part in PARTS:
        if part == timing.REST:
            hook = adam.register_step_pre_hook(lambda *_: take(1))
        else:
            module = model.decoder.head if part == "head" else getattr(model, part)
            hook = module.register_forward_hook(behind)
        train_step(model, rows, 50.0, adam, 1.0, world, clock=clock)
        results[part] = timing.seconds(clock.stop())
        hook.remove()
    mesh.stop()
    return results


@pytest.mark.parametrize("ranks, rows", [(1, 2), (2, 1)])
def test_a_part_has_the_seconds_of_its_forward_and_backward(ranks, rows):
    for results in run_ranks(measure, ranks, make_config()):
        for part, seconds in results.items():
            assert set(seconds) == set(PARTS)
            assert seconds == dict.fromkeys(PARTS, 0.0) | {part: 1.0 if part == timing.REST else 4.0 * rows}


def gather(cfg):
    """Part -> seconds, when nothing takes time but FSDP's gathers of weights, a second each."""
    now = [0.0]
    timing.time = SimpleNamespace(perf_counter=lambda: now[0])
    world, model = build(cfg)
    clock = timing.PartClock(model, world.device)
    adam = optimizer.build(model, cfg.stages[0].optimizer)
    original = dist.all_gather_into_tensor

    def slow(*arguments, **options):
        now[0] += 1
        return original(*arguments, **options)

    dist.all_gather_into_tensor = slow
    train_step(model, make_rows(cfg, ["both", "both"])[world.rank :][:1], 50.0, adam, 1.0, world, clock=clock)
    mesh.stop()
    return timing.seconds(clock.stop())


def test_a_part_waits_for_its_own_weights():
    for seconds in run_ranks(gather, 2, make_config()):
        assert seconds["vision"] > 0 and seconds["audio"] > 0 and seconds["decoder"] > 0
        assert seconds[timing.REST] == 0


def test_a_frozen_tower_has_its_forward_alone():
    cfg = make_config(stages=[{"name": "all", "steps": 1, "train": ["vision_projector", "audio_projector"]}])
    [results] = run_ranks(measure, 1, cfg)
    assert results["vision"]["vision"] == 6.0 and results["decoder"]["decoder"] == 8.0

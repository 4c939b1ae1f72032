"""How fast a config trains on this device: its stage's real step on synthetic rows, with random weights.

    python -m tests.measurements.step_speed configs/avlm_8b.yaml [section.key=value ...] [--stage N] [--out DIR]

The model, its layout, the optimizer and ``train_step`` are those of train.py, in one process. Weights are drawn on the
device, rows are made before the clock starts; no file is read but the config and those that give its sizes. Reported
are tokens/s, MFU and HFU (by ``avlm.training.flops``), peak memory, and the ten kernels that take most time, by
torch.profiler over one more step. --tiny shrinks the model, for a try on the CPU.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from avlm.config.run import Config
from avlm.data.loader import open_loader
from avlm.data.stream import Stream
from avlm.models.avlm import AVLM
from avlm.models.batch import Batch
from avlm.models.freezing import freeze
from avlm.models.lora import init_magnitudes
from avlm.parallel import mesh
from avlm.parallel.apply import apply_parallel, compute_dtype, own_part, warm_up
from avlm.parallel.mesh import World
from avlm.training import flops, optimizer
from avlm.training.console import describe
from avlm.training.log import tally
from avlm.weights.model_from import open_config
from train import train_step

SYNTHETIC = [
    "data.train=synthetic:documents=4,images=4,clips=2,seconds=10",
    "data.validation={}",
    "init_from={}",
    "train.rows_per_step=null",
    "train.accumulate=1",
]
TINY = [
    "data.train=synthetic:documents=2,images=2,clips=1,seconds=1",
    "data.seq_length=256",
    "model.decoder={vocab_size: 512, hidden_size: 64, intermediate_size: 128, num_layers: 2, num_heads: 4}",
    "model.decoder.num_kv_heads=2",
    "model.vision={hidden_size: 32, intermediate_size: 64, num_layers: 2, num_heads: 2, image_size: 28}",
    "model.vision.patch_size=14",
    "model.audio={hidden_size: 32, intermediate_size: 64, num_layers: 2, num_heads: 2, num_mels: 128}",
    "model.vision_projector={}",
    "model.audio_projector={}",
]
LARGEST = 10


@dataclass(frozen=True)
class Run:
    """A stage that is ready to train: ``step`` takes one optimizer step over a row."""

    world: World
    step: Callable[[Batch], torch.Tensor]
    rows: list[Batch]
    counts: list[dict[str, float]]  # of each row, as train.py counts them
    summary: str


def prepare(cfg: Config, number: int, num_rows: int) -> Run:
    """What train.py does before its first step."""
    world = mesh.start(cfg.parallel, mesh.choose_device(cfg.device))
    torch.manual_seed(cfg.seed)
    with torch.device("meta"):
        model = AVLM(cfg.model)
    apply_parallel(model, world, cfg.parallel, cfg.train)
    randomise(model)
    warm_up(model, world)
    stage = cfg.stages[number]
    trained = freeze(model, stage)
    adam = optimizer.build(model, stage.optimizer)
    stream = Stream(stage.data.train, stage.data, cfg.model, rank=0, world=1, seed=cfg.seed, train=True)
    rows = list(itertools.islice(open_loader(stream), num_rows))
    costs = flops.costs(cfg.model, stage, cfg.train.recompute)

    def step(row: Batch) -> torch.Tensor:
        part = own_part(row, cfg.model, world)
        optimizer.schedule(adam, stage.optimizer, optimizer.warmup_steps(stage.optimizer, stage.steps), stage.steps)
        return train_step(model, [part], len(row.target_R), adam, stage.optimizer.clip_norm, world)

    counts = [tally([row], costs) for row in rows]
    return Run(world, step, rows, counts, f"{describe(model)}; stage {stage.name} trains {', '.join(trained)}")


@torch.no_grad()
def randomise(model: AVLM) -> None:
    """Initial values, drawn where the parameters are: as train.py's in kind, but not number by number."""
    stats = {name: module.init_stats() for name, module in model.named_children()}
    for name, parameter in model.named_parameters():
        module, _, inner = name.partition(".")
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.normal_(*stats[module][inner])
    init_magnitudes(model)


def measure(run: Run, cfg: Config, num_warmup: int) -> dict:
    """Seconds are those of all steps after the warm-up together: nothing waits for the device between them."""
    device = run.world.device
    values = [run.step(row) for row in run.rows[:num_warmup]]
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    values += [run.step(row) for row in run.rows[num_warmup:]]
    synchronize(device)
    seconds = time.perf_counter() - started
    counts = run.counts[num_warmup:]
    tokens = sum(count["tokens"] for count in counts)
    useful = sum(value for count in counts for name, value in count.items() if name.startswith("flops/"))
    repeated = sum(count["recomputed_flops"] for count in counts)
    is_bf16 = compute_dtype(cfg.train.precision, device) == torch.bfloat16
    peak = flops.peak(device) if is_bf16 else None
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "steps": len(counts),
        "seconds_per_step": seconds / len(counts),
        "tokens_per_second": tokens / seconds,
        "tflops_per_step": useful / len(counts) / 1e12,
        "mfu": useful / seconds / peak if peak else None,
        "hfu": (useful + repeated) / seconds / peak if peak else None,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }
    losses = [value[:-2].sum().item() / count["target_tokens"] for value, count in zip(values, run.counts)]
    return found | {"losses": losses}


def largest_kernels(run: Run) -> list[dict]:
    """By their own time in one more step; on the CPU, operators."""
    device = run.world.device
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities, acc_events=True) as profiler:
        run.step(run.rows[-1])
        synchronize(device)
    column = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == kind and not event.is_user_annotation]
    total = sum(getattr(event, column) for event in events)
    events.sort(key=lambda event: -getattr(event, column))
    return [
        {
            "ms": getattr(event, column) / 1000,
            "share": getattr(event, column) / total,
            "calls": event.count,
            "name": event.key,
        }
        for event in events[:LARGEST]
    ]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def shown(found: dict) -> str:
    """Ends with a line that says it all."""
    lines = [f"{name:18} {value}" for name, value in found.items() if name != "kernels"]
    lines += [
        f"{kernel['ms']:10.2f} ms {kernel['share']:6.1%} {kernel['calls']:6} x  {kernel['name'][:90]}"
        for kernel in found["kernels"]
    ]
    parts = [f"{found['tokens_per_second']:,.0f} tokens/s", f"{found['seconds_per_step']:.3f} s a step"]
    if found["mfu"]:
        parts += [f"MFU {found['mfu']:.1%}", f"HFU {found['hfu']:.1%}"]
    if found["peak_memory_gib"]:
        parts.append(f"{found['peak_memory_gib']:.1f} GiB")
    return "\n".join([*lines, f"{found['config']} on {found['device']}: {', '.join(parts)}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--stage", type=int, default=0, help="by number: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="that are timed, after two that are not: %(default)s")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write step_CONFIG.json here")
    options = parser.parse_intermixed_args()
    overrides = [*SYNTHETIC, *(TINY if options.tiny else []), *options.overrides]
    cfg = open_config(options.config, overrides)
    cfg = replace(cfg, stages=[replace(stage, data=replace(stage.data, num_workers=0)) for stage in cfg.stages])
    num_warmup = 2
    run = prepare(cfg, options.stage, num_warmup + options.steps)
    print(run.summary, flush=True)
    name = f"{options.config.stem}{' tiny' * options.tiny}"
    found = {"config": name, "model": run.summary, **measure(run, cfg, num_warmup)}
    path = None
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"step_{options.config.stem}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")  # before the profiler, which may fail
    found["kernels"] = largest_kernels(run)
    if path:
        path.write_text(json.dumps(found, indent=1) + "\n")
    print(shown(found))
    mesh.stop()


if __name__ == "__main__":
    main()

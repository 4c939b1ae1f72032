"""Train an audio-vision language model.

    torchrun --nproc-per-node 8 train.py configs/demo.yaml [section.key=value ...]
    python train.py configs/demo.yaml --print

Read from the bottom: main() builds the parts in order, then runs the stages.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

from avlm.process import arguments

if __name__ == "__main__":
    ARGUMENTS = arguments.parse()  # before the imports below, which take seconds

import torch
import torch.distributed as dist
from torch import Tensor

from avlm.config.load import dump_config
from avlm.config.run import Config
from avlm.data.check import check_skipped
from avlm.data.loader import open_loader
from avlm.data.stream import Stream
from avlm.demo.build import ensure
from avlm.evaluation.validation import judge, validate
from avlm.models.avlm import AVLM
from avlm.models.batch import KINDS, Batch
from avlm.models.freezing import freeze
from avlm.models.moe import set_balance, take_seen
from avlm.parallel import agreement, mesh
from avlm.parallel.apply import apply_parallel, warm_up
from avlm.parallel.mesh import World
from avlm.parallel.rows import TrainingRows, of_a_step
from avlm.preflight.check import check
from avlm.preflight.kernel_check import check_kernels
from avlm.preflight.report import check_memory, report
from avlm.process.exit import listen, run_command
from avlm.process.launch import ranks
from avlm.storage.run_folder import Progress, claim, find, read_progress, write_durably
from avlm.training import checkpoint, flops, optimizer
from avlm.training.console import describe, describe_length
from avlm.training.epochs import Epoch, with_steps
from avlm.training.log import Log, tally
from avlm.training.resume import check_resume
from avlm.training.saving import Saver
from avlm.training.steady import Between
from avlm.weights.load import init_weights
from avlm.weights.model_from import open_config
from avlm.weights.plan import pinned


def train_step(
    model: AVLM,
    batches: list[Batch],
    num_targets: float,
    adam: torch.optim.AdamW,
    clip_norm: float | None,
    world: World,
    accumulate_mode: str = "sharded",
) -> Tensor:
    """One optimizer step over this rank's part of the rows. ``num_targets`` counts over all ranks and batches, so that
    every layout takes the same step.

    Returns, on the device, float32: the global loss sum of each kind, the gradient norm, the own loss sum; then, of all
    ranks, what ``take_seen`` says of experts. Nothing here waits for the device, but experts
    may (``avlm.parallel.experts``).
    """
    losses = torch.zeros(len(KINDS), device=world.device)
    for i, batch in enumerate(batches):
        batch = batch.to(world.device)
        is_last = i + 1 == len(batches)
        model.set_requires_gradient_sync(accumulate_mode == "sharded" or is_last)
        model.set_requires_all_reduce(is_last)  # copies of the model need the sum only once, at the end
        loss, loss_R = model(batch)
        (loss / num_targets).backward()
        losses.index_add_(0, batch.kind_R, loss_R)
    norm = optimizer.clip_gradients(model, clip_norm)
    adam.step()
    adam.zero_grad()
    own = losses.sum()
    if not world.counts_losses:
        losses.zero_()
    sums = torch.cat([losses, take_seen(model, world.device)])
    dist.all_reduce(sums)
    losses, seen = sums.split([len(KINDS), len(sums) - len(KINDS)])
    norm = norm.to(losses.device)  # offloaded gradients are on the host
    return torch.cat([losses, norm.reshape(1), own.reshape(1), seen])


def run_stage(
    model: AVLM,
    cfg: Config,
    world: World,
    log: Log,
    saver: Saver,
    progress: Progress,
    resume_from: Path | None,
    epoch: Epoch | None,
    stopping: list[int],
) -> Progress:
    """Train one stage from where ``progress`` stands to the end of the stage, or until the run has to stop."""
    # 1. What trains, with its own optimizer state; where the data continues.
    stage = cfg.stages[progress.stage]
    trained = freeze(model, stage)
    adam = optimizer.build(model, stage.optimizer)
    loader_state = None
    if resume_from:
        checkpoint.load_optimizer(resume_from, model, adam)
        loader_state = checkpoint.read_loader_state(resume_from, world, stage.data.num_workers)
    loader = None
    if world.leads_row:
        options = {"seed": cfg.seed + progress.stage, "objective": stage.objective}
        stream = Stream(stage.data.train, stage.data, cfg.model, **world.shard_of_data, **options, train=True)
        loader = open_loader(stream, loader_state)
    world.barrier()
    if world.is_first:  # not before: a run that cannot continue keeps the config of its checkpoints
        write_durably(Path(cfg.output_dir) / "config.yaml", dump_config(cfg))
    micro_batches = cfg.train.micro_batches(world.data_size)
    rows = TrainingRows(loader, cfg.model, world, ahead=micro_batches)
    costs = flops.costs(cfg.model, stage, cfg.train.recompute)
    rows_per_step = world.data_size * micro_batches
    set_balance(model, cfg.train.balance_loss, rows_per_step)
    log.message(f"stage {stage.name}: {stage.steps} steps, trains {', '.join(trained)}")
    for line in describe_length(stage, epoch, rows_per_step):
        log.message(line)
    between = Between(cfg, world, model, adam, log, progress.step)
    log.restart_clock()

    # 2. Steps.
    last = min(stage.steps, progress.stage_step + (cfg.train.stop_after or cfg.total_steps) - progress.step)
    while progress.stage_step < last:
        between.step(progress.step)
        started = time.perf_counter()
        taken = [next(rows) for _ in range(micro_batches)]
        waited = time.perf_counter() - started
        parts = of_a_step([row.part for row in taken], cfg.model, world)
        counted = [row.batch for row in taken if world.leads_row]  # a row counts once, however many ranks share it
        counts = world.sum_by_name(tally(counted, costs) | {"stop": bool(stopping), "unsaved": saver.is_unsaved()})
        stop, unsaved, read, skipped = (counts.pop(name) for name in ("stop", "unsaved", "read", "skipped"))
        for batch in counted:
            log.skipped(batch)
        lr = optimizer.schedule(adam, stage.optimizer, progress.stage_step, stage.steps)
        if cfg.debug.check_collectives:
            agreement.check_step(world, model, progress.step, parts)
        num_targets = counts["target_tokens"] or 1.0
        values = train_step(
            model, parts, num_targets, adam, stage.optimizer.clip_norm, world, cfg.train.accumulate_mode
        )
        progress = progress.after_step(read, skipped, rows_per_step)
        record = {"step": progress.step, "stage": stage.name, "lr": lr, "data_seconds": waited}
        record |= {"skipped_samples": progress.skipped, **counts}
        if epoch is not None:
            record["epoch"] = epoch.of_steps(progress.stage_step, rows_per_step)
        log.step(record, values, [key for row in taken for key in row.batch.keys])
        check_skipped(progress.read, progress.skipped, stage.data.max_bad_fraction, epoch and epoch.total)

        # 3. Validation and checkpoints, at their steps and at the end.
        before = progress
        every = cfg.train.validate_every
        is_due = every and (progress.step % every == 0 or progress.stage_step == stage.steps)
        if stage.data.validation and is_due:
            log.flush()
            rows.settle()
            results = validate(model, stage, cfg, world, log, progress.step)
            progress = judge(progress, results, cfg.checkpoint.best)
            log.validation(progress, stage.name, results)
            log.restart_clock()
        is_best = progress.best_step == progress.step
        if is_best or stop or unsaved or saver.is_due(progress.step) or progress.stage_step == last:
            log.flush()
            is_final = bool(stop) or progress.step in (cfg.total_steps, cfg.train.stop_after)
            state = taken[-1].loader_state()
            progress = saver.save_or_warn(progress, before, model, adam, state, log, is_final)
            log.restart_clock()
        if stop:
            log.message(f"stopped by a signal after step {progress.step}; the same command continues from there")
            break
    rows.settle()
    between.end()
    return progress


def main(cfg: Config) -> None:
    # 1. Everything that can be wrong is found before any process group starts. The run folder belongs to one run.
    epochs = check(cfg, world_size=ranks()[1])
    device = mesh.choose_device(cfg.device)
    world = mesh.start(cfg.parallel, device, Path(cfg.output_dir))
    agreement.check_start(world, dump_config(cfg))
    lock = claim(cfg, world)
    resume_from, note = world.gather(find(cfg))[0]
    epochs = world.gather(epochs)[0]
    cfg = with_steps(cfg, epochs, world.data_size, resume_from)
    changes = check_resume(cfg, resume_from, world.data_size)
    run = Path(cfg.output_dir)
    stopping = listen()

    # 2. Model: shapes first (meta), then layout and memory, then values: a checkpoint's, or initial ones.
    torch.manual_seed(cfg.seed + world.rank)  # ranks with different rows draw different dropout
    torch.use_deterministic_algorithms(cfg.deterministic)
    with torch.device("meta"):
        model = AVLM(cfg.model)
    apply_parallel(model, world, cfg.parallel, cfg.train)
    progress = read_progress(resume_from, run) if resume_from else Progress()
    log = Log(cfg, world, progress.step)
    log.message(f"{describe(model)}; {world.size} x {device.type}")
    for line in check_kernels(cfg, world):
        log.message(line)
    if resume_from:
        checkpoint.load_model(resume_from, model)
        log.message(f"{note}resuming {resume_from.name} at step {progress.step} of {cfg.total_steps}")
        for line in changes:
            log.message(line)
    else:
        for loaded in init_weights(model, world.gather(pinned(cfg.init_from))[0], cfg.seed):
            log.message(str(loaded))
    warm_up(model, world)
    if resume_from:
        checkpoint.load_random_state(resume_from, world)

    # 3. Stages.
    saver = Saver(run, cfg.checkpoint, world)
    while progress.stage < len(cfg.stages):
        steps = cfg.stages[progress.stage].steps
        if progress.stage_step < steps:
            epoch = epochs[progress.stage]
            progress = run_stage(model, cfg, world, log, saver, progress, resume_from, epoch, stopping)
        if progress.stage_step < steps or progress.step == cfg.train.stop_after:
            break
        progress = replace(progress, stage=progress.stage + 1, stage_step=0)
        resume_from = None
    log.close(progress)
    stopped_by = max(world.gather(max(stopping, default=0)))
    world.watch.end()
    mesh.stop()
    if lock is not None:
        lock.close()
    if stopped_by and progress.step < cfg.total_steps:
        sys.exit(128 + stopped_by)


def command() -> None:
    cfg = open_config(ARGUMENTS.config, ARGUMENTS.overrides)
    if ARGUMENTS.print:
        print(dump_config(cfg))
        return
    ensure(cfg)  # a config of the demo needs the demo's data
    if not ARGUMENTS.preflight:
        main(cfg)
        return
    print(report(cfg, ARGUMENTS.world_size), flush=True)
    if ARGUMENTS.device_memory_gib is not None:
        check_memory(cfg, ARGUMENTS.world_size, ARGUMENTS.device_memory_gib)


if __name__ == "__main__":
    run_command(command)

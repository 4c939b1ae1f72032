"""Train an audio-vision language model.

    torchrun --nproc-per-node 8 train.py configs/demo.yaml [section.key=value ...]
    python train.py configs/demo.yaml --print

Read from the bottom: main() builds the parts in order, then runs the stages.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from avlm.config.load import dump_config, load_config
from avlm.config.run import Config, StageConfig
from avlm.data.loader import open_loader
from avlm.data.packing import empty_batch
from avlm.demo.build import ensure
from avlm.evaluation.answers import judge, validate_answers
from avlm.models import freezing
from avlm.models.avlm import AVLM
from avlm.models.batch import KINDS, Batch
from avlm.parallel import agreement, mesh
from avlm.parallel.apply import apply_parallel, own_part, warm_up
from avlm.parallel.fsdp import reshard
from avlm.parallel.mesh import World
from avlm.preflight import check as preflight
from avlm.preflight.check import check, check_resume, check_skipped
from avlm.preflight.report import check_memory
from avlm.process import exit
from avlm.process.exit import one_line_errors
from avlm.process.launch import ranks
from avlm.storage.run_folder import Progress, claim, find, read_progress, write_durably
from avlm.training import checkpoint, flops, optimizer
from avlm.training.log import Log, describe, tally
from avlm.training.timing import PartClock
from avlm.weights.load import init_weights
from avlm.weights.plan import pinned


def train_step(
    model: AVLM,
    batches: list[Batch],
    num_targets: float,
    adam: torch.optim.AdamW,
    clip_norm: float | None,
    world: World,
    accumulate_mode: str = "sharded",
    clock: PartClock | None = None,
) -> Tensor:
    """One optimizer step over this rank's part of the rows. ``num_targets`` counts over all ranks and batches, so that
    every layout gives the same step.

    Returns, on the device, float32 (len(KINDS) + 2,): the global loss sum of each kind, the gradient norm, the own loss
    sum. Nothing here waits for the device.
    """
    if clock:
        clock.start()
    losses = torch.zeros(len(KINDS), device=world.device)
    for i, batch in enumerate(batches):
        batch = batch.to(world.device)
        is_last = i + 1 == len(batches)
        model.set_requires_gradient_sync(accumulate_mode == "sharded" or is_last)
        model.set_requires_all_reduce(is_last)  # between copies sums are as good at the end
        loss, loss_R = model(batch)
        (loss / num_targets).backward()
        losses.index_add_(0, batch.kind_R, loss_R)
    if clock:
        clock.end_of_backward()
    norm = optimizer.clip_gradients(model, clip_norm)
    adam.step()
    adam.zero_grad()
    own = losses.sum()
    if not world.counts_losses:
        losses.zero_()
    dist.all_reduce(losses)
    return torch.cat([losses, norm.to(losses.device).reshape(1), own.reshape(1)])  # offloaded gradients are on the host


@torch.no_grad()
def validate(model: AVLM, stage: StageConfig, cfg: Config, world: World, log: Log, step: int) -> dict[str, float]:
    """Of each validation set the mean loss per target, the share of targets that are the likeliest token, and scores of
    generated answers if asked for.

    Every rank runs as many forwards as the rank with most rows. Raises ValueError for a set without a target.
    """
    results = {}
    for name, source in stage.data.validation.items():
        who = {"rank": world.data_rank, "world": world.data_size, "seed": cfg.seed}
        rows = world.share_rows(
            open_loader(source, stage.data, cfg.model, **who, train=False) if world.leads_row else None
        )
        loss, num_targets = torch.zeros((), device=world.device), 0
        right = torch.zeros((), dtype=torch.int64, device=world.device)
        for _ in range(cfg.train.validate_batches):
            batch = next(rows, None)
            if world.sum([batch is not None])[0] == 0:
                break
            if batch and world.leads_row:
                log.skipped(batch, f" of {name}")
            batch = own_part(batch or empty_batch(stage.data.seq_length, cfg.model), cfg, world)
            batch = batch.to(world.device)
            batch_loss, _, token_R = model(batch, predict=True)
            loss += batch_loss
            right += (token_R == batch.target_R).sum()
            num_targets += len(batch.target_R)
        loss, right, num_targets = world.sum([loss.item(), right.item(), num_targets])
        if not num_targets:
            raise ValueError(f"validation set {name} ({source}) has no sample that can be used")
        found = {"loss": loss / num_targets, "token_accuracy": right / num_targets}
        if cfg.train.validate_answers:
            found |= validate_answers(model, name, stage, cfg, world, step)
        results |= {f"val/{name}/{metric}": value for metric, value in found.items()}
    reshard(model)
    return results


def run_stage(
    model: AVLM,
    cfg: Config,
    world: World,
    log: Log,
    saver: checkpoint.Saver,
    at: Progress,
    resume_from: Path | None,
    loader_state: dict | None,
    stopping: list[int],
) -> Progress:
    """Train one stage from ``at`` to its end, or to where the run has to stop."""
    # 1. What trains, with optimizer state of its own; where the data goes on.
    stage = cfg.stages[at.stage]
    trained = freezing.freeze(model, stage)
    adam = optimizer.build(model, stage.optimizer)
    if resume_from:
        checkpoint.load_checkpoint(resume_from, model, adam)
    who = {"rank": world.data_rank, "world": world.data_size, "seed": cfg.seed + at.stage}
    loader = None
    if world.leads_row:
        loader = open_loader(stage.data.train, stage.data, cfg.model, **who, train=True, state=loader_state)
    costs = flops.costs(cfg, stage)
    log.say(f"stage {stage.name}: {stage.steps} steps, trains {', '.join(trained)}")
    log.restart_clock()

    # 2. Steps.
    rows = world.share_rows(loader)
    last = min(stage.steps, at.stage_step + (cfg.train.stop_after or cfg.total_steps) - at.step)
    while at.stage_step < last:
        started = time.perf_counter()
        batches = [next(rows) for _ in range(cfg.train.accumulate)]
        waited = time.perf_counter() - started
        parts = [own_part(batch, cfg, world) for batch in batches]
        own = batches if world.leads_row else []  # a row counts once, whoever works on it
        counts = tally(own, costs) | {"stop": float(bool(stopping))}
        counts = dict(zip(counts, world.sum(list(counts.values()))))
        stop, read, skipped = (counts.pop(name) for name in ("stop", "read", "skipped"))
        for batch in own:
            log.skipped(batch)
        lr = optimizer.schedule(adam, stage.optimizer, at.stage_step, stage.steps)
        if cfg.debug.check_collectives:
            agreement.check_step(world, model, at.step, parts)
        num_targets, clip_norm = max(counts["target_tokens"], 1.0), stage.optimizer.clip_norm
        mode = cfg.train.accumulate_mode
        values = train_step(model, parts, num_targets, adam, clip_norm, world, mode, log.part_clock)
        at = replace(
            at, step=at.step + 1, stage_step=at.stage_step + 1, read=at.read + read, skipped=at.skipped + skipped
        )
        row = {"step": at.step, "stage": stage.name, "lr": lr, "data_seconds": waited, "skipped_samples": at.skipped}
        log.step(row | counts, values, [key for batch in batches for key in batch.keys])
        check_skipped(at.read, at.skipped, stage.data.max_bad_fraction)

        # 3. Validation and checkpoints, at their steps and at the end.
        ends = bool(stop) or at.stage_step == last
        every = cfg.train.validate_every
        if stage.data.validation and every and (at.step % every == 0 or at.stage_step == stage.steps):
            log.flush()
            results = validate(model, stage, cfg, world, log, at.step)
            log.write([{"step": at.step, "stage": stage.name, **results}])
            before, at = at, judge(at, results, cfg.checkpoint.best)
            mark = "  (the best so far)" if at.best_step == at.step else ""
            log.say("  ".join(f"{key} {value:.4f}" for key, value in results.items()) + mark)
            log.restart_clock()
        if at.step % cfg.checkpoint.every == 0 or at.best_step == at.step or ends or saver.failed:
            log.flush()
            had_failed = saver.failed
            failure = saver.save(at, model, adam, loader.state() if world.leads_row else {})
            if failure and (stop or at.step in (cfg.total_steps, cfg.train.stop_after)):
                raise OSError(failure)
            if failure and not had_failed:
                log.say(f"warning: {failure}; the run continues and tries again after the next step")
            if failure and at.best_step == at.step:  # not kept, so a later one may be the best
                at = replace(at, **{key: getattr(before, key) for key in ("best_step", "best_metric", "best_value")})
            log.restart_clock()
        if stop:
            log.say(f"stopped by a signal after step {at.step}; the same command continues from there")
            break
    return at


def main(cfg: Config) -> None:
    # 1. Everything that can be wrong is found before any process group starts. The run folder belongs to one run.
    ensure(cfg)
    check(cfg, world_size=ranks()[1])
    device = mesh.choose_device(cfg)
    world = mesh.start(cfg, device)
    agreement.check_start(world, dump_config(cfg))
    lock = claim(cfg, world)
    resume_from, note = world.gather(find(cfg))[0]
    check_resume(cfg, resume_from)
    world.barrier()
    if world.is_first:
        write_durably(Path(cfg.output_dir) / "config.yaml", dump_config(cfg))
    stopping = exit.listen()

    # 2. Model: shapes first (meta), then layout and memory, then values: a checkpoint's, or the start's.
    torch.manual_seed(cfg.seed + world.rank)  # ranks with other rows drop other inputs of adapters
    torch.use_deterministic_algorithms(cfg.deterministic)
    with torch.device("meta"):
        model = AVLM(cfg.model)
    apply_parallel(model, world, cfg)
    run = Path(cfg.output_dir)
    at = read_progress(resume_from, run) if resume_from else Progress()
    log = Log(cfg, world, model, at.step)
    log.say(f"{describe(model)}; {world.size} x {device.type}")
    if resume_from:
        checkpoint.load_checkpoint(resume_from, model)
        log.say(f"{note}resuming {resume_from.name} at step {at.step} of {cfg.total_steps}")
    else:
        for report in init_weights(model, world.gather(pinned(cfg.init_from))[0], cfg.seed):
            log.say(str(report))
    warm_up(model, cfg, world)
    loader_state = None
    if resume_from:
        checkpoint.load_random_state(resume_from, world)
        if at.stage_step < cfg.stages[at.stage].steps:
            loader_state = checkpoint.read_loader_state(resume_from, world)

    # 3. Stages.
    saver = checkpoint.Saver(run, cfg.checkpoint, world)
    while at.stage < len(cfg.stages):
        if at.stage_step < cfg.stages[at.stage].steps:
            at = run_stage(model, cfg, world, log, saver, at, resume_from, loader_state, stopping)
        if at.stage_step < cfg.stages[at.stage].steps or at.step == cfg.train.stop_after:
            break
        at, resume_from, loader_state = replace(at, stage=at.stage + 1, stage_step=0), None, None
    log.close()
    stopped_by = max(world.gather(max(stopping, default=0)))
    mesh.stop()
    if lock is not None:
        lock.close()
    if stopped_by and at.step < cfg.total_steps:
        sys.exit(128 + stopped_by)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train an audio-vision language model.")
    parser.add_argument("config", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--print", action="store_true", help="show the resolved config and stop")
    parser.add_argument("--preflight", action="store_true", help="check and estimate, then stop")
    parser.add_argument("--world-size", type=int, default=1, help="ranks that --preflight assumes")
    parser.add_argument("--device-memory-gib", type=float, help="error of --preflight when a rank needs more")
    arguments = parser.parse_intermixed_args()
    with one_line_errors():
        loaded = load_config(arguments.config, arguments.overrides)
        if arguments.print:
            print(dump_config(loaded))
        elif arguments.preflight:
            ensure(loaded)
            print(preflight.report(loaded, arguments.world_size), flush=True)
            if arguments.device_memory_gib is not None:
                check_memory(loaded, arguments.world_size, arguments.device_memory_gib)
        else:
            main(loaded)

"""Validation while training: the loss of each set, scores of generated answers, and which step is the best so far."""

import dataclasses
import math
from collections.abc import Iterator

import torch

from avlm.config.run import Config, StageConfig
from avlm.data.loader import open_loader
from avlm.data.sample import SampleEncoder
from avlm.data.stream import Stream
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation.answers import answers, predictions_path, score
from avlm.evaluation.scores import LOWER_IS_BETTER
from avlm.evaluation.sets import read_set, references
from avlm.evaluation.zero_shot import zero_shot
from avlm.models.avlm import AVLM
from avlm.models.batch import Batch, empty_batch, empty_pairs
from avlm.parallel.apply import own_part
from avlm.parallel.fsdp import reshard
from avlm.parallel.mesh import World
from avlm.parallel.rows import share_rows
from avlm.storage.run_folder import Progress
from avlm.training.console import answer_lines
from avlm.training.log import Log


@torch.no_grad()
def validate(model: AVLM, stage: StageConfig, config: Config, world: World, log: Log, step: int) -> dict[str, float]:
    """val/SET/METRIC -> value, for each validation set of a stage: the mean loss per target, the share of targets that
    are the most likely token, and scores of generated answers if asked for; of contrastive stages, what
    ``avlm.evaluation.zero_shot`` says.

    Raises ValueError for a set without a target.
    """
    world.watch.enter("validate", step)
    results = {}
    for name in stage.data.validation:
        scores = _validate_set(model, name, stage, config, world, log)
        if config.train.validate_answers and stage.objective == "answers":
            scores |= validate_answers(model, name, stage, config, world, log, step)
        results |= {f"val/{name}/{metric}": value for metric, value in scores.items()}
    reshard(model)
    return results


def _validate_set(
    model: AVLM, name: str, stage: StageConfig, config: Config, world: World, log: Log
) -> dict[str, float]:
    """Loss and accuracy of a set."""
    source = stage.data.validation[name]
    rows = _rows(name, stage, config, world, log)
    if stage.objective == "contrastive":
        scores = zero_shot(model, rows, world)
        if not scores:
            raise ValueError(f"validation set {name} ({source}) has no sample that can be used")
        return scores
    loss = torch.zeros((), device=world.device)
    right = torch.zeros((), dtype=torch.int64, device=world.device)
    num_targets = total = 0
    for batch in rows:
        batch_loss, _, token_R = model(batch, predict=True)
        loss += batch_loss
        right += (token_R == batch.target_R).sum()
        total += batch.num_targets
        num_targets += len(batch.target_R)
    loss, total, right, num_targets = world.sum([loss.item(), total, right.item(), num_targets])
    if not num_targets:
        raise ValueError(f"validation set {name} ({source}) has no sample that can be used")
    return {"loss": loss / (total or 1.0), "token_accuracy": right / num_targets}


def _rows(name: str, stage: StageConfig, config: Config, world: World, log: Log) -> Iterator[Batch]:
    """This rank's parts of the rows of a set. Every rank gets the same number, that of the rank with the most rows."""
    loader = None
    if world.leads_row:
        options = {**world.shard_of_data, "seed": config.seed, "objective": stage.objective}
        loader = open_loader(Stream(stage.data.validation[name], stage.data, config.model, **options, train=False))
    rows = share_rows(loader, world)
    for _ in range(config.train.validate_batches):
        batch = next(rows, None)
        num_batches = world.sum([batch is not None])[0]
        if num_batches == 0:
            break
        if batch and world.leads_row:
            log.skipped(batch, f" of {name}")
        if batch is None and stage.objective == "contrastive":
            batch = empty_pairs(config.model)
        batch = batch or empty_batch(stage.data.seq_length, config.model)
        yield own_part(batch, config.model, world).to(world.device)


def validate_answers(
    model: AVLM, name: str, stage: StageConfig, config: Config, world: World, log: Log, step: int
) -> dict[str, float]:
    """metric -> its value on the first samples of a validation set, as training reports it. Writes the answers, and
    shows a few."""
    train, data = config.train, stage.data
    metrics = data.metrics.get(name, ["exact_match"])
    samples = read_set(data.validation[name], data, metrics, train.validate_answers)
    encoder = SampleEncoder(model.config, data, Tokenizer(data.tokenizer))
    given = answers(model, samples, encoder, world, max_new_tokens=train.validate_new_tokens)
    path = predictions_path(config.output_dir, step, name)
    scores = score(given, samples, metrics, world, path)
    for line in answer_lines(samples, given, [references(sample) for sample in samples], path):
        log.message(line)
    return scores


def judge(progress: Progress, results: dict[str, float], best: str | None) -> Progress:
    """The progress, with its step marked as the best one if ``results`` improve the metric ``best``. A best step in a
    different metric is forgotten."""
    if best not in results or math.isnan(results[best]):
        return progress
    sign = -1 if best.rpartition("/")[2] in LOWER_IS_BETTER else 1
    if progress.best_metric == best and sign * results[best] <= sign * progress.best_value:
        return progress
    return dataclasses.replace(progress, best_step=progress.step, best_metric=best, best_value=results[best])

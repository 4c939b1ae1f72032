"""What can be known to be wrong with a run's data and what is to be measured on it, before ranks start."""

import difflib
from dataclasses import replace
from pathlib import Path

from avlm.config.run import Config, DataConfig, StageConfig
from avlm.data.jsonl import Records, RowStream
from avlm.data.loader import open_loader
from avlm.data.sample import SampleEncoder
from avlm.data.text.chat import Tokenizer, check_vocabulary
from avlm.evaluation.scores import check_names, read_set


def check_data(config: Config) -> None:
    """Raise ValueError or FileNotFoundError for data sources, tokenizers, validation sets, metrics, checkpoint.best."""
    for stage in config.stages:
        for source in (stage.data.train, *stage.data.validation.values()):
            if not source.startswith("synthetic") and not Path(source).exists():
                raise FileNotFoundError(f"stage {stage.name}: no data at {source}")
        if not stage.data.train.startswith("synthetic"):
            check_vocabulary(Tokenizer(stage.data.tokenizer), config.model.decoder.vocab_size)
        _check_metrics(config, stage)
    _check_best(config)
    checked: list[DataConfig] = []
    for stage in config.stages:
        data = replace(stage.data, validation={}, metrics={})
        if data not in checked:
            _check_train(config, stage)
            checked.append(data)
        for name, source in stage.data.validation.items() if config.train.validate_every else ():
            _check_set(config, stage, name, source)


def _check_metrics(config: Config, stage: StageConfig) -> None:
    sets = sorted({name for each in config.stages for name in each.data.validation})  # stages may share their metrics
    for name, metrics in stage.data.metrics.items():
        where = f"stage {stage.name}: data.metrics.{name}"
        if name not in sets:
            raise ValueError(f"{where}: data.validation has no such set, only {', '.join(sets) or 'none'}")
        check_names(metrics, where)
        if not config.train.validate_answers:
            raise ValueError(f"{where} wants answers: set train.validate_answers to how many, it is 0")


def _check_train(config: Config, stage: StageConfig) -> None:
    """The training data of a stage, however late it comes, can be opened, and a sample of a file can be used. Samples
    of an Energon folder are not read."""
    data, model = stage.data, config.model
    try:
        if Path(data.train).suffix in (".json", ".jsonl"):
            # One row, by what a worker runs: a loader would start processes for it.
            encoder = SampleEncoder(model, replace(data, packing_buffer=1), Tokenizer(data.tokenizer))
            stream = RowStream(Records(data.train, data), encoder, config.seed, train=True, first_slot=0, num_slots=1)
            _, row, _ = next(iter(stream))
            if isinstance(row, str):
                raise ValueError(row)
        else:
            open_loader(data.train, data, model, rank=0, world=1, seed=config.seed, train=True)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"stage {stage.name}: data.train: {error}") from None


def _check_set(config: Config, stage: StageConfig, name: str, source: str) -> None:
    """A validation set can be opened, holds samples, and those that are answered what its metrics want."""
    answers = config.train.validate_answers
    try:
        if answers and source.startswith("synthetic"):
            raise ValueError("synthetic samples have no answers: set train.validate_answers=0")
        open_loader(source, stage.data, config.model, rank=0, world=1, seed=config.seed, train=False)
        if answers:
            read_set(source, stage.data, stage.data.metrics.get(name, []), answers)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"stage {stage.name}: data.validation.{name}: {error}") from None


def _check_best(config: Config) -> None:
    best, train = config.checkpoint.best, config.train
    if best is None:
        return
    reported = []
    for data in (stage.data for stage in config.stages):
        for name in data.validation:
            answered = data.metrics.get(name, ["exact_match"]) if train.validate_answers else []
            reported += [f"val/{name}/{metric}" for metric in ("loss", "token_accuracy", *answered)]
    if not train.validate_every:
        raise ValueError(f"checkpoint.best={best} wants validation, but train.validate_every=0")
    if best not in reported:
        near = difflib.get_close_matches(best, reported, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it reports {', '.join(dict.fromkeys(reported)) or 'nothing'}"
        hint += "" if train.validate_answers else "; of answers it reports nothing, as train.validate_answers=0"
        raise ValueError(f"checkpoint.best={best} is nothing that validation reports: {hint}")

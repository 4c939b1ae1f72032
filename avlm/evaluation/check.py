"""Mistakes in the metrics that a run asks for, found before any rank starts."""

import difflib

from avlm.config.run import Config, StageConfig
from avlm.evaluation.scores import check_names
from avlm.evaluation.sets import read_set


def check_measures(config: Config) -> None:
    """Raise ValueError for metrics, answered validation sets and a ``checkpoint.best`` that would fail later."""
    for stage in config.stages:
        _check_metrics(config, stage)
    _check_best(config)
    if config.train.validate_every and config.train.validate_answers:
        for stage in config.stages:
            if stage.objective == "answers":
                _check_answers(config, stage)


def _check_metrics(config: Config, stage: StageConfig) -> None:
    sets = sorted({name for each in config.stages for name in each.data.validation})  # stages may share their metrics
    for name, metrics in stage.data.metrics.items():
        where = f"stage {stage.name}: data.metrics.{name}"
        if name not in sets:
            raise ValueError(f"{where}: data.validation has no such set (it has {', '.join(sets) or 'none'})")
        check_names(metrics, where)
        if not config.train.validate_answers:
            raise ValueError(f"{where} needs answers: set train.validate_answers, which is 0, to their number")


def _check_answers(config: Config, stage: StageConfig) -> None:
    """The samples that are answered have what their metrics need."""
    data = stage.data
    for name, source in data.validation.items():
        try:
            if source.startswith("synthetic"):
                raise ValueError("synthetic samples have no answers: set train.validate_answers=0")
            read_set(source, data, data.metrics.get(name, []), config.train.validate_answers)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"stage {stage.name}: data.validation.{name}: {error}") from None


def _check_best(config: Config) -> None:
    best = config.checkpoint.best
    if best is None:
        return
    if not config.train.validate_every:
        raise ValueError(f"checkpoint.best={best} needs validation, but train.validate_every=0")
    reported = _reported(config)
    if best in reported:
        return
    near = difflib.get_close_matches(best, reported, n=1)
    if near:
        hint = f"did you mean {near[0]}?"
    else:
        hint = f"it reports {', '.join(reported) or 'nothing'}"
    if not config.train.validate_answers:
        hint += " (answers are not scored, because train.validate_answers=0)"
    raise ValueError(f"checkpoint.best={best} is not a value that validation reports: {hint}")


def _reported(config: Config) -> list[str]:
    """Names of all values that validation reports."""
    names: dict[str, None] = {}
    for stage in config.stages:
        data = stage.data
        for name in data.validation:
            metrics = ["loss", "token_accuracy"]
            if stage.objective == "contrastive":
                metrics = ["loss", "zero_shot"]
            elif config.train.validate_answers:
                metrics += data.metrics.get(name, ["exact_match"])
            names |= {f"val/{name}/{metric}": None for metric in metrics}
    return list(names)

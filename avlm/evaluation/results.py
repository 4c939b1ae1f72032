"""A set's entry of report.json: its scores, whole, by kind of sample, and with modalities taken away.

Metrics are those of ``avlm.evaluation.scores``. An ablation takes a modality away from the samples that have it: then
accuracy must stay within the one-sided 95 % bound of chance, or the set can be answered without looking or listening.
Chance is the best exact match that can be reached with what the ablation leaves; a set may state it in its
``chance.json``.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avlm.config.run import DataConfig
from avlm.data.media import video
from avlm.data.sample import Sample, kind_of
from avlm.evaluation.answers import predictions_path, write_predictions
from avlm.evaluation.public_sets import public_set
from avlm.evaluation.report import ABLATIONS
from avlm.evaluation.scores import Score, score_samples, total
from avlm.evaluation.sets import read_set, references
from avlm.models.batch import KINDS
from avlm.parallel.mesh import World


@dataclass(frozen=True)
class Asked:
    """How sets are evaluated. ``metrics`` None: those of a public set, else exact match, and wer too if the set has
    audio and no images."""

    metrics: list[str] | None = None
    limit: int | None = None  # samples
    max_new_tokens: int = 64
    ablations: bool = True


Answered = Callable[[list[Sample], str], list[str]]  # samples and an ablation, "" for none -> answers


def evaluate(
    answered: Answered,
    data: DataConfig,
    name: str,
    source: str,
    world: World,
    asked: Asked,
    output: Path | None = None,
    step: int | None = None,
) -> dict[str, Any]:
    """One entry of report.json. The answers are written into the folder ``output``, to the file that the entry's
    ``predictions`` names. An ablation changes the first metric."""
    metrics = asked.metrics
    public = public_set(name, source)
    if metrics is None and public is not None:
        metrics = public.metrics
    samples = read_set(source, data, metrics or [], asked.limit, name)
    given = answered(samples, "")  # refuses what cannot be encoded
    possible = possible_ablations(samples, data)
    if metrics is None:
        is_speech = "no_audio" in possible and "no_image" not in possible
        metrics = ["exact_match", "wer"] if is_speech else ["exact_match"]
    truths = [references(sample) for sample in samples]
    scores = {metric: score_samples(metric, given, truths) for metric in metrics}
    path = predictions_path(output, step, name) if output else None
    if path is not None and world.is_first:
        write_predictions(path, samples, given, scores)
    ablated: dict[str, list[Score | None]] = {}
    for ablation, places in possible.items() if asked.ablations else ():
        blind: list[str | None] = [None] * len(samples)
        for i, answer in zip(places, answered([samples[i] for i in places], ablation)):
            blind[i] = answer
        ablated[ablation] = score_samples(metrics[0], blind, truths)
    chances = _chances(Path(source), len(samples)) if metrics[0] == "exact_match" else {}
    task, _, part = name.partition("/")
    return {
        "name": name,
        "task": task,
        "set": part or "test",
        "source": source,
        "predictions": str(path.relative_to(output)) if path else None,
        "metric": metrics[0],
        "chance": chances.get("blind"),
        **_summary(range(len(samples)), scores, ablated, chances),
        "kinds": _by_kind(samples, scores, ablated),
        "examples": [_example(sample, answer) for sample, answer in zip(samples[:8], given)],
    }


def possible_ablations(samples: list[Sample], data: DataConfig) -> dict[str, list[int]]:
    """ablation -> the samples that it changes, for those that change any."""
    has_video = [bool(sample.videos) for sample in samples]
    has_image = [bool(sample.videos or sample.images) for sample in samples]
    has_audio = [bool(sample.audios) or (bool(data.video.audio) and _is_heard(sample)) for sample in samples]
    changed = {"no_image": has_image, "no_audio": has_audio, "shuffled": has_video}
    return {name: [i for i, does in enumerate(has) if does] for name, has in changed.items() if any(has)}


def _is_heard(sample: Sample) -> bool:
    return any(video.has_audio(file) for file in sample.videos)


def _by_kind(
    samples: list[Sample], scores: dict[str, list[Score]], ablated: dict[str, list[Score | None]]
) -> list[dict[str, Any]]:
    """The samples of each kind, if there is more than one."""
    kinds = [kind_of({"image": each.images, "audio": each.audios, "video": each.videos}) for each in samples]
    present = [kind for kind in KINDS if kind in kinds]
    if len(present) < 2:
        return []
    places = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in present}
    return [{"kind": kind, **_summary(chosen, scores, ablated, {})} for kind, chosen in places.items()]


def _summary(
    chosen: list[int] | range,
    scores: dict[str, list[Score]],
    ablated: dict[str, list[Score | None]],
    chances: dict[str, float],
) -> dict[str, Any]:
    """Of some samples of a set: all metrics, and the first with each modality taken away from those that have it.
    ``chances`` are those of the whole set."""
    metrics = {name: total(of_samples[i] for i in chosen) for name, of_samples in scores.items()}
    changed = {name: [of[i] for i in chosen if of[i] is not None] for name, of in ablated.items()}
    changed = {name: of for name, of in changed.items() if of}
    whole = {name for name, of in changed.items() if len(of) == len(chosen)}
    return {
        "value": next(iter(metrics.values())),
        "metrics": metrics,
        "count": len(chosen),
        "ablations": {name: total(of) for name, of in changed.items()},
        "ablation_counts": {name: len(of) for name, of in changed.items()},
        "ablation_chances": {name: _first(chances, ABLATIONS[name]) if name in whole else None for name in changed},
    }


def _example(sample: Sample, answer: str) -> dict[str, str]:
    truth = " / ".join(references(sample)[:3])
    return {"key": sample.key, "question": sample.messages[-2]["content"], "truth": truth, "answer": answer}


def _chances(source: Path, count: int) -> dict[str, float]:
    """Chance levels of a set, if it has chance.json and is evaluated in full."""
    path = source / "chance.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found if found.get("count") == count else {}


def _first(values: dict[str, float], keys: tuple[str, ...]) -> float | None:
    return next((values[key] for key in keys if key in values), None)

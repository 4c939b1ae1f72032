"""Generated answers on held-out sets: scores, with modalities taken away, and against chance.

    torchrun --nproc-per-node 2 -m avlm.evaluation runs/demo --data data/demo
    python -m avlm.evaluation runs/asr --data clean=test.jsonl --metrics wer,cer --step best

Metrics are those of ``avlm.evaluation.scores``. Chance is the best anyone could do in exact match with what an ablation
leaves; it is read from ``chance.json`` beside a set, when there is one. With the needed modality gone accuracy must
stay within the one-sided 95 % bound of chance: otherwise the set can be answered without looking or listening.
Writes report.json and report.md into the run folder, and every answer into predictions/step_STEP/NAME.jsonl.
"""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch

from avlm.config.model import AudioConfig
from avlm.config.run import Config, DataConfig, StageConfig
from avlm.data.media import audio
from avlm.data.media.video import has_sound
from avlm.data.sample import EncodedSample, Sample, SampleEncoder
from avlm.data.text.chat import Tokenizer
from avlm.evaluation.generation import Ranks, generate
from avlm.evaluation.report import ABLATIONS
from avlm.evaluation.scores import LOWER_IS_BETTER, read_set, references, scorer, total, value
from avlm.models.avlm import AVLM
from avlm.parallel.apply import prompt_part
from avlm.parallel.fsdp import reshard
from avlm.parallel.mesh import World
from avlm.storage.run_folder import Progress, write_durably

PROMPTS = 64  # answered together on each rank


def answers(
    model: AVLM,
    samples: list[Sample],
    encoder: SampleEncoder,
    world: World,
    ablation: str = "",
    max_new_tokens: int = 64,
) -> list[str]:
    """What the model answers to each sample's conversation up to its last turn, greedily; on every rank, in order.

    The samples are split over the ranks, which all run the same number of forwards. The ranks of a tensor axis, which
    lie next to each other, answer together. ValueError, on the rank that has it, for a sample that cannot be encoded.
    """
    _, tensor = world.axis("tensor")
    own = list(range(world.rank // tensor, len(samples), world.size // tensor))
    rounds = math.ceil(math.ceil(len(samples) * tensor / world.size) / PROMPTS)
    ranks = Ranks(
        world.device,
        everyone_done=lambda done: world.sum([float(not done)])[0] == 0,
        own_part=lambda batch: prompt_part(batch, model.config, world),
        multiple=tensor,
    )
    texts: dict[int, str] = {}
    for r in range(rounds):
        chosen = own[r * PROMPTS : (r + 1) * PROMPTS]
        prompts = [
            ablate(_prompt(encoder, samples[i], max_new_tokens), ablation, i, model.config.audio) for i in chosen or [0]
        ]
        completions = generate(
            model,
            prompts,
            stop_ids=encoder.chat.stop_ids,
            max_new_tokens=max_new_tokens,
            ranks=ranks,
        )
        for i, completion in zip(chosen, completions):
            texts[i] = encoder.tokenizer.decode(completion.token_ids, control=False).strip()
    gathered: dict[int, str] = {}
    for part in world.gather(texts):
        gathered |= part
    reshard(model)
    return [gathered[i] for i in range(len(samples))]


def ablate(prompt: EncodedSample, ablation: str, seed: int, tower: AudioConfig | None) -> EncodedSample:
    """The prompt without what its pictures show, without what is heard, or with its frames in a random order."""
    if ablation == "no_image":  # mid-grey, which normalisation brings near zero
        return dataclasses.replace(prompt, pixels=torch.full_like(prompt.pixels, 127))
    if ablation == "no_audio":  # as many rows of silence
        silence = [torch.zeros(audio.rows(mel) * audio.SAMPLES_PER_ROW) for mel in prompt.mels]
        return dataclasses.replace(prompt, mels=[mel for clip in silence for mel in audio.mels(clip, tower)])
    if ablation == "shuffled":
        order = torch.randperm(len(prompt.pixels), generator=torch.Generator().manual_seed(seed))
        return dataclasses.replace(prompt, pixels=prompt.pixels[order])
    return prompt


def score(
    given: list[str], samples: list[Sample], metrics: list[str], world: World, predictions: Path | None = None
) -> dict[str, float]:
    """metric -> its value on a set. Into ``predictions`` goes a line of JSON for each sample, with its own values: null
    where its references hold no word."""
    pairs = [(answer, references(sample)) for answer, sample in zip(given, samples, strict=True)]
    scores = {name: list(itertools.starmap(scorer(name, pairs), pairs)) for name in metrics}
    if predictions is not None and world.is_first:
        lines = []
        for i, (sample, (answer, truths)) in enumerate(zip(samples, pairs)):
            line = {"key": sample.key, "question": sample.messages[-2]["content"], "references": truths}
            line |= {"prediction": answer} | {name: value(each[i]) for name, each in scores.items()}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        predictions.parent.mkdir(parents=True, exist_ok=True)
        write_durably(predictions, "".join(lines))
    return {name: total(each) for name, each in scores.items()}


def predictions_path(run: Path | str, step: int, name: str) -> Path:
    return Path(run) / "predictions" / f"step_{step:08d}" / f"{name}.jsonl"


def validate_answers(
    model: AVLM, name: str, stage: StageConfig, config: Config, world: World, step: int
) -> dict[str, float]:
    """metric -> its value on the first samples of a validation set; what training reports. Writes the answers."""
    train, data = config.train, stage.data
    metrics = data.metrics.get(name, ["exact_match"])
    samples = read_set(data.validation[name], data, metrics, train.validate_answers)
    encoder = SampleEncoder(model.config, data, Tokenizer(data.tokenizer))
    given = answers(model, samples, encoder, world, max_new_tokens=train.validate_new_tokens)
    return score(given, samples, metrics, world, predictions_path(config.output_dir, step, name))


def judge(at: Progress, results: dict[str, float], best: str | None) -> Progress:
    """The progress with its step as the best one, if the validation results of that step say so of the metric
    ``best``. What was the best of another metric is forgotten."""
    if best not in results or math.isnan(results[best]):
        return at
    sign = -1 if best.rpartition("/")[2] in LOWER_IS_BETTER else 1
    if at.best_metric == best and sign * results[best] <= sign * at.best_value:
        return at
    return dataclasses.replace(at, best_step=at.step, best_metric=best, best_value=results[best])


def evaluate(
    model: AVLM,
    name: str,
    source: str,
    data: DataConfig,
    world: World,
    metrics: list[str] | None = None,
    limit: int | None = None,
    max_new_tokens: int = 64,
    predictions: Path | None = None,
) -> dict[str, Any]:
    """One entry of report.json: a set whole, and under every ablation that it has media for, in the first metric.

    Without ``metrics`` it is exact match, and wer too for sets of sound alone.
    """
    encoder = SampleEncoder(model.config, data, Tokenizer(data.tokenizer))
    samples = read_set(source, data, metrics or [], limit)
    given = answers(model, samples, encoder, world, "", max_new_tokens)  # refuses what cannot be encoded
    has_images, has_videos = any(s.images or s.videos for s in samples), any(s.videos for s in samples)
    has_audio = any(s.audios or (data.video.sound and any(map(has_sound, s.videos))) for s in samples)
    metrics = metrics or ["exact_match", *(["wer"] if has_audio and not has_images else [])]
    first = metrics[0]
    values = score(given, samples, metrics, world, predictions)
    ablations = {}
    for key, wanted in {"no_image": has_images, "no_audio": has_audio, "shuffled": has_videos}.items():
        if wanted:
            blind = answers(model, samples, encoder, world, key, max_new_tokens)
            ablations[key] = score(blind, samples, [first], world)[first]
    chances = _chances(Path(source), len(samples)) if first == "exact_match" else {}
    task, _, part = name.partition("/")
    result = {"task": task, "set": part or "test", "metric": first, "value": values[first], "metrics": values}
    result |= {"count": len(samples), "chance": chances.get("blind"), "ablations": ablations}
    result["ablation_chances"] = {key: _first(chances, ABLATIONS[key]) for key in ablations}
    result["examples"] = [
        {"key": s.key, "question": s.messages[-2]["content"], "truth": " / ".join(references(s)[:3]), "answer": text}
        for s, text in zip(samples[:8], given)
    ]
    return result


def _prompt(encoder: SampleEncoder, sample: Sample, max_new_tokens: int) -> EncodedSample:
    """The conversation up to its last assistant turn. ValueError names the sample if that cannot be encoded."""
    try:
        prompt = encoder.prompt(sample.messages[:-1], sample.images, sample.audios, sample.videos)
        if len(prompt) + max_new_tokens > (limit := encoder.model.decoder.max_position):
            raise ValueError(
                f"its {len(prompt)} tokens and an answer of {max_new_tokens} exceed model.decoder.max_position={limit}"
            )
        return prompt
    except ValueError as error:
        raise ValueError(f"{sample.key}: {error}") from None


def _chances(source: Path, count: int) -> dict[str, float]:
    """What guessers reach on a set, where it says so and is asked whole."""
    path = source / "chance.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found if found.get("count") == count else {}


def _first(values: dict[str, float], keys: tuple[str, ...]) -> float | None:
    return next((values[key] for key in keys if key in values), None)


def find_sets(given: list[str]) -> dict[str, str]:
    """name -> source of every ``NAME=SOURCE``; a folder of sets stands for all its test sets, TASK/test*."""
    sets = {}
    for item in given:
        name, equals, source = item.partition("=")
        if equals:
            if not Path(source).exists():
                raise FileNotFoundError(f"--data {item}: there is no {source}")
            found = {name: source}
        else:
            folders = sorted(path.parent for path in Path(item).glob("*/test*/.nv-meta"))
            found = {f"{path.parent.name}/{path.name}": str(path) for path in folders}
        if not found:
            raise ValueError(f"--data {item}: give NAME=SOURCE, or a folder that holds TASK/test*/ sets")
        for name in found.keys() & sets.keys():
            raise ValueError(f"--data {item}: {name} is {sets[name]} already, give it another name")
        sets |= found
    return sets

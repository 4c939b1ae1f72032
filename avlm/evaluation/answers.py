"""Generated answers on held-out sets and their scores, also with modalities taken away.

Metrics are those of ``avlm.evaluation.scores``. An ablation takes a modality away: then accuracy must stay within the
one-sided 95 % bound of chance, or the set can be answered without looking or listening. Chance is the best exact match
that can be reached with what the ablation leaves; a set may state it in its ``chance.json``.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from avlm.config.model import AudioConfig
from avlm.config.run import DataConfig
from avlm.data.media import audio, video
from avlm.data.sample import EncodedSample, Sample, SampleEncoder
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation.generation import Ranks, generate
from avlm.evaluation.report import ABLATIONS
from avlm.evaluation.scores import read_set, references, scorer, total, value
from avlm.models.avlm import AVLM
from avlm.parallel.apply import prompt_part
from avlm.parallel.fsdp import reshard
from avlm.parallel.mesh import World
from avlm.storage.run_folder import write_durably

PROMPTS = 64  # answered together on each rank


def answers(
    model: AVLM,
    samples: list[Sample],
    encoder: SampleEncoder,
    world: World,
    ablation: str = "",
    max_new_tokens: int = 64,
) -> list[str]:
    """The model's greedy answer to each sample's conversation up to its last turn; on every rank, in order.

    The samples are split over the ranks, which all run the same number of forwards. The ranks of a tensor axis are
    neighbours and answer together. A sample that cannot be encoded is a ValueError on the rank that has it.
    """
    _, tensor = world.axis("tensor")
    own = list(range(world.rank // tensor, len(samples), world.size // tensor))
    most = math.ceil(len(samples) * tensor / world.size)  # samples of any rank
    ranks = Ranks(
        world.device,
        everyone_done=lambda done: world.sum([float(not done)])[0] == 0,
        own_part=lambda batch: prompt_part(batch, model.config, world),
        multiple=tensor,
    )
    texts: dict[int, str] = {}
    for first in range(0, most, PROMPTS):
        chosen = own[first : first + PROMPTS]
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
    """The prompt with grey images, with silent audio, or with its frames in a random order."""
    if ablation == "no_image":  # mid-grey is near zero after normalisation
        grey = [torch.full_like(frame, 127) for frame in prompt.media["image"]]
        return _with_items(prompt, "image", grey)
    if ablation == "no_audio":  # silence with the same number of rows
        silent = []
        for mel in prompt.media["audio"]:
            silence = torch.zeros(audio.num_rows(mel) * audio.SAMPLES_PER_ROW)
            silent += audio.mels(silence, tower)
        return _with_items(prompt, "audio", silent)
    if ablation == "shuffled":
        frames = prompt.media["image"]
        order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(seed))
        return _with_items(prompt, "image", [frames[i] for i in order.tolist()])
    return prompt


def _with_items(prompt: EncodedSample, modality: str, items: list[torch.Tensor]) -> EncodedSample:
    return dataclasses.replace(prompt, media={**prompt.media, modality: items})


def score(
    given: list[str], samples: list[Sample], metrics: list[str], world: World, predictions: Path | None = None
) -> dict[str, float]:
    """metric -> its value on a set. ``predictions`` gets one line of JSON for each sample, with its own values (null if
    its references are empty after normalisation)."""
    pairs = [(answer, references(sample)) for answer, sample in zip(given, samples, strict=True)]
    scores = {}
    for name in metrics:
        metric = scorer(name, pairs)
        scores[name] = [metric(answer, truths) for answer, truths in pairs]
    if predictions is not None and world.is_first:
        lines = []
        for i, (sample, (answer, truths)) in enumerate(zip(samples, pairs)):
            line = {"key": sample.key, "question": sample.messages[-2]["content"]}
            line |= {"references": truths, "prediction": answer}
            for name in metrics:
                line[name] = value(scores[name][i])
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        predictions.parent.mkdir(parents=True, exist_ok=True)
        write_durably(predictions, "".join(lines))
    return {name: total(of_samples) for name, of_samples in scores.items()}


def predictions_path(run: Path | str, step: int, name: str) -> Path:
    return Path(run) / "predictions" / f"step_{step:08d}" / f"{name}.jsonl"


def evaluate(
    model: AVLM,
    name: str,
    source: str,
    data: DataConfig,
    world: World,
    metrics: list[str] | None = None,
    limit: int | None = None,
    max_new_tokens: int = 64,
    output: Path | None = None,
    step: int = 0,
) -> dict[str, Any]:
    """One entry of report.json: the scores of a set, and its first score under every ablation that its media allow.
    The answers are written into the folder ``output``, to the file that the entry's ``predictions`` names.

    Without ``metrics``, exact match; and wer too if the set has audio and no images.
    """
    encoder = SampleEncoder(model.config, data, Tokenizer(data.tokenizer))
    samples = read_set(source, data, metrics or [], limit)
    given = answers(model, samples, encoder, world, "", max_new_tokens)  # refuses what cannot be encoded
    possible = _possible_ablations(samples, data)
    if not metrics:
        is_speech = "no_audio" in possible and "no_image" not in possible
        metrics = ["exact_match", "wer"] if is_speech else ["exact_match"]
    first = metrics[0]
    predictions = predictions_path(output, step, name) if output else None
    values = score(given, samples, metrics, world, predictions)
    ablations = {}
    for ablation in possible:
        blind = answers(model, samples, encoder, world, ablation, max_new_tokens)
        ablations[ablation] = score(blind, samples, [first], world)[first]
    chances = _chances(Path(source), len(samples)) if first == "exact_match" else {}
    task, _, part = name.partition("/")
    return {
        "task": task,
        "set": part or "test",
        "source": source,
        "predictions": str(predictions.relative_to(output)) if predictions else None,
        "metric": first,
        "value": values[first],
        "metrics": values,
        "count": len(samples),
        "chance": chances.get("blind"),
        "ablations": ablations,
        "ablation_chances": {ablation: _first(chances, ABLATIONS[ablation]) for ablation in ablations},
        "examples": [_example(sample, answer) for sample, answer in zip(samples[:8], given)],
    }


def _possible_ablations(samples: list[Sample], data: DataConfig) -> list[str]:
    has_videos = any(sample.videos for sample in samples)
    has_images = has_videos or any(sample.images for sample in samples)
    has_audio = any(sample.audios for sample in samples)
    if data.video.sound and not has_audio:
        has_audio = any(video.has_audio(file) for sample in samples for file in sample.videos)
    possible = {"no_image": has_images, "no_audio": has_audio, "shuffled": has_videos}
    return [ablation for ablation, is_possible in possible.items() if is_possible]


def _example(sample: Sample, answer: str) -> dict[str, str]:
    truth = " / ".join(references(sample)[:3])
    return {"key": sample.key, "question": sample.messages[-2]["content"], "truth": truth, "answer": answer}


def _prompt(encoder: SampleEncoder, sample: Sample, max_new_tokens: int) -> EncodedSample:
    """The conversation up to its last turn, encoded. ValueError with the sample's key if that is impossible."""
    try:
        prompt = encoder.prompt(sample.messages[:-1], sample.images, sample.audios, sample.videos)
        limit = encoder.model.decoder.max_position
        if len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"its {len(prompt)} tokens and an answer of {max_new_tokens} exceed model.decoder.max_position={limit}"
            )
        return prompt
    except ValueError as error:
        raise ValueError(f"{sample.key}: {error}") from None


def _chances(source: Path, count: int) -> dict[str, float]:
    """Chance levels of a set, if it has chance.json and is evaluated in full."""
    path = source / "chance.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found if found.get("count") == count else {}


def _first(values: dict[str, float], keys: tuple[str, ...]) -> float | None:
    return next((values[key] for key in keys if key in values), None)


def find_sets(given: list[str]) -> dict[str, str]:
    """name -> source, from arguments NAME=SOURCE; or a folder, which stands for all its test sets TASK/test*."""
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

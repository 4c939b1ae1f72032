"""Generated answers on held-out sets and their scores, also with a modality taken away: an ablation."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from avlm.config.model import AudioConfig
from avlm.data.media import audio
from avlm.data.sample import EncodedSample, Sample, SampleEncoder
from avlm.evaluation.generation import generate
from avlm.evaluation.scores import Score, score_samples, total, value
from avlm.evaluation.sets import references
from avlm.evaluation.sharded import together
from avlm.models.avlm import AVLM
from avlm.parallel.fsdp import reshard
from avlm.parallel.mesh import World
from avlm.storage.run_folder import write_durably

PROMPTS = 64  # answered together on each rank


def answers(model: AVLM, samples: list[Sample], encoder: SampleEncoder, world: World, **how: Any) -> list[str]:
    """The texts of ``answered_ids``, with its options."""
    return [text_of(ids, encoder) for ids in answered_ids(model, samples, encoder, world, **how)]


def text_of(token_ids: list[int], encoder: SampleEncoder) -> str:
    """An answer as it is scored."""
    return encoder.tokenizer.decode(token_ids, control=False).strip()


def answered_ids(
    model: AVLM,
    samples: list[Sample],
    encoder: SampleEncoder,
    world: World,
    ablation: str = "",
    max_new_tokens: int = 64,
    stop_ids: list[int] | None = None,
) -> list[list[int]]:
    """The model's greedy answer to each sample's conversation up to its last turn, with the id that ends it; on every
    rank, in order. Ids of ``stop_ids`` end it, by default those of the encoder's chat.

    The samples are split over the ranks, which all run the same number of forwards. The ranks of a tensor axis are
    neighbours and answer together. A sample that cannot be encoded is a ValueError on the rank that has it.
    """
    _, tensor = world.axis("tensor")
    own = list(range(world.rank // tensor, len(samples), world.size // tensor))
    most = math.ceil(len(samples) * tensor / world.size)  # samples of any rank
    found: dict[int, list[int]] = {}
    for first in range(0, most, PROMPTS):
        chosen = own[first : first + PROMPTS]
        prompts = [
            ablate(prompt_of(encoder, samples[i], max_new_tokens), ablation, i, model.config.audio)
            for i in chosen or [0]
        ]
        completions = generate(
            model,
            prompts,
            stop_ids=encoder.chat.stop_ids if stop_ids is None else stop_ids,
            max_new_tokens=max_new_tokens,
            ranks=together(model, world),
        )
        for i, completion in zip(chosen, completions):
            found[i] = completion.token_ids
    gathered: dict[int, list[int]] = {}
    for part in world.gather(found):
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
            silence = torch.zeros(audio.num_frames(mel, tower) * audio.HOP)
            silent += audio.mels(silence, tower)
        return _with_items(prompt, "audio", silent)
    if ablation == "shuffled":
        return _with_items(prompt, "image", _shuffled(prompt.media["image"], seed))
    return prompt


def _shuffled(frames: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Frames of each grid change places among themselves: those of another have other numbers of features."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = list(frames)
    for shape in dict.fromkeys(frame.shape for frame in frames):
        places = [place for place, frame in enumerate(frames) if frame.shape == shape]
        order = torch.randperm(len(places), generator=generator)
        for place, i in zip(places, order.tolist()):
            shuffled[place] = frames[places[i]]
    return shuffled


def _with_items(prompt: EncodedSample, modality: str, items: list[torch.Tensor]) -> EncodedSample:
    return dataclasses.replace(prompt, media={**prompt.media, modality: items})


def score(
    given: list[str], samples: list[Sample], metrics: list[str], world: World, predictions: Path | None = None
) -> dict[str, float]:
    """metric -> its value on a set. ``predictions`` gets one line of JSON for each sample, with its own values (null if
    its references are empty after normalisation)."""
    truths = [references(sample) for sample in samples]
    scores = {name: score_samples(name, given, truths) for name in metrics}
    if predictions is not None and world.is_first:
        write_predictions(predictions, samples, given, scores)
    return {name: total(of_samples) for name, of_samples in scores.items()}


def write_predictions(path: Path, samples: list[Sample], given: list[str], scores: dict[str, list[Score]]) -> None:
    lines = []
    for i, sample in enumerate(samples):
        line = {"key": sample.key, "question": sample.messages[-2]["content"]}
        line |= {"references": references(sample), "prediction": given[i]}
        for name, of_samples in scores.items():
            line[name] = value(of_samples[i])
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, "".join(lines))


def predictions_path(folder: Path | str, step: int | None, name: str) -> Path:
    """``step``: of a run, None for a model that has none."""
    of_step = "" if step is None else f"step_{step:08d}"
    return Path(folder) / "predictions" / of_step / f"{name}.jsonl"


def prompt_of(encoder: SampleEncoder, sample: Sample, max_new_tokens: int) -> EncodedSample:
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

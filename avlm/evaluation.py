"""Exact match of generated answers on held-out sets, with modalities taken away, against chance.

    torchrun --nproc-per-node 2 -m avlm.evaluation runs/demo --data data/demo

An answer counts when it equals the reference. Chance is the best anyone could do with what an ablation leaves; it is
read from ``chance.json`` beside a set, when there is one. With the needed modality gone accuracy must stay within the
one-sided 95 % bound of chance: otherwise the set can be answered without looking or listening.
Writes report.json and report.md into the run folder.
"""

import argparse
import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import jiwer
import torch

from avlm import checkpoint, parallel, preflight
from avlm.config import DataConfig, ParallelConfig
from avlm.data import open_samples
from avlm.data.chat import Tokenizer
from avlm.data.sample import EncodedSample, Sample, SampleEncoder
from avlm.generation import Ranks, generate
from avlm.models.avlm import AVLM
from avlm.parallel import mesh
from avlm.parallel.mesh import World

ABLATIONS = {
    "no_image": ("no_video", "no_image"),
    "no_audio": ("no_audio",),
    "shuffled": ("no_order",),
}  # -> chance.json
MAX_NEW_TOKENS = 64
PROMPTS = 64  # answered together on each rank


def answers(model: AVLM, samples: list[Sample], encoder: SampleEncoder, world: World, ablation: str = "") -> list[str]:
    """What the model answers to each sample's conversation up to its last turn, greedily; on every rank, in order.

    The samples are split over the ranks, which all run the same number of forwards. The ranks of a tensor axis, which
    lie next to each other, answer together.
    """
    _, tensor = world.axis("tensor")
    own = list(range(world.rank // tensor, len(samples), world.size // tensor))
    rounds = math.ceil(math.ceil(len(samples) * tensor / world.size) / PROMPTS)
    ranks = Ranks(
        world.device,
        everyone_done=lambda done: world.sum([float(not done)])[0] == 0,
        own_part=lambda batch: parallel.prompt_part(batch, model.config, world),
        multiple=tensor,
    )
    texts: dict[int, str] = {}
    for r in range(rounds):
        chosen = own[r * PROMPTS : (r + 1) * PROMPTS]
        prompts = [ablate(_prompt(encoder, samples[i]), ablation, seed=i) for i in chosen or [0]]
        completions = generate(
            model,
            prompts,
            stop_ids=encoder.chat.stop_ids,
            max_new_tokens=MAX_NEW_TOKENS,
            ranks=ranks,
        )
        for i, completion in zip(chosen, completions):
            texts[i] = encoder.tokenizer.decode(completion.token_ids, control=False).strip()
    gathered: dict[int, str] = {}
    for part in world.gather(texts):
        gathered |= part
    parallel.reshard(model)
    return [gathered[i] for i in range(len(samples))]


def ablate(prompt: EncodedSample, ablation: str, seed: int) -> EncodedSample:
    """The prompt without what its pictures show, without what is heard, or with its frames in a random order."""
    if ablation == "no_image":  # mid-grey, which normalisation brings near zero
        return dataclasses.replace(prompt, pixels=torch.full_like(prompt.pixels, 127))
    if ablation == "no_audio":  # the floor of a log-mel: (log10(1e-10) + 4) / 4
        return dataclasses.replace(prompt, mels=[torch.full_like(mel, -1.5) for mel in prompt.mels])
    if ablation == "shuffled":
        order = torch.randperm(len(prompt.pixels), generator=torch.Generator().manual_seed(seed))
        return dataclasses.replace(prompt, pixels=prompt.pixels[order])
    return prompt


def exact_match(model: AVLM, source: str, data: DataConfig, world: World, limit: int) -> float:
    """Share of right answers to the first ``limit`` samples of a set; what validation during training reports."""
    encoder = SampleEncoder(model.config, data, Tokenizer(data.tokenizer))
    samples = list(itertools.islice(open_samples(source, data), limit))
    return _score(answers(model, samples, encoder, world), samples)


def evaluate(
    model: AVLM, name: str, source: str, data: DataConfig, world: World, limit: int | None = None
) -> dict[str, Any]:
    """One entry of report.json: exact match of a set, whole and under every ablation that it has media for."""
    encoder = SampleEncoder(model.config, data, Tokenizer(data.tokenizer))
    samples = list(itertools.islice(open_samples(source, data), limit))
    given = answers(model, samples, encoder, world)
    has_images, has_videos = any(s.images or s.videos for s in samples), any(s.videos for s in samples)
    has_audio = any(len(_prompt(encoder, s).mels) for s in samples[:20])
    wanted = {"no_image": has_images, "no_audio": has_audio, "shuffled": has_videos}
    scores = {key: _score(answers(model, samples, encoder, world, key), samples) for key in wanted if wanted[key]}
    chances = _chances(Path(source))
    task, _, part = name.partition("/")
    result = {"task": task, "set": part or "test", "metric": "exact_match", "value": _score(given, samples)}
    result |= {"count": len(samples), "chance": chances.get("blind"), "ablations": scores}
    result["ablation_chances"] = {key: _first(chances, ABLATIONS[key]) for key in scores}
    if has_audio and not has_images:
        result["word_error_rate"] = jiwer.wer([_truth(sample) for sample in samples], given)
    result["examples"] = [
        {"key": s.key, "question": s.messages[-2]["content"], "truth": _truth(s), "answer": text}
        for s, text in zip(samples[:8], given)
    ]
    return result


def _truth(sample: Sample) -> str:
    return sample.messages[-1]["content"].strip()


def _score(given: list[str], samples: list[Sample]) -> float:
    return sum(answer == _truth(sample) for answer, sample in zip(given, samples, strict=True)) / len(samples)


def bound(chance: float, count: int) -> float:
    """The share that a guesser with this chance does not exceed in 95 of 100 sets of this size (exact binomial)."""
    below, right = 0.0, -1
    while below < 0.95 and right < count:
        right += 1
        below += math.comb(count, right) * chance**right * (1 - chance) ** (count - right)
    return right / count


def table(results: list[dict[str, Any]]) -> str:
    """The report as Markdown; an ablation above its bound is marked."""
    lines = ["| task | set | samples | exact match | " + " | ".join(ABLATIONS) + " | word errors |", "|---" * 8 + "|"]
    for result in results:
        cells = [result["task"], result["set"], str(result["count"]), f"**{100 * result['value']:.1f} %**"]
        for key in ABLATIONS:
            cells.append(_ablation_cell(result, key))
        cells.append(f"{100 * result['word_error_rate']:.1f} %" if "word_error_rate" in result else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def report(results: list[dict[str, Any]]) -> str:
    """report.md: the table, how to read it, and the first examples of every set."""
    lines = [
        f"# Held-out samples\n\n{table(results)}",
        "Exact match of greedy answers. The columns to its right take away what pictures show, what is heard or the",
        "order of frames. Chance is the best that anyone could do without it who knew this very set; (!) marks what",
        "lies above the one-sided 95 % bound of chance.\n",
        "| set | question | truth | answer |\n|---|---|---|---|",
    ]
    for result in results:
        for example in result["examples"][:3]:
            cells = [f"{result['task']}/{result['set']}", *(example[key] for key in ("question", "truth", "answer"))]
            lines.append("| " + " | ".join(cell.replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _ablation_cell(result: dict[str, Any], key: str) -> str:
    if key not in result["ablations"]:
        return ""
    value, chance = result["ablations"][key], result["ablation_chances"][key]
    if chance is None:
        return f"{100 * value:.1f} %"
    flag = " (!)" if value > bound(chance, result["count"]) else ""
    return f"{100 * value:.1f} % (chance {100 * chance:.1f} %){flag}"


def _prompt(encoder: SampleEncoder, sample: Sample) -> EncodedSample:
    """The conversation up to its last assistant turn."""
    return encoder.prompt(sample.messages[:-1], sample.images, sample.audios, sample.videos)


def _chances(source: Path) -> dict[str, float]:
    path = source / "chance.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _first(values: dict[str, float], keys: tuple[str, ...]) -> float | None:
    return next((values[key] for key in keys if key in values), None)


def find_sets(given: list[str]) -> dict[str, str]:
    """name -> source of every ``NAME=SOURCE``; a folder of sets stands for all its test sets, TASK/test*."""
    sets = {}
    for item in given:
        name, equals, source = item.partition("=")
        if equals:
            sets[name] = source
            continue
        found = sorted(path.parent for path in Path(item).glob("*/test*/.nv-meta"))
        if not found:
            raise ValueError(f"--data {item}: give NAME=SOURCE, or a folder that holds TASK/test*/ sets")
        sets |= {f"{path.parent.name}/{path.name}": str(path) for path in found}
    return sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--data", action="append", required=True, metavar="NAME=SOURCE", help="a set, or a folder of sets"
    )
    parser.add_argument("--limit", type=int, help="samples of each set")
    arguments = parser.parse_args()
    sets = find_sets(arguments.data)
    config, path = checkpoint.read_run(arguments.run)
    config = dataclasses.replace(config, parallel=ParallelConfig())  # on however many ranks there are
    world = mesh.start(config, mesh.choose_device(config))
    with torch.device("meta"):
        model = AVLM(config.model)
    parallel.apply(model, world, config)
    checkpoint.load(path, model)
    results = []
    with torch.no_grad():
        for name, source in sets.items():
            results.append(evaluate(model, name, source, config.stages[-1].data, world, arguments.limit))
            if world.is_first:
                print(f"{name}: {100 * results[-1]['value']:.1f} % of {results[-1]['count']}", flush=True)
    if world.is_first:
        (arguments.run / "report.json").write_text(json.dumps({"results": results}, indent=2))
        (arguments.run / "report.md").write_text(report(results))
        print(table(results))
    mesh.stop()


if __name__ == "__main__":
    with preflight.one_line_errors():
        main()

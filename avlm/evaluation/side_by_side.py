"""Models, one after the other, on the same sets: where the results of each go, and the table of all of them."""

import dataclasses
import gc
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from avlm.config.run import ParallelConfig, TrainConfig
from avlm.data.sample import SampleEncoder
from avlm.evaluation.answering import open_encoder
from avlm.evaluation.report import comparison, report, shown, table, words
from avlm.evaluation.report_page import write_page
from avlm.evaluation.results import Asked, evaluate
from avlm.models.avlm import AVLM
from avlm.parallel import mesh
from avlm.parallel.apply import apply_parallel
from avlm.parallel.mesh import World
from avlm.storage.hub import resolve
from avlm.storage.run_folder import find_checkpoint, is_run, read_progress
from avlm.storage.weight_files import local
from avlm.weights.load import load_weights, open_model


@dataclass(frozen=True)
class Candidate:
    """name    as it was given
    opened  a checkpoint of a run, or the name of a model
    folder  where its results go
    step    of the checkpoint, None for a model that is no run
    train   how it computes
    device  that its run asks for
    """

    name: str
    opened: str
    folder: Path
    step: int | None = None
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    device: str = "auto"


def find_candidates(names: list[str], step: str, out: Path | None) -> list[Candidate]:
    """Results of the first run go to its folder, those of other models, runs too, to a folder of their own in it; with
    ``out`` everything goes there, several models into folders of their own. ValueError if there is no place."""
    runs = {}
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is given twice")
        path = local(name)
        if is_run(path):
            config, checkpoint = find_checkpoint(path, step)
            run = checkpoint.resolve().parents[1]
            found = Candidate(name, str(checkpoint), run, read_progress(checkpoint).step, config.train, config.device)
            runs[name] = found
    if step != "latest" and not runs:
        raise ValueError(f"--step {step} chooses a checkpoint of a run, and {names[0]} is none")
    if out is None and not runs and not local(names[0]).exists():
        raise FileNotFoundError(
            f"there is no folder {names[0]}; if it is a name of the Hub, say by --out FOLDER where its results go"
        )
    if out is None and not runs:
        raise ValueError(f"{names[0]} is no run: say by --out FOLDER where its results go")
    home = out or next(iter(runs.values())).folder
    folders = _folder_names(names)
    candidates = []
    for name in names:
        found = runs.get(name) or Candidate(name, name, home)
        is_home = len(names) == 1 if out is not None else name == next(iter(runs))
        candidates.append(dataclasses.replace(found, folder=home if is_home else home / folders[name]))
    return candidates


def _folder_names(names: list[str]) -> dict[str, str]:
    """The last part of each name, or the whole name where that is not enough."""
    short = {name: Path(name).resolve().name for name in names}
    unique = {name: list(short.values()).count(last) == 1 for name, last in short.items()}
    return {name: short[name] if unique[name] else name.strip("./").replace("/", "_") for name in names}


def evaluate_all(candidates: list[Candidate], sets: dict[str, str], asked: Asked, out: Path | None) -> None:
    """Writes each model's report and answers. Prints its table, and that of all models, which is comparison.md in
    ``out``, by default in the folder of the first run."""
    device = next((each.device for each in candidates if each.step is not None), "auto")
    world = mesh.start(ParallelConfig(), mesh.choose_device(device))  # any number of ranks
    results = {}
    for candidate in candidates:
        candidate = dataclasses.replace(candidate, opened=world.gather(candidate.opened)[0])  # a run may save meanwhile
        results[candidate.name] = _evaluate_one(candidate, sets, asked, world)
    if world.is_first and len(candidates) > 1:
        text = comparison(results)
        home = out or next(each.folder for each in candidates if each.step is not None)
        (home / "comparison.md").write_text(text)
        print(f"{text}\nwritten to {home / 'comparison.md'}")
    mesh.stop()


@torch.no_grad()
def _evaluate_one(candidate: Candidate, sets: dict[str, str], asked: Asked, world: World) -> list[dict]:
    model, encoder, stop_ids = _load(candidate, world)
    folder = candidate.folder
    if world.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{candidate.name}:" if candidate.step is None else f"{candidate.name}, step {candidate.step}:")
    results = []
    for name, source in sets.items():
        result = evaluate(model, encoder, stop_ids, name, source, world, asked, folder, candidate.step)
        results.append(result)
        if world.is_first:
            values = [f"{words(metric)} {shown(metric, value)}" for metric, value in result["metrics"].items()]
            print(f"{name}: {', '.join(values)} of {result['count']}", flush=True)
            found = {"model": candidate.name, "step": candidate.step, "results": results}
            (folder / "report.json").write_text(json.dumps(found, indent=2))
            (folder / "report.md").write_text(report(results))
    if world.is_first:
        print(table(results))
        print(f"with images and sounds: {write_page(folder)}\n")
    del model
    gc.collect()  # a module refers to itself through hooks
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return results


def _load(candidate: Candidate, world: World) -> tuple[AVLM, SampleEncoder, list[int]]:
    """The model laid out over the ranks, its prompt encoder, and the ids that end an answer."""
    if candidate.step is None and world.is_first:
        resolve(candidate.opened)  # one rank fetches it
    world.barrier()
    opened = open_model(candidate.opened)
    encoder, stop_ids = open_encoder(opened)
    with torch.device("meta"):
        model = AVLM(opened.config)
    apply_parallel(model, world, ParallelConfig(), candidate.train)
    model.requires_grad_(False)  # FSDP needs one dtype among trained parameters, and adapters may have a bf16 base
    load_weights(model, opened.source)
    return model, encoder, stop_ids

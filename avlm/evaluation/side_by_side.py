"""Models, one after the other, on the same sets: where the results of each go, and the table of all of them."""

import dataclasses
import gc
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from avlm.config.parallel import ParallelConfig
from avlm.config.run import DataConfig, TrainConfig
from avlm.data.sample import Sample
from avlm.evaluation.answering import open_encoder
from avlm.evaluation.answers import answered_ids, text_of
from avlm.evaluation.engines import Agreement, Engine, open_engine
from avlm.evaluation.report import comparison, report, shown, table, words
from avlm.evaluation.report_page import write_page
from avlm.evaluation.results import Answered, Asked, evaluate
from avlm.evaluation.sharded import lay_out
from avlm.parallel import mesh
from avlm.parallel.mesh import World
from avlm.storage.hub import resolve
from avlm.storage.run_folder import find_checkpoint, is_run, read_progress
from avlm.storage.weight_files import local
from avlm.weights.load import open_model


@dataclass(frozen=True)
class Candidate:
    """name    as it was given
    opened  a checkpoint of a run, or the name of a model
    folder  where its results go
    step    of the checkpoint, None for a model that is no run
    train   how it computes
    device  that its run asks for
    engine  that answers in our place, "" for none
    """

    name: str
    opened: str
    folder: Path
    step: int | None = None
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    device: str = "auto"
    engine: str = ""

    @property
    def label(self) -> str:
        return f"{self.name}, {self.engine}" if self.engine else self.name


def find_candidates(names: list[str], step: str, out: Path | None, engine: str | None = None) -> list[Candidate]:
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
            stage = config.stages[min(read_progress(checkpoint).stage, len(config.stages) - 1)]
            if stage.objective == "contrastive":
                raise ValueError(
                    f"{name}: its last stage, {stage.name}, is contrastive, and did not teach it to answer. How often "
                    f"media find their captions is val/SET/zero_shot in {run}/metrics.jsonl, with data.validation; "
                    "answers can be scored after a stage of them"
                )
            train = dataclasses.replace(config.train, float8=False)  # which only training needs
            found = Candidate(name, str(checkpoint), run, read_progress(checkpoint).step, train, config.device)
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
        if engine is not None:  # which computes in float32
            found = dataclasses.replace(found, train=TrainConfig(precision="fp32"))
        is_home = len(names) == 1 if out is not None else name == next(iter(runs))
        candidates.append(dataclasses.replace(found, folder=home if is_home else home / folders[name]))
    return candidates


def _folder_names(names: list[str]) -> dict[str, str]:
    """The last part of each name, or the whole name where that is not enough."""
    short = {name: Path(name).resolve().name for name in names}
    unique = {name: list(short.values()).count(last) == 1 for name, last in short.items()}
    return {name: short[name] if unique[name] else name.strip("./").replace("/", "_") for name in names}


def evaluate_all(
    candidates: list[Candidate], sets: dict[str, str], asked: Asked, out: Path | None, engine: str | None = None
) -> None:
    """Writes each model's report and answers. Prints its table, and that of all models, which is comparison.md in
    ``out``, by default in the folder of the first run. With an ``engine`` it answers too; ValueError for answers that
    differ beyond rounding, once all is written."""
    device = next((each.device for each in candidates if each.step is not None), "auto")
    world = mesh.start(ParallelConfig(), mesh.choose_device(device))  # any number of ranks
    if engine is not None:
        _check_engine(engine, candidates, world)
    results: dict[str, list[dict]] = {}
    differences = []
    for candidate in candidates:
        candidate = dataclasses.replace(candidate, opened=world.gather(candidate.opened)[0])  # a run may save meanwhile
        answering = Answering(candidate, world, asked.max_new_tokens)
        other = None
        if engine is not None:  # first, because it may refuse the folder
            other = open_engine(engine, resolve(candidate.opened), answering.opened, world.device)
        results[candidate.name] = _evaluate_one(candidate, answering, answering.opened.data, sets, asked, world)
        if other is not None:
            theirs = dataclasses.replace(candidate, engine=engine, folder=candidate.folder / engine)
            results[theirs.label], difference = _evaluate_engine(other, theirs, answering, sets, asked, world)
            differences.append(difference)
        del answering, other
        gc.collect()  # a module refers to itself through hooks
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    if world.is_first and len(results) > 1:
        text = comparison(results)
        home = out or next(each.folder for each in candidates if each.step is not None)
        (home / "comparison.md").write_text(text)
        print(f"{text}\nwritten to {home / 'comparison.md'}")
    mesh.stop()
    if any(differences):
        raise ValueError(next(filter(None, differences)))


class Answering:
    """A model laid out over the ranks, which keeps its answers to whole samples: id by id, set by set."""

    def __init__(self, candidate: Candidate, world: World, max_new_tokens: int) -> None:
        if candidate.step is None and world.is_first:
            resolve(candidate.opened)  # one rank fetches it
        world.barrier()
        self.world = world
        self.max_new_tokens = max_new_tokens
        self.opened = open_model(candidate.opened)
        self.encoder, self.stop_ids = open_encoder(self.opened)
        self.model = lay_out(self.opened, world, ParallelConfig(), candidate.train)
        self.kept: list[list[list[int]]] = []

    def __call__(self, samples: list[Sample], ablation: str) -> list[str]:
        asked = (samples, self.encoder, self.world, ablation, self.max_new_tokens, self.stop_ids)
        ids = answered_ids(self.model, *asked)
        if not ablation:
            self.kept.append(ids)
        return [text_of(each, self.encoder) for each in ids]


@torch.no_grad()
def _evaluate_one(
    candidate: Candidate, answered: Answered, data: DataConfig, sets: dict[str, str], asked: Asked, world: World
) -> list[dict]:
    folder = candidate.folder
    if world.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{candidate.label}:" if candidate.step is None else f"{candidate.label}, step {candidate.step}:")
    results = []
    for name, source in sets.items():
        result = evaluate(answered, data, name, source, world, asked, folder, candidate.step)
        results.append(result)
        if world.is_first:
            values = [f"{words(metric)} {shown(metric, value)}" for metric, value in result["metrics"].items()]
            print(f"{name}: {', '.join(values)} of {result['count']}", flush=True)
            found = {"model": candidate.name, "step": candidate.step, "results": results}
            found |= {"engine": candidate.engine} if candidate.engine else {}
            (folder / "report.json").write_text(json.dumps(found, indent=2))
            (folder / "report.md").write_text(report(results))
    if world.is_first:
        print(table(results))
        print(f"with images and sounds: {write_page(folder)}\n")
    return results


def _check_engine(engine: str, candidates: list[Candidate], world: World) -> None:
    if world.size > 1:
        raise ValueError(f"--engine {engine} runs in one process, not in {world.size}")
    format = "gguf" if engine == "llama_cpp" else engine
    for each in candidates:
        if each.step is not None:
            raise ValueError(
                f"--engine {engine} runs an export, and {each.name} is a run: write one by python -m avlm.weights "
                f"export {each.name} FOLDER --format {format}"
            )


def _evaluate_engine(
    engine: Engine, candidate: Candidate, ours: Answering, sets: dict[str, str], asked: Asked, world: World
) -> tuple[list[dict], str]:
    """Its results, and the first answer that differs from ours beyond rounding."""
    agreement = Agreement(ours.model, ours.encoder, ours.stop_ids, engine.tolerance)
    of_sets = iter(zip(sets, ours.kept))

    def answered(samples: list[Sample], ablation: str) -> list[str]:
        name, our_ids = next(of_sets)
        their_ids = engine.answer(samples, asked.max_new_tokens)
        for each in zip(samples, our_ids, their_ids):
            agreement.add(name, *each, asked.max_new_tokens)
        return [text_of(ids, ours.encoder) for ids in their_ids]

    asked = dataclasses.replace(asked, ablations=False)
    results = _evaluate_one(candidate, answered, ours.opened.data, sets, asked, world)
    print(f"{agreement}\n")
    return results, agreement.first and f"{candidate.label}: {agreement.first}"

"""Checkpoints: everything that an exact resume needs, complete or not there at all.

    <run>/checkpoints/step_00000100/
        *.distcp, .metadata       weights and optimizer state (torch.distributed.checkpoint: any layout can load them)
        rank_00000.safetensors    torch's random state of that rank (CPU, and the GPU's when there is one)
        rank_00000.json           python's and numpy's
        loader_00000.json         where the loader of that data rank stands
        complete                  marker, written last: step, stage and step within the stage, as JSON
    <run>/checkpoints/latest      name of the newest complete one
    <run>/checkpoints/best        name of the best one by checkpoint.best

A checkpoint folder is trusted like code; to share a model, export it (``python -m avlm.weights export``).
"""

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from avlm import config_file
from avlm.checkpoint_reader import Reader, cause_of
from avlm.config import CheckpointConfig, Config
from avlm.data.redistribute import redistribute
from avlm.models.avlm import AVLM
from avlm.parallel.mesh import World

MARKER = "complete"


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands: steps done over all stages, the stage it is in, steps done within it."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    read: float = 0.0  # samples
    skipped: float = 0.0  # bad ones among them
    best_step: int = 0  # whose validation was the best so far; 0: none
    best_metric: str = ""  # in what: val/NAME/METRIC
    best_value: float = 0.0


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def complete_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(marker.parent for marker in run.glob(f"checkpoints/step_*/{MARKER}"))


def find(config: Config) -> tuple[Path | None, str]:
    """The checkpoint that ``resume`` asks for, and a line about half-written ones that were passed over."""
    if config.resume == "never":
        return None, ""
    if config.resume != "auto":
        path = Path(config.resume)
        if not (path / MARKER).is_file():
            raise FileNotFoundError(f"resume={path} is not a complete checkpoint (it has no file named {MARKER!r})")
        later = [p.name for p in complete_checkpoints(Path(config.output_dir)) if p.name > path.name]
        if later:  # they would be taken for this run's newest
            raise ValueError(f"{config.output_dir} holds later checkpoints ({', '.join(later)}): remove them first")
        return path, ""
    run = Path(config.output_dir)
    done = complete_checkpoints(run)
    newest = done[-1] if done else None
    broken = [
        p.name for p in sorted(run.glob("checkpoints/step_*")) if p not in done and (not done or p.name > newest.name)
    ]
    note = f"{', '.join(broken)} was not written to its end; " if broken else ""
    return newest, note


def read_progress(path: Path, run: Path | None = None) -> Progress:
    """Where a checkpoint stands. For another ``run`` that goes on from it, without the best step, which is not its."""
    progress = Progress(**json.loads((path / MARKER).read_text()))
    if run is not None and path.resolve().parents[1] != run.resolve():
        return dataclasses.replace(progress, best_step=0, best_metric="", best_value=0.0)
    return progress


class Saver:
    """Writes the checkpoints of a run."""

    def __init__(self, run: Path, config: CheckpointConfig, world: World):
        self.run, self.config, self.world = run, config, world

    def save(self, progress: Progress, model: AVLM, optimizer: torch.optim.Optimizer, loader_state: dict) -> None:
        """Write a checkpoint. On any failure, of any rank, the ones before stay as they are and OSError is raised."""
        path = folder_of(self.run, progress.step)
        if self.world.is_first:
            shutil.rmtree(path, ignore_errors=True)  # what an interrupted run left there
            path.mkdir(parents=True)
        self.world.barrier()
        self._attempt(path, lambda: _write_rank_state(path, self.world, loader_state))
        self._attempt(path, lambda: dcp.save(state_tensors(model, optimizer), checkpoint_id=path))
        if self.world.is_first:
            write_durably(path / MARKER, json.dumps(dataclasses.asdict(progress)))
            write_durably(path.parent / "latest", path.name)
            done, best = complete_checkpoints(self.run), folder_of(self.run, progress.best_step)
            if best in done:
                write_durably(path.parent / "best", best.name)
            for old in set(done[: -self.config.keep]) - {best}:
                (old / MARKER).unlink()  # first, so that a half-removed one is not taken for complete
                shutil.rmtree(old)
        self.world.barrier()

    def _attempt(self, path: Path, write: Callable[[], Any]) -> None:
        """Write, and find out whether every rank could (a full disk, most often)."""
        failure = None
        try:
            write()
        except (Exception, CheckpointException) as error:
            failure = error
        if self.world.sum([float(failure is not None)])[0] == 0:
            return
        if self.world.is_first:
            shutil.rmtree(path, ignore_errors=True)
        done = complete_checkpoints(self.run)
        kept = f"the newest complete checkpoint is {done[-1]}" if done else "there is no earlier checkpoint"
        cause = cause_of(failure) if failure else "another rank failed"
        raise OSError(f"could not write checkpoint {path}: {cause}; {kept}")


def load(path: Path, model: AVLM, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Read the weights, and with them the state of an optimizer, in place; strict about what weights there are."""
    tensors = state_tensors(model, optimizer)
    try:
        stored = {name for name in Reader(path).read_metadata().state_dict_metadata if name[:6] == "model."}
        ours = {f"model.{name}" for name in tensors["model"]}
        if stored != ours:
            raise ValueError(f"it and the model differ in {', '.join(sorted(stored ^ ours)[:5])}")
        dcp.load(tensors, storage_reader=Reader(path))
    except (Exception, CheckpointException) as error:
        raise ValueError(f"{path} cannot be loaded: {cause_of(error)}") from error


def load_random_state(path: Path, world: World) -> None:
    """Restore the random state of this rank. Only the dropout of adapters draws from it; where there are other ranks
    than before it stays that of the seed."""
    if len(list(path.glob("rank_*.json"))) != world.size:
        return
    tensors = load_file(path / f"rank_{world.rank:05d}.safetensors")
    torch.set_rng_state(tensors["cpu"])
    if world.device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], world.device)
    state = _read_state(path / f"rank_{world.rank:05d}.json")
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


def read_loader_state(path: Path, world: World) -> dict[str, Any]:
    """The loader state of this rank's data rank; the streams of data are dealt out anew where there were others."""
    files = sorted(path.glob("loader_*.json"))
    if len(files) == world.data_size:
        return _read_state(files[world.data_rank])
    return redistribute([_read_state(file) for file in files], world.data_rank, world.data_size)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def is_run(path: Path) -> bool:
    """Whether a folder is a run, or a checkpoint of one, complete or not. What has a config.json is a Hugging Face
    folder or an export, whatever else is in it."""
    if (path / "config.json").is_file():
        return False
    return _is_checkpoint(path) or (path / "config.yaml").is_file() or (path / "checkpoints").is_dir()


def _is_checkpoint(path: Path) -> bool:
    path = path.resolve()
    in_place = path.is_dir() and path.parent.name == "checkpoints" and path.name.startswith("step_")
    return in_place or (path / MARKER).is_file()


def read_run(path: Path | str, step: int | None = None) -> tuple[Config, Path]:
    """(config, complete checkpoint) of a run, the newest or that of ``step``; or of a checkpoint folder itself."""
    path = Path(path)
    if _is_checkpoint(path) and step is None:
        if not (path / MARKER).is_file():
            raise FileNotFoundError(f"{path} is not a complete checkpoint (it has no file named {MARKER!r})")
        return config_file.load(path.resolve().parent.parent / "config.yaml"), path
    done = complete_checkpoints(path)
    if not done:
        raise FileNotFoundError(f"{path} holds no complete checkpoint")
    if step is not None and folder_of(path, step) not in done:
        steps = ", ".join(str(read_progress(each).step) for each in done)
        raise ValueError(f"{path} holds no complete checkpoint of step {step}: there are those of steps {steps}")
    return config_file.load(path / "config.yaml"), done[-1] if step is None else folder_of(path, step)


def state_tensors(model: AVLM, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Weights and optimizer state by parameter name: the live tensors, which a load writes into."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Any] = {"model": {name: parameter.detach() for parameter, name in names.items()}}
    if optimizer is not None:
        tensors["optimizer"] = {names[parameter]: state for parameter, state in optimizer.state.items()}
    return tensors


def _write_rank_state(path: Path, world: World, loader_state: dict) -> None:
    tensors = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(world.device)
    save_file(tensors, path / f"rank_{world.rank:05d}.safetensors")
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}
    write_durably(path / f"rank_{world.rank:05d}.json", json.dumps(state))
    if world.leads_row:
        write_durably(path / f"loader_{world.data_rank:05d}.json", json.dumps(loader_state))


def write_durably(path: Path, text: str) -> None:
    """Replace a file in one step, on disk before it takes the name."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)

"""Everything that can be known to be wrong before ranks start, and the errors that a person sees."""

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from avlm import config as configuration
from avlm.checkpoint import complete_checkpoints
from avlm.config import Config
from avlm.data.chat import Tokenizer, check_vocabulary
from avlm.metrics import NonFiniteLoss
from avlm.models.avlm import AVLM
from avlm.parallel import mesh
from avlm.parallel.mesh import World
from avlm.pretrained import check_config

MAY_CHANGE_IN_DATA = ("validation", "max_bad_fraction", "media_root")
MAY_CHANGE = ("output_dir", "resume", "checkpoint", "parallel", "wandb", "device")  # between a run and its resume
MAY_CHANGE_IN_TRAIN = ("log_every", "validate_every", "validate_batches", "validate_answers", "stop_after")


def check(config: Config, world_size: int) -> None:
    """Raise ValueError or FileNotFoundError for what would fail later: mesh, start weights, data sources, tokenizer."""
    mesh.sizes(config.parallel, world_size)
    for entry, source in configuration.to_dict(config.init_from).items():
        if source and Path(source).is_dir():  # a name of the Hub is looked at when its files are there
            check_config(config.model if entry == "all" else getattr(config.model, entry), Path(source))
    for stage in config.stages:
        for source in (stage.data.train, *stage.data.validation.values()):
            if not source.startswith("synthetic") and not Path(source).exists():
                raise FileNotFoundError(f"stage {stage.name}: no data at {source}")
        if not stage.data.train.startswith("synthetic"):
            check_vocabulary(Tokenizer(stage.data.tokenizer), config.model.decoder.vocab_size)


def check_resume(config: Config, checkpoint: Path | None) -> None:
    """Refuse to go on with another model, data or stages than the run began with, naming the key; and to begin a run
    over the checkpoints of another."""
    if checkpoint is None:
        if complete_checkpoints(Path(config.output_dir)):
            raise ValueError(
                f"{config.output_dir} holds an earlier run: set resume=auto to go on, or another output_dir"
            )
        return
    stored = configuration.to_dict(configuration.load(checkpoint.parent.parent / "config.yaml"))
    for key, (was, wanted) in _differences(stored, configuration.to_dict(config)).items():
        section, _, name = key.partition(".")
        if section in MAY_CHANGE or (section == "train" and name in MAY_CHANGE_IN_TRAIN):
            continue
        if ".data." in key and key.split(".data.")[1].split(".")[0] in MAY_CHANGE_IN_DATA:
            continue
        raise ValueError(
            f"{key} is {wanted!r}, but {checkpoint} was made with {was!r}: set it back, or choose another output_dir"
        )


def _differences(a: Any, b: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys at which two configs differ, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = [(key, a.get(key), b.get(key)) for key in {**a, **b}]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and any(isinstance(x, dict) for x in a):
        pairs = [(x.get("name", str(i)), x, y) for i, (x, y) in enumerate(zip(a, b))]
    else:
        return {} if a == b else {where: (a, b)}
    found = {}
    for key, x, y in pairs:
        found |= _differences(x, y, f"{where}.{key}" if where else str(key))
    return found


def check_skipped(read: float, skipped: float, max_fraction: float) -> None:
    """Stop a run whose data is mostly broken; ten bad samples are forgiven, however early they come."""
    if skipped > max(10.0, max_fraction * read):
        raise ValueError(
            f"{skipped:.0f} of {read:.0f} samples were bad and skipped (named above), more than "
            f"data.max_bad_fraction={max_fraction}: mend the data, or raise it"
        )


def claim(config: Config, world: World) -> IO[str] | None:
    """Make the run folder this run's own until the returned file is closed."""
    folder = Path(config.output_dir)
    failure, lock = "", None
    if world.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+")  # noqa: SIM115  (held until the run ends)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock would live on in forked loader workers
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            failure = f"{folder} belongs to a run that is live ({lock.read().strip()}): wait for it, or set output_dir"
    if world.sum([float(bool(failure))])[0]:
        raise ValueError(failure or f"{folder} belongs to a run that is live")
    if lock is not None:
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        lock.flush()
    return lock


def report(config: Config, world_size: int) -> str:
    """The checks, and an estimate of memory for weights and optimizer and of tokens, as text."""
    check(config, world_size)
    with torch.device("meta"):
        model = AVLM(config.model)
    _, shard = mesh.sizes(config.parallel, world_size)
    lines = []
    for stage in config.stages:
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] in stage.train)
        # float32 weights of all, gradient and two moments of what trains, all sharded
        gib = (4 * total + 12 * trained) / shard / 2**30
        tokens = world_size * config.train.accumulate * stage.data.seq_length
        lines.append(
            f"{stage.name}: {stage.steps} steps of up to {tokens:,} tokens; trains {trained:,} of {total:,} "
            f"parameters; {gib:.2f} GiB a rank for weights, gradients and optimizer state (activations come on top)"
        )
    return "\n".join(lines)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Print what a user got wrong as one line, without a traceback, and exit with 2."""
    try:
        yield
        if mesh.ranks()[1] > 1:
            # Threads of gloo may still be running; one that outlives the interpreter's own end aborts the process,
            # and the launcher would call a finished run failed.
            sys.stdout.flush()
            os._exit(0)
    except (ValueError, OSError, NonFiniteLoss) as error:
        started = torch.distributed.is_initialized()
        if started or mesh.ranks()[0] == 0:
            rank = f" (rank {mesh.ranks()[0]})" if started and mesh.ranks()[1] > 1 else ""
            print(f"error{rank}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # the first rank says it; a launcher ends all ranks as soon as one has failed
        os._exit(2) if started else sys.exit(2)  # other ranks may wait in a collective: nothing to shut down in order

"""Samples in, packed rows out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.data.jsonl import JsonlLoader, read_samples
from avlm.data.sample import fingerprint
from avlm.data.synthetic import SyntheticLoader


def open_loader(
    source: str,
    data: DataConfig,
    model: ModelConfig,
    *,
    rank: int,
    world: int,
    seed: int,
    train: bool,
    state: dict[str, Any] | None = None,
) -> Any:
    """A loader of packed rows for one of ``world`` data ranks: iterate it for Batch, ``state()`` is plain JSON.

    ``source``: an Energon folder or .yaml blend, a .json or .jsonl file, or "synthetic". Training never ends;
    validation ends when the rank's share does (go on with ``batch.empty_batch``) and starts anew with each iteration.
    ``state`` is what ``state()`` gave after the last row that was used. ValueError if it is of another rank, world
    (``avlm.data.redistribute`` deals it out anew), number of workers, seed or config, or if the source has no usable
    sample.
    """
    config = fingerprint(data, model)
    identity = {"rank": rank, "world": world, "workers": data.num_workers, "seed": seed, "config": config}
    for key, value in identity.items() if state is not None else ():
        if state.get(key) != value:
            same = "resume with the same seed and data"
            mend = f"set data.num_workers={state['workers']}" if key == "workers" else same
            raise ValueError(
                f"the loader state is for {key}={state.get(key)}, this run has {key}={value}: {mend}, or start anew "
                "with resume=never"
            )
    if source.partition(":")[0] == "synthetic":
        Loader = SyntheticLoader
    elif Path(source).suffix in (".json", ".jsonl"):
        Loader = JsonlLoader
    elif Path(source).suffix == ".yaml" or Path(source).is_dir():
        from avlm.data.energon.loader import EnergonLoader as Loader  # seconds to import
    else:
        raise ValueError(f"data source {source!r} is no Energon folder or .yaml blend, .json or .jsonl, or synthetic")
    try:
        return Loader(source, data, model, rank=rank, identity=identity, seed=seed, train=train, state=state)
    except (LookupError, TypeError, AttributeError) as error:
        if state is None:
            raise
        raise ValueError(
            f"the loader state is not one of {source} ({error!r:.100}): start anew with resume=never"
        ) from error


def open_samples(source: str, data: DataConfig) -> Iterator[Any]:
    """Every ``sample.Sample`` of a validation source (Energon or .json, .jsonl), in its order, media still encoded.

    ValueError for the first that cannot be read: an evaluation leaves nothing out.
    """
    if Path(source).suffix in (".json", ".jsonl"):
        return read_samples(source, data)
    from avlm.data.energon.loader import read_samples as read_energon  # seconds to import

    return read_energon(source, data)

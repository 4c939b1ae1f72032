"""A model folder by its path, or by its name on the Hugging Face Hub, from where only the files that we read come."""

import os
from pathlib import Path

from avlm.config.values import shown
from avlm.process.launch import own_launch
from avlm.storage import locks
from avlm.storage.weight_files import local, to_fetch

SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]  # configs and tokenizers


def resolve(name_or_folder: str | Path, weights: bool = True) -> Path:
    """The local folder, or the downloaded snapshot of a Hub name, with or without its weights.

    Raises FileNotFoundError for a name that neither can have, and ValueError if the Hub does not give it.
    """
    folder = local(name_or_folder)
    if folder.is_dir():
        return folder
    name = str(name_or_folder)
    if not may_be_on_hub(name):
        raise FileNotFoundError(f"no model folder {shown(name)} (a name of the Hub has the form owner/model)")
    from huggingface_hub import errors  # slow to import, and needed only here

    try:
        return _fetched_once(name, weights)
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{shown(name)} is not a local folder and could not be fetched from the Hub ({shown(lines[0])}); "
            "download it elsewhere and give the folder"
        ) from None


def _fetched_once(name: str, weights: bool) -> Path:
    """The snapshot. Of the ranks of a machine the first asks the Hub, and the others wait and take what it fetched."""
    from huggingface_hub import constants

    launch = own_launch()
    if not launch:
        return _fetched(name, weights)
    kind = "weights" if weights else "files"
    machine = os.uname().nodename  # machines that share a cache do not wait for each other
    file = Path(constants.HF_HUB_CACHE, ".locks", f"avlm--{name.replace('/', '--')}.{kind}.{machine}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("a+")
    except OSError:  # a cache that others filled, and in which nothing has to be written
        return _fetched(name, weights)
    with lock:  # a rank that ends lets the next one have it
        locks.lock(lock, wait=True)
        lock.seek(0)
        is_here = lock.read() == launch
        path = _fetched(name, weights, is_here)
        if not is_here:
            lock.truncate(0)
            lock.write(launch)
        return path


def _fetched(name: str, weights: bool, is_here: bool = False) -> Path:
    import huggingface_hub

    def fetch(patterns: list[str]) -> Path:
        found = huggingface_hub.snapshot_download(
            name, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"], local_files_only=is_here
        )
        return Path(found)

    path = fetch(SMALL_FILES)
    for files in to_fetch(path) if weights else ():
        fetch(files)
    return path


def may_be_on_hub(name: str) -> bool:
    return not Path(name).expanduser().is_absolute() and not name.startswith(".") and name.count("/") == 1

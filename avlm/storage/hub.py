"""A model folder by its path, or by its name on the Hugging Face Hub, from where only the files that we read come."""

from pathlib import Path

from avlm.config.values import shown
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
    import huggingface_hub  # slow to import, and needed only here
    from huggingface_hub import errors

    def fetch(patterns: list[str]) -> Path:
        ignored = ["*/*", "consolidated*"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=ignored))

    try:
        path = fetch(SMALL_FILES)
        for files in to_fetch(path) if weights else ():
            fetch(files)
        return path
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{shown(name)} is not a local folder and could not be fetched from the Hub ({shown(lines[0])}); "
            "download it elsewhere and give the folder"
        ) from None


def may_be_on_hub(name: str) -> bool:
    return not Path(name).expanduser().is_absolute() and not name.startswith(".") and name.count("/") == 1

"""A model folder, local or from the Hub: the config of its model, and how its prompts are made."""

from pathlib import Path

import pydantic

from avlm.config.model import DecoderConfig, ModelConfig, first_error, shown, validated
from avlm.config.run import DataConfig
from avlm.data.text.chat import Chat
from avlm.data.text.tokenizer import Tokenizer
from avlm.families import door
from avlm.families.door import AnyConfig
from avlm.storage.model_folder import read_json
from avlm.storage.weight_files import local, to_fetch


def resolve(name_or_folder: str | Path) -> Path:
    """The local folder, or the downloaded snapshot of a Hub name; only files that we read are fetched."""
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
        path = fetch(["*.json", "*.jinja", "*.model", "*.txt"])
        for files in to_fetch(path):
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


def read_config(folder: str | Path) -> AnyConfig:
    """The config of a supported decoder, tower or whole model, or of our own export. ValueError if our models would
    compute something different: a folder that loads computes what it was trained to compute."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no config.json in {folder}: it is not a model folder")
    keys = read_json(path)
    try:
        if is_own(keys):
            return validated(ModelConfig, keys.get("model"), "model")
        family = door.family_of(keys)
        there = [name for name in family.PROCESSOR_FILES if (path.parent / name).is_file()]
        files = {name: read_json(path.parent / name) for name in there[:1]}
        return family.read(keys, files)
    except pydantic.ValidationError as error:
        raise ValueError(f"{path}: {first_error(error)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path} is not understood ({type(error).__name__}: {shown(str(error))})") from None


def is_own(keys: dict) -> bool:
    """Whether a config.json is that of our own export."""
    return keys.get("architecture") == "AVLM"


def stop_ids(folder: str | Path) -> list[int]:
    """Ids that end an answer: of generation_config.json, else of config.json, else none."""
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        if not path.is_file():
            continue
        try:
            ids = door.stop_ids(read_json(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if ids is not None:
            return ids
    return []


def model_and_data(folder: Path) -> tuple[ModelConfig, DataConfig]:
    """The model of a folder and how its prompts are made. ValueError for a tower without a decoder."""
    config = read_config(folder)
    if isinstance(config, DecoderConfig):
        config = ModelConfig(decoder=config)
    if not isinstance(config, ModelConfig):
        raise ValueError(
            f"{folder} holds a tower, which cannot answer: give a decoder, a whole model, an export or a run"
        )
    path = folder / "config.json"
    keys = read_json(path)
    data = keys.get("data") if is_own(keys) else {"template": template_of(folder)}
    if not isinstance(data, dict):
        raise ValueError(f"{path} does not say how its model was trained: it has no data")
    return config, validated(DataConfig, {**data, "train": "", "tokenizer": str(folder)}, f"{path}: data")


def template_of(folder: Path) -> str:
    """The ``data.template`` for a Hugging Face folder: "tokenizer", its own template, if that accepts text. Many
    folders have one that only accepts lists of parts; they get the template of ours that makes the same prompts."""
    text_template = door.TEXT_TEMPLATES.get(read_json(folder / "config.json").get("model_type"))
    if text_template is None:
        return "tokenizer"
    tokenizer = Tokenizer(folder)
    if not (folder / "chat_template.json").is_file():  # the processor's; the tokenizer's is then the decoder's
        try:
            pieces = Chat(tokenizer, "tokenizer", published=True).pieces(
                [{"role": "user", "content": "question"}], prompt=True
            )
        except ValueError:
            pieces = []
        if any("question" in piece.text for piece in pieces):
            return "tokenizer"
    return text_template(tokenizer.control_tokens)

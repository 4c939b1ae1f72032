"""A model folder, local or from the Hub: the config of its model, and how its prompts are made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from avlm.config.decoder import DecoderConfig
from avlm.config.model import AudioConfig, ModelConfig
from avlm.config.run import DataConfig
from avlm.config.values import first_error, shown, validated
from avlm.data.text.chat import Chat
from avlm.data.text.tokenizer import Tokenizer
from avlm.families import door
from avlm.families.door import AnyConfig
from avlm.storage.hub import resolve
from avlm.storage.model_folder import read_json


def read_config(folder: str | Path) -> AnyConfig:
    """The config of a supported decoder, tower or whole model, or of our own export. ValueError if our models would
    compute something different: a folder that loads computes what it was trained to compute."""
    return _read(Path(folder))[0]


def _read(folder: Path) -> tuple[AnyConfig, dict[str, Any]]:
    """The config, and the keys of ``data`` besides the template that a folder of Hugging Face brings along."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no config.json in {folder}: it is not a model folder")
    keys = read_json(path)
    try:
        if is_own(keys):
            return validated(ModelConfig, keys.get("model"), "model"), {}
        family = door.family_of(keys)
        there = [name for name in family.PROCESSOR_FILES if (folder / name).is_file()]
        files = {name: read_json(folder / name) for name in there}
        parts = {module: _elsewhere(module, *named) for module, named in door.elsewhere(family, keys).items()}
        config = family.read(keys, files, **parts)
        return config, door.prompts(family, config, files)
    except pydantic.ValidationError as error:
        raise ValueError(f"{path}: {first_error(error)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path} is not understood ({type(error).__name__}: {shown(str(error))})") from None


def _elsewhere(module: str, key: str, name: str) -> AnyConfig:
    """The config of a module in another folder, which ``key`` names."""
    wanted = {"decoder": DecoderConfig, "audio": AudioConfig}[module]
    try:
        folder = resolve(name, weights=False)
        keys = read_json(folder / "config.json")
        if not is_own(keys) and door.elsewhere(door.family_of(keys), keys):
            raise ValueError(f"{shown(name)} leaves modules to other folders itself")
        config = read_config(folder)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{key}: {error}") from None
    if not isinstance(config, wanted):
        raise ValueError(f"{key}: {shown(name)} holds no {wanted.__name__}")
    return config


def media_prompts(folder: str | Path) -> dict[str, Any]:
    """The keys of ``data`` that say how media stand in the prompts of a folder of Hugging Face."""
    return _read(Path(folder))[1]


def media_in_texts(folder: Path, markers: Mapping[str, list[str]]) -> dict[str, str]:
    """Kind -> what stands for a medium in a text of a Hugging Face folder, whose own template may take media as parts
    of a list only. Templates of ours put it in place of a tag."""
    keys = read_json(folder / "config.json")
    if not is_own(keys):
        return door.media_in_prompts(door.family_of(keys), markers)
    base = door.FORMATS.get(str(keys.get("base")))  # of an export for transformers with code of its own
    return door.media_in_prompts(base, markers) if base in door.WITH_MARKERS else {}


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
    config, media = _read(folder)
    if isinstance(config, DecoderConfig):
        config = ModelConfig(decoder=config)
    if not isinstance(config, ModelConfig):
        raise ValueError(
            f"{folder} holds a tower, which cannot answer: give a decoder, a whole model, an export or a run"
        )
    path = folder / "config.json"
    keys = read_json(path)
    data = keys.get("data") if is_own(keys) else {"template": template_of(folder, Tokenizer(folder)), **media}
    if not isinstance(data, dict):
        raise ValueError(f"{path} does not say how its model was trained: it has no data")
    return config, validated(DataConfig, {**data, "train": "", "tokenizer": str(folder)}, f"{path}: data")


def template_of(folder: Path, tokenizer: Tokenizer) -> str:
    """The ``data.template`` for a Hugging Face folder: "tokenizer", its own template, if that accepts text. Many
    folders have one that only accepts lists of parts; they get the template of ours that makes the same prompts."""
    keys = read_json(folder / "config.json")
    text_template = door.TEXT_TEMPLATES.get(door.family_of(keys))
    if text_template is None:
        return "tokenizer"
    is_written = (folder / "chat_template.json").is_file() or door.family_of(keys) in door.CHAT_TEMPLATES
    if not is_written:  # the processor's; the tokenizer's is then the decoder's
        try:
            pieces = Chat(tokenizer, "tokenizer", published=True).pieces(
                [{"role": "user", "content": "question"}], prompt=True
            )
        except ValueError:
            pieces = []
        if any("question" in piece.text for piece in pieces):
            return "tokenizer"
    return text_template(keys, tokenizer.control_tokens)

"""``from`` in a run's config: sizes, weights, tokenizer and prompts are those of a model folder.

    model: {from: llava-hf/llava-1.5-7b-hf, lora: {}}             a whole model, a decoder, an export or a run
    model:
      decoder: {from: Qwen/Qwen2.5-0.5B-Instruct}                 part by part: a module of any of these
      vision: {from: openai/clip-vit-large-patch14-336}
      vision_projector: {downsample: 2}
    model: {from: Salesforce/blip2-opt-2.7b, decoder: {from: ...}}    a tower and its Q-Former, for a decoder of ours

Keys next to ``from`` override what the folder says, and a part's own ``from`` wins over the model's, which must be of
the same sizes there. A ``from`` is also the entry of ``init_from`` for its part, unless the config has that entry
(null: random weights of the same sizes). The keys of ``data`` that say how prompts are made come from the whole model
or the decoder; the config's own win.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avlm.config.decoder import DecoderConfig
from avlm.config.load import merge, read_tree, resolve_config, to_dict
from avlm.config.model import TOWERS, AudioConfig, ModelConfig, VisionConfig, VisionParts
from avlm.config.run import Config
from avlm.config.values import shown
from avlm.data.text.tokenizer import Tokenizer
from avlm.storage.hub import resolve
from avlm.storage.model_folder import read_json
from avlm.storage.run_folder import is_run, read_run
from avlm.storage.weight_files import local
from avlm.weights.export import PROMPT_KEYS
from avlm.weights.folder import is_own, media_prompts, model_and_data, read_config, template_of
from avlm.weights.sources import FILES

PARTS = {"decoder": DecoderConfig, "vision": VisionConfig, "audio": AudioConfig}
SEQ_LENGTH = 8192  # at most, where the config names none


def open_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The checked config of a YAML file, every ``from`` resolved. Of models on the Hub only the small files are
    fetched. ValueError or FileNotFoundError with one line for the user."""
    return resolve_config(expand(read_tree(path, overrides)), str(path))


def expand(tree: dict[str, Any]) -> dict[str, Any]:
    """A config's tree with every ``from`` of its model replaced by what it stands for."""
    model = tree.get("model")
    if not isinstance(model, dict):
        return tree
    found: dict[str, Any] = {}
    sources: dict[str, str] = {}  # entry of init_from -> folder or name
    own = {}
    for key, value in model.items():
        if key != "from":
            own[key] = value
    if "from" in model:
        whole = _whole(model["from"])
        found = to_dict(whole)
        sources["all" if whole.modules != ["decoder"] else "decoder"] = model["from"]
    for part in PARTS:
        if not isinstance(own.get(part), dict) or "from" not in own[part]:
            continue
        own[part] = {**own[part]}
        sources[part] = own[part].pop("from")
        found[part] = _part(part, sources[part])
        if part in TOWERS.values() and not found.get(f"{part}_projector"):
            found[f"{part}_projector"] = {}
    if not sources:
        return tree
    init_from = _section(tree, "init_from")
    _check_init_from(sources, init_from)
    expanded = {**tree, "model": merge(found, own), "init_from": merge(sources, init_from)}
    speaker = sources.get("decoder", sources.get("all") if "decoder" in found else None)
    if speaker is not None:
        data = _section(tree, "data")
        expanded["data"] = merge(_prompts(speaker, data, expanded["model"]), data)
    return expanded


def _section(tree: dict[str, Any], key: str) -> dict[str, Any]:
    section = tree.get(key)
    if not isinstance(section, dict | None):
        raise ValueError(f"{key} must hold keys and values, not {shown(section)}")
    return section or {}


def _whole(name: Any) -> ModelConfig | VisionParts:
    config = _config_of("model.from", name)
    if isinstance(config, DecoderConfig):
        return ModelConfig(decoder=config)
    if not isinstance(config, ModelConfig | VisionParts):
        raise ValueError(
            f"model.from is {shown(name)}, which is a tower: name it as model.vision.from or model.audio.from"
        )
    return config


def _part(part: str, name: Any) -> dict[str, Any]:
    """The sizes of a part, on its own or in a whole model."""
    config = _config_of(f"model.{part}.from", name)
    if isinstance(config, ModelConfig | VisionParts):
        config = getattr(config, part, None)
    if not isinstance(config, PARTS[part]):
        raise ValueError(f"model.{part}.from is {shown(name)}, which holds no {PARTS[part].__name__}")
    return to_dict(config)


def _config_of(key: str, name: Any) -> Any:
    if not isinstance(name, str):
        raise ValueError(f"{key} must be a folder, a run or a name of the Hub, not {shown(name)}")
    try:
        if is_run(local(name)):
            return read_run(local(name))[0].model
        return read_config(resolve(name, weights=False))
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{key}: {error}") from None


def _check_init_from(sources: dict[str, str], init_from: dict[str, Any]) -> None:
    """A ``from`` and a different ``init_from.all`` would both have the weights. A file of tensors may add what parts
    lack."""
    everything = init_from.get("all")
    if everything is None or everything == sources.get("all"):
        return
    if "all" in sources:
        raise ValueError(
            f"model.from={sources['all']} and init_from.all={shown(everything)} both give the weights: leave out "
            "one, or set init_from.all=null for random ones"
        )
    if Path(str(everything)).suffix in FILES:
        return
    for part in sources:
        if part not in init_from:
            raise ValueError(
                f"model.{part}.from={sources[part]} and init_from.all={everything} both give the {part} weights: set "
                f'init_from.{part} to the one to take, or take everything from it with "model={{from: {everything}}}"'
            )


def _prompts(name: str, given: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """The keys of ``data`` that a model brings along. Its template is looked for only where ``given`` has none."""
    found: dict[str, Any] = {"tokenizer": name, "seq_length": SEQ_LENGTH}
    trained = None  # how the prompts of a model of ours were made
    if is_run(local(name)):
        trained = read_run(local(name))[0].stages[-1].data
        found["tokenizer"] = trained.tokenizer
    else:
        folder = resolve(name, weights=False)
        if is_own(read_json(folder / "config.json")):
            trained = model_and_data(folder)[1]
        else:
            found |= media_prompts(folder)
            if "template" not in given:
                found["template"] = template_of(folder, Tokenizer(given.get("tokenizer", name)))
    if trained is not None:
        found |= {key: value for key, value in to_dict(trained).items() if key in PROMPT_KEYS}
    decoder = model.get("decoder")
    max_position = decoder.get("max_position") if isinstance(decoder, dict) else None
    if isinstance(max_position, int):
        found["seq_length"] = min(found["seq_length"], max_position)
    return found

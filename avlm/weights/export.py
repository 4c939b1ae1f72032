"""Trained weights out: safetensors, config.json and tokenizer of a model folder, ours or Hugging Face's."""

import dataclasses
import functools
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from avlm.config.contrastive import ALIGNMENT
from avlm.config.load import to_dict
from avlm.config.model import AudioConfig, LoraConfig, ModelConfig
from avlm.config.run import DataConfig
from avlm.data.text.pieces import MEDIA
from avlm.data.text.tokenizer import Tokenizer
from avlm.families import door
from avlm.models.lora import is_adapter, merge
from avlm.models.whisper import sinusoids
from avlm.parallel.mesh import World
from avlm.storage.model_folder import Lazy, publish, write_json, write_tensors
from avlm.weights import conformer, experts, served
from avlm.weights.gguf import export_gguf
from avlm.weights.peft import Base, adapter_keys, peft_names
from avlm.weights.served import Places
from avlm.weights.sources import Stored, regrouped
from avlm.weights.tokenizer import media_token_ids, write_tokenizer
from avlm.weights.whole import Whole

PROMPT_KEYS = ["template", "system", "seq_length", "image_tokens", "markers", "image_layout", "video", "duplex"]
PROMPT_KEYS += ["max_media_bytes", "max_image_pixels", "max_audio_seconds"]
ADAPTER = ("lora_down.weight", "lora_up.weight", "lora_magnitude")
State = dict[str, Lazy]


def export(
    config: ModelConfig,
    state: Mapping[str, Tensor | Stored],
    folder: str | Path,
    format: str = "avlm",
    *,
    data: DataConfig | None = None,
    dtype: torch.dtype | None = None,
    base: Base | None = None,
    whole: str | None = None,
    overwrite: bool = False,
    world: World | None = None,
    type: str | None = None,
) -> State:
    """Write a model folder: safetensors, config.json, generation_config.json and the tokenizer of ``data``.

    avlm     every module under our names; ``config.json`` also holds what encoding a prompt needs
    adapter  the adapters for PEFT, on ``base``, and its projectors if they changed; elsewhere adapters are merged
    transformers  every module in a class of transformers, with the code that this class lacks (``avlm.weights.served``)
    gguf     llama.cpp's files, with config.json under our names; ``type`` is that of matrices (default: f16)
    parakeet  the audio tower alone
    decoder (which leaves out towers and layers of cross-attention), llava, voxtral, ... are Hugging Face's
    (``avlm.families``)

    ``state`` holds tensors under our parameter names, on the CPU or stored; stored ones are read only when they are
    written. ``dtype`` casts them. ``whole`` is the folder of a larger model that the format is a part of: what it has
    besides is written too, as it is stored. The folder appears once it is complete. An earlier one stays until then,
    and is replaced only with ``overwrite``. The ranks of ``world`` share the work. Returns what the files hold. Raises
    ValueError or OSError.
    """
    folder = Path(folder)
    lazy = {name: Lazy.of(tensor) for name, tensor in state.items()}
    if config.lora and format != "adapter":
        lazy = merged(lazy, config.lora, dtype)
        config = dataclasses.replace(config, lora=None)
    if config.decoder.tie_embedding:
        lazy.pop("decoder.head.weight", None)
    _check_connectors(format, config)
    if format != "avlm":
        config, lazy = _without_alignment(config, lazy)
    tokenizer = Tokenizer(data.tokenizer) if data is not None and data.tokenizer else None
    larger = Whole(format, whole) if whole is not None else None
    if format == "gguf":
        keys = _own_keys(config, data)
        return export_gguf(config, lazy, folder, keys, data, type=type, overwrite=overwrite, world=world)
    content = _content(format, config, lazy, tokenizer, data, base)
    tensors = content.tensors
    if dtype is not None:
        tensors = {name: each.to(dtype) if each.dtype.is_floating_point else each for name, each in tensors.items()}
    stored_as = next(iter(tensors.values())).dtype
    if larger is not None:
        content.files["config.json"] = larger.config_json(content.files["config.json"])
        tensors = larger.tensors(tensors, door.FORMATS[format].constants(config))

    def write(partial: Path) -> None:
        write_tensors(tensors, partial, world, content.name)
        if world is not None and not world.is_first:
            return
        for name, keys in content.files.items():
            if name == "config.json":
                keys["torch_dtype"] = str(stored_as).removeprefix("torch.")
            write_json(partial / name, keys)
        for name, text in content.texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        if larger is not None:
            larger.copy_files(partial)
        if tokenizer is not None and format not in ("adapter", *door.TOWER_FORMATS):
            model_type = content.files["config.json"].get("model_type")
            names = door.TOKEN_NAMES.get(content.format, {})
            chat_template = door.CHAT_TEMPLATES.get(door.FORMATS.get(content.format))
            more = (content.ids, model_type, names, content.added, chat_template)
            write_tokenizer(tokenizer, data, partial, content.media, *more)

    publish(folder, write, overwrite, world)
    return tensors


def _without_alignment(config: ModelConfig, state: State) -> tuple[ModelConfig, State]:
    """Without what compares media with captions, for which other formats have no place."""
    kept = {name: tensor for name, tensor in state.items() if name.split(".")[0] not in ALIGNMENT}
    return dataclasses.replace(config, text=None, contrastive=None), kept


@dataclasses.dataclass
class Content:
    """The files of a model in one format."""

    files: dict[str, dict[str, Any]]  # JSON file -> its keys
    tensors: State
    name: str = "model"  # of the files of tensors
    media: dict[str, str] = dataclasses.field(default_factory=dict)  # kind -> what stands for it in a prompt
    ids: dict[str, int] = dataclasses.field(default_factory=dict)  # of the tokens that a format needs
    texts: dict[str, str] = dataclasses.field(default_factory=dict)  # other files -> what stands in them
    added: tuple[str, ...] = ()  # kinds of media that the tokenizer's own template does not know
    format: str = "avlm"  # whose processor reads the tokenizer


def _check_connectors(format: str, config: ModelConfig) -> None:
    """ValueError for what no format holds but our own; those of one part leave it out."""
    found = [] if config.cross is None else ["cross"]
    for tower in config.modalities.values():
        projector = getattr(config, f"{tower}_projector")
        found += [f"{tower}_projector.resampler"] * (projector.resampler is not None)
        found += [f"{tower}_projector.add"] * projector.add
    if found and format not in ("avlm", *door.TEXT_FORMATS, *door.TOWER_FORMATS):
        raise ValueError(f"the {format} format cannot hold model.{found[0]}: write --format avlm")


def _content(
    format: str,
    config: ModelConfig,
    state: State,
    tokenizer: Tokenizer | None,
    data: DataConfig | None,
    base: Base | None,
) -> Content:
    if format == "avlm":
        files = {"config.json": _own_keys(config, data)}
        return Content(files, state, media={kind: f"<{kind}>" for kind in MEDIA})
    if format == "adapter":
        base = base or Base()
        names = peft_names(state, base)
        if not any(is_adapter(name) for name in names):
            raise ValueError(f"the adapter format holds adapters onto {base.format}, and the model has none")
        family = door.FORMATS[base.format]
        tensors = {theirs: _in_their_order(state[name], family, name) for name, theirs in names.items()}
        return Content({"adapter_config.json": adapter_keys(config, state, base)}, tensors, "adapter_model")
    if format == served.FORMAT:
        return _served(config, state, tokenizer, data)
    if format in door.TOWER_FORMATS:
        return _tower(format, config, state)
    if format not in door.FORMATS:
        known = ("avlm", "adapter", served.FORMAT, *door.FORMATS, *door.TOWER_FORMATS)
        raise ValueError(f"format {format!r} is not one of {', '.join(known)}")
    family = door.FORMATS[format]
    ids = media_token_ids(tokenizer, family.MEDIA_TOKENS, config.decoder.vocab_size)
    config = _with_rows(config, ids)
    keys = {**family.config_json(config, ids), **door.prompt_keys(family, config, data)}
    files = {"config.json": keys, **family.processor_json(config, data)}
    places = {module: (family, known[0]) for module, known in family.PREFIXES.items()}
    tensors = _hugging_face_tensors(family, places, family.HEAD, config, state)
    markers = data.markers if data is not None else {}
    return Content(files, tensors, media=door.media_in_prompts(family, markers), ids=ids, format=format)


def _tower(format: str, config: ModelConfig, state: State) -> Content:
    family = door.TOWER_FORMATS[format]
    if config.audio is None:
        raise ValueError(f"the {format} format holds an audio tower, and the model has none")
    files = {"config.json": family.config_json(config.audio), **family.processor_json(config.audio)}
    tensors: State = {}
    for name, tensor in state.items():
        module, _, rest = name.partition(".")
        if module == "audio":
            tensors |= conformer.written(name, door.full_name(family, module, rest, family.PREFIXES[module][0]), tensor)
    return Content(files, tensors)


def _with_rows(config: ModelConfig, ids: Mapping[str, int]) -> ModelConfig:
    """With an embedding that has a row for each of the ids."""
    rows = max([config.decoder.vocab_size, *(number + 1 for number in ids.values())])
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=rows))


def _served(config: ModelConfig, state: State, tokenizer: Tokenizer | None, data: DataConfig | None) -> Content:
    chosen = served.choose(config, data)
    media = served.tokens(chosen, config, data)
    family = chosen.family
    wanted = dict.fromkeys([*(family.MEDIA_TOKENS if config.vision else ()), *media.values()])
    ids = media_token_ids(tokenizer, wanted, config.decoder.vocab_size)
    config = _with_rows(config, ids)
    keys = {**_own_keys(config, data), **served.config_json(chosen, config, data, ids)}
    files = {"config.json": keys, **served.processor_json(chosen, config, data, ids)}
    places = chosen.places(config)
    tensors = _hugging_face_tensors(family, places, served.HEAD, config, state)
    markers = data.markers if data is not None else {}
    marked = {kind: token.join(markers.get(kind, ["", ""])) for kind, token in media.items()}
    if config.vision is not None:
        marked |= door.media_in_prompts(family, markers)
    added = tuple(kind for kind in media if kind not in family.MEDIA)
    code = served.code(chosen.base, keys["base_processor"])
    return Content(files, tensors, media=marked, ids=ids, texts=code, added=added, format=chosen.base)


def _own_keys(config: ModelConfig, data: DataConfig | None) -> dict[str, Any]:
    """config.json under our own names, with what encoding a prompt needs."""
    prompt = {}
    if data is not None:
        prompt = {key: value for key, value in to_dict(data).items() if key in PROMPT_KEYS}
    return {"architecture": "AVLM", "model": to_dict(config), "data": prompt}


def merged(state: State, config: LoraConfig, dtype: torch.dtype | None = None) -> State:
    """Weights with their adapters merged, in ``dtype`` (None: the base's), each computed when it is read."""
    done = {}
    for name, base in state.items():
        down, up, magnitude = (state.get(f"{name.removesuffix('.weight')}.{part}") for part in ADAPTER)
        if down is not None:
            merge_here = functools.partial(_merge, down=down, up=up, magnitude=magnitude, config=config)
            done[name] = base.changed(merge_here, dtype=torch.float32).to(dtype or base.dtype)
        elif not is_adapter(name):
            done[name] = base
    return done


def _merge(base_OI: Tensor, down: Lazy, up: Lazy, magnitude: Lazy | None, config: LoraConfig) -> Tensor:
    return merge(base_OI, down.read(), up.read(), magnitude.read() if magnitude else None, config)


def _hugging_face_tensors(family: ModuleType, places: Places, head: str, config: ModelConfig, state: State) -> State:
    """The modules that have places, with the names and shapes of a family, and the tensors that only files have."""
    parts: dict[str, list[tuple[int, Lazy]]] = {}
    last = experts.LastRead()
    for name, tensor in state.items():
        module, _, rest = name.partition(".")
        if module not in places:
            continue
        naming, prefix = places[module]
        shapes = door.stored_shapes(naming, config)
        if name in shapes:
            tensor = tensor.changed(functools.partial(torch.Tensor.reshape, shape=shapes[name]), shape=shapes[name])
        tensor = _in_their_order(tensor, naming, name)
        theirs = head if name == "decoder.head.weight" else door.full_name(naming, module, rest, prefix)
        if door.EXPERT in theirs and door.joins_experts(naming):
            theirs, tensor = door.of_all_experts(theirs), experts.turned(tensor)
        elif door.EXPERT in theirs:
            parts |= {each: [(0, part)] for each, part in experts.of_each(theirs, tensor, last).items()}
            continue
        parts.setdefault(theirs, []).append((door.row_order(naming, module, rest), tensor))
    tensors = {}
    for theirs, ordered in parts.items():
        ordered.sort(key=itemgetter(0))
        is_of_experts = len(ordered[0][1].shape) == 3  # whose rows are columns of a tensor that is turned
        tensors[theirs] = Lazy.joined([tensor for _, tensor in ordered], 2 if is_of_experts else 0)
    dtype = state["decoder.norm.weight"].dtype
    for name, (shape, value) in _constants(family, places, config).items():
        tensors[name] = Lazy(shape, dtype, functools.partial(torch.full, shape, value, dtype=dtype))
    for module, name in family.SINUSOIDS.items():
        if places[module][0] is family:
            like = state[f"{module}.conv1.weight"]
            tensors[places[module][1] + name] = _sinusoids(getattr(config, module)).to(like.dtype)
    embedding = door.full_name(places["decoder"][0], "decoder", "embedding.weight", places["decoder"][1])
    if not family.TIES_HEAD:
        tied = state["decoder.embedding.weight"].changed(torch.clone)  # safetensors refuses tensors that share memory
        tensors.setdefault(head, tied)
    for name in (embedding, head):
        if name in tensors:
            tensors[name] = _with_room(tensors[name], config.decoder.vocab_size)
    return tensors


def _constants(family: ModuleType, places: Places, config: ModelConfig) -> dict[str, Any]:
    """Those of a family, where its modules have their places."""
    if "vision" not in places:
        return {} if family.PREFIXES.get("vision") else family.constants(config)
    usual, prefix = family.PREFIXES["vision"][0], places["vision"][1]
    return {name.replace(usual, prefix): value for name, value in family.constants(config).items()}


def _in_their_order(tensor: Lazy, family: ModuleType, name: str) -> Lazy:
    """The inverse of ``sources.in_our_order``."""
    if door.is_channel_major(family, name):
        width, inputs = tensor.shape
        return tensor.changed(functools.partial(regrouped, first=inputs // width))
    if door.is_transposed(family, name):
        *others, lines, columns = tensor.shape
        return tensor.changed(_transposed, shape=(*others, columns, lines))
    return tensor


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous()


def _sinusoids(audio: AudioConfig) -> Lazy:
    rows, width = audio.max_positions, audio.hidden_size
    return Lazy((rows, width), torch.float32, lambda: sinusoids(torch.arange(rows), width))


def _with_room(table_VD: Lazy, rows: int) -> Lazy:
    """Padded to ``rows`` for new tokens. A new row is the mean row, so its logit is the mean of the others and never
    the largest."""
    if table_VD.shape[0] >= rows:
        return table_VD
    return table_VD.changed(functools.partial(_padded, rows=rows), shape=(rows, table_VD.shape[1]))


def _padded(table_VD: Tensor, rows: int) -> Tensor:
    mean_1D = table_VD.mean(0, keepdim=True)
    return torch.cat([table_VD, mean_1D.expand(rows - len(table_VD), -1)])

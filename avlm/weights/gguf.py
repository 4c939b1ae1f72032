"""A model as GGUF files for llama.cpp, in a folder with config.json and the tokenizer, from which we read it back."""

import dataclasses
import functools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.data.text.pieces import MEDIA
from avlm.data.text.tokenizer import Tokenizer
from avlm.families import gguf as family
from avlm.models.rope import rope_frequencies
from avlm.models.whisper import sinusoids
from avlm.parallel.mesh import World
from avlm.storage.model_folder import Lazy, publish, write_json
from avlm.weights.gguf_files import MODEL, PROJECTORS, library, neighbours, write_gguf
from avlm.weights.gguf_tokenizer import tokenizer_keys
from avlm.weights.tokenizer import chat_template, write_tokenizer

State = dict[str, Lazy]
NO_BOS = "{%- set bos_token = '' -%}"  # llama.cpp takes token 11 for it where a file names none


def export_gguf(
    config: ModelConfig,
    state: State,
    folder: Path,
    keys: dict[str, Any],
    data: DataConfig | None,
    *,
    type: str | None,
    overwrite: bool,
    world: World | None,
) -> State:
    """Write model.gguf, mmproj.gguf for a model with towers, config.json with ``keys``, and the tokenizer. ``type``: of
    matrices, one of ``TYPES`` (None: f16). Returns what the files hold, before it is stored in their types."""
    library()
    if data is None or not data.tokenizer:
        raise ValueError("GGUF needs data.tokenizer: model.gguf holds the tokenizer too")
    type = type or "f16"
    if type not in family.TYPES:
        raise ValueError(f"type={type} is not one of {', '.join(family.TYPES)}")
    tokenizer = Tokenizer(data.tokenizer)
    files = tensors(config, state, tokenizer, data)
    media = {kind: f"<{kind}>" for kind in MEDIA}
    template = (NO_BOS if tokenizer.bos is None else "") + chat_template(tokenizer, data, media)
    of_tokenizer = tokenizer_keys(tokenizer, data, config.decoder.vocab_size, template)
    metadata = {
        MODEL: {**family.decoder_keys(config.decoder), **of_tokenizer},
        PROJECTORS: family.projector_keys(config),
    }
    architectures = {MODEL: family.architecture(config.decoder), PROJECTORS: "clip"}

    def write(partial: Path) -> None:
        if world is not None and not world.is_first:
            return
        write_json(partial / "config.json", keys)
        write_tokenizer(tokenizer, data, partial, media, {})
        for file, held in files.items():
            write_gguf(partial / file, architectures[file], metadata[file], held, type)

    publish(folder, write, overwrite, world)
    return {name: tensor for held in files.values() for name, tensor in held.items()}


def tensors(config: ModelConfig, state: State, tokenizer: Tokenizer, data: DataConfig) -> dict[str, State]:
    """File -> its tensors, with llama.cpp's names and order. ValueError for a model that it does not compute."""
    family.check(config, data)
    files: dict[str, State] = {}
    for ours, tensor in state.items():
        heads = family.rotated_heads(config, ours)
        if heads is not None:
            tensor = tensor.changed(functools.partial(neighbours, heads=heads))
        shape = family.stored_shape(config, ours, tensor.shape)
        if shape != tensor.shape:
            tensor = tensor.changed(functools.partial(torch.Tensor.reshape, shape=shape), shape=shape)
        if ours == family.UP and family.GATE in state:
            tensor = Lazy.joined([tensor, state[family.GATE]])
        elif ours == family.GATE:
            continue
        file = MODEL if ours.startswith("decoder.") else PROJECTORS
        files.setdefault(file, {})[family.name_of(config, ours)] = tensor
    for file, computed in _computed(config, state, tokenizer, data).items():
        files[file] |= computed
    return files


def _computed(config: ModelConfig, state: State, tokenizer: Tokenizer, data: DataConfig) -> dict[str, State]:
    """The tensors of files that are no parameters of ours."""
    found: dict[str, State] = {}
    if config.decoder.rope_scaling is not None:
        plain = rope_frequencies(dataclasses.replace(config.decoder, rope_scaling=None))
        factors = (plain / rope_frequencies(config.decoder)).float()
        found[MODEL] = {family.ROPE_FACTORS: Lazy.of(factors)}
    if config.audio is None:
        return found
    positions = sinusoids(torch.arange(family.WINDOW_ROWS), config.audio.hidden_size)
    computed = {family.POSITIONS: Lazy.of(positions)}
    if family.audio_type(config) == "glma":
        for name, marker in zip(family.MARKERS, data.markers["audio"]):
            computed[name] = _marker_row(state["decoder.embedding.weight"], marker, tokenizer)
        for part in ("up", "down"):
            if f"audio_projector.{part}.bias" not in state:  # llama.cpp asks for it
                width = state[f"audio_projector.{part}.weight"].shape[0]
                computed[family.name_of(config, f"audio_projector.{part}.bias")] = Lazy.of(torch.zeros(width))
    found[PROJECTORS] = computed
    return found


def _marker_row(embedding: Lazy, marker: str, tokenizer: Tokenizer) -> Lazy:
    ids = tokenizer.encode(marker, control=True)
    if len(ids) != 1:
        raise ValueError(
            f"GGUF cannot hold data.markers.audio with {shown(marker)!r}, which is {len(ids)} tokens: llama.cpp (glma) "
            "puts one row before the features and one behind them"
        )
    return embedding.changed(lambda table_VD: table_VD[ids[0]], shape=embedding.shape[1:])


def spelled_markers(config: ModelConfig, data: DataConfig) -> dict[str, list[str]]:
    """What of ``data.markers`` the text of a prompt holds: llama.cpp puts the others around features itself."""
    by_itself = config.audio is not None and family.audio_type(config) == "glma"
    return {kind: markers for kind, markers in data.markers.items() if kind != "audio" or not by_itself}


def gguf_summary(folder: str | Path, type: str | None) -> str:
    """What the files of an export hold, by type, which matrices are not in the ``type`` that was asked for, and what
    loads them."""
    lines = []
    for path in sorted(Path(folder).glob("*.gguf"), key=lambda path: path.name != MODEL):
        held = library().GGUFReader(path).tensors
        counts = Counter(tensor.tensor_type.name for tensor in held)
        of_types = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        lines.append(f"wrote {path}: {len(held)} tensors ({of_types}), {path.stat().st_size / 1e6:,.1f} MB")
        if path.name == MODEL and (type or "").startswith("q"):
            kept = {_of_all_layers(tensor.name) for tensor in held if tensor.tensor_type.name == "F16"}
            if kept:
                lines.append(f"in F16, as their rows are no multiple of {type}'s blocks: {', '.join(sorted(kept))}")
    projectors = f" --mmproj {folder}/{PROJECTORS}" if (Path(folder) / PROJECTORS).is_file() else ""
    command = "llama-mtmd-cli" if projectors else "llama-cli"
    return "\n".join([*lines, f"load it: {command} --jinja -m {folder}/{MODEL}{projectors}"])


def _of_all_layers(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)

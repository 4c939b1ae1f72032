"""Weights of pretrained models in, trained weights out: one name table per tower, strict in both directions.

    load(model, init_from)                    Hugging Face folders or our own export -> the model's parameters
    export(config, state, folder, format)     parameters -> safetensors, config.json and tokenizer
    python -m avlm.weights export RUN DIR --format avlm|decoder|llava|adapter

Every tensor of a folder is loaded or stands in the report as skipped with its reason; anything else is an error. A rank
reads only the slice that it holds, one tensor at a time, whatever sharded the model. Adapters are in no
folder that is loaded: they start anew, and every format but ``adapter`` is written with them merged.
"""

import argparse
import math
import re
import sys
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

# What DCP itself uses to place shards; the public API has no equivalent that knows strided shards (FSDP over TP).
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from avlm.config import InitFrom, ModelConfig
from avlm.export import export
from avlm.models.avlm import AVLM, initial_values
from avlm.models.lora import is_adapter, start_magnitudes
from avlm.models.whisper import sinusoids
from avlm.pretrained import check_config, read_config, read_json, resolve
from avlm.weights_tables import LAYOUTS, RESHAPED, SKIPPED, hugging_face_name


@dataclass(frozen=True)
class Report:
    """What one entry of ``init_from`` gave: our names of the loaded tensors; skipped tensors by reason."""

    entry: str
    folder: Path
    names: list[str]
    total: int  # tensors in the folder
    skipped: dict[str, int]

    def __str__(self) -> str:
        skipped = ", ".join(f"{count} of {reason}" for reason, count in self.skipped.items()) or "none"
        return f"{self.entry} from {self.folder}: {len(self.names)} of {self.total} tensors loaded, skipped: {skipped}"


def load(model: AVLM, init_from: InitFrom) -> list[Report]:
    """Fill the modules that ``init_from`` names; the others are left as they are.

    Parameters are plain tensors or DTensors of any dtype and device. Raises ValueError or FileNotFoundError.
    """
    parameters = dict(model.named_parameters())
    reports = []
    for entry in ("all", "decoder", "vision", "audio"):  # a tower's own folder wins over the whole model's
        source = getattr(init_from, entry)
        if source is None:
            continue
        ours = model.config if entry == "all" else getattr(model.config, entry)
        if ours is None:
            raise ValueError(f"init_from.{entry} is {source!r}, and model.{entry} is null")
        folder = resolve(source)
        check_config(ours, folder)
        reports.append(_load_folder(entry, folder, model.config, parameters))
    return reports


def start(model: AVLM, init_from: InitFrom, seed: int) -> list[Report]:
    """Give every parameter its first value: a folder's where ``init_from`` has one, a random one elsewhere."""
    reports = load(model, init_from)
    loaded = {name for report in reports for name in report.names}
    parameters = dict(model.named_parameters())
    for name, value in initial_values(model, seed, skip=loaded):
        _copy_slice(parameters[name], name, _Loaded(value), "random start")
    start_magnitudes(model)
    return reports


def fill(model: AVLM, state: dict[str, Tensor]) -> None:
    """Copy whole tensors under our names, as ``avlm.checkpoint.read_model`` gives them; strict."""
    parameters = dict(model.named_parameters())
    tied = {"decoder.head.weight"} if model.config.decoder.tie_embedding else set()
    odd = parameters.keys() ^ (state.keys() - tied)
    if odd:
        raise ValueError(
            f"the checkpoint and its config.yaml disagree about {len(odd)} tensors: {', '.join(sorted(odd)[:5])}"
        )
    for name, parameter in parameters.items():
        _copy_slice(parameter, name, _Loaded(state[name]), "checkpoint")


def _load_folder(entry: str, folder: Path, config: ModelConfig, parameters: dict[str, Tensor]) -> Report:
    theirs = read_config(folder)
    modules = theirs.modules if isinstance(theirs, ModelConfig) else [entry]
    tensors = open_tensors(folder)
    own_export = read_json(folder / "config.json").get("architecture") == "AVLM"
    prefixes = {name: f"{name}." if own_export else _prefix(name, tensors, folder) for name in modules}

    remaining, loaded = set(tensors), []
    for name, parameter in parameters.items():
        module, _, rest = name.partition(".")
        if module not in (modules if entry == "all" else [entry]) or is_adapter(name):
            continue
        file_name = name if own_export else _file_name(module, rest, prefixes[module], tensors)
        if file_name not in tensors:
            raise ValueError(f"{folder} has no tensor {file_name} for {name} {tuple(parameter.shape)}")
        _copy_slice(parameter, name, tensors[file_name], f"{folder}: {file_name}")
        remaining.discard(file_name)
        loaded.append(name)
    if entry == "audio" and not own_export:
        _check_sinusoids(tensors, prefixes["audio"], folder)

    reasons = {name: _skip_reason(name, entry, config, prefixes) for name in sorted(remaining)}
    extra = [name for name, reason in reasons.items() if reason is None]
    if extra:
        shapes = ", ".join(f"{name} {tuple(tensors[name].get_shape())}" for name in extra[:5])
        raise ValueError(f"{folder} has {len(extra)} tensors that the model has no place for: {shapes}")
    return Report(entry, folder, loaded, len(tensors), dict(Counter(reasons.values())))


def open_tensors(folder: Path) -> dict:
    """Name -> lazy tensor (``get_shape()``, and slicing reads) of every weight file of the folder."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            files = sorted(set(read_json(folder / index)["weight_map"].values()))
            break
    else:
        files = [name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()][:1]
    if not files:
        raise FileNotFoundError(f"no model.safetensors, pytorch_model.bin or index of shards in {folder}")
    tensors = {}
    for name in files:
        if Path(name).name != name:
            raise ValueError(f"{folder}: the index names {name!r}, which lies outside the folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing")
        try:
            if name.endswith(".safetensors"):
                file = safe_open(folder / name, framework="pt")
                tensors |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            else:
                # Older folders hold pickles. weights_only refuses code; mmap keeps what is not read on the disk.
                mapped = zipfile.is_zipfile(folder / name)
                state = torch.load(folder / name, map_location="cpu", weights_only=True, mmap=mapped)
                tensors |= {key: _Loaded(value) for key, value in state.items()}
        except Exception as error:  # safetensors, zip and pickle each have their own
            raise ValueError(f"{folder / name} cannot be read: {str(error).splitlines()[0]}") from None
    return tensors


class _Loaded:
    """A tensor with the two calls of a safetensors slice."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, index) -> Tensor:
        return self.tensor[index]


def _prefix(module: str, tensors: dict, folder: Path) -> str:
    anchor, prefixes = LAYOUTS[module]
    for prefix in prefixes:
        if prefix + anchor in tensors:
            return prefix
    raise ValueError(f"{folder} has no tensor {anchor}, under any of {prefixes}")


def _file_name(module: str, name: str, prefix: str, tensors: dict) -> str:
    theirs = hugging_face_name(module, name)
    if name == "head.weight":
        return theirs if theirs in tensors else f"language_model.{theirs}"
    return prefix + theirs


@torch.no_grad()
def _copy_slice(parameter: Tensor, name: str, source, origin: str) -> None:
    """Copy what this rank holds of ``parameter``; the file keeps its dtype until the copy converts it."""
    shape, there = tuple(parameter.shape), tuple(source.get_shape())
    reshaped = name in RESHAPED and len(there) != len(shape) and math.prod(there) == parameter.numel()
    if there != shape and not reshaped:
        raise ValueError(f"{origin} has shape {there}, and {name} has {shape}")
    local, offset, size = parameter, (0,) * len(shape), shape
    if isinstance(parameter, DTensor):
        local = parameter.to_local()  # without grad: the storage itself
        size, offset = compute_local_shape_and_global_offset(shape, parameter.device_mesh, parameter.placements)
    if not local.numel():
        return
    region = tuple(slice(start, start + length) for start, length in zip(offset, size))
    if there == shape:
        value = source[region]
    elif there[0] == shape[0]:  # (D, 3, P, P) -> (D, 3 * P * P)
        value = source[region[0]].flatten(1)[:, region[1]]
    else:  # (D,) -> (1, D)
        value = source[:].view(shape)[region]
    local.copy_(value)


def _check_sinusoids(tensors: dict, prefix: str, folder: Path) -> None:
    name = f"{prefix}embed_positions.weight"
    if name in tensors:
        table = tensors[name][:].float()
        distance = (table - sinusoids(torch.arange(table.shape[0]), table.shape[1])).abs().max().item()
        if distance > 4e-3:  # bf16 rounds by 2e-3
            raise ValueError(f"{folder}: {name} is {distance:.2g} away from Whisper's sinusoids, which we compute")


def _skip_reason(name: str, entry: str, config: ModelConfig, prefixes: dict[str, str]) -> str | None:
    """Why a tensor of the file is not loaded, or None where nothing excuses it."""
    if name in ("lm_head.weight", "language_model.lm_head.weight", "decoder.head.weight"):
        if entry not in ("all", "decoder"):
            return "other modules"
        return "a head tied to the embedding" if config.decoder.tie_embedding else None
    for module, prefix in prefixes.items():
        if entry not in ("all", module):
            if name.startswith(prefix):
                return "other modules"
            continue
        rest = name.removeprefix(prefix)
        layer = re.match(r"encoder\.layers\.(\d+)\.", rest)
        if module == "vision" and layer and int(layer[1]) > config.vision.num_layers + config.vision.feature_layer:
            return "layers above feature_layer"
        for pattern, reason in SKIPPED[module]:
            if re.match(pattern, rest):
                return reason
    return None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m avlm.weights", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="write the newest checkpoint of a run as a model folder")
    command.add_argument("run", help="run folder")
    command.add_argument("folder", help="folder to write, new or empty")
    command.add_argument("--format", choices=["avlm", "decoder", "llava", "adapter"], default="avlm")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    arguments = parser.parse_args()
    from avlm.checkpoint import read_model  # only runs need it: it brings the whole checkpoint machinery

    try:
        config, state = read_model(Path(arguments.run))
        dtype = getattr(torch, arguments.dtype)
        options = {"data": config.stages[-1].data, "base": config.init_from.decoder or config.init_from.all}
        export(config.model, state, arguments.folder, arguments.format, dtype=dtype, **options)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

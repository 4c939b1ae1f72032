"""A checkpoint of a run, written as a model folder: what ``python -m avlm.weights export`` does."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from avlm.config.parallel import ParallelConfig
from avlm.families import door
from avlm.parallel import mesh
from avlm.process.launch import ranks
from avlm.storage.model_folder import Lazy
from avlm.storage.run_folder import read_progress, read_run
from avlm.weights.export import export
from avlm.weights.gguf import gguf_summary
from avlm.weights.model_card import write_card
from avlm.weights.peft import Base, base_of, left_behind
from avlm.weights.served import FORMAT, notes
from avlm.weights.sources import open_checkpoint


def export_run(arguments: argparse.Namespace) -> None:
    """Write the folder that the command's ``arguments`` ask for, and say what was written, what it lacks and how it
    loads."""
    config, path = read_run(arguments.run, arguments.step)
    to_peft = arguments.format == "adapter"
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    if dtype is None and arguments.format not in ("adapter", "gguf"):
        dtype = torch.bfloat16
    rank, size = ranks()
    world = None
    if size > 1:
        world = mesh.start(ParallelConfig(), torch.device("cpu"))
        path = world.gather(path)[0]  # the run may continue and save meanwhile
    state = open_checkpoint(path)
    base = base_of(config, state, arguments.onto, arguments.base) if to_peft else None
    tensors = export(
        config.model,
        state,
        arguments.folder,
        arguments.format,
        data=config.stages[-1].data,
        dtype=dtype,
        base=base,
        whole=arguments.whole,
        overwrite=arguments.overwrite,
        world=world,
        type=arguments.type,
    )
    if rank == 0:
        if not to_peft and arguments.format not in door.TOWER_FORMATS:
            write_card(config, read_progress(path), path.resolve().parents[1], Path(arguments.folder), arguments.format)
        if arguments.format == "gguf":
            print(gguf_summary(arguments.folder, arguments.type))
            return
        print(summary(arguments.folder, arguments.format, tensors, base, arguments.whole))
        for note in notes(config.model, config.stages[-1].data) if arguments.format == FORMAT else ():
            print(note)
        left = left_behind(state, base) if base else []
        if left:
            print(f"it lacks {', '.join(left)}: --format avlm keeps them, with all adapters merged")
        if base and base.name is None:
            print(f"it names no base: --base NAME adds the {base.format} that its adapters belong to")


def summary(folder: str, format: str, tensors: Mapping[str, Lazy], base: Base | None, whole: str | None = None) -> str:
    """What was written, and the line that loads it."""
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    if base is not None:
        model = f"transformers.{door.FORMATS[base.format].CLASS}.from_pretrained({base.name or 'BASE'!r})"
        load = f"peft.PeftModel.from_pretrained({model}, {folder!r})"
    elif whole is not None:
        load = f"transformers.{door.WITHIN[format].WHOLE_CLASS}.from_pretrained({folder!r})"
    elif format == FORMAT:
        load = f"transformers.AutoModelForMultimodalLM.from_pretrained({folder!r}, trust_remote_code=True)"
    elif format in door.FORMATS and door.FORMATS[format].CLASS:
        load = f"transformers.{door.FORMATS[format].CLASS}.from_pretrained({folder!r})"
    elif format in door.TOWER_FORMATS:
        load = f"transformers.{door.TOWER_FORMATS[format].CLASS}.from_pretrained({folder!r})"
    else:
        load = f"avlm.load({folder!r})"
    kind = f"adapters onto {base.format}" if base else f"format {format}" + (f" within {whole}" if whole else "")
    return f"wrote {folder}: {kind}, {len(tensors)} tensors in {' and '.join(dtypes)}, {size:,.1f} MB\nload it: {load}"

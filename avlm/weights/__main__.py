"""Write a checkpoint of a run as a model folder: ``python -m avlm.weights export RUN DIR --format FORMAT``."""

import argparse
from collections.abc import Mapping

import torch

from avlm.config.run import ParallelConfig
from avlm.families import door
from avlm.parallel import mesh
from avlm.process.exit import run_command
from avlm.process.launch import ranks
from avlm.storage.model_folder import Lazy
from avlm.storage.run_folder import read_run
from avlm.weights.export import FORMATS, export
from avlm.weights.peft import Base, base_of, left_behind
from avlm.weights.sources import open_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m avlm.weights", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="write a checkpoint of a run as a model folder")
    command.add_argument("run", help="run folder, or a checkpoint folder of one")
    command.add_argument("folder", help="folder to write, new or empty")
    command.add_argument("--format", choices=FORMATS, default="avlm")
    command.add_argument("--step", type=int, help="which checkpoint of the run (default: the newest)")
    command.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the tensors (default: bfloat16; for adapters, as they are stored)",
    )
    command.add_argument(
        "--onto", choices=list(door.FORMATS), help="what adapters are put on (default: the whole model)"
    )
    command.add_argument(
        "--base", help="folder or Hub name of the model that adapters belong to (default: init_from's)"
    )
    command.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export once the new one is complete"
    )
    arguments = parser.parse_args()
    config, path = read_run(arguments.run, arguments.step)
    to_peft = arguments.format == "adapter"
    for option in ("base", "onto"):
        value = getattr(arguments, option)
        if value and not to_peft:
            raise ValueError(f"--{option} {value} is for --format adapter, and the format is {arguments.format}")
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    if dtype is None and not to_peft:
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
        overwrite=arguments.overwrite,
        world=world,
    )
    if rank == 0:
        print(summary(arguments.folder, arguments.format, tensors, base))
        left = left_behind(state, base) if base else []
        if left:
            print(f"it lacks {', '.join(left)}: --format avlm keeps them, with all adapters merged")
        if base and base.name is None:
            print(f"it names no base: --base NAME adds the {base.format} that its adapters belong to")


def summary(folder: str, format: str, tensors: Mapping[str, Lazy], base: Base | None) -> str:
    """What was written, and the line that loads it."""
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    if base is not None:
        model = f"transformers.{door.FORMATS[base.format].CLASS}.from_pretrained({base.name or 'BASE'!r})"
        load = f"peft.PeftModel.from_pretrained({model}, {folder!r})"
    elif format in door.FORMATS:
        load = f"transformers.{door.FORMATS[format].CLASS}.from_pretrained({folder!r})"
    else:
        load = f"avlm.load({folder!r})"
    kind = f"adapters of a {base.format}" if base else f"format {format}"
    return f"wrote {folder}: {kind}, {len(tensors)} tensors in {' and '.join(dtypes)}, {size:,.1f} MB\nload it: {load}"


if __name__ == "__main__":
    run_command(main)

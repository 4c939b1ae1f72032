"""Write a checkpoint of a run as a model folder: ``python -m avlm.weights export RUN DIR --format FORMAT``."""

import argparse

import torch

from avlm.config.run import ParallelConfig
from avlm.parallel import mesh
from avlm.process.exit import run_command
from avlm.process.launch import ranks
from avlm.storage.run_folder import read_run
from avlm.weights.export import FORMATS, export
from avlm.weights.peft import left_behind
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
    command.add_argument("--base", help="name of the decoder that an adapter belongs to (default: init_from.decoder)")
    command.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export once the new one is complete"
    )
    arguments = parser.parse_args()
    config, path = read_run(arguments.run, arguments.step)
    to_peft = arguments.format == "adapter"
    if arguments.base and not to_peft:
        raise ValueError(f"--base {arguments.base} is for --format adapter, and the format is {arguments.format}")
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    if dtype is None and not to_peft:
        dtype = torch.bfloat16
    base = arguments.base or config.init_from.decoder
    rank, size = ranks()
    world = None
    if size > 1:
        world = mesh.start(ParallelConfig(), torch.device("cpu"))
        path = world.gather(path)[0]  # the run may continue and save meanwhile
    state = open_checkpoint(path)
    export(
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
    if to_peft and rank == 0:
        left = left_behind(config, state)
        if left:
            print(f"{arguments.folder} lacks {', '.join(left)}: --format avlm keeps them, with all adapters merged")
        if base is None:
            print(f"{arguments.folder} names no base decoder: --base NAME adds the one that its adapters belong to")


if __name__ == "__main__":
    run_command(main)

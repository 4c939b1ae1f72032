"""Write a checkpoint of a run as a model folder: ``python -m avlm.weights export RUN DIR --format FORMAT``."""

import argparse

from avlm.families import door
from avlm.families.gguf import TYPES
from avlm.process.exit import run_command


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m avlm.weights", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="write a checkpoint of a run as a model folder")
    command.add_argument("run", help="run folder, or a checkpoint folder of one")
    command.add_argument("folder", help="folder to write, new or empty")
    formats = ["avlm", "transformers", *door.FORMATS, *door.TOWER_FORMATS, "gguf", "adapter"]
    command.add_argument("--format", choices=formats, default="avlm")
    command.add_argument("--step", type=int, help="which checkpoint of the run (default: the newest)")
    command.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the tensors (default: bfloat16; for adapters, as they are stored)",
    )
    command.add_argument("--type", choices=TYPES, help="of the matrices of --format gguf (default: f16)")
    command.add_argument(
        "--onto", choices=list(door.FORMATS), help="what adapters are put on (default: the whole model)"
    )
    command.add_argument(
        "--base", help="folder or Hub name of the model that adapters belong to (default: init_from's)"
    )
    command.add_argument(
        "--whole",
        help="folder or Hub name of the larger model into which the exported part is written "
        f"({' and '.join(door.WITHIN)})",
    )
    command.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export once the new one is complete"
    )
    arguments = parser.parse_args()
    for option in ("base", "onto"):
        value = getattr(arguments, option)
        if value and arguments.format != "adapter":
            raise ValueError(f"--{option} {value} is for --format adapter, and the format is {arguments.format}")
    if arguments.type and arguments.format != "gguf":
        raise ValueError(f"--type {arguments.type} is for --format gguf: --dtype is that of the other formats")
    if arguments.dtype and arguments.format == "gguf":
        raise ValueError(f"--dtype {arguments.dtype} is for the other formats: --format gguf takes --type")
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    from avlm.weights.export_run import export_run  # torch takes seconds, and --help needs none

    export_run(arguments)


if __name__ == "__main__":
    run_command(main)

"""Weights of pretrained models in, trained weights out: one name table per tower, strict in both directions.

    load(model, init_from)                    what ``avlm.weights_plan`` found out -> the model's parameters
    export(config, state, folder, format)     parameters -> safetensors, config.json and tokenizer (``avlm.export``)
    python -m avlm.weights export RUN DIR --format avlm|decoder|llava|voxtral|adapter [--step N] [--base NAME]

A rank reads only the slice that it holds, one tensor at a time, whatever sharded the model and whatever layout wrote
it. An export reads what one file of it holds at a time, and ``torchrun`` shares the files among its ranks.
"""

import argparse
import dataclasses

import torch

from avlm.adapters import left_behind
from avlm.checkpoint import read_run
from avlm.config import InitFrom, ParallelConfig
from avlm.export import FORMATS, export
from avlm.models.avlm import AVLM, initial_values
from avlm.models.lora import start_magnitudes
from avlm.parallel import mesh
from avlm.preflight import one_line_errors
from avlm.weights_plan import Report, plan
from avlm.weights_sources import Whole, copy_slice, open_checkpoint


def load(model: AVLM, init_from: InitFrom) -> list[Report]:
    """Fill the modules that ``init_from`` names; the others are left as they are.

    Parameters are plain tensors or DTensors of any dtype and device. Raises ValueError or FileNotFoundError before any
    of them is written to, unless a file turns out to be damaged.
    """
    parameters = dict(model.named_parameters())
    plans = plan(model.config, {name: tuple(parameter.shape) for name, parameter in parameters.items()}, init_from)
    for each in plans:
        for name, theirs in each.chosen.items():
            copy_slice(parameters[name], each.source.tensors[theirs])
    return [each.report for each in plans]


def start(model: AVLM, init_from: InitFrom, seed: int) -> list[Report]:
    """Give every parameter its first value: a source's where ``init_from`` has one, a random one elsewhere."""
    reports = load(model, init_from)
    loaded = {name for report in reports for name in report.names}
    parameters = dict(model.named_parameters())
    for name, value in initial_values(model, seed, skip=loaded):
        copy_slice(parameters[name], Whole(value))
    start_magnitudes(model, skip=loaded)
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m avlm.weights", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="write a checkpoint of a run as a model folder")
    command.add_argument("run", help="run folder, or a checkpoint folder of one")
    command.add_argument("folder", help="folder to write, new or empty")
    command.add_argument("--format", choices=FORMATS, default="avlm")
    command.add_argument("--step", type=int, help="that checkpoint of the run; without it the newest")
    command.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the tensors; without it bfloat16, and adapters as they are stored",
    )
    command.add_argument("--base", help="name of the decoder that an adapter belongs to; without it init_from.decoder")
    command.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export, when the new one is whole"
    )
    arguments = parser.parse_args()
    config, path = read_run(arguments.run, arguments.step)
    to_peft = arguments.format == "adapter"
    if arguments.base and not to_peft:
        raise ValueError(f"--base {arguments.base} is for --format adapter, and the format is {arguments.format}")
    dtype = arguments.dtype or (None if to_peft else "bfloat16")
    options = {"data": config.stages[-1].data, "base": arguments.base or config.init_from.decoder}
    options |= {"dtype": dtype and getattr(torch, dtype), "overwrite": arguments.overwrite}
    if mesh.ranks()[1] > 1:
        options["world"] = mesh.start(dataclasses.replace(config, parallel=ParallelConfig()), torch.device("cpu"))
        path = options["world"].gather(path)[0]  # the run may go on and save meanwhile
    state = open_checkpoint(path)
    export(config.model, state, arguments.folder, arguments.format, **options)
    if to_peft and mesh.ranks()[0] == 0:
        if left := left_behind(config, state):
            print(f"{arguments.folder} lacks {', '.join(left)}: --format avlm keeps them, with all adapters merged")
        if options["base"] is None:
            print(f"{arguments.folder} names no base decoder: --base NAME says which one its adapters belong to")


if __name__ == "__main__":
    with one_line_errors():
        main()

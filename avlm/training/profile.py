"""Where the time of profiled steps went, part by part: ``python -m avlm.training.profile RUN``."""

import argparse
from pathlib import Path

from avlm.process.exit import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m avlm.training.profile",
        description="Print the time of each part of the model in the traces of a run with debug.profile.",
    )
    parser.add_argument("run", type=Path, help="run folder")
    run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    from avlm.training.trace import table  # torch takes seconds, and --help needs none

    paths = sorted(arguments.run.glob("profile/*.json.gz"))
    if not paths:
        raise FileNotFoundError(f"{arguments.run}/profile has no trace: train with debug.profile=[STEP,COUNT]")
    for path in paths:
        print(table(path))


if __name__ == "__main__":
    run_command(main)

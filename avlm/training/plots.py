"""The curves of a run in one image: ``python -m avlm.training.plots RUN [--all]``."""

import argparse
from pathlib import Path

from avlm.process.exit import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m avlm.training.plots", description="Draw the curves of a run into RUN/metrics.png."
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--all", action="store_true", help="every panel, not just the first three")
    run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    from avlm.training.curves import plot  # torch and matplotlib take seconds, and --help needs none

    print(plot(arguments.run, arguments.all))


if __name__ == "__main__":
    run_command(main)

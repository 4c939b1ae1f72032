"""Writes RUN/report.html, the report of a run as one page, again: ``python -m avlm.evaluation.page RUN``."""

import argparse
from pathlib import Path

from avlm.process.exit import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m avlm.evaluation.page",
        description="Write RUN/report.html again, from what python -m avlm.evaluation has left in RUN.",
    )
    parser.add_argument("run", type=Path, help="folder of a run that was evaluated")
    run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    from avlm.evaluation.report_page import write_page  # torch takes seconds, and --help needs none

    print(write_page(arguments.run))


if __name__ == "__main__":
    run_command(main)

"""Compare a kernel with its peers: ``python -m kernels.benchmark attention [--shapes avlm] [--csv DIR] [--plot]``."""

import argparse
import math
import signal
from pathlib import Path

from kernels.benchmark import attention, cross_entropy, projector, report
from kernels.benchmark.measure import start_session

# A suite has SHAPES (its sets of shapes by name), FORWARD_ONLY (sets without a backward) and run, which yields rows.
SUITES = {"attention": attention, "projector": projector, "cross_entropy": cross_entropy}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.benchmark", description="Compare a kernel with its peers.")
    suites = parser.add_subparsers(dest="suite", required=True)
    for name, suite in SUITES.items():
        suite_parser = suites.add_parser(name)
        suite_parser.add_argument("--shapes", choices=suite.SHAPES, default=next(iter(suite.SHAPES)))
        suite_parser.add_argument("--direction", choices=("fwd", "bwd", "both"), default="both")
        suite_parser.add_argument("--csv", type=Path, metavar="DIR", help="append the rows to a file in this folder")
        suite_parser.add_argument("--plot", action="store_true", help="write PNGs next to the CSV, or here")
        suite_parser.add_argument(
            "--seconds", type=seconds, default=0.2, help="of timing per provider, shape, direction: %(default)s"
        )
    options = parser.parse_args(arguments)
    suite = SUITES[options.suite]
    modes = ("fwd", "bwd") if options.direction == "both" else (options.direction,)
    if options.shapes in suite.FORWARD_ONLY:
        modes = tuple(mode for mode in modes if mode == "fwd")
        if not modes:
            parser.error(f"{options.suite} --shapes {options.shapes} has no backward")
    prefix = f"{options.suite}_{options.shapes}"
    csv_path = options.csv / f"{prefix}.csv" if options.csv else None
    if csv_path:
        try:
            report.open_csv(csv_path)
        except (OSError, ValueError) as error:
            parser.error(str(error))

    session = start_session(options.seconds)
    print(f"device={session.label} {session.gpu}")
    print(f"ceilings: GEMM {session.gemm_tflops:.4g} TFLOP/s, copy {session.copy_gb_per_s:.4g} GB/s")
    rows = []
    for new_rows in suite.run(options.shapes, modes, session):
        print("\n" + report.table(new_rows), flush=True)
        rows += new_rows
        if csv_path:
            report.append_csv(csv_path, new_rows)
    if options.plot:
        for path in report.plot(rows, options.csv or Path(), prefix):
            print(f"wrote {path}")


def seconds(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, not {text}")
    return float(text)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    main()

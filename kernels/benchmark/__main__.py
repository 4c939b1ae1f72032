"""Compare kernels with their peers.

python -m kernels.benchmark attention [--shapes avlm] [--csv DIR] [--plot]     one suite
python -m kernels.benchmark all [--out DIR] [--quick]                          everything, with a page
"""

import argparse
import math
import signal
import sys
from pathlib import Path

from kernels.backend import INTERPRETED
from kernels.benchmark import everything, plots, report
from kernels.benchmark.measure import DTYPES, MAX_RATIO, Session, start_session
from kernels.benchmark.own_shapes import parse_shape
from kernels.benchmark.suites import SUITES, Suite


def main(arguments: list[str] | None = None) -> None:
    """Ends with status 1 if an error of ours is more than MAX_RATIO times that of plain PyTorch."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser()
    options = parser.parse_args(arguments)
    if INTERPRETED and options.dtype == "bf16":
        parser.error("the interpreter's products of bf16 are wrong (Triton 3.6)")
    try:
        rows = run_everything(options, arguments) if options.suite == "all" else run_suite(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    wrong = [row for row in report.wrong(rows) if row["provider"].startswith("ours")]
    for row in wrong:
        print(f"error: {row['provider']}: {report.title_of(row)}: {row['error_ratio']:.2f} times plain PyTorch's error")
    if wrong:
        sys.exit(1)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.benchmark",
        description=f"Compare kernels with their peers. Status 1 if an error of ours is {MAX_RATIO} times PyTorch's.",
    )
    commands = parser.add_subparsers(dest="suite", required=True)
    for name, suite in SUITES.items():
        one = commands.add_parser(name)
        add_common(one)
        one.add_argument("--shapes", choices=suite.sets, default=next(iter(suite.sets)))
        one.add_argument("--shape", action="append", metavar="NAME=VALUE,...", help="own shapes instead of --shapes")
        one.add_argument("--lengths", type=numbers, help="of the shapes, only those of these lengths: 4096,8192")
        if name == "attention":
            one.add_argument("--head-dims", type=numbers, help="only those of these head dims: 64,128")
        one.add_argument("--direction", choices=("fwd", "bwd", "both"), default="both")
        one.add_argument("--providers", default="", help=f"only those that begin with: {', '.join(suite.providers)}")
        one.add_argument("--csv", type=Path, metavar="DIR", help="append the rows to a file in this folder")
        one.add_argument("--plot", action="store_true", help="write PNGs next to the CSV, or here")
    every = commands.add_parser("all", help="every suite: CSV, plots and a page in DIR/<gpu>/")
    add_common(every)
    every.add_argument("--out", type=Path, metavar="DIR", default=Path("docs/results"), help="%(default)s")
    every.add_argument("--quick", action="store_true", help="what matters most, in less than 4 minutes on an H100")
    return parser


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="bf16, without a GPU fp32")
    parser.add_argument("--seconds", type=seconds, help="of timing per provider, shape, direction: 0.2, quick 0.1")


def run_everything(options: argparse.Namespace, arguments: list[str]) -> list[dict]:
    session = start(options, 0.1 if options.quick else 0.2, ("",))
    parts, limit = (everything.QUICK, everything.QUICK_SECONDS) if options.quick else (everything.FULL, None)
    command = " ".join(["python -m kernels.benchmark", *arguments])
    with session.own_stream():
        return everything.run_all(parts, session, options.out, command, limit)


def run_suite(options: argparse.Namespace) -> list[dict]:
    """ValueError for options that do not fit together."""
    suite = SUITES[options.suite]
    name = "own" if options.shape else options.shapes
    shapes = chosen_shapes(suite, options)
    modes = ("fwd", "bwd") if options.direction == "both" else (options.direction,)
    if options.direction == "bwd" and all(getattr(shape, "decode", False) for shape in shapes):
        raise ValueError(f"{options.suite} --shapes {name} has no backward")
    wanted = tuple(name.strip() for name in options.providers.split(","))
    for word in wanted:
        if not any(provider.startswith(word) for provider in suite.providers):
            raise ValueError(f"no provider begins with {word!r}; there are {', '.join(suite.providers)}")
    csv_path = options.csv / f"{options.suite}_{name}.csv" if options.csv else None
    if csv_path:
        report.open_csv(csv_path)

    session = start(options, 0.2, wanted)
    rows = []
    with session.own_stream():
        for new_rows in suite.run(shapes, modes, session):
            print("\n" + report.table(new_rows), flush=True)
            rows += new_rows
            if csv_path:
                report.append_csv(csv_path, new_rows)
    if options.plot:
        for path in plots.lines(rows, options.csv or Path(), f"{options.suite}_{name}"):
            print(f"wrote {path}")
    return rows


def chosen_shapes(suite: Suite, options: argparse.Namespace) -> list:
    """Own shapes, or those of the set that have the lengths and head dims asked for."""
    if options.shape:
        return [parse_shape(suite.shape, text) for text in options.shape]
    shapes = list(suite.sets[options.shapes]())
    for option, attribute in (("lengths", "x"), ("head_dims", "head_dim")):
        wanted = getattr(options, option, None)
        if wanted is None:
            continue
        there = sorted({getattr(shape, attribute) for shape in shapes})
        shapes = [shape for shape in shapes if getattr(shape, attribute) in wanted]
        if not shapes:
            flag = option.replace("_", "-")
            raise ValueError(f"--{flag}: --shapes {options.shapes} has {', '.join(map(str, there))}")
    return shapes


def start(options: argparse.Namespace, default_seconds: float, wanted: tuple[str, ...]) -> Session:
    dtype = DTYPES[options.dtype] if options.dtype else None
    session = start_session(options.seconds or default_seconds, dtype, wanted)
    print(f"device={session.label} {session.gpu}")
    print(f"ceilings: GEMM {session.gemm_tflops:.4g} TFLOP/s, copy {session.copy_gb_per_s:.4g} GB/s")
    return session


def seconds(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, not {text}")
    return float(text)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    main()

"""What train.py is told. It imports nothing slow, so that --help and a missing config are answered at once."""

import argparse
from pathlib import Path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train an audio-vision language model.",
        epilog="A config of your own begins as a copy of one of configs/starters/, whose comments explain it.",
    )
    parser.add_argument("config", nargs="?", help="a YAML file")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--print", action="store_true", help="show the resolved config and stop")
    parser.add_argument("--preflight", action="store_true", help="check and estimate, then stop")
    parser.add_argument("--world-size", type=int, default=1, help="ranks that --preflight assumes")
    parser.add_argument("--device-memory-gib", type=float, help="let --preflight fail if a rank needs more")
    arguments = parser.parse_intermixed_args()
    if arguments.config is None:
        starters = sorted(map(str, Path("configs").glob("starters/*.yaml")))
        parser.error(f"give a config, such as configs/demo.yaml or a copy of one of {', '.join(starters)}")
    return arguments

"""Shows what a stage of a config trains on, as the model sees it:

    python -m avlm.data.inspect CONFIG [section.key=value ...] [--stage NAME] [--count N] [--out DIR] [--html PAGE]

First come N samples, in the order in which training draws them; those of shards before they are shuffled. Text is
decoded from the token ids; <image x576> stands for 576 placeholders, and learned text has [brackets], or is green on a
terminal. Statistics follow, of the whole set or of its first 1,000 samples: how full rows are, what they hold, what is
skipped and why, and how long samples are. Last comes the speed of the loader over 16 rows.

--out saves the media files of the N samples, DIR/KEY_image1.png for the first image, and a picture of the first packed
row, DIR/row_001.png: whose its tokens are and which are learned, up to 64 images as the tower gets them, and up to 64
windows of audio as log-mel spectrograms. --html writes the N samples as one page that needs no other file, with images
and players.
"""

import argparse
from pathlib import Path

from avlm.process.exit import run_command


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m avlm.data.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", help="section.key=value, as for train.py")
    parser.add_argument("--stage", help="name of a stage (default: the first)")
    parser.add_argument("--count", type=int, default=4, help="number of samples to show (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for media files and the picture of a row (default: none)")
    parser.add_argument("--html", type=Path, metavar="PAGE", help="file for the page (default: none)")
    options = parser.parse_intermixed_args(arguments)
    if options.count < 0:
        raise ValueError(f"--count is a number of samples, not {options.count}")
    run(options)


def run(options: argparse.Namespace) -> None:
    from avlm.data.inspect_samples import show, stream_of  # torch takes seconds, and --help needs none
    from avlm.weights.model_from import open_config

    config = open_config(options.config, options.overrides)
    show(stream_of(config, options.stage), options.count, options.out, options.html)


if __name__ == "__main__":
    run_command(main)

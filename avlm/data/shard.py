"""Makes a prepared Megatron-Energon folder of a JSON file, or prepares a folder of shards:

    python -m avlm.data.shard FILE DIR [--split val]
    python -m avlm.data.shard --prepare DIR [--split val]

The records of FILE (.json or .jsonl) may have any form that training reads. Each becomes KEY.json with its turns under
"messages", and its media files are packed next to it; other keys of a record are left out. A sample that cannot be read
is left out and named. DIR gets SPLIT_000000.tar and so on: a second call with another --split adds that split.

--prepare writes the index of shards that are there, as `energon prepare` does. Shards whose names begin with train, val
or test belong to that split, and all others to --split.
"""

import argparse
from pathlib import Path

from avlm.config.run import is_json
from avlm.process.exit import run_command


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m avlm.data.shard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", help="a .json or .jsonl file")
    parser.add_argument("folder", nargs="?", type=Path, help="the Energon folder, new or with other splits")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="prepare the shards of a folder, and write none")
    parser.add_argument("--split", choices=["train", "val", "test"], default="train", help="default: %(default)s")
    parser.add_argument("--media-root", help="folder of the media (default: the folder of FILE)")
    options = parser.parse_args(arguments)
    if (options.folder is None) == (options.prepare is None):
        parser.error("give FILE and DIR, or --prepare DIR")
    run(options)


def run(options: argparse.Namespace) -> None:
    from avlm.data.energon.prepare import prepare  # Energon takes seconds, and --help needs none
    from avlm.data.energon.shards import pack_file

    if options.prepare is not None:
        prepare(options.prepare, options.split)
        print(f"{options.prepare} is prepared: data.train={options.prepare}")
    elif not is_json(options.file):
        raise ValueError(f"{options.file} is no .json or .jsonl file")
    else:
        pack_file(options.file, options.folder, options.split, options.media_root)


if __name__ == "__main__":
    run_command(main)

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
import io
import itertools
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from avlm.config.model import counted
from avlm.config.run import DataConfig, is_json
from avlm.data.bad_samples import by_reason
from avlm.data.energon.prepare import prepare
from avlm.data.jsonl import Records
from avlm.data.media import signature
from avlm.data.sample import Sample
from avlm.data.text.pieces import MEDIA
from avlm.process.exit import run_command

SPLITS = ("train", "val", "test")
SHARD_BYTES = 256 * 2**20  # a shard ends with the sample that exceeds this
PARTS = [(split, f"{split}.*") for split in SPLITS]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m avlm.data.shard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", help="a .json or .jsonl file")
    parser.add_argument("folder", nargs="?", type=Path, help="the Energon folder, new or with other splits")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="prepare the shards of a folder, and write none")
    parser.add_argument("--split", choices=SPLITS, default="train", help="split of the samples (default: %(default)s)")
    parser.add_argument("--media-root", help="folder of the media (default: the folder of FILE)")
    options = parser.parse_args(arguments)
    if (options.folder is None) == (options.prepare is None):
        parser.error("give FILE and DIR, or --prepare DIR")
    run_command(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    if options.prepare is not None:
        others = f"(?!{'|'.join(SPLITS)}).*"
        prepare(options.prepare, [*PARTS, (options.split, f"{options.split}.*|{others}")])
        print(f"{options.prepare} is prepared: data.train={options.prepare}")
        return
    if not is_json(options.file):
        raise ValueError(f"{options.file} is no .json or .jsonl file")
    records = Records(options.file, DataConfig(train=options.file, media_root=options.media_root))
    bad: list[tuple[str, str]] = []
    shards = write_shards(read(records, bad), options.folder, options.split)
    for reason, keys in by_reason(bad):
        print(f"left out {counted(len(keys), 'sample')}: {reason} ({', '.join(keys)})", file=sys.stderr)
    prepare(options.folder, PARTS)
    print(f"{counted(len(records) - len(bad), 'sample')} in {counted(len(shards), 'shard')} of {options.folder}")


def read(records: Records, bad: list[tuple[str, str]]) -> Iterator[Sample]:
    """The samples of a file; those that cannot be read are added to ``bad``."""
    for number in range(len(records)):
        try:
            yield records.sample(number)
        except ValueError as error:
            bad.append((records.key(number), str(error)))


def write_shards(samples: Iterator[Sample], folder: Path, split: str) -> list[Path]:
    """SPLIT_000000.tar and so on. They get their names when all of them are written."""
    if any(folder.glob(f"{split}*.tar")):
        raise ValueError(f"{folder} has shards of the split {split} already: choose another folder, or remove them")
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    numbered = enumerate(samples)
    first = next(numbered, None)
    while first is not None:
        written.append(folder / f"{split}_{len(written):06d}.tar.partial")
        with tarfile.open(written[-1], "w", format=tarfile.USTAR_FORMAT) as shard:
            for number, sample in itertools.chain([first], numbered):
                add(shard, f"{split}_{number:08d}", sample)
                if shard.offset >= SHARD_BYTES:
                    break
        first = next(numbered, None)
    if not written:
        raise ValueError(f"no sample can be read: {folder} gets no shard")
    return [path.rename(path.with_suffix("")) for path in written]


def add(shard: tarfile.TarFile, key: str, sample: Sample) -> None:
    for name, content in parts_of(sample).items():
        member = tarfile.TarInfo(f"{key}.{name}")
        member.size = len(content)
        shard.addfile(member, io.BytesIO(content))


def parts_of(sample: Sample) -> dict[str, bytes]:
    """The record, and the files that it names."""
    files: dict[str, bytes] = {}
    record: dict = {"messages": [turn_of(message) for message in sample.messages]}
    for kind in MEDIA:
        names = []
        for number, content in enumerate(getattr(sample, f"{kind}s")):
            names.append(f"{kind}{number}{signature.ending(content)}")
            files[names[-1]] = content
        if names:
            record[f"{kind}s"] = names
    if sample.answers:
        record["answers"] = sample.answers
    return {"json": json.dumps(record, ensure_ascii=False).encode(), **files}


def turn_of(message: dict) -> dict:
    turn = {"role": message["role"], "content": message["content"]}
    if not message.get("learn", True):
        turn["train"] = False
    return turn


if __name__ == "__main__":
    main()

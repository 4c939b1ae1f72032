"""Samples of a JSON file as shards: KEY.json with the turns, and the media files next to it."""

import io
import itertools
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from avlm.config.run import DataConfig
from avlm.config.values import counted
from avlm.data.bad_samples import by_reason
from avlm.data.energon.prepare import prepare
from avlm.data.jsonl import Records
from avlm.data.media import signature
from avlm.data.sample import Sample
from avlm.data.text.pieces import MEDIA

SHARD_BYTES = 256 * 2**20  # a shard ends with the sample that exceeds this


def pack_file(file: str, folder: Path, split: str, media_root: str | None) -> None:
    """Write a file's samples as a split of a folder, and prepare it."""
    records = Records(file, DataConfig(train=file, media_root=media_root))
    bad: list[tuple[str, str]] = []
    shards = write_shards(read(records, bad), folder, split)
    for reason, keys in by_reason(bad):
        print(f"left out {counted(len(keys), 'sample')}: {reason} ({', '.join(keys)})", file=sys.stderr)
    prepare(folder, split)
    print(f"{counted(len(records) - len(bad), 'sample')} in {counted(len(shards), 'shard')} of {folder}")


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
    if sample.words is not None:  # of a duplex model, which has no turns
        record = {"audio": record["audios"][0], "words": sample.words, "codes": sample.codes}
        if isinstance(sample.codes, bytes):
            record["codes"] = "codes0.npy"
            files["codes0.npy"] = sample.codes
    return {"json": json.dumps(record, ensure_ascii=False).encode(), **files}


def turn_of(message: dict) -> dict:
    turn = {"role": message["role"], "content": message["content"]}
    if not message.get("learn", True):
        turn["train"] = False
    return turn

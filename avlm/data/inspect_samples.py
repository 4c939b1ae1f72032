"""The samples of a training stream, as text and in numbers."""

import itertools
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from avlm.config.run import Config, shares
from avlm.config.values import counted
from avlm.data.bad_samples import by_reason
from avlm.data.inspect_page import Shown, media_of, page
from avlm.data.inspect_row import draw_row
from avlm.data.loader import open_loader
from avlm.data.media_reader import MediaReader
from avlm.data.packing import tokens_of_rows
from avlm.data.rows import RowStream, encoded
from avlm.data.sample import EncodedSample, Sample
from avlm.data.stream import Stream
from avlm.data.text.tokenizer import Tokenizer
from avlm.models.batch import IGNORE, IMAGE, KINDS, NEWLINE, PLACEHOLDERS

MAX_SAMPLES = 1000  # of the statistics
SPEED_ROWS = 16
GREEN, CYAN = 32, 36  # terminal colours
NAMES = {**{placeholder: modality for modality, placeholder in PLACEHOLDERS.items()}, NEWLINE: "newline"}


def stream_of(config: Config, name: str | None) -> Stream:
    """What the first data rank reads in a stage, by default in the first one."""
    names = [stage.name for stage in config.stages]
    if name is not None and name not in names:
        raise ValueError(f"there is no stage {name!r}: {', '.join(names)}")
    index = names.index(name) if name is not None else 0
    stage = config.stages[index]
    options = {"rank": 0, "world": 1, "seed": config.seed + index, "objective": stage.objective}
    return Stream(stage.data.train, stage.data, config.model, **options, train=True)


def show(stream: Stream, count: int, out: Path | None = None, html: Path | None = None) -> None:
    if not stream.has_samples:
        raise ValueError("synthetic rows hold nothing to look at: set data.train to a file or a folder")
    tokenizer = Tokenizer(stream.data.tokenizer)
    found = Statistics()
    shown: list[Shown] = []
    # One of several workers reads only its share, and from a shuffle buffer some samples come twice before others come.
    rows = RowStream(replace(stream, data=replace(stream.data, num_workers=0, shuffle_buffer=1)))
    slot = rows.begin(0)
    if None not in rows.num_records:
        found.num_samples = sum(rows.num_records)
    while found.read < min(found.num_samples or MAX_SAMPLES, MAX_SAMPLES):
        _, drawn = slot.draw()
        try:
            sample = encoded(drawn, rows.encoder)
        except ValueError as error:
            found.bad.append((drawn.key, str(error)))
            continue
        found.add(sample)
        if len(shown) < count:
            size = f"{counted(len(sample), 'token')}, {int((sample.target_T != IGNORE).sum())} learned"
            grids = grids_of(drawn.sample, rows.encoder.reader)
            shown.append(Shown(drawn.sample, size, list(pieces(sample, tokenizer)), grids))
            print(describe(shown[-1]), end="\n\n", flush=True)
    if found.bad and not found.lengths:
        key, reason = found.bad[0]
        raise ValueError(f"none of {counted(found.read, 'sample')} of {rows.names} can be used; {key}: {reason}")
    for name, share, size in zip(shares(stream.source), rows.shares, rows.num_records):
        blended = f", {100 * share:.0f} % of the samples drawn" if len(rows.shares) > 1 else ""
        print(f"{name}: {_size(size)}{blended}")
    print("\n".join(found.lines(stream)))
    if html is not None:
        title = f"{', '.join(shares(stream.source))}: {_size(found.num_samples)}"
        html.write_text(page(shown, title, stream.data))
        print(f"wrote {html}")
    if out is not None:
        save_media(shown, out)
    measure_speed(stream, out)


def save_media(shown: list[Shown], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for each in shown:
        key = re.sub(r"[^\w.-]", "_", each.sample.key)  # ":" is in no file name of Windows
        for name, _, content in media_of(each.sample):
            (folder / f"{key}_{name}").write_bytes(content)
            count += 1
    print(f"wrote {counted(count, 'media file')} to {folder}")


def measure_speed(stream: Stream, out: Path | None) -> None:
    """Read some rows as training does, and draw the first of them."""
    arrived: list[float] = []  # seconds
    counts: list[int] = []
    for batch in itertools.islice(open_loader(stream), SPEED_ROWS):
        arrived.append(time.perf_counter())
        counts.append(len(batch.keys))
        if out is not None and len(counts) == 1:
            draw_row(batch, stream.model, out / "row_001.png")
            print(f"wrote {out / 'row_001.png'}")
    workers = stream.num_workers
    if len(counts) > workers:  # a worker's first row waits for its packing buffer
        per_second = sum(counts[workers:]) / (arrived[-1] - arrived[workers - 1])
        each = f", {per_second / workers:,.0f} each" if workers > 1 else ""
        print(f"{per_second:,.0f} samples a second from {counted(workers, 'worker')}{each}")


def pieces(sample: EncodedSample, tokenizer: Tokenizer) -> Iterator[tuple[str, str, bool]]:
    """(modality or "", text or "modality x count", whether it is learned) of each part of a sample."""
    tokens = sample.token_T.tolist()
    learned = [False, *(sample.target_T[:-1] != IGNORE).tolist()]  # a target is the token that follows

    def kind(position: int) -> tuple[int, bool]:
        """Learned text, other text and each placeholder are shown separately."""
        return min(tokens[position], 0), learned[position]

    for (placeholder, is_learned), run in itertools.groupby(range(len(tokens)), kind):
        ids = [tokens[position] for position in run]
        if placeholder:
            modality = NAMES[placeholder]
            yield modality, f"{modality} x{len(ids)}", False
        else:
            yield "", tokenizer.decode(ids), is_learned


def grids_of(sample: Sample, reader: MediaReader) -> dict[str, str]:
    """Name of each image and video -> its size, patches and features."""
    found = {}
    for name, kind, content in media_of(sample):
        if kind == "audio":
            continue
        extent, runs = reader.laid_out(kind, content, len(sample.images))
        height, width = extent.source
        lines, columns = extent.grid
        parts = [f"{width} x {height} pixels"]
        items = ""
        if kind == "video":
            first, last = extent.times[0], extent.times[-1]
            parts.append(f"{counted(len(extent.times), 'frame')} at {first:.1f} to {last:.1f} s")
            items = f"{extent.num_items:,} x "
        if extent.tiling.num_tiles:
            parts.append(f"{extent.tiling.columns} x {extent.tiling.lines} tiles and the whole image")
            items = f"{extent.num_items:,} x "
        parts.append(f"{items}{columns} x {lines} patches")
        num_features = sum(run.tokens.count(IMAGE) for run in runs)
        found[name] = ", ".join([*parts, counted(num_features, "feature")])
    return found


def describe(shown: Shown) -> str:
    """One sample: its key, its length and its tokens, then the grids of its media."""
    text = ""
    for modality, part, is_learned in shown.pieces:
        if modality:
            text += _coloured(f"<{part}>", CYAN)
        else:
            text += _coloured(f"[{part}]", GREEN) if is_learned else part
    grids = [f"{name}: {grid}" for name, grid in shown.grids.items()]
    return "\n".join([f"{shown.sample.key}: {shown.size}", text.removesuffix("\n"), *grids])


@dataclass
class Statistics:
    """Counted over the first samples of a set."""

    num_samples: int | None = None  # of the whole set; None: unknown, as it streams
    lengths: list[int] = field(default_factory=list)  # tokens of each good sample
    bad: list[tuple[str, str]] = field(default_factory=list)  # (key, reason)
    features: Counter[str] = field(default_factory=Counter)  # by modality
    items: Counter[str] = field(default_factory=Counter)  # by modality: images, windows of audio
    targets: Counter[str] = field(default_factory=Counter)  # by kind of sample

    @property
    def read(self) -> int:
        return len(self.lengths) + len(self.bad)

    def add(self, sample: EncodedSample) -> None:
        self.lengths.append(len(sample))
        self.targets[sample.kind] += int((sample.target_T != IGNORE).sum())
        for modality, placeholder in PLACEHOLDERS.items():
            self.features[modality] += int((sample.token_T == placeholder).sum())
            self.items[modality] += len(sample.media.get(modality, ()))

    def lines(self, stream: Stream) -> list[str]:
        lines = []
        if self.num_samples is None or self.read < self.num_samples:
            lines.append(f"of the first {self.read:,}:")
        for reason, keys in by_reason(self.bad):
            lines.append(f"skipped {counted(len(keys), 'sample')}: {reason} ({', '.join(keys[:10])})")
        if not self.lengths:
            return lines
        total = sum(self.lengths)
        rows = tokens_of_rows(self.lengths, stream.data)
        whole = rows[:-1] or rows  # what the last one lacks, the samples to come will fill
        size = stream.data.seq_length
        fill = sum(whole) / (len(whole) * size)
        lines.append(f"{counted(len(rows), 'row')} of {size:,} tokens, {100 * fill:.1f} % full")
        is_part = self.num_samples is not None and self.read < self.num_samples
        if is_part and isinstance(stream.source, str):  # sets of a blend have their own epochs
            lines.append(f"an epoch has about {total / (fill * size) * self.num_samples / self.read:,.0f} rows")
        is_cut = stream.data.image_layout.tiles != "none"
        item_names = {"image": "view" if is_cut else "image", "audio": "window"}
        for modality, count in self.features.items():
            if count:
                items = counted(self.items[modality], item_names[modality])
                lines.append(f"{modality} features {100 * count / total:.1f} % of the tokens ({items})")
        by_kind = ", ".join(f"{kind} {self.targets[kind]:,}" for kind in KINDS if self.targets[kind])
        lines.append(f"learned {100 * self.targets.total() / total:.1f} % of the tokens: {by_kind}")
        return [*lines, "tokens of a sample", *histogram(self.lengths)]


def histogram(lengths: list[int]) -> list[str]:
    """One line for each doubling of the length, with the count of samples in it."""
    bins = Counter(length.bit_length() - 1 for length in lengths)
    most = max(bins.values())
    lines = []
    for i in range(min(bins), max(bins) + 1):
        first = 2**i
        last = 2 * first - 1
        count = bins[i]
        bar = "#" * math.ceil(40 * count / most)
        lines.append(f"  {first:>6} to {last:<6} {count:>6} {bar}")
    return lines


def _size(num_samples: int | None) -> str:
    return "samples without a known end" if num_samples is None else counted(num_samples, "sample")


def _coloured(text: str, colour: int) -> str:
    if not sys.stdout.isatty():
        return text
    return f"\033[{colour}m{text}\033[0m"

"""Shows what a stage of a config trains on, as the model sees it:

    python -m avlm.data.inspect CONFIG [section.key=value ...] [--stage NAME] [--count N] [--out DIR]

First come N samples, in the order of their packed rows. Text is decoded from the token ids; <image x576> stands for 576
placeholders, and learned text has [brackets], or is green on a terminal. Statistics of the first 16 rows follow: how
full they are, what they hold, what was skipped and why, how long samples are and how fast they come. --out draws a
sheet for each row that has one of the N samples, DIR/row_000.png for the first: up to 64 images as the tower gets them,
and up to 64 windows of audio as log-mel spectrograms.
"""

import argparse
import itertools
import math
import sys
import time
from collections import Counter
from pathlib import Path

from matplotlib.figure import Figure

from avlm.config.run import Config
from avlm.data.loader import open_loader
from avlm.data.stream import Stream
from avlm.data.text.tokenizer import Tokenizer
from avlm.models.batch import KINDS, PLACEHOLDERS, Batch
from avlm.process.exit import run_command
from avlm.weights.model_from import open_config

STATISTICS_ROWS = 16
MAX_PANELS = 64  # images of a sheet, and the same number of audio windows
GREEN, CYAN = 32, 36  # terminal colours
NAMES = {placeholder: modality for modality, placeholder in PLACEHOLDERS.items()}


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
    parser.add_argument("--out", type=Path, help="folder for the sheets (default: none are drawn)")
    options = parser.parse_intermixed_args(arguments)
    run_command(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    if options.count < 0:
        raise ValueError(f"--count is a number of samples, not {options.count}")
    config = open_config(options.config, options.overrides)
    show(config, stage_index(config, options.stage), options.count, options.out)


def stage_index(config: Config, name: str | None) -> int:
    names = [stage.name for stage in config.stages]
    if name is not None and name not in names:
        raise ValueError(f"there is no stage {name!r}: {', '.join(names)}")
    return names.index(name) if name is not None else 0


def show(config: Config, stage: int, count: int, out: Path | None = None) -> None:
    data = config.stages[stage].data
    tokenizer = Tokenizer(data.tokenizer) if data.tokenizer else None
    seed = config.seed + stage
    loader = open_loader(Stream(data.train, data, config.model, rank=0, world=1, seed=seed, train=True))
    batches: list[Batch] = []
    arrived: list[float] = []  # seconds
    num_left = count
    for batch in itertools.islice(loader, STATISTICS_ROWS):
        arrived.append(time.perf_counter())
        num_shown = min(len(batch.keys), num_left)
        for i in range(num_shown):
            print(describe(batch, i, tokenizer), end="\n\n")
        if out is not None and num_left > 0:
            save_sheet(batch, out / f"row_{len(batches):03d}.png")
        num_left -= num_shown
        batches.append(batch)
    print(statistics(batches))
    workers = max(1, data.num_workers)
    if len(batches) > workers:  # a worker's first row waits for its packing buffer
        num_samples = sum(len(batch.keys) for batch in batches[workers:])
        seconds = arrived[-1] - arrived[workers - 1]
        per_second = num_samples / seconds
        print(f"{per_second:,.0f} samples per second from {workers} workers, {per_second / workers:,.0f} each")


def describe(batch: Batch, index: int, tokenizer: Tokenizer | None) -> str:
    """One sample of a row: its key, its length and its tokens."""
    start, length = batch.segments.spans[index]
    positions = range(start, start + length)
    tokens = batch.token_T.tolist()
    learned = {position + 1 for position in batch.target_rows_R.tolist()}  # a target is the token that follows

    def kind(position: int) -> tuple[int, bool]:
        """Learned text, other text and each placeholder are shown separately."""
        return min(tokens[position], 0), position in learned

    text = ""
    for (placeholder, is_learned), run in itertools.groupby(positions, kind):
        ids = [tokens[position] for position in run]
        if placeholder:
            text += _coloured(f"<{NAMES[placeholder]} x{len(ids)}>", CYAN)
            continue
        decoded = tokenizer.decode(ids) if tokenizer else f"{len(ids)} ids"
        text += _coloured(f"[{decoded}]", GREEN) if is_learned else decoded
    num_learned = len(learned.intersection(positions))
    return f"{batch.keys[index]}: {length} tokens, {num_learned} learned\n{text}"


def statistics(batches: list[Batch]) -> str:
    """How full rows are, what they hold and what was skipped."""
    num_tokens = 0
    num_read = 0
    lengths: list[int] = []
    reasons: list[str] = []
    features: Counter[str] = Counter()
    items: Counter[str] = Counter()
    targets: Counter[str] = Counter()
    for batch in batches:
        num_tokens += len(batch.token_T)
        num_read += batch.read
        lengths += [length for _, length in batch.segments.spans[: len(batch.keys)]]
        reasons += [f"  {key}: {reason}" for key, reason in batch.skipped]
        targets.update(KINDS[kind] for kind in batch.kind_R.tolist())
        for modality, media in batch.media.items():
            features[modality] += len(media.rows)
            items[modality] += len(media.values)

    def share(count: int) -> str:
        return f"{100 * count / num_tokens:.1f} %"

    lines = [
        f"{len(batches)} rows of {num_tokens // len(batches)} tokens: fill {share(sum(lengths))}",
        f"samples per row {len(lengths) / len(batches):.1f}",
    ]
    for modality in PLACEHOLDERS:
        filled = share(features[modality])
        lines.append(f"{modality} features {filled} ({items[modality]} items)")
    by_kind = ", ".join(f"{kind} {targets[kind]}" for kind in KINDS if targets[kind])
    lines.append(f"targets {share(targets.total())}: {by_kind}")
    lines.append(f"samples read {num_read}, skipped {len(reasons)}")
    lines += reasons[:10]
    lines.append("tokens of a sample")
    lines += histogram(lengths)
    return "\n".join(lines)


def histogram(lengths: list[int]) -> list[str]:
    """One line for each doubling of the length, with the count of samples in it."""
    bins = Counter(length.bit_length() - 1 for length in lengths)
    if not bins:
        return []
    most = max(bins.values())
    lines = []
    for i in range(min(bins), max(bins) + 1):
        first = 2**i
        last = 2 * first - 1
        count = bins[i]
        bar = "#" * math.ceil(40 * count / most)
        lines.append(f"  {first:>6} to {last:<6} {count:>6} {bar}")
    return lines


def _coloured(text: str, colour: int) -> str:
    if not sys.stdout.isatty():
        return text
    return f"\033[{colour}m{text}\033[0m"


def save_sheet(batch: Batch, path: Path) -> None:
    """One PNG with the images and the log-mel windows of a row."""
    panels = [*batch.image.values[:MAX_PANELS], *batch.audio.values[:MAX_PANELS]]
    if not panels:
        return
    columns = min(8, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(2 * columns, 2 * lines))
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, number)
        axes.set_axis_off()
        if panel.ndim == 3:
            axes.imshow(panel.permute(1, 2, 0).numpy())
        else:
            axes.imshow(panel.numpy(), origin="lower", aspect="auto")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

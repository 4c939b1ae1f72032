"""Shows what a stage of a config trains on, as the model sees it:

    python -m avlm.data.inspect CONFIG [section.key=value ...] [--stage NAME] [--count N] [--out DIR]

First N samples, in the order of their packed rows. Text is decoded from the token ids; <image x576> stands for 576
placeholders, [brackets], green on a terminal, for what is learned. Then of the first 16 rows: how full they are, what
they hold, what was skipped and why, how long samples are and how fast they come. --out draws a sheet for each row that
has one of the N samples, DIR/row_000.png for the first: up to 64 images as the tower gets them, and up to 64 windows
of sound as log-mel spectrograms.
"""

import argparse
import itertools
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from matplotlib.figure import Figure

from avlm.config.load import load_config
from avlm.config.model import ModelConfig
from avlm.config.run import Config
from avlm.data.loader import open_loader
from avlm.data.text.tokenizer import Tokenizer
from avlm.models.batch import KINDS, PLACEHOLDERS, Batch
from avlm.models.log_mel import at_tower
from avlm.process.exit import run_command

STATISTICS_ROWS = 16
MAX_PICTURES = 64  # of a sheet, and as many windows of sound
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
    config = load_config(options.config, options.overrides)
    show(config, stage_index(config, options.stage), options.count, options.out)


def stage_index(config: Config, name: str | None) -> int:
    names = [stage.name for stage in config.stages]
    if name is not None and name not in names:
        raise ValueError(f"there is no stage {name!r}: {', '.join(names)}")
    return names.index(name) if name is not None else 0


def show(config: Config, stage: int, count: int, out: Path | None = None) -> None:
    data = config.stages[stage].data
    tokenizer = Tokenizer(data.tokenizer) if data.tokenizer else None
    loader = open_loader(data.train, data, config.model, rank=0, world=1, seed=config.seed + stage, train=True)
    batches: list[Batch] = []
    left, begun = count, []
    for batch in itertools.islice(loader, STATISTICS_ROWS):
        begun.append(time.perf_counter())
        for i in range(min(len(batch.keys), left)):
            print(describe(batch, i, tokenizer), end="\n\n")
        if out is not None and left > 0:
            save_sheet(batch, config.model, out / f"row_{len(batches):03d}.png")
        left -= min(len(batch.keys), left)
        batches.append(batch)
    print(statistics(batches))
    workers = max(1, data.num_workers)
    if len(batches) > workers:  # a worker's first row waits for its packing buffer
        samples = sum(len(batch.keys) for batch in batches[workers:])
        per_second = samples / (begun[-1] - begun[workers - 1])
        print(f"{per_second:,.0f} samples per second from {workers} workers, {per_second / workers:,.0f} each")


def describe(batch: Batch, index: int, tokenizer: Tokenizer | None) -> str:
    """One sample of a row: its key, what it holds, and its tokens."""
    start, length = batch.segments.spans[index]
    token_ids = batch.token_T[start : start + length].tolist()
    learned = set((batch.target_rows_R + 1).tolist())  # the target at row t is the token at row t + 1
    text = ""
    runs = itertools.groupby(range(length), key=lambda i: (min(token_ids[i], 0), start + i in learned))
    for (placeholder, is_learned), rows in runs:
        ids = [token_ids[i] for i in rows]
        if placeholder:
            text += _coloured(f"<{NAMES[placeholder]} x{len(ids)}>", CYAN)
        else:
            decoded = tokenizer.decode(ids) if tokenizer else f"{len(ids)} ids"
            text += _coloured(f"[{decoded}]", GREEN) if is_learned else decoded
    num_learned = sum(start <= row - 1 < start + length for row in learned)
    return f"{batch.keys[index]}: {length} tokens, {num_learned} learned\n{text}"


def statistics(batches: list[Batch]) -> str:
    """How full rows are, what they hold, what was skipped."""
    tokens = sum(len(batch.token_T) for batch in batches)
    lengths: list[int] = []
    reasons: list[str] = []
    for batch in batches:
        lengths += [length for _, length in batch.segments.spans[: len(batch.keys)]]
        reasons += [f"  {key}: {reason}" for key, reason in batch.skipped]

    def share(count: int) -> str:
        return f"{100 * count / tokens:.1f} %"

    lines = [
        f"{len(batches)} rows of {tokens // len(batches)} tokens: fill {share(sum(lengths))}",
        f"samples per row {len(lengths) / len(batches):.1f}",
    ]
    for modality in PLACEHOLDERS:
        features = sum(len(batch.media[modality].rows) for batch in batches)
        items = sum(len(batch.media[modality].values) for batch in batches)
        lines.append(f"{modality} features {share(features)} ({items} items)")
    kind_R = torch.cat([batch.kind_R for batch in batches])
    counts = zip(KINDS, kind_R.bincount(minlength=len(KINDS)).tolist())
    by_kind = ", ".join(f"{kind} {count}" for kind, count in counts if count)
    lines.append(f"targets {share(len(kind_R))}: {by_kind}")
    lines.append(f"samples read {sum(batch.read for batch in batches)}, skipped {len(reasons)}")
    return "\n".join([*lines, *reasons[:10], "tokens of a sample", *histogram(lengths)])


def histogram(lengths: list[int]) -> list[str]:
    """One line for each doubling of the length, with the count of samples in it."""
    bins = Counter(length.bit_length() - 1 for length in lengths)
    if not bins:
        return []
    most = max(bins.values())
    return [
        f"  {2**i:>6} to {2 ** (i + 1) - 1:<6} {bins[i]:>6} {'#' * -(-40 * bins[i] // most)}"
        for i in range(min(bins), max(bins) + 1)
    ]


def _coloured(text: str, colour: int) -> str:
    return f"\033[{colour}m{text}\033[0m" if sys.stdout.isatty() else text


def save_sheet(batch: Batch, model: ModelConfig, path: Path) -> None:
    """One PNG with the pictures and the mel windows of a row."""
    panels = list(batch.image.values[:MAX_PICTURES])
    if model.audio:
        panels += at_tower(batch.audio.values[:MAX_PICTURES], model.audio)
    if not panels:
        return
    columns = min(8, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(2 * columns, 2 * lines))
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, panel in zip(grid.flat, panels):
        if panel.ndim == 3:
            axes.imshow(panel.permute(1, 2, 0).numpy())
        else:
            axes.imshow(panel.numpy(), origin="lower", aspect="auto")
    for axes in figure.axes:
        axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

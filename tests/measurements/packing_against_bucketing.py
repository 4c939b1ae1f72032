"""What padding costs: packed rows against batches of clips of similar length (duration bucketing, as SALM trains).

    python tests/measurements/packing_against_bucketing.py

20,000 clips of speech, a third each of commands (about 1 s), utterances (about 4 s) and read sentences (10 to 17 s),
in a random order; a clip gives 12.5 features a second and 3 words a second as text, beside a prompt of 20 tokens.
Bucketing: buckets of equal counts, batches of one bucket filled up to 8,192 tokens with every sample as long as the
longest, every bucket read in the order of arrival. Packing: rows of 8,192 from a buffer of 200 samples, of which the
last row is packed again. Printed: the share of tokens that are padding.
"""

import random
import sys
from bisect import bisect_left
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from avlm.data.packing import select

CLIPS, ROW, BUFFER = 20_000, 8192, 200


def main() -> None:
    lengths = make_lengths(random.Random(0))
    print(f"{len(lengths)} clips of {min(lengths)} to {max(lengths)} tokens, rows or batches of {ROW}")
    for buckets in (1, 5, 30, 100):
        print(f"bucketing, {buckets:3} buckets   {padding(bucketed(lengths, buckets)):6.2%}")
    for method in ("first_fit", "knapsack"):
        rows = packed(lengths, method)
        assert sum(map(len, rows)) == len(lengths)
        print(f"packing, {method:9}      {1 - sum(map(sum, rows)) / (ROW * len(rows)):6.2%}")


def make_lengths(draw: random.Random) -> list[int]:
    durations = (
        lambda: draw.lognormvariate(0.0, 0.4),
        lambda: draw.lognormvariate(1.4, 0.4),
        lambda: draw.uniform(10.0, 17.0),
    )
    seconds = [min(30.0, durations[i % 3]()) for i in range(CLIPS)]
    draw.shuffle(seconds)
    return [20 + round(12.5 * s) + round(3 * s) for s in seconds]


def bucketed(lengths: list[int], count: int) -> list[list[int]]:
    """Batches of each bucket: as many samples as fit when all are as long as the longest."""
    edges = [sorted(lengths)[len(lengths) * i // count] for i in range(1, count)]
    waiting: list[list[int]] = [[] for _ in range(count)]
    batches = []
    for length in lengths:
        batch = waiting[bisect_left(edges, length)]
        if max([length, *batch]) * (len(batch) + 1) > ROW:
            batches.append(list(batch))
            batch.clear()
        batch.append(length)
    return batches + [batch for batch in waiting if batch]


def padding(batches: list[list[int]]) -> float:
    return 1 - sum(map(sum, batches)) / sum(max(batch) * len(batch) for batch in batches)


def packed(lengths: list[int], method: str) -> list[list[int]]:
    """Rows as the loaders make them: what the last of a buffer holds goes before the samples that follow."""
    rows, buffer, read = [], [], 0
    while read < len(lengths):
        new = lengths[read : read + BUFFER - len(buffer)]
        read += len(new)
        buffer += new
        *full, buffer = ([buffer[i] for i in row] for row in select(buffer, ROW, method))
        rows += full
    return [*rows, buffer]


if __name__ == "__main__":
    main()

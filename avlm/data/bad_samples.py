"""Samples that cannot be used: found before a run, and named by their reasons."""

import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from avlm.config.run import shares
from avlm.config.values import counted
from avlm.data.captions import Encoder, encoder_of
from avlm.data.rows import encoded, open_samples_of
from avlm.data.stream import Stream

LOOKED_AT = 100  # samples of each source
SECONDS = 2.0  # for all sources of a stage
NAMED = 3  # samples of each reason
# What differs between samples that are bad for the same reason: numbers, names and paths.
DETAIL = re.compile(r"'[^']*'|\S*/\S*|\d[\d,.]*")

Bad = Sequence[tuple[str, str]]  # (key, reason) of each


@dataclass(frozen=True)
class Look:
    """What was found by encoding samples of a source, in the order in which training reads them."""

    source: str
    bad: Bad
    looked_at: int
    num_samples: int | None  # of the whole source; None: unknown, as it streams
    lengths: Sequence[int] = ()  # tokens of each sample that is not bad

    def lines(self) -> list[str]:
        """One for each reason."""
        whole = counted(self.looked_at, "sample")
        if self.num_samples is None:
            whole += " looked at"
        elif self.looked_at < self.num_samples:
            whole += f" looked at (of {self.num_samples:,})"
        groups = by_reason(self.bad)
        return [f"{self.source}: {len(keys)} of {whole}: {reason} ({_some(keys)})" for reason, keys in groups]


def look(stream: Stream) -> list[Look]:
    """Encode the first samples of each source of a training stream."""
    data = replace(stream.data, num_workers=0, shuffle_buffer=1)  # a shuffle buffer would be filled first
    stream = replace(stream, data=data, rank=0, world=1)
    encoder = encoder_of(stream)
    sources = shares(stream.source)
    return [_look(source, stream, encoder, SECONDS / len(sources)) for source in sources]


def _look(source: str, stream: Stream, encoder: Encoder, seconds: float) -> Look:
    samples = open_samples_of(source, stream)
    samples.start(0, {"drawn": 0})
    bad, lengths = [], []
    ends = time.monotonic() + seconds
    most = min(LOOKED_AT, samples.num_samples or LOOKED_AT)
    while samples.drawn < most and time.monotonic() < ends:
        drawn = samples.draw()
        try:
            lengths.append(encoded(drawn, encoder).room)
        except ValueError as error:
            bad.append((drawn.key, str(error)))
    return Look(source, bad, samples.drawn, samples.num_samples, lengths)


def by_reason(bad: Bad) -> list[tuple[str, list[str]]]:
    """(reason, keys) of samples that are bad in the same way, most first. The reason is that of the first of them."""
    reasons: dict[str, str] = {}
    keys: defaultdict[str, list[str]] = defaultdict(list)
    for key, reason in bad:
        kind = DETAIL.sub("#", reason)
        reasons.setdefault(kind, reason.removeprefix("sample "))
        keys[kind].append(key)
    return sorted(((reasons[kind], keys[kind]) for kind in keys), key=lambda group: -len(group[1]))


def _some(keys: list[str]) -> str:
    left = len(keys) - NAMED
    named = ", ".join(keys[:NAMED])
    return f"{named} and {left} more" if left > 0 else named

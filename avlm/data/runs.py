"""Runs of features in a sample, and how they stand among the pieces of its text."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from torch import Tensor

from avlm.data.features import Group
from avlm.data.text.pieces import Piece


@dataclass(frozen=True)
class Run:
    """Placeholders of one modality that follow each other.

    tokens     their ids
    items      that begin here
    groups     of these items, where features are not those of each item on its own
    markers    around them, "" for none: text in which control tokens are read
    offsets    their positions, for M-RoPE; None: those of text
    continues  they begin where the run before began
    abreast    the tokens of its markers share a position, before and after
    """

    modality: str
    tokens: list[int]
    items: list[Tensor] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    markers: tuple[str, str] = ("", "")
    offsets: Tensor | None = None
    continues: bool = False
    abreast: bool = False


def holding(items: list[Tensor], runs: list[Run]) -> list[Run]:
    """Items come with the first of the runs of their features."""
    return [replace(runs[0], items=items), *runs[1:]]


def within(runs: list[Run], before: str, after: str) -> list[Run]:
    """Runs with more markers around all of them."""
    first = runs[0]
    runs = [replace(first, markers=(before + first.markers[0], first.markers[1])), *runs[1:]]
    last = runs[-1]
    return [*runs[:-1], replace(last, markers=(last.markers[0], last.markers[1] + after))]


def lay_out(run: Run, pieces: list[Piece], control_tokens: Collection[str]) -> None:
    """Add a run after other pieces. Text before it is tokenised together with the text before that; text after it
    stands as a piece of its own, for text that follows."""
    text, first_markup, last_markup, after = around(run, control_tokens)
    last = pieces[-1] if pieces else None
    if text and last is not None and last.kind in ("text", "markup") and not last.learned:
        pieces[-1] = replace(last, text=last.text + text)
        text = ""
    around_it = [("text", text), ("markup", first_markup), (run.modality, f"<{run.modality}>")]
    around_it += [("markup", last_markup), ("text", after)]
    pieces += [Piece(kind, text) for kind, text in around_it if text]


def around(run: Run, control_tokens: Collection[str]) -> tuple[str, str, str, str]:
    """Text, markup from the first control token on, markup up to the last control token and text: the first two of
    the marker before a run, the others of that after it."""
    before, after = run.markers
    start = min((before.find(token) for token in control_tokens if token in before), default=len(before))
    end = max((after.rfind(token) + len(token) for token in control_tokens if token in after), default=0)
    return before[:start], before[start:], after[:end], after[end:]

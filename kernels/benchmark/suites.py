"""The suites that can be run, by name."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kernels.benchmark import attention, attention_providers, attention_shapes, cross_entropy, elementwise, projector

Shapes = Callable[[], Iterable[Any]]


@dataclass(frozen=True)
class Suite:
    """``run(shapes, modes, session)`` yields the rows of one shape and direction after the other. Shapes have ``x``,
    what a plot has on its axis."""

    run: Callable[..., Iterator[list[dict]]]
    shape: type
    sets: Mapping[str, Shapes]  # the first one is the default
    providers: tuple[str, ...]


SUITES = {
    "attention": Suite(
        attention.run,
        attention_shapes.Shape,
        attention_shapes.SHAPES,
        tuple({**attention_providers.PROVIDERS, **attention_providers.DECODE_PROVIDERS}),
    ),
    "projector": Suite(projector.run, projector.Shape, projector.SHAPES, tuple(projector.PROVIDERS)),
    "cross_entropy": Suite(
        cross_entropy.run, cross_entropy.Shape, cross_entropy.SHAPES, tuple(cross_entropy.PROVIDERS)
    ),
    "elementwise": Suite(elementwise.run, elementwise.Shape, elementwise.SHAPES, tuple(elementwise.PROVIDERS)),
}

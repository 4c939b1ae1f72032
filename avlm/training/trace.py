"""Reads a trace of ``debug.profile``: the time of each part of the model, forward and backward.

The profiler records operations, and which of them lie inside others. A part's forward is what lies inside its mark,
without the parts inside it. Its backward is found by the number that autograd gives to an operation and to its
gradient. Where a gradient has none, as of functions of our own, it is that of the last operation with its name. A GPU's
kernels belong to the part that launched them.
"""

import gzip
import json
import re
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from avlm.training.profiler import PART, STEP

BACKWARD = "autograd::engine::evaluate_function: "
OPTIMIZER = "Optimizer.step#"
FSDP = "FSDP::"
OTHER = "everything else"


class Place(NamedTuple):
    """What a moment of a thread belongs to: a part of the model, and "forward" or "backward"."""

    part: str
    direction: str


class Times(NamedTuple):
    """Microseconds by place, over all steps of a trace: of the host, and of kernels."""

    host: dict[Place, float]
    device: dict[Place, float]
    total: float
    num_steps: int


def read(path: Path) -> Times:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
        spans = [event for event in events if event.get("ph") == "X" and "dur" in event]
        steps = [span for span in spans if span["name"].startswith(STEP) and span["cat"] == "user_annotation"]
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error!r:.100}): if the run was killed as it wrote it, remove it"
        ) from None
    if not steps:
        raise ValueError(f"{path} has no steps: it is no trace of debug.profile")
    on_host = [
        span for span in spans if span.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
    ]
    host, launched_at = _walk(on_host)
    device: dict[Place, float] = defaultdict(float)
    for span in spans:
        if span.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            place = launched_at.get(span["args"].get("correlation"), Place(OTHER, "forward"))
            device[place] += span["dur"]
    return Times(host, device, sum(step["dur"] for step in steps), len(steps))


def _walk(spans: list[dict[str, Any]]) -> tuple[dict[Place, float], dict[int, Place]]:
    """The host's time by place, and the place of each launch by its correlation number."""
    times: dict[Place, float] = defaultdict(float)
    launched_at = {}
    places_by_number: dict[int, Place] = {}
    places_by_name: dict[str, list[Place]] = defaultdict(list)
    open_spans: dict[Any, list[tuple[float, Place]]] = defaultdict(list)  # of each thread: (end, place), innermost last
    last = Place(OTHER, "backward")
    for span in sorted(spans, key=lambda span: (span["ts"], -span["dur"])):
        around = open_spans[span["tid"]]
        while around and around[-1][0] <= span["ts"]:
            around.pop()
        outer = around[-1][1] if around else None
        name, arguments = span["name"], span.get("args", {})
        number = arguments.get("Sequence number")
        place = outer
        if name.startswith(PART):
            place = Place(_of_all_layers(name.removeprefix(PART)), "forward")
        elif name.startswith(FSDP):
            place = Place("FSDP", outer.direction if outer else "backward")
        elif name.startswith(OPTIMIZER):
            place = Place("optimizer", "forward")
        elif name.startswith(STEP):
            place = Place(OTHER, "forward")
        elif name.startswith(BACKWARD):
            same_name = places_by_name[name.removeprefix(BACKWARD).removesuffix("Backward")]
            forward = same_name.pop() if same_name else last
            last = places_by_number.get(number, forward)._replace(direction="backward")
            place = last
        elif outer is not None and span["cat"] == "cpu_op":
            places_by_name[name].append(outer)
            if number is not None:
                places_by_number[number] = outer
        if place is None:
            continue
        if place != outer:
            times[place] += span["dur"]
            if outer is not None:
                times[outer] -= span["dur"]
        around.append((span["ts"] + span["dur"], place))
        if "correlation" in arguments:
            launched_at[arguments["correlation"]] = place
    return times, launched_at


def _of_all_layers(part: str) -> str:
    return re.sub(r"\.blocks\.\d+$", ".blocks", part)


def table(path: Path) -> str:
    """The parts of a trace, the longest first, in milliseconds of a step."""
    times = read(path)
    per_step = 1 / 1000 / times.num_steps
    measured = {"host": times.host} | ({"GPU": times.device} if times.device else {})
    head = "".join(f"{device + ' forward':>14}{device + ' backward':>15}" for device in measured)
    lines = [f"{path.name}: {times.num_steps} steps of {times.total * per_step:.1f} ms", f"{'':<24}{head}   share"]
    parts = {place.part for by_place in measured.values() for place in by_place}
    clock = times.device or times.host  # a GPU's time is what a step takes, the host's runs beside it

    def of_both(part: str) -> float:
        return sum(clock.get(Place(part, direction), 0.0) for direction in ("forward", "backward"))

    whole = sum(clock.values())
    for part in sorted(parts, key=of_both, reverse=True):
        cells = ""
        for by_place in measured.values():
            forward, backward = (by_place.get(Place(part, each), 0.0) * per_step for each in ("forward", "backward"))
            cells += f"{forward:14.2f}{backward:15.2f}"
        lines.append(f"{part:<24}{cells}{of_both(part) / whole:8.1%}")
    return "\n".join(lines)

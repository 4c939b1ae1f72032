"""How near each family comes to the class of transformers that it is compared with. ``make families`` runs the tests
that compare and prints the table of docs/families.md; each of them notes what it found.

    python -m tests.families.measured
"""

import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

from avlm.families.door import (
    EXPERT,
    FORMATS,
    TOWER_FORMATS,
    full_name,
    is_channel_major,
    is_transposed,
    of_all_experts,
)
from avlm.models.avlm import AVLM
from tests.models.handmade import assert_gradients_close

TESTS = ("families", "models/test_avlm.py", "models/test_decoder.py", "weights/test_export.py", "weights/test_peft.py")
NOTES = "AVLM_MEASURED"  # the file that tests write to, if it is set
TOLERANCE = 2e-5  # of numbers of about 1
# The second word of a note -> its column.
COLUMNS = {
    **dict.fromkeys(("features", "tower", "deepstack", "log-mel"), "features"),
    "logits": "logits",
    "gradients": "gradients",
    "answers": "answers",
    "prompts": "prompts",
    **dict.fromkeys(("export", "whole"), "export"),
    "adapters": "adapters",
}
HEADER = ["format", "class of transformers", *dict.fromkeys(COLUMNS.values())]


def close(ours: Tensor, theirs: Tensor, name: str) -> None:
    """``name``: the format and what is compared."""
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max().item()
    note(name, error)
    assert error <= TOLERANCE, f"{name}: {error:.2e} of {theirs.abs().max():.2f}"


def gradients_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], format: str) -> None:
    """By the rule of docs/contracts.md."""
    note(f"{format} gradients", assert_gradients_close(ours, theirs))


def all_gradients_close(ours: AVLM, theirs: nn.Module, format: str) -> None:
    """Of every parameter, by the names of ``theirs``; sinusoids and embeddings that nobody reads have none there."""
    family = FORMATS[format]
    parts = defaultdict(list)
    for name, parameter in ours.named_parameters():
        module, _, rest = name.partition(".")
        prefix = "" if name == "decoder.head.weight" else family.LOADED[module]
        gradient = parameter.grad
        if is_channel_major(family, name):
            width, inputs = gradient.shape
            gradient = gradient.unflatten(1, (inputs // width, width)).mT.flatten(1)
        if is_transposed(family, name):
            gradient = gradient.mT
        theirs_name = full_name(family, module, rest, prefix)
        parts[of_all_experts(theirs_name) if EXPERT in theirs_name else theirs_name].append(gradient)
    found = {name: torch.cat(rows, 1 if ".experts." in name else 0) for name, rows in parts.items()}
    gradients_close(found, {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}, format)


def note(name: str, error: float | None = None) -> None:
    """``error``: the largest; None if what is compared is equal, such as ids."""
    format, what, *_ = name.split()
    assert (format in FORMATS or format in TOWER_FORMATS) and what in COLUMNS, name
    path = os.environ.get(NOTES)
    if path:
        with open(path, "a") as file:
            file.write(f"{name}|{'' if error is None else error}\n")


def table(notes: list[str]) -> list[str]:
    """Lines of Markdown: a row for each format."""
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for line in notes:
        name, _, error = line.partition("|")
        format, what, *_ = name.split()
        errors[format, COLUMNS[what]].append(float(error or 0))
    rows = [HEADER, ["---"] * len(HEADER)]
    for format, family in {**FORMATS, **TOWER_FORMATS}.items():
        cells = [_cell(errors[format, column]) for column in HEADER[2:]]
        rows.append([f"`{format}`", f"`{family.CLASS}`" if family.CLASS else "none", *cells])
    return [f"| {' | '.join(row)} |" for row in rows]


def _cell(errors: list[float]) -> str:
    if not errors:
        return ""
    return f"{max(errors):.0e}" if max(errors) else "equal"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes"
        tests = [str(Path(__file__).parent.parent / test) for test in TESTS]
        command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-m", "not slow", *tests]
        ended = subprocess.run(command, env={**os.environ, NOTES: str(notes), "OMP_NUM_THREADS": "1"})
        print("\n".join(table(notes.read_text().splitlines())))
    sys.exit(ended.returncode)


if __name__ == "__main__":
    main()
